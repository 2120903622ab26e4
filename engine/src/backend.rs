//! The operation table: every kernel that the tape may call, once per device.
//!
//! A backend knows nothing of gradients: a forward returns what its backward will ask for. Matrix
//! operands are read as `[rows, last axis]`. `bias`, `gamma`, `beta`, statistics and losses are f32;
//! everything else has the compute type. Sums are kept in f32 whatever the storage.

use crate::{DType, Device, Ids, Result, Tensor};

/// `out[m,n] = alpha · op(a)·op(b) + left·op(right) + bias + residual`.
pub struct Gemm<'a> {
    /// `[m,k]`, or `[k,m]` with `trans_a`.
    pub a: &'a Tensor,
    /// Read `a` transposed.
    pub trans_a: bool,
    /// `[k,n]`, or `[n,k]` with `trans_b`.
    pub b: &'a Tensor,
    /// Read `b` transposed.
    pub trans_b: bool,
    /// Factor of the product `a·b`.
    pub alpha: f32,
    /// A second product of small inner size, added before rounding.
    pub low_rank: Option<LowRank<'a>>,
    /// `[n]`, added to every row.
    pub bias: Option<&'a Tensor>,
    /// `[m,n]`, added.
    pub residual: Option<&'a Tensor>,
    /// Type of the result.
    pub out: DType,
}

impl<'a> Gemm<'a> {
    /// The plain product of `a` and `b`, in the type of `a`.
    pub fn new(a: &'a Tensor, trans_a: bool, b: &'a Tensor, trans_b: bool) -> Self {
        let out = a.dtype();
        Self { a, trans_a, b, trans_b, alpha: 1., low_rank: None, bias: None, residual: None, out }
    }
}

/// `left[m,r] · right`, the LoRA part of a layer fused into its GEMM.
#[derive(Clone, Copy)]
pub struct LowRank<'a> {
    /// `[m,r]`.
    pub left: &'a Tensor,
    /// `[r,n]`, or `[n,r]` with `trans_right`.
    pub right: &'a Tensor,
    /// Read `right` transposed.
    pub trans_right: bool,
}

/// Window of a convolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConvGeometry {
    /// Kernel height and width.
    pub kernel: (usize, usize),
    /// Step in both directions.
    pub stride: usize,
    /// Zeros before the first row and column.
    pub pad_before: usize,
    /// Zeros after the last row and column.
    pub pad_after: usize,
}

impl ConvGeometry {
    /// A square kernel with equal padding on all sides.
    pub fn square(kernel: usize, stride: usize, padding: usize) -> Self {
        Self { kernel: (kernel, kernel), stride, pad_before: padding, pad_after: padding }
    }

    /// Output height and width for an input of `height` by `width`; `None` if the window is larger.
    pub fn output(&self, height: usize, width: usize) -> Option<(usize, usize)> {
        let size = |n: usize, k: usize| {
            Some((n + self.pad_before + self.pad_after).checked_sub(k)? / self.stride + 1)
        };
        Some((size(height, self.kernel.0)?, size(width, self.kernel.1)?))
    }
}

/// `out[b,oh,ow,co] = conv(x, w) + left·rightᵀ + bias + per_image[b,co] + residual`.
pub struct Conv<'a> {
    /// `[B,H,W,Ci]`.
    pub x: &'a Tensor,
    /// `[Co,kh,kw,Ci]`.
    pub w: &'a Tensor,
    /// Window.
    pub geometry: ConvGeometry,
    /// `left` is `[B·OH·OW,r]`, `right` is `[Co,r]` (`trans_right` true).
    pub low_rank: Option<LowRank<'a>>,
    /// `[Co]`.
    pub bias: Option<&'a Tensor>,
    /// `[B,Co]`, added to every pixel of its image: the time embedding.
    pub per_image: Option<&'a Tensor>,
    /// `[B,OH,OW,Co]`, added.
    pub residual: Option<&'a Tensor>,
}

/// Normalisation over groups of channels.
#[derive(Clone, Copy, Debug)]
pub struct GroupNormShape {
    /// Number of groups; divides the channels.
    pub groups: usize,
    /// Added to the variance.
    pub eps: f32,
    /// Apply SiLU to the result.
    pub silu: bool,
}

/// Heads and mask of an attention.
#[derive(Clone, Copy, Debug)]
pub struct AttentionKind {
    /// Number of heads; divides the last axis.
    pub heads: usize,
    /// Factor of the scores, usually `1/sqrt(head_dim)`.
    pub scale: f32,
    /// Token `i` sees keys `0..=i` only.
    pub causal: bool,
}

/// What attention gives back: its output and what its backward needs.
pub struct AttentionOut {
    /// `[B,Tq,heads·head_dim]`.
    pub out: Tensor,
    /// Log-sum-exp of the scores, f32 `[B,heads,Tq]`.
    pub lse: Tensor,
}

