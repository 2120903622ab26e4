//! Resizing with the arithmetic of the libraries that the reference uses, so that the same picture
//! gives the same training data: OpenCV for area, bilinear, bicubic and nearest, Pillow for Lanczos
//! and box (columns first, as Pillow up to 11 does; later ones may take the rows first). All work on eight-bit channels.
//!
//! Golden pictures of both libraries hold each filter in the tests.

use crate::{Interpolation, Pixels};

/// Resizes to `width` x `height`; without `interpolation` by area when neither side grows and by
/// Lanczos otherwise. Both sides must be at least 1.
pub fn resize(
    source: Pixels,
    width: usize,
    height: usize,
    interpolation: Option<Interpolation>,
) -> Pixels {
    if (source.width, source.height) == (width, height) {
        return source;
    }
    let shrinks = source.width >= width && source.height >= height;
    let default = if shrinks { Interpolation::Area } else { Interpolation::Lanczos };
    match interpolation.unwrap_or(default) {
        Interpolation::Area if shrinks => area(&source, width, height),
        Interpolation::Area => {
            fixed_point(&source, width, height, area_growing_taps, Rounding::Linear)
        }
        Interpolation::Bilinear => {
            fixed_point(&source, width, height, linear_taps, Rounding::Linear)
        }
        Interpolation::Bicubic => fixed_point(&source, width, height, cubic_taps, Rounding::Exact),
        Interpolation::Nearest => nearest(&source, width, height),
        Interpolation::Lanczos => antialiased(source, width, height, lanczos, 3.0),
        Interpolation::Box => antialiased(source, width, height, box_filter, 0.5),
    }
}

/// One source index and its weight.
type Tap<W> = (usize, W);

/// The taps of each output position.
type Taps<W> = Vec<Vec<Tap<W>>>;

/// OpenCV's INTER_AREA where no side grows: every output pixel is the mean of the area it covers.
fn area(source: &Pixels, width: usize, height: usize) -> Pixels {
    if source.width.is_multiple_of(width) && source.height.is_multiple_of(height) {
        return area_of_whole_pixels(source, width, height);
    }
    if source.channels == 4 {
        area_of_parts::<4>(source, width, height)
    } else {
        area_of_parts::<3>(source, width, height)
    }
}

/// The general case, for `C` channels: each source row is shrunk, then rows are added up.
fn area_of_parts<const C: usize>(source: &Pixels, width: usize, height: usize) -> Pixels {
    let columns = area_taps(source.width, width);
    let rows = area_taps(source.height, height);
    let mut data = Vec::with_capacity(width * height * C);
    let mut sums = vec![[0f32; C]; width];
    for row_taps in &rows {
        sums.fill([0.0; C]);
        for &(y, row_weight) in row_taps {
            let row = &source.data[y * source.width * C..(y + 1) * source.width * C];
            for (sum, taps) in sums.iter_mut().zip(&columns) {
                let mut line = [0f32; C];
                let first = taps.first().map_or(0, |tap| tap.0);
                for (pixel, (_, weight)) in row[first * C..].chunks_exact(C).zip(taps) {
                    for channel in 0..C {
                        line[channel] += f32::from(pixel[channel]) * weight;
                    }
                }
                for channel in 0..C {
                    sum[channel] += row_weight * line[channel];
                }
            }
        }
        data.extend(sums.as_flattened().iter().map(|value| value.round_ties_even() as u8));
    }
    Pixels { width, height, channels: C, data }
}

/// The case of whole ratios, which OpenCV sums in integers.
fn area_of_whole_pixels(source: &Pixels, width: usize, height: usize) -> Pixels {
    let channels = source.channels;
    let (step_x, step_y) = (source.width / width, source.height / height);
    let scale = 1.0 / (step_x * step_y) as f32;
    let mut data = Vec::with_capacity(width * height * channels);
    for y in 0..height {
        for x in 0..width {
            for channel in 0..channels {
                let mut sum = 0u32;
                for row in y * step_y..(y + 1) * step_y {
                    let start = (row * source.width + x * step_x) * channels + channel;
                    let values = source.data[start..].iter().step_by(channels);
                    sum += values.take(step_x).map(|value| u32::from(*value)).sum::<u32>();
                }
                data.push(if (step_x, step_y) == (2, 2) {
                    ((sum + 2) >> 2) as u8
                } else {
                    (sum as f32 * scale).round_ties_even() as u8
                });
            }
        }
    }
    Pixels { width, height, channels, data }
}

