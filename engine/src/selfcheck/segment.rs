//! A small piece of a network on the tape, forward and backward: operations in each other's company.

use super::{Check, TYPES, noise, relative_error_of, rounded};
use crate::{
    Activation, Adapter, AttentionShape, Conv2d, ConvGeometry, DType, Device, Dropouts,
    ElementLoss, GroupNorm, LayerNorm, Linear, LossSpec, LowRankAdapter, ParamId, ParamStore,
    Result, Tape, Tensor, Value,
};

/// Batch, height and width, channels, heads of the piece.
const SIZES: (usize, usize, usize, usize) = (2, 4, 24, 3);
/// Rank of the adapters.
const RANK: usize = 3;

pub(super) fn checks() -> Vec<Check> {
    let kinds = [("kept", false), ("recomputed", true)];
    let one = |(kind, checkpointing): (&str, bool), (dtype, tolerance): (DType, f32)| {
        // Roundings of a dozen operations add up.
        Check::new(format!("segment {kind} {}", dtype.suffix()), 5. * tolerance, move |device| {
            let got = run(device, dtype, dtype, checkpointing)?;
            let want = run(Device::Cpu, DType::F32, dtype, false)?;
            Ok(got
                .iter()
                .zip(&want)
                .fold(0_f32, |worst, (got, want)| worst.max(relative_error_of(got, want))))
        })
    };
    kinds.into_iter().flat_map(|kind| TYPES.map(|of_type| one(kind, of_type))).collect()
}

/// Where a piece's tensors are made.
struct Site {
    device: Device,
    dtype: DType,
    /// What the numbers are rounded to before.
    rounding: DType,
}

impl Site {
    /// Numbers of deviation `1/sqrt(last axis)`, as weights have.
    fn weight(&self, shape: &[usize], seed: u32) -> Result<Tensor> {
        let inner: usize = shape.iter().skip(1).product();
        self.tensor(shape, seed, 1. / (inner as f32).sqrt())
    }

    fn tensor(&self, shape: &[usize], seed: u32, factor: f32) -> Result<Tensor> {
        let data = noise(shape.iter().product(), seed);
        let data: Vec<f32> = data.iter().map(|x| rounded(x * factor, self.rounding)).collect();
        Tensor::from_f32(self.device, shape, &data, self.dtype)
    }

    /// f32 whatever the compute type.
    fn wide(&self, len: usize, seed: u32, around: f32) -> Result<Tensor> {
        let data: Vec<f32> = noise(len, seed).iter().map(|x| around + x * 0.1).collect();
        Tensor::from_f32(self.device, &[len], &data, DType::F32)
    }

    fn linear(&self, (inner, outer): (usize, usize), seed: u32, first: usize) -> Result<Linear> {
        Ok(Linear {
            weight: self.weight(&[outer, inner], seed)?,
            bias: Some(self.tensor(&[outer], seed + 1, 0.1)?),
            adapter: Some(low_rank(first)),
        })
    }

    fn layer_norm(&self, len: usize, seed: u32) -> Result<LayerNorm> {
        Ok(LayerNorm {
            gamma: self.wide(len, seed, 1.)?,
            beta: self.wide(len, seed + 1, 0.)?,
            eps: 1e-5,
        })
    }
}

/// The adapter of parameters `first` and the next.
fn low_rank(first: usize) -> Adapter {
    let (down, up) = (ParamId(first), ParamId(first + 1));
    let (dropouts, module) = (Dropouts::default(), 0);
    Adapter::LowRank(LowRankAdapter { down, up, scale: 0.5, dropouts, module })
}

/// A residual block, self-attention and a gated feed-forward.
struct Piece {
    norm: GroupNorm,
    conv: Conv2d,
    norms: [LayerNorm; 2],
    /// Query, key, value, output; into and out of the feed-forward.
    linear: [Linear; 6],
}

