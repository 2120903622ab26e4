//! The residual block and the two resamplers that U-Net and VAE share.

use engine::{Conv2d, ConvGeometry, GroupNorm, Linear, Result as EngineResult, Tape, Value};

use crate::Result;
use crate::reader::{ConvShape, LayerVisitor, Reader};

/// Sizes of a [`ResnetBlock`].
#[derive(Clone, Copy)]
pub(crate) struct ResnetShape {
    pub input: usize,
    pub out: usize,
    /// Width of the time embedding; `None` in a VAE.
    pub time: Option<usize>,
    pub groups: usize,
    pub eps: f32,
}

/// `x + conv2(silu(norm2(conv1(silu(norm1(x))) + time)))`, with a 1x1 shortcut where widths differ.
pub(crate) struct ResnetBlock {
    norm1: GroupNorm,
    conv1: Conv2d,
    time_emb_proj: Option<Linear>,
    norm2: GroupNorm,
    conv2: Conv2d,
    conv_shortcut: Option<Linear>,
}

impl ResnetBlock {
    pub(crate) fn load(reader: &Reader, path: &str, shape: ResnetShape) -> Result<Self> {
        let ResnetShape { input, out, time, groups, eps } = shape;
        let name = |part: &str| format!("{path}.{part}");
        let shortcut = || reader.projection(&name("conv_shortcut"), (out, input), true).map(Some);
        Ok(Self {
            norm1: reader.group_norm(&name("norm1"), input, groups, eps)?,
            conv1: reader.conv(&name("conv1"), ConvShape::same3(out, input))?,
            time_emb_proj: time
                .map(|width| reader.linear(&name("time_emb_proj"), out, width))
                .transpose()?,
            norm2: reader.group_norm(&name("norm2"), out, groups, eps)?,
            conv2: reader.conv(&name("conv2"), ConvShape::same3(out, out))?,
            conv_shortcut: if input == out { None } else { shortcut()? },
        })
    }

    /// `x` is `[B,H,W,in]`, `time` the SiLU of the time embedding `[B,time]`; gives `[B,H,W,out]`.
    pub(crate) fn forward<'m>(
        &self,
        tape: &Tape<'m>,
        x: &Value,
        time: Option<&Value>,
    ) -> EngineResult<Value> {
        let mut h = self.norm1.forward_silu(tape, x)?;
        h = match (&self.time_emb_proj, time) {
            (Some(projection), Some(time)) => {
                let shift = projection.forward(tape, time)?;
                self.conv1.forward_shifted(tape, &h, &shift)?
            }
            _ => self.conv1.forward(tape, &h)?,
        };
        h = self.norm2.forward_silu(tape, &h)?;
        match &self.conv_shortcut {
            Some(shortcut) => self.conv2.forward_add(tape, &h, &shortcut.forward(tape, x)?),
            None => self.conv2.forward_add(tape, &h, x),
        }
    }

    pub(crate) fn visit(&mut self, path: &str, visit: LayerVisitor) {
        visit(&format!("{path}.conv1"), (&mut self.conv1).into());
        if let Some(projection) = &mut self.time_emb_proj {
            visit(&format!("{path}.time_emb_proj"), projection.into());
        }
        visit(&format!("{path}.conv2"), (&mut self.conv2).into());
        if let Some(shortcut) = &mut self.conv_shortcut {
            visit(&format!("{path}.conv_shortcut"), shortcut.into());
        }
    }
}

/// How a downsampler pads.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Padding {
    /// One row of zeros on all sides: the U-Net.
    Around,
    /// One row of zeros after the last: the VAE.
    After,
}

/// A 3x3 convolution of stride 2.
pub(crate) fn downsampler(
    reader: &Reader,
    path: &str,
    channels: usize,
    padding: Padding,
) -> Result<Conv2d> {
    let pad_before = usize::from(padding == Padding::Around);
    let geometry = ConvGeometry { kernel: (3, 3), stride: 2, pad_before, pad_after: 1 };
    reader.conv(path, ConvShape { out: channels, input: channels, geometry })
}

/// Doubles height and width (nearest neighbour), cuts to `size`, convolves.
pub(crate) fn upsample<'m>(
    conv: &Conv2d,
    tape: &Tape<'m>,
    x: &Value,
    size: Option<(usize, usize)>,
) -> EngineResult<Value> {
    let doubled = tape.upsample2x(x)?;
    let cut = match (size, doubled.shape()) {
        (Some((height, width)), [batch, h, w, _]) if (height, width) != (*h, *w) => {
            Some(cut_rows(*batch, (*h, *w), (height, width)))
        }
        _ => None,
    };
    match (cut, size) {
        (Some(rows), Some((height, width))) => {
            let shape = [x.shape()[0], height, width, x.tensor().last_dim()];
            let cut = tape.reshape(&tape.gather_rows(&doubled, &rows)?, &shape)?;
            conv.forward(tape, &cut)
        }
        _ => conv.forward(tape, &doubled),
    }
}

/// Pixels of `[B,from.0,from.1]` that lie within the first `to.0` rows and `to.1` columns.
///
/// For an odd size this is what nearest-neighbour resizing to that size gives.
fn cut_rows(batch: usize, from: (usize, usize), to: (usize, usize)) -> Vec<u32> {
    let mut rows = Vec::with_capacity(batch * to.0 * to.1);
    for image in 0..batch {
        for y in 0..to.0.min(from.0) {
            let start = (image * from.0 + y) * from.1;
            rows.extend((start..start + to.1.min(from.1)).map(|row| row as u32));
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cutting_keeps_the_upper_left() {
        assert_eq!(cut_rows(2, (2, 4), (1, 3)), [0, 1, 2, 8, 9, 10]);
    }
}
