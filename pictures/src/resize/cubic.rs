//! OpenCV's INTER_CUBIC, without antialiasing: 4x4 pixels, in floating point.
//!
//! OpenCV has two: its own with weights of 11 bits, and Intel's, which its packages for x86 use and
//! which rounds once, at the end. This is the second, so the other differs by one in 3 of 100 values.

use crate::Pixels;

/// Four source indices and their weights, for each output position.
type Taps = Vec<([usize; 4], [f32; 4])>;

pub(super) fn bicubic(source: &Pixels, width: usize, height: usize) -> Pixels {
    if source.channels == 4 {
        of_channels::<4>(source, width, height)
    } else {
        of_channels::<3>(source, width, height)
    }
}

fn of_channels<const C: usize>(source: &Pixels, width: usize, height: usize) -> Pixels {
    let columns = taps(source.width, width);
    let row_length = source.width * C;
    let mut data = Vec::with_capacity(width * height * C);
    // Columns of bytes first: they are the sums over rows, of one output row.
    let mut sums = vec![0f32; row_length];
    for (places, weights) in taps(source.height, height) {
        let row = |k: usize| &source.data[places[k] * row_length..(places[k] + 1) * row_length];
        let rows = row(0).iter().zip(row(1)).zip(row(2).iter().zip(row(3)));
        for (sum, ((a, b), (c, d))) in sums.iter_mut().zip(rows) {
            *sum = f32::from(*a) * weights[0]
                + f32::from(*b) * weights[1]
                + f32::from(*c) * weights[2]
                + f32::from(*d) * weights[3];
        }
        for (places, weights) in &columns {
            let mut pixel = [0f32; C];
            for (place, weight) in places.iter().zip(weights) {
                for (value, sum) in pixel.iter_mut().zip(&sums[place * C..(place + 1) * C]) {
                    *value += sum * weight;
                }
            }
            data.extend(pixel.map(|value| value.round_ties_even().clamp(0.0, 255.0) as u8));
        }
    }
    Pixels { width, height, channels: C, data }
}

fn taps(source: usize, out: usize) -> Taps {
    const A: f64 = -0.75;
    let scale = source as f64 / out as f64;
    let last = source as i64 - 1;
    (0..out)
        .map(|index| {
            let position = (index as f64 + 0.5) * scale - 0.5;
            let at = position.floor();
            let x = position - at;
            let outer = |x: f64| ((A * x - 5.0 * A) * x + 8.0 * A) * x - 4.0 * A;
            let inner = |x: f64| ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0;
            let weights = [outer(x + 1.0), inner(x), inner(1.0 - x), outer(2.0 - x)];
            let place = |k: usize| (at as i64 - 1 + k as i64).clamp(0, last) as usize;
            (std::array::from_fn(place), weights.map(|weight| weight as f32))
        })
        .collect()
}