fn area_taps(source: usize, out: usize) -> Taps<f32> {
    let scale = 1.0 / (out as f64 / source as f64);
    let last = source - 1;
    (0..out)
        .map(|index| {
            let start = index as f64 * scale;
            let end = start + scale;
            let cell = scale.min(source as f64 - start);
            let last_whole = (end.floor() as usize).min(last);
            let first_whole = (start.ceil() as usize).min(last_whole);
            let mut taps = Vec::with_capacity(last_whole - first_whole + 2);
            if first_whole as f64 - start > 1e-3 {
                taps.push((first_whole - 1, ((first_whole as f64 - start) / cell) as f32));
            }
            taps.extend((first_whole..last_whole).map(|at| (at, (1.0 / cell) as f32)));
            let rest = end - last_whole as f64;
            if rest > 1e-3 {
                taps.push((last_whole, (rest.min(1.0).min(cell) / cell) as f32));
            }
            taps
        })
        .collect()
}

/// Fixed-point weights of OpenCV's filters without antialiasing: 11 bits.
const WEIGHT_ONE: f32 = 2048.0;

fn fixed_weight(weight: f32) -> i32 {
    (weight * WEIGHT_ONE).round_ties_even() as i32
}

fn pair(source: usize, at: i64, part: f32) -> Vec<Tap<i32>> {
    let last = source as i64 - 1;
    let (at, part) = if at < 0 { (0, 0.0) } else { (at, part) };
    let (at, part) = if at >= last { (last, 0.0) } else { (at, part) };
    let next = (at + 1).min(last);
    vec![(at as usize, fixed_weight(1.0 - part)), (next as usize, fixed_weight(part))]
}

fn linear_taps(source: usize, out: usize) -> Taps<i32> {
    let scale = 1.0 / (out as f64 / source as f64);
    (0..out)
        .map(|index| {
            let position = ((index as f64 + 0.5) * scale - 0.5) as f32;
            pair(source, position.floor() as i64, position - position.floor())
        })
        .collect()
}

/// OpenCV's INTER_AREA where a side grows: bilinear between the edges of the source pixels.
fn area_growing_taps(source: usize, out: usize) -> Taps<i32> {
    let inverse = out as f64 / source as f64;
    let scale = 1.0 / inverse;
    (0..out)
        .map(|index| {
            let at = (index as f64 * scale).floor();
            let part = ((index as f64 + 1.0) - (at + 1.0) * inverse) as f32;
            let part = if part <= 0.0 { 0.0 } else { part - part.floor() };
            pair(source, at as i64, part)
        })
        .collect()
}

fn cubic_taps(source: usize, out: usize) -> Taps<i32> {
    const A: f32 = -0.75;
    let scale = 1.0 / (out as f64 / source as f64);
    let last = source as i64 - 1;
    (0..out)
        .map(|index| {
            let position = ((index as f64 + 0.5) * scale - 0.5) as f32;
            let at = position.floor();
            let x = position - at;
            let outer = |x: f32| ((A * x - 5.0 * A) * x + 8.0 * A) * x - 4.0 * A;
            let inner = |x: f32| ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0;
            let first = [outer(x + 1.0), inner(x), inner(1.0 - x)];
            let weights = [first[0], first[1], first[2], 1.0 - first[0] - first[1] - first[2]];
            let place = |k: usize| (at as i64 - 1 + k as i64).clamp(0, last) as usize;
            (0..4).map(|k| (place(k), fixed_weight(weights[k]))).collect()
        })
        .collect()
}

/// How the sum over rows goes back to eight bits.
#[derive(Clone, Copy, PartialEq)]
enum Rounding {
    /// OpenCV's two-tap filter drops bits on the way.
    Linear,
    /// Rounded once at the end.
    Exact,
}

/// OpenCV's separable filters of few taps, in integers. `taps` makes the taps of one side.
fn fixed_point(
    source: &Pixels,
    width: usize,
    height: usize,
    taps: fn(usize, usize) -> Taps<i32>,
    rounding: Rounding,
) -> Pixels {
    let channels = source.channels;
    let columns = taps(source.width, width);
    let rows = taps(source.height, height);
    let line = |y: usize| -> Vec<i32> {
        let row = &source.data[y * source.width * channels..];
        let mut out = Vec::with_capacity(width * channels);
        for taps in &columns {
            for channel in 0..channels {
                let value =
                    |(x, weight): &Tap<i32>| i32::from(row[x * channels + channel]) * weight;
                out.push(taps.iter().map(value).sum());
            }
        }
        out
    };
    let lines: Vec<Vec<i32>> = (0..source.height).map(line).collect();
    let mut data = Vec::with_capacity(width * height * channels);
    let mut sums = vec![0i64; width * channels];
    for taps in &rows {
        sums.fill(0);
        for (y, weight) in taps {
            for (sum, value) in sums.iter_mut().zip(&lines[*y]) {
                *sum += match rounding {
                    Rounding::Linear => i64::from((weight * (value >> 4)) >> 16),
                    Rounding::Exact => i64::from(*weight) * i64::from(*value),
                };
            }
        }
        data.extend(sums.iter().map(|sum| {
            let value = match rounding {
                Rounding::Linear => (sum + 2) >> 2,
                Rounding::Exact => (sum + (1 << 21)) >> 22,
            };
            value.clamp(0, 255) as u8
        }));
    }
    Pixels { width, height, channels, data }
}

