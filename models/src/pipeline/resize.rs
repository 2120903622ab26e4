//! Pictures, masks and latents in other sizes, as gen_img resizes them: Pillow's Lanczos and bilinear
//! filters, which widen where a side shrinks, and PyTorch's bicubic interpolation, which does not.
//!
//! Numbers stay f32 between the passes, where Pillow rounds to eight bits.

use std::f32::consts::PI;

/// How values between pixels are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Filter {
    /// Pillow's `LANCZOS`: three lobes.
    Lanczos,
    /// Pillow's `BILINEAR`.
    Bilinear,
    /// `torch.nn.functional.interpolate(mode="bicubic")`.
    Bicubic,
}

/// The pixels that make a new one, each with its weight.
type Taps = Vec<(usize, f32)>;

/// `[height,width,channels]` of the size `from` (columns and rows) in the size `to`.
pub(super) fn resize(
    values: &[f32],
    channels: usize,
    from: [usize; 2],
    to: [usize; 2],
    filter: Filter,
) -> Vec<f32> {
    if from == to {
        return values.to_vec();
    }
    // A row is `width` cells of `channels`; the whole is `height` cells of a row.
    let rows = values.chunks(from[0] * channels);
    let taps = filter.taps(from[0], to[0]);
    let wide: Vec<f32> = rows.flat_map(|row| combine(row, channels, &taps)).collect();
    combine(&wide, to[0] * channels, &filter.taps(from[1], to[1]))
}

/// New cells of `width` numbers from those of `cells`.
fn combine(cells: &[f32], width: usize, taps: &[Taps]) -> Vec<f32> {
    let mut out = vec![0.; taps.len() * width];
    for (new, taps) in out.chunks_mut(width).zip(taps) {
        for (index, weight) in taps {
            let old = &cells[index * width..][..width];
            new.iter_mut().zip(old).for_each(|(new, old)| *new += weight * old);
        }
    }
    out
}

impl Filter {
    fn taps(self, from: usize, to: usize) -> Vec<Taps> {
        let scale = from as f32 / to as f32;
        (0..to)
            .map(|new| {
                let center = (new as f32 + 0.5) * scale;
                match self {
                    Filter::Lanczos => widened(center, scale, from, (3., lanczos)),
                    Filter::Bilinear => widened(center, scale, from, (1., |x| 1. - x.abs())),
                    Filter::Bicubic => bicubic(center - 0.5, from),
                }
            })
            .collect()
    }
}

/// Taps of a kernel of this reach, made wider by `scale` where that is above 1.
fn widened(center: f32, scale: f32, from: usize, (reach, kernel): (f32, fn(f32) -> f32)) -> Taps {
    let wider = scale.max(1.);
    let reach = reach * wider;
    let first = (center - reach + 0.5).max(0.) as usize;
    let end = ((center + reach + 0.5) as usize).min(from);
    let weight = |index: usize| kernel((index as f32 - center + 0.5) / wider);
    let sum: f32 = (first..end).map(weight).sum();
    (first..end).map(|index| (index, weight(index) / sum)).collect()
}

fn lanczos(x: f32) -> f32 {
    let sinc = |x: f32| if x == 0. { 1. } else { (PI * x).sin() / (PI * x) };
    if x.abs() < 3. { sinc(x) * sinc(x / 3.) } else { 0. }
}

/// Keys' cubic with a = -0.75 around `at`, the border repeated.
fn bicubic(at: f32, from: usize) -> Taps {
    const A: f32 = -0.75;
    let weight = |x: f32| match x.abs() {
        x if x <= 1. => ((A + 2.) * x - (A + 3.)) * x * x + 1.,
        x => ((A * x - 5. * A) * x + 8. * A) * x - 4. * A,
    };
    let (left, last) = (at.floor(), from.saturating_sub(1));
    (-1..3)
        .map(|step| {
            let index = left + step as f32;
            ((index.max(0.) as usize).min(last), weight(at - index))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `Image.fromarray(x, "F").resize(..)` of Pillow 12 and `interpolate` of PyTorch 2.11 for the
    /// ramp 0, 1, 4, 9, 16, 25.
    #[test]
    fn values_are_those_of_pillow_and_torch() {
        let ramp: Vec<f32> = (0..6).map(|x| (x * x) as f32).collect();
        let cases: [(Filter, &[f32]); 3] =
            [(Filter::Lanczos, LANCZOS), (Filter::Bilinear, BILINEAR), (Filter::Bicubic, BICUBIC)];
        for (filter, golden) in cases {
            let (small, large) = golden.split_at(4);
            for want in [small, large] {
                let got = resize(&ramp, 1, [6, 1], [want.len(), 1], filter);
                // As a column, too, of two equal channels.
                let twice: Vec<f32> = ramp.iter().flat_map(|x| [*x, *x]).collect();
                let column = resize(&twice, 2, [1, 6], [1, want.len()], filter);
                for (i, want) in want.iter().enumerate() {
                    assert!((got[i] - want).abs() < 1e-4, "{filter:?} {i}: {} {want}", got[i]);
                    assert_eq!([column[2 * i], column[2 * i + 1]], [got[i]; 2]);
                }
            }
        }
    }

    #[rustfmt::skip]
    const LANCZOS: &[f32] = &[
        0.1358, 2.8969, 10.7187, 22.5721,
        -0.0066, 0.2592, 1.3259, 3.4372, 6.25, 9.8239, 14.2978, 21.5428, 25.6294,
    ];
    #[rustfmt::skip]
    const BILINEAR: &[f32] = &[
        0.375, 3.5556, 10.7778, 21.625,
        0.0, 0.5, 1.5, 3.5, 6.5, 10.1667, 14.8333, 20.5, 25.0,
    ];
    #[rustfmt::skip]
    const BICUBIC: &[f32] = &[
        0.1211, 2.8281, 10.7969, 23.207,
        -0.0868, 0.2188, 1.4305, 3.1528, 6.125, 10.2824, 14.3009, 21.1562, 25.7812,
    ];
}
