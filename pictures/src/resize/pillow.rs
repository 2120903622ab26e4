//! Pillow's antialiased filters.

use std::borrow::Cow;

use crate::Pixels;

/// A filter and how far it reaches, in pixels of the smaller picture.
pub(super) type Filter = (fn(f64) -> f64, f64);

pub(super) const LANCZOS: Filter = (lanczos, 3.0);
pub(super) const BICUBIC: Filter = (bicubic, 2.0);
pub(super) const BOX: Filter = (box_filter, 0.5);

fn lanczos(x: f64) -> f64 {
    let sinc = |x: f64| {
        let x = x * std::f64::consts::PI;
        if x == 0.0 { 1.0 } else { x.sin() / x }
    };
    if (-3.0..3.0).contains(&x) { sinc(x) * sinc(x / 3.0) } else { 0.0 }
}

fn bicubic(x: f64) -> f64 {
    const A: f64 = -0.5;
    let x = x.abs();
    if x < 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * A
    } else {
        0.0
    }
}

fn box_filter(x: f64) -> f64 {
    if x > -0.5 && x <= 0.5 { 1.0 } else { 0.0 }
}

/// Bits after the point of Pillow's weights.
const PILLOW_BITS: u32 = 22;

/// Columns first, then rows, eight bits in between. RGBA is filtered with premultiplied alpha.
pub(super) fn antialiased(source: &Pixels, width: usize, height: usize, filter: Filter) -> Pixels {
    let mut picture = Cow::Borrowed(source);
    if picture.channels == 4 {
        picture.to_mut().data.chunks_exact_mut(4).for_each(premultiply);
    }
    if picture.width != width {
        let windows = pillow_taps(picture.width, width, filter);
        picture = Cow::Owned(match picture.channels {
            4 => filter_columns::<4>(&picture, width, &windows),
            _ => filter_columns::<3>(&picture, width, &windows),
        });
    }
    if picture.height != height {
        let windows = pillow_taps(picture.height, height, filter);
        picture = Cow::Owned(filter_rows(&picture, height, &windows));
    }
    let mut picture = picture.into_owned();
    if picture.channels == 4 {
        picture.data.chunks_exact_mut(4).for_each(unpremultiply);
    }
    picture
}

/// The first source index and the weights of each output position.
type Window = (usize, Vec<i32>);

fn pillow_taps(source: usize, out: usize, (filter, support): Filter) -> Vec<Window> {
    let scale = source as f64 / out as f64;
    let filter_scale = scale.max(1.0);
    let support = support * filter_scale;
    (0..out)
        .map(|index| {
            let center = (index as f64 + 0.5) * scale;
            let first = (center - support + 0.5).max(0.0) as usize;
            let end = ((center + support + 0.5) as usize).min(source);
            let weight = |at: usize| filter((at as f64 - center + 0.5) / filter_scale);
            let weights: Vec<f64> = (first..end).map(weight).collect();
            let sum: f64 = weights.iter().sum();
            let fixed = |weight: &f64| {
                let weight = if sum == 0.0 { *weight } else { weight / sum };
                (weight * f64::from(1 << PILLOW_BITS)).round() as i32
            };
            (first, weights.iter().map(fixed).collect())
        })
        .collect()
}

/// The weights of a window add up to 1 and none exceeds 1.3, so sums stay below 2^31, as Pillow
/// relies on too.
fn to_eight_bits(sum: i32) -> u8 {
    ((sum + (1 << (PILLOW_BITS - 1))) >> PILLOW_BITS).clamp(0, 255) as u8
}

fn filter_columns<const C: usize>(source: &Pixels, width: usize, windows: &[Window]) -> Pixels {
    let mut data = Vec::with_capacity(width * source.height * C);
    for row in source.data.chunks_exact(source.width * C) {
        for (first, weights) in windows {
            let mut sums = [0i32; C];
            for (pixel, weight) in row[first * C..].chunks_exact(C).zip(weights) {
                for channel in 0..C {
                    sums[channel] += i32::from(pixel[channel]) * weight;
                }
            }
            data.extend(sums.map(to_eight_bits));
        }
    }
    Pixels { width, height: source.height, channels: C, data }
}

fn filter_rows(source: &Pixels, height: usize, windows: &[Window]) -> Pixels {
    let row = source.width * source.channels;
    let mut data = Vec::with_capacity(row * height);
    let mut sums = vec![0i32; row];
    for (first, weights) in windows {
        sums.fill(0);
        for (line, weight) in source.data[first * row..].chunks_exact(row).zip(weights) {
            for (sum, value) in sums.iter_mut().zip(line) {
                *sum += i32::from(*value) * weight;
            }
        }
        data.extend(sums.iter().map(|sum| to_eight_bits(*sum)));
    }
    Pixels { width: source.width, height, channels: source.channels, data }
}

fn premultiply(pixel: &mut [u8]) {
    let alpha = u32::from(pixel[3]);
    for value in &mut pixel[..3] {
        let product = u32::from(*value) * alpha + 128;
        *value = (((product >> 8) + product) >> 8) as u8;
    }
}

fn unpremultiply(pixel: &mut [u8]) {
    let alpha = u32::from(pixel[3]);
    if alpha != 0 && alpha != 255 {
        for value in &mut pixel[..3] {
            *value = (255 * u32::from(*value) / alpha).min(255) as u8;
        }
    }
}
