//! OpenCV's INTER_AREA where no side grows: every output pixel is the mean of the area it covers.

use crate::Pixels;

pub(super) fn area(source: &Pixels, width: usize, height: usize) -> Pixels {
    let whole = source.width.is_multiple_of(width) && source.height.is_multiple_of(height);
    match (whole, source.channels) {
        (true, 4) => area_of_whole_pixels::<4>(source, width, height),
        (true, _) => area_of_whole_pixels::<3>(source, width, height),
        (false, 4) => area_of_parts::<4>(source, width, height),
        (false, _) => area_of_parts::<3>(source, width, height),
    }
}

/// The source pixels under one output pixel along a side: a run, with a weight for each.
struct Cover {
    first: usize,
    weights: Vec<f32>,
}

/// The general case, for `C` channels: each source row is shrunk, then rows are added up. The order
/// of the additions is OpenCV's; other orders round differently.
fn area_of_parts<const C: usize>(source: &Pixels, width: usize, height: usize) -> Pixels {
    let columns = covers(source.width, width);
    let rows = covers(source.height, height);
    let row_length = source.width * C;
    let mut data = Vec::with_capacity(width * height * C);
    // Four values are added at once whatever `C` is: the row has one more behind its end.
    let mut values = vec![0f32; row_length + 1];
    let mut line = vec![[0f32; C]; width];
    let mut sums = vec![[0f32; C]; width];
    for cover in &rows {
        sums.fill([0.0; C]);
        for (y, row_weight) in (cover.first..).zip(&cover.weights) {
            let row = &source.data[y * row_length..(y + 1) * row_length];
            for (value, byte) in values.iter_mut().zip(row) {
                *value = f32::from(*byte);
            }
            for (out, cover) in line.iter_mut().zip(&columns) {
                let mut four = [0f32; 4];
                for (window, weight) in
                    values[cover.first * C..].windows(4).step_by(C).zip(&cover.weights)
                {
                    for lane in 0..4 {
                        four[lane] += window[lane] * weight;
                    }
                }
                out.copy_from_slice(&four[..C]);
            }
            for (sum, value) in sums.as_flattened_mut().iter_mut().zip(line.as_flattened()) {
                *sum += row_weight * value;
            }
        }
        data.extend(sums.as_flattened().iter().map(|value| rounded(*value)));
    }
    Pixels { width, height, channels: C, data }
}

/// To the nearest number, the even one of two. Adding 2^23 leaves no bits for what follows the
/// point; means of bytes are neither negative nor above 255.
fn rounded(value: f32) -> u8 {
    const NO_FRACTIONS: f32 = 8_388_608.0;
    (value + NO_FRACTIONS).to_bits() as u8
}

/// The case of whole ratios, which OpenCV sums in integers.
fn area_of_whole_pixels<const C: usize>(source: &Pixels, width: usize, height: usize) -> Pixels {
    let (step_x, step_y) = (source.width / width, source.height / height);
    let scale = 1.0 / (step_x * step_y) as f32;
    let halves = (step_x, step_y) == (2, 2);
    let row_length = source.width * C;
    let mut data = Vec::with_capacity(width * height * C);
    let mut columns = vec![0u32; row_length];
    for rows in source.data.chunks_exact(row_length * step_y) {
        columns.fill(0);
        for row in rows.chunks_exact(row_length) {
            for (sum, value) in columns.iter_mut().zip(row) {
                *sum += u32::from(*value);
            }
        }
        for cell in columns.chunks_exact(step_x * C) {
            let mut sums = [0u32; C];
            for pixel in cell.chunks_exact(C) {
                for (sum, value) in sums.iter_mut().zip(pixel) {
                    *sum += value;
                }
            }
            data.extend(sums.map(|sum| {
                if halves { ((sum + 2) >> 2) as u8 } else { rounded(sum as f32 * scale) }
            }));
        }
    }
    Pixels { width, height, channels: C, data }
}

fn covers(source: usize, out: usize) -> Vec<Cover> {
    let scale = 1.0 / (out as f64 / source as f64);
    let last = source - 1;
    (0..out)
        .map(|index| {
            let start = index as f64 * scale;
            let end = start + scale;
            let cell = scale.min(source as f64 - start);
            let last_whole = (end.floor() as usize).min(last);
            let first_whole = (start.ceil() as usize).min(last_whole);
            let mut cover =
                Cover { first: first_whole, weights: Vec::with_capacity(scale as usize + 2) };
            if first_whole as f64 - start > 1e-3 {
                cover.first -= 1;
                cover.weights.push(((first_whole as f64 - start) / cell) as f32);
            }
            let whole = (first_whole..last_whole).map(|_| (1.0 / cell) as f32);
            cover.weights.extend(whole);
            let rest = end - last_whole as f64;
            if rest > 1e-3 {
                cover.weights.push((rest.min(1.0).min(cell) / cell) as f32);
            }
            cover
        })
        .collect()
}