impl Piece {
    fn new(site: &Site) -> Result<Self> {
        let (_, _, c, _) = SIZES;
        let weight = site.weight(&[c, 3, 3, c], 10)?;
        let bias = Some(site.tensor(&[c], 11, 0.1)?);
        let (geometry, adapter) = (ConvGeometry::square(3, 1, 1), Some(low_rank(0)));
        let shape = |i: usize| match i {
            4 => (c, 8 * c),
            5 => (4 * c, c),
            _ => (c, c),
        };
        let linear =
            |i: usize| site.linear(shape(i), 20 + 2 * u32::try_from(i).unwrap_or(0), 2 * i + 2);
        let (gamma, beta) = (site.wide(c, 12, 1.)?, site.wide(c, 13, 0.)?);
        Ok(Self {
            norm: GroupNorm { gamma, beta, groups: 4, eps: 1e-5 },
            conv: Conv2d { weight, bias, geometry, adapter },
            norms: [site.layer_norm(c, 14)?, site.layer_norm(c, 16)?],
            linear: [linear(0)?, linear(1)?, linear(2)?, linear(3)?, linear(4)?, linear(5)?],
        })
    }

    /// `[B,H,W,C]` to `[B,H·W,C]`.
    fn forward<'m>(&'m self, tape: &Tape<'m>, x: &Value, per_image: &Value) -> Result<Value> {
        let (batch, side, c, heads) = SIZES;
        let x = tape.segment(&[x, per_image], move |tape, inputs| {
            let hidden = self.norm.forward_silu(tape, &inputs[0])?;
            let hidden = self.conv.forward_shifted(tape, &hidden, &inputs[1])?;
            tape.add(&hidden, &inputs[0])
        })?;
        let x = tape.reshape(&x, &[batch, side * side, c])?;
        tape.segment(&[&x], move |tape, inputs| {
            let [query, key, value, output, widen, narrow] = &self.linear;
            let hidden = self.norms[0].forward(tape, &inputs[0])?;
            let [q, k, v] = [query, key, value].map(|layer| layer.forward(tape, &hidden));
            let shape = AttentionShape { heads, causal: false };
            let hidden = tape.attention(&q?, &k?, &v?, shape)?;
            let x = output.forward_add(tape, &hidden, &inputs[0])?;
            let hidden = widen.forward(tape, &self.norms[1].forward(tape, &x)?)?;
            narrow.forward_add(tape, &tape.geglu(&hidden)?, &x)
        })
    }
}

/// Down and up of the convolution's and the linear layers' adapters, always the same f32 numbers.
fn parameters(device: Device) -> Result<ParamStore> {
    let (_, _, c, _) = SIZES;
    let mut shapes = vec![vec![RANK, 3, 3, c], vec![c, RANK]];
    for (inner, outer) in [(c, c), (c, c), (c, c), (c, c), (c, 8 * c), (4 * c, c)] {
        shapes.extend([vec![RANK, inner], vec![outer, RANK]]);
    }
    let values = |(i, shape): (usize, Vec<usize>)| {
        let seed = 50 + u32::try_from(i).unwrap_or(0);
        let data = noise(shape.iter().product(), seed).iter().map(|x| x * 0.2).collect();
        (shape, data)
    };
    let tensors: Vec<_> = shapes.into_iter().enumerate().map(values).collect();
    ParamStore::new(device, &tensors)
}

/// The output, the losses, and the gradient of every parameter.
fn run(
    device: Device,
    dtype: DType,
    rounding: DType,
    checkpointing: bool,
) -> Result<Vec<Vec<f32>>> {
    let site = Site { device, dtype, rounding };
    let (batch, side, c, _) = SIZES;
    let (piece, params) = (Piece::new(&site)?, parameters(device)?);
    let x = Value::constant(site.tensor(&[batch, side, side, c], 1, 1.)?);
    let time = Value::constant(site.tensor(&[batch, c], 2, 1.)?);
    let target = noise(batch * side * side * c, 3);
    let target = Tensor::from_f32(device, &[batch, side * side, c], &target, DType::F32)?;
    let weight = vec![1. / batch as f32; batch];
    let spec = LossSpec::new(device, ElementLoss::L2, &vec![1.; batch], &weight)?;
    let tape = Tape::new(&params, checkpointing);
    let time = tape.activation(Activation::Silu, &time)?;
    let out = piece.forward(&tape, &x, &time)?;
    let losses = tape.loss(&out, &target, &spec)?;
    let mut results = vec![out.tensor().to_vec_f32()?, losses.tensor().to_vec_f32()?];
    let mut gradients = vec![Vec::new(); params.count()];
    drop(out);
    tape.backward(&losses, &mut |id, gradient| {
        gradients[id.0] = gradient.to_vec_f32()?;
        Ok(())
    })?;
    results.append(&mut gradients);
    Ok(results)
}
