//! The operation table of the host processor: each kernel in the file of its kind.

mod activation;
mod attention;
mod compose;
mod conv;
mod elementwise;
mod features;
mod gemm;
mod kernel_dot;
mod kernel_tile;
mod kernel_transpose;
mod layout;
mod loss;
mod norm;
mod optimizer;
mod simd;
mod transcendental;

pub(crate) use elementwise::round;
pub(crate) use optimizer::Factors;

use crate::backend::{
    Activation, AdamWStep, AttentionKind, AttentionOut, AttentionSaved, Backend, Conv,
    ConvGeometry, Gemm, GroupNormShape, LossSpec,
};
use crate::{DType, Ids, Result, Tensor};

/// Kernels for the CPU, on all threads of the global rayon pool.
pub struct Cpu;

impl Backend for Cpu {
    fn cast(&self, x: &Tensor, dtype: DType) -> Result<Tensor> {
        elementwise::cast(x, dtype)
    }
    fn gemm(&self, p: &Gemm) -> Result<Tensor> {
        gemm::gemm(p)
    }
    fn conv2d(&self, p: &Conv) -> Result<Tensor> {
        conv::conv2d(p)
    }
    fn conv2d_backward_input(
        &self,
        dy: &Tensor,
        w: &Tensor,
        geometry: ConvGeometry,
        input: (usize, usize),
        onto: Option<Tensor>,
    ) -> Result<Tensor> {
        conv::conv2d_backward_input(dy, w, geometry, input, onto)
    }
    fn conv2d_backward_weight(
        &self,
        x: &Tensor,
        dy: &Tensor,
        geometry: ConvGeometry,
    ) -> Result<Tensor> {
        conv::conv2d_backward_weight(x, dy, geometry)
    }
    fn group_norm(
        &self,
        x: &Tensor,
        gamma: &Tensor,
        beta: &Tensor,
        shape: GroupNormShape,
    ) -> Result<(Tensor, Tensor)> {
        norm::group_norm(x, gamma, beta, shape)
    }
    fn group_norm_backward(
        &self,
        dy: Tensor,
        x: &Tensor,
        stats: &Tensor,
        affine: (&Tensor, &Tensor),
        shape: GroupNormShape,
    ) -> Result<Tensor> {
        norm::group_norm_backward(dy, x, stats, affine, shape)
    }
    fn layer_norm(
        &self,
        x: &Tensor,
        gamma: &Tensor,
        beta: &Tensor,
        eps: f32,
    ) -> Result<(Tensor, Tensor)> {
        norm::layer_norm(x, gamma, beta, eps)
    }
    fn layer_norm_backward(
        &self,
        dy: Tensor,
        x: &Tensor,
        stats: &Tensor,
        gamma: &Tensor,
    ) -> Result<Tensor> {
        norm::layer_norm_backward(dy, x, stats, gamma)
    }
    fn attention(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        kind: AttentionKind,
    ) -> Result<AttentionOut> {
        attention::attention(q, k, v, kind)
    }
    fn attention_backward(
        &self,
        dy: &Tensor,
        saved: &AttentionSaved,
        kind: AttentionKind,
    ) -> Result<(Tensor, Tensor, Tensor)> {
        attention::attention_backward(dy, saved, kind)
    }
    fn activation(&self, kind: Activation, x: &Tensor) -> Result<Tensor> {
        activation::activation(kind, x)
    }
    fn activation_backward(&self, kind: Activation, dy: Tensor, x: &Tensor) -> Result<Tensor> {
        activation::activation_backward(kind, dy, x)
    }
    fn geglu(&self, x: &Tensor) -> Result<Tensor> {
        activation::geglu(x)
    }
    fn geglu_backward(&self, dy: &Tensor, x: &Tensor) -> Result<Tensor> {
        activation::geglu_backward(dy, x)
    }
    fn add(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        elementwise::add(a, b)
    }
    fn accumulate(&self, into: Tensor, x: &Tensor) -> Result<Tensor> {
        elementwise::accumulate(into, x)
    }
    fn scale(&self, x: &Tensor, factor: f32) -> Result<Tensor> {
        elementwise::scale(x, factor)
    }
    fn sum_rows(&self, x: &Tensor) -> Result<Tensor> {
        elementwise::sum_rows(x)
    }
    fn concat_last(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        layout::concat_last(a, b)
    }
    fn split_last(&self, x: &Tensor, at: usize) -> Result<(Tensor, Tensor)> {
        layout::split_last(x, at)
    }
    fn upsample2x(&self, x: &Tensor) -> Result<Tensor> {
        layout::upsample2x(x)
    }
    fn upsample2x_backward(&self, dy: &Tensor) -> Result<Tensor> {
        layout::upsample2x_backward(dy)
    }
    fn embedding(&self, table: &Tensor, ids: &Ids) -> Result<Tensor> {
        layout::embedding(table, ids)
    }
    fn concat_rows(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        layout::concat_rows(a, b)
    }
    fn scale_rows(&self, x: &Tensor, factors: &Tensor) -> Result<Tensor> {
        elementwise::scale_rows(x, factors)
    }
    fn multiply(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        compose::multiply(a, b)
    }
    fn kronecker(&self, first: &Tensor, second: &Tensor) -> Result<Tensor> {
        compose::kronecker(first, second)
    }
    fn kronecker_backward(
        &self,
        dy: &Tensor,
        first: &Tensor,
        second: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        compose::kronecker_backward(dy, first, second)
    }
    fn rescale_rows(
        &self,
        v: &Tensor,
        magnitude: &Tensor,
        multiplier: f32,
    ) -> Result<(Tensor, Tensor)> {
        compose::rescale_rows(v, magnitude, multiplier)
    }
    fn rescale_rows_backward(
        &self,
        dy: &Tensor,
        v: &Tensor,
        norms: &Tensor,
        magnitude: &Tensor,
        multiplier: f32,
    ) -> Result<(Tensor, Tensor)> {
        compose::rescale_rows_backward(dy, v, norms, magnitude, multiplier)
    }
    fn loss(&self, pred: &Tensor, target: &Tensor, spec: &LossSpec) -> Result<(Tensor, Tensor)> {
        loss::loss(pred, target, spec)
    }
    fn adamw(
        &self,
        p: &AdamWStep,
        param: &mut Tensor,
        grad: &Tensor,
        moments: (&mut Tensor, &mut Tensor),
    ) -> Result<()> {
        optimizer::adamw(p, param, grad, moments)
    }
    fn add_at(&self, flat: &mut Tensor, offset: usize, x: &Tensor) -> Result<()> {
        optimizer::add_at(flat, offset, x)
    }
}