/// OpenCV's INTER_NEAREST_EXACT: the pixel under the centre of the output pixel.
fn nearest(source: &Pixels, width: usize, height: usize) -> Pixels {
    let places = |source: usize, out: usize| -> Vec<usize> {
        let step = ((source << 16) + out / 2) / out;
        let start = (step / 2) as i64 - (source % 2) as i64;
        let place = |index| ((index * step) as i64 + start) >> 16;
        (0..out).map(|index| place(index).clamp(0, source as i64 - 1) as usize).collect()
    };
    let columns = places(source.width, width);
    let channels = source.channels;
    let mut data = Vec::with_capacity(width * height * channels);
    for y in places(source.height, height) {
        for &x in &columns {
            let at = (y * source.width + x) * channels;
            data.extend_from_slice(&source.data[at..at + channels]);
        }
    }
    Pixels { width, height, channels, data }
}

fn lanczos(x: f64) -> f64 {
    let sinc = |x: f64| {
        let x = x * std::f64::consts::PI;
        if x == 0.0 { 1.0 } else { x.sin() / x }
    };
    if (-3.0..3.0).contains(&x) { sinc(x) * sinc(x / 3.0) } else { 0.0 }
}

fn box_filter(x: f64) -> f64 {
    if x > -0.5 && x <= 0.5 { 1.0 } else { 0.0 }
}

/// Bits after the point of Pillow's weights.
const PILLOW_BITS: u32 = 22;

/// Pillow's antialiased filters: columns first, then rows, eight bits in between. RGBA is filtered
/// with premultiplied alpha.
fn antialiased(
    mut source: Pixels,
    width: usize,
    height: usize,
    filter: fn(f64) -> f64,
    support: f64,
) -> Pixels {
    if source.channels == 4 {
        source.data.chunks_exact_mut(4).for_each(premultiply);
    }
    if source.width != width {
        let windows = pillow_taps(source.width, width, filter, support);
        source = match source.channels {
            4 => filter_columns::<4>(&source, width, &windows),
            _ => filter_columns::<3>(&source, width, &windows),
        };
    }
    if source.height != height {
        source = filter_rows(&source, height, &pillow_taps(source.height, height, filter, support));
    }
    if source.channels == 4 {
        source.data.chunks_exact_mut(4).for_each(unpremultiply);
    }
    source
}

/// The first source index and the weights of each output position.
type Window = (usize, Vec<i32>);

fn pillow_taps(source: usize, out: usize, filter: fn(f64) -> f64, support: f64) -> Vec<Window> {
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Pictures resized by OpenCV and Pillow: `tests/data/dataset/make_resize.py`.
    const GOLDEN: &str = include_str!("../../tests/data/dataset/resize.json");

    #[derive(serde::Deserialize)]
    struct Golden {
        sources: Vec<Picture>,
        cases: Vec<Case>,
    }

    #[derive(serde::Deserialize, Clone)]
    struct Picture {
        width: usize,
        height: usize,
        channels: usize,
        data: Vec<u8>,
    }

    #[derive(serde::Deserialize)]
    struct Case {
        source: usize,
        filter: String,
        result: Picture,
    }

    fn pixels(picture: &Picture) -> Pixels {
        let Picture { width, height, channels, data } = picture.clone();
        Pixels { width, height, channels, data }
    }

    #[test]
    fn filters_equal_opencv_and_pillow() {
        let golden: Golden = serde_json::from_str(GOLDEN).unwrap();
        assert!(golden.cases.len() >= 40, "{}", golden.cases.len());
        for case in &golden.cases {
            let filter = Interpolation::from_name(&case.filter);
            let want = pixels(&case.result);
            let source = pixels(&golden.sources[case.source]);
            let got = resize(source, want.width, want.height, filter);
            let worst = got
                .data
                .iter()
                .zip(&want.data)
                .map(|(left, right)| left.abs_diff(*right))
                .max()
                .unwrap();
            // Pillow's integers and OpenCV's nearest are exact; OpenCV's other filters have vector
            // code that adds and rounds in other orders.
            let exact = matches!(case.filter.as_str(), "lanczos" | "box" | "nearest");
            let allowed = u8::from(!exact);
            let name = format!("{} {}x{}", case.filter, want.width, want.height);
            assert_eq!(got.data.len(), want.data.len(), "{name}");
            assert!(worst <= allowed, "{name} from source {}: off by {worst}", case.source);
        }
    }
}