/// Inputs and saved values of an attention.
pub struct AttentionSaved<'a> {
    /// `[B,Tq,C]`.
    pub q: &'a Tensor,
    /// `[B,Tk,C]`.
    pub k: &'a Tensor,
    /// `[B,Tk,C]`.
    pub v: &'a Tensor,
    /// `[B,Tq,C]`.
    pub out: &'a Tensor,
    /// f32 `[B,heads,Tq]`.
    pub lse: &'a Tensor,
}

/// Pointwise activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x·sigmoid(x)`.
    Silu,
    /// `x·Φ(x)` with the exact (erf) normal distribution function.
    Gelu,
    /// `x·sigmoid(1.702x)`.
    QuickGelu,
}

/// The loss of one element, of the difference `d = prediction - target`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ElementLoss {
    /// `d²`.
    L2,
    /// `|d|`.
    L1,
    /// `2c(√(d²+c²) - c)`.
    Huber,
    /// `2(√(d²+c²) - c)`.
    SmoothL1,
}

/// How a prediction is judged. Lists are f32 `[B]`, one entry per sample (outermost axis), on the
/// device of the prediction.
#[derive(Clone, Debug)]
pub struct LossSpec {
    /// Loss of one element.
    pub element: ElementLoss,
    /// `c` of the Huber losses; ignored by the others.
    pub delta: Tensor,
    /// Factor of the sample's mean in the total, with `1/batch` already in it.
    pub weight: Tensor,
    /// The same factor in the gradient: `weight` times the loss scale of fp16.
    pub gradient_weight: Tensor,
    /// Factor of each element's loss, f32 of the prediction's shape (`alpha_mask`).
    pub mask: Option<Tensor>,
}

impl LossSpec {
    /// Lists on `device`, without a mask and without a loss scale.
    pub fn new(
        device: Device,
        element: ElementLoss,
        delta: &[f32],
        weight: &[f32],
    ) -> Result<Self> {
        let list = |data: &[f32]| Tensor::from_f32(device, &[data.len()], data, DType::F32);
        let weight = list(weight)?;
        let gradient_weight = weight.clone();
        Ok(Self { element, delta: list(delta)?, weight, gradient_weight, mask: None })
    }
}

/// AdamW with decoupled weight decay (Loshchilov & Hutter), PyTorch's order of operations.
#[derive(Clone, Debug)]
pub struct AdamWStep {
    /// Elements of the flat tensor that move in this call; the others stay.
    pub range: std::ops::Range<usize>,
    /// Learning rate of this step.
    pub lr: f32,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
    /// 1 for the first step.
    pub step: u32,
}

