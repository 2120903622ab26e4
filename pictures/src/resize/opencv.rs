//! OpenCV's filters without antialiasing that work in integers: bilinear, nearest, and area where a
//! side grows.

use crate::Pixels;

pub(super) fn bilinear(source: &Pixels, width: usize, height: usize) -> Pixels {
    of_channels(source, width, height, linear_taps)
}

/// INTER_AREA where a side grows.
pub(super) fn area_growing(source: &Pixels, width: usize, height: usize) -> Pixels {
    of_channels(source, width, height, area_growing_taps)
}

fn of_channels(
    source: &Pixels,
    width: usize,
    height: usize,
    taps: fn(usize, usize) -> Taps,
) -> Pixels {
    if source.channels == 4 {
        fixed_point::<4>(source, width, height, taps)
    } else {
        fixed_point::<3>(source, width, height, taps)
    }
}

/// One source index and its weight.
type Tap = (usize, i32);

/// The taps of each output position.
type Taps = Vec<Vec<Tap>>;

/// Fixed-point weights: 11 bits.
const WEIGHT_ONE: f32 = 2048.0;

fn fixed_weight(weight: f32) -> i32 {
    (weight * WEIGHT_ONE).round_ties_even() as i32
}

fn pair(source: usize, at: i64, part: f32) -> Vec<Tap> {
    let last = source as i64 - 1;
    let (at, part) = if at < 0 { (0, 0.0) } else { (at, part) };
    let (at, part) = if at >= last { (last, 0.0) } else { (at, part) };
    let next = (at + 1).min(last);
    vec![(at as usize, fixed_weight(1.0 - part)), (next as usize, fixed_weight(part))]
}

fn linear_taps(source: usize, out: usize) -> Taps {
    let scale = 1.0 / (out as f64 / source as f64);
    (0..out)
        .map(|index| {
            let position = ((index as f64 + 0.5) * scale - 0.5) as f32;
            pair(source, position.floor() as i64, position - position.floor())
        })
        .collect()
}

/// OpenCV's INTER_AREA where a side grows: bilinear between the edges of the source pixels.
fn area_growing_taps(source: usize, out: usize) -> Taps {
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

/// A picture's rows after the filter along them. The last two are kept: the taps of an output row
/// lie on no more than two neighbours.
struct Lines<'a, const C: usize> {
    source: &'a Pixels,
    columns: Taps,
    kept: [(Option<usize>, Vec<[i32; C]>); 2],
}

impl<const C: usize> Lines<'_, C> {
    fn get(&mut self, y: usize) -> &[i32] {
        let (made, line) = &mut self.kept[y % 2];
        if *made != Some(y) {
            let row_length = self.source.width * C;
            let row = &self.source.data[y * row_length..(y + 1) * row_length];
            line.clear();
            line.extend(self.columns.iter().map(|taps| {
                let mut sums = [0i32; C];
                for (x, weight) in taps {
                    for (sum, value) in sums.iter_mut().zip(&row[x * C..(x + 1) * C]) {
                        *sum += i32::from(*value) * weight;
                    }
                }
                sums
            }));
            *made = Some(y);
        }
        line.as_flattened()
    }
}

/// OpenCV's separable filters of two taps, in integers, with bits dropped on the way. `taps` makes
/// the taps of one side.
fn fixed_point<const C: usize>(
    source: &Pixels,
    width: usize,
    height: usize,
    taps: fn(usize, usize) -> Taps,
) -> Pixels {
    let kept = std::array::from_fn(|_| (None, Vec::with_capacity(width)));
    let mut lines = Lines::<C> { source, columns: taps(source.width, width), kept };
    let mut data = Vec::with_capacity(width * height * C);
    let mut sums = vec![0i32; width * C];
    for taps in &taps(source.height, height) {
        sums.fill(0);
        for (y, weight) in taps {
            let line = lines.get(*y);
            for (sum, value) in sums.iter_mut().zip(line) {
                *sum += (weight * (value >> 4)) >> 16;
            }
        }
        data.extend(sums.iter().map(|sum| ((sum + 2) >> 2).clamp(0, 255) as u8));
    }
    Pixels { width, height, channels: C, data }
}

/// INTER_NEAREST_EXACT of OpenCV 4: the pixel under the centre of the output pixel, in fixed point
/// of 16 bits, which drifts a little over a long side.
pub(super) fn nearest(source: &Pixels, width: usize, height: usize) -> Pixels {
    pick(source, width, height, |source, out| {
        let step = ((source << 16) + out / 2) / out;
        let start = (step / 2) as i64 - (source % 2) as i64;
        let place = |index| ((index * step) as i64 + start) >> 16;
        (0..out).map(|index| place(index).clamp(0, source as i64 - 1) as usize).collect()
    })
}

/// INTER_NEAREST_EXACT of OpenCV 5: centres are added up, so that those between two pixels fall to
/// either side as they do there.
pub(super) fn nearest_centre(source: &Pixels, width: usize, height: usize) -> Pixels {
    pick(source, width, height, |source, out| {
        let step = source as f64 / out as f64;
        let centres = std::iter::successors(Some(step * 0.5), |centre| Some(centre + step));
        centres.take(out).map(|centre| (centre as usize).min(source - 1)).collect()
    })
}

/// `places` gives the source index of each output position of a side.
fn pick(
    source: &Pixels,
    width: usize,
    height: usize,
    places: fn(usize, usize) -> Vec<usize>,
) -> Pixels {
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
