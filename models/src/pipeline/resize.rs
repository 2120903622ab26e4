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
        0.13581, 2.89692, 10.71867, 22.57210,
        -0.00658, 0.25917, 1.32587, 3.43724, 6.25000, 9.82395, 14.29776, 21.54279, 25.62937,
    ];
    #[rustfmt::skip]
    const BILINEAR: &[f32] = &[
        0.37500, 3.55556, 10.77778, 21.62500,
        0.00000, 0.50000, 1.50000, 3.50000, 6.50000, 10.16667, 14.83333, 20.50000, 25.00000,
    ];
    #[rustfmt::skip]
    const BICUBIC: &[f32] = &[
        0.12109, 2.82812, 10.79688, 23.20703,
        -0.08681, 0.21875, 1.43055, 3.15278, 6.12500, 10.28241, 14.30093, 21.15625, 25.78125,
    ];
}