/// All kernels of a device. Gradients named `dy` are taken by value so that a kernel may reuse them.
pub trait Backend: Sync {
    /// Another element type.
    fn cast(&self, x: &Tensor, dtype: DType) -> Result<Tensor>;
    /// See [`Gemm`]; result `[m,n]`.
    fn gemm(&self, p: &Gemm) -> Result<Tensor>;
    /// See [`Conv`]; result `[B,OH,OW,Co]`.
    fn conv2d(&self, p: &Conv) -> Result<Tensor>;
    /// Gradient of a convolution's input `[B,H,W,Ci]` given `dy` `[B,OH,OW,Co]`; added to `onto`.
    fn conv2d_backward_input(
        &self,
        dy: &Tensor,
        w: &Tensor,
        geometry: ConvGeometry,
        input: (usize, usize),
        onto: Option<Tensor>,
    ) -> Result<Tensor>;
    /// Gradient of a convolution's weight, f32 `[Co,kh,kw,Ci]`; for adapters, `Co` is a rank.
    fn conv2d_backward_weight(
        &self,
        x: &Tensor,
        dy: &Tensor,
        geometry: ConvGeometry,
    ) -> Result<Tensor>;
    /// `x` is `[B,...,C]`; gives the result and f32 `[B,groups,2]` of mean and 1/deviation.
    fn group_norm(
        &self,
        x: &Tensor,
        gamma: &Tensor,
        beta: &Tensor,
        shape: GroupNormShape,
    ) -> Result<(Tensor, Tensor)>;
    /// Gradient of the input of [`Backend::group_norm`].
    fn group_norm_backward(
        &self,
        dy: Tensor,
        x: &Tensor,
        stats: &Tensor,
        affine: (&Tensor, &Tensor),
        shape: GroupNormShape,
    ) -> Result<Tensor>;
    /// Normalises the last axis; gives the result and f32 `[rows,2]` of mean and 1/deviation.
    fn layer_norm(
        &self,
        x: &Tensor,
        gamma: &Tensor,
        beta: &Tensor,
        eps: f32,
    ) -> Result<(Tensor, Tensor)>;
    /// Gradient of the input of [`Backend::layer_norm`].
    fn layer_norm_backward(
        &self,
        dy: Tensor,
        x: &Tensor,
        stats: &Tensor,
        gamma: &Tensor,
    ) -> Result<Tensor>;
    /// Scaled dot-product attention without an N x N tensor.
    fn attention(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        kind: AttentionKind,
    ) -> Result<AttentionOut>;
    /// Gradients of q, k and v.
    fn attention_backward(
        &self,
        dy: &Tensor,
        saved: &AttentionSaved,
        kind: AttentionKind,
    ) -> Result<(Tensor, Tensor, Tensor)>;
    /// Applies an activation.
    fn activation(&self, kind: Activation, x: &Tensor) -> Result<Tensor>;
    /// Gradient of an activation's input.
    fn activation_backward(&self, kind: Activation, dy: Tensor, x: &Tensor) -> Result<Tensor>;
    /// `x` is `[...,2C]`: `x[..C] · gelu(x[C..])` (erf), result `[...,C]`.
    fn geglu(&self, x: &Tensor) -> Result<Tensor>;
    /// Gradient of the input of [`Backend::geglu`].
    fn geglu_backward(&self, dy: &Tensor, x: &Tensor) -> Result<Tensor>;
    /// Sum of two tensors of one shape.
    fn add(&self, a: &Tensor, b: &Tensor) -> Result<Tensor>;
    /// `into += x`, in place when nothing shares `into`.
    fn accumulate(&self, into: Tensor, x: &Tensor) -> Result<Tensor>;
    /// `x·factor`.
    fn scale(&self, x: &Tensor, factor: f32) -> Result<Tensor>;
    /// Sums `[B,...,C]` over all but the first and last axis: `[B,C]`.
    fn sum_rows(&self, x: &Tensor) -> Result<Tensor>;
    /// Joins two tensors along the last axis.
    fn concat_last(&self, a: &Tensor, b: &Tensor) -> Result<Tensor>;
    /// Cuts the last axis into its first `at` elements and the rest.
    fn split_last(&self, x: &Tensor, at: usize) -> Result<(Tensor, Tensor)>;
    /// Each pixel of `[B,H,W,C]` four times: `[B,2H,2W,C]`.
    fn upsample2x(&self, x: &Tensor) -> Result<Tensor>;
    /// Gradient of [`Backend::upsample2x`]: sums of 2x2 pixels.
    fn upsample2x_backward(&self, dy: &Tensor) -> Result<Tensor>;
    /// Rows of `table` `[N,C]` chosen by `ids`: `[ids.len(),C]`. An id outside is an error on the
    /// CPU; a card reads the last row.
    fn embedding(&self, table: &Tensor, ids: &Ids) -> Result<Tensor>;
    /// Puts the rows of `b` behind those of `a`, both read as `[rows, last axis]`.
    fn concat_rows(&self, a: &Tensor, b: &Tensor) -> Result<Tensor>;
    /// Multiplies row `i` of `x`, read as `[rows, last axis]`, by `factors[i]`, f32.
    fn scale_rows(&self, x: &Tensor, factors: &Tensor) -> Result<Tensor>;
    /// Product of two f32 tensors of one shape, element by element.
    fn multiply(&self, a: &Tensor, b: &Tensor) -> Result<Tensor>;
    /// Kronecker product of f32 `[a,b]` and `[c,window,d]`: `[a·c,window,b·d]`, for linear layers
    /// with a window of 1.
    fn kronecker(&self, first: &Tensor, second: &Tensor) -> Result<Tensor>;
    /// Gradients of both matrices of [`Backend::kronecker`]; `dy` has its elements.
    fn kronecker_backward(
        &self,
        dy: &Tensor,
        first: &Tensor,
        second: &Tensor,
    ) -> Result<(Tensor, Tensor)>;
    /// Multiplies each row `v_i` (outermost axis, f32) by `multiplier·(magnitude_i/‖v_i‖ - 1) + 1`;
    /// gives the result and the norms, which have the shape of `magnitude`.
    fn rescale_rows(
        &self,
        v: &Tensor,
        magnitude: &Tensor,
        multiplier: f32,
    ) -> Result<(Tensor, Tensor)>;
    /// Gradients of `v` and `magnitude` of [`Backend::rescale_rows`], through the norms as well.
    fn rescale_rows_backward(
        &self,
        dy: &Tensor,
        v: &Tensor,
        norms: &Tensor,
        magnitude: &Tensor,
        multiplier: f32,
    ) -> Result<(Tensor, Tensor)>;
    /// Weighted mean loss of each sample (f32 `[B]`, the weight in it) and the gradient of `pred`
    /// of their sum (with `gradient_weight` for the weight), in the type of `pred`. `target` is f32; both are `[B,...]`.
    fn loss(&self, pred: &Tensor, target: &Tensor, spec: &LossSpec) -> Result<(Tensor, Tensor)>;
    /// One optimizer step over `p.range` of flat f32 tensors; `param` and both moments change in
    /// place.
    fn adamw(
        &self,
        p: &AdamWStep,
        param: &mut Tensor,
        grad: &Tensor,
        moments: (&mut Tensor, &mut Tensor),
    ) -> Result<()>;
    /// `flat[offset..offset + x.len()] += x`, both f32, in place: a tensor's gradient into the flat
    /// gradient of all.
    fn add_at(&self, flat: &mut Tensor, offset: usize, x: &Tensor) -> Result<()>;
}
