//! The operation table of a card: each operation in the file of its kind.

use super::{
    attention, card::Card, compose, conv, layout, loss, matmul, norm, optimizer, pointwise,
};
use crate::backend::{
    Activation, AdamWStep, AttentionKind, AttentionOut, AttentionSaved, Backend, Conv,
    ConvGeometry, Gemm, GroupNormShape, LossSpec,
};
use crate::{DType, Ids, Result, Tensor};

impl Backend for Card {
    fn cast(&self, x: &Tensor, dtype: DType) -> Result<Tensor> {
        pointwise::cast(self.itself(), x, dtype)
    }
    fn gemm(&self, p: &Gemm) -> Result<Tensor> {
        matmul::gemm(self.itself(), p)
    }
    fn conv2d(&self, p: &Conv) -> Result<Tensor> {
        conv::conv2d(self.itself(), p)
    }
    fn conv2d_backward_input(
        &self,
        dy: &Tensor,
        w: &Tensor,
        geometry: ConvGeometry,
        input: (usize, usize),
        onto: Option<Tensor>,
    ) -> Result<Tensor> {
        conv::conv2d_backward_input(self.itself(), dy, w, geometry, input, onto)
    }
    fn conv2d_backward_weight(
        &self,
        x: &Tensor,
        dy: &Tensor,
        geometry: ConvGeometry,
    ) -> Result<Tensor> {
        conv::conv2d_backward_weight(self.itself(), x, dy, geometry)
    }
    fn group_norm(
        &self,
        x: &Tensor,
        gamma: &Tensor,
        beta: &Tensor,
        shape: GroupNormShape,
    ) -> Result<(Tensor, Tensor)> {
        norm::group_norm(self.itself(), x, gamma, beta, shape)
    }
    fn group_norm_backward(
        &self,
        dy: Tensor,
        x: &Tensor,
        stats: &Tensor,
        affine: (&Tensor, &Tensor),
        shape: GroupNormShape,
    ) -> Result<Tensor> {
        norm::group_norm_backward(self.itself(), dy, x, stats, affine, shape)
    }
    fn layer_norm(
        &self,
        x: &Tensor,
        gamma: &Tensor,
        beta: &Tensor,
        eps: f32,
    ) -> Result<(Tensor, Tensor)> {
        norm::layer_norm(self.itself(), x, gamma, beta, eps)
    }
    fn layer_norm_backward(
        &self,
        dy: Tensor,
        x: &Tensor,
        stats: &Tensor,
        gamma: &Tensor,
    ) -> Result<Tensor> {
        norm::layer_norm_backward(self.itself(), dy, x, stats, gamma)
    }
    fn attention(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        kind: AttentionKind,
    ) -> Result<AttentionOut> {
        attention::attention(self.itself(), q, k, v, kind)
    }
    fn attention_backward(
        &self,
        dy: &Tensor,
        saved: &AttentionSaved,
        kind: AttentionKind,
    ) -> Result<(Tensor, Tensor, Tensor)> {
        attention::attention_backward(self.itself(), dy, saved, kind)
    }
    fn activation(&self, kind: Activation, x: &Tensor) -> Result<Tensor> {
        pointwise::activation(self.itself(), kind, x)
    }
    fn activation_backward(&self, kind: Activation, dy: Tensor, x: &Tensor) -> Result<Tensor> {
        pointwise::activation_backward(self.itself(), kind, dy, x)
    }
    fn geglu(&self, x: &Tensor) -> Result<Tensor> {
        pointwise::geglu(self.itself(), x)
    }
    fn geglu_backward(&self, dy: &Tensor, x: &Tensor) -> Result<Tensor> {
        pointwise::geglu_backward(self.itself(), dy, x)
    }
    fn add(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        pointwise::add(self.itself(), a, b)
    }
    fn accumulate(&self, into: Tensor, x: &Tensor) -> Result<Tensor> {
        pointwise::accumulate(self.itself(), into, x)
    }
    fn scale(&self, x: &Tensor, factor: f32) -> Result<Tensor> {
        pointwise::scale(self.itself(), x, factor)
    }
    fn sum_rows(&self, x: &Tensor) -> Result<Tensor> {
        pointwise::sum_rows(self.itself(), x)
    }
    fn concat_last(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        layout::concat_last(self.itself(), a, b)
    }
    fn split_last(&self, x: &Tensor, at: usize) -> Result<(Tensor, Tensor)> {
        layout::split_last(self.itself(), x, at)
    }
    fn upsample2x(&self, x: &Tensor) -> Result<Tensor> {
        layout::upsample2x(self.itself(), x)
    }
    fn upsample2x_backward(&self, dy: &Tensor) -> Result<Tensor> {
        layout::upsample2x_backward(self.itself(), dy)
    }
    fn embedding(&self, table: &Tensor, ids: &Ids) -> Result<Tensor> {
        layout::embedding(self.itself(), table, ids)
    }
    fn concat_rows(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        layout::concat_rows(self.itself(), a, b)
    }
    fn scale_rows(&self, x: &Tensor, factors: &Tensor) -> Result<Tensor> {
        pointwise::scale_rows(self.itself(), x, factors)
    }
    fn multiply(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        compose::multiply(self.itself(), a, b)
    }
    fn kronecker(&self, first: &Tensor, second: &Tensor) -> Result<Tensor> {
        compose::kronecker(self.itself(), first, second)
    }
    fn kronecker_backward(
        &self,
        dy: &Tensor,
        first: &Tensor,
        second: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        compose::kronecker_backward(self.itself(), dy, first, second)
    }
    fn rescale_rows(
        &self,
        v: &Tensor,
        magnitude: &Tensor,
        multiplier: f32,
    ) -> Result<(Tensor, Tensor)> {
        compose::rescale_rows(self.itself(), v, magnitude, multiplier)
    }
    fn rescale_rows_backward(
        &self,
        dy: &Tensor,
        v: &Tensor,
        norms: &Tensor,
        magnitude: &Tensor,
        multiplier: f32,
    ) -> Result<(Tensor, Tensor)> {
        compose::rescale_rows_backward(self.itself(), dy, v, norms, magnitude, multiplier)
    }
    fn loss(&self, pred: &Tensor, target: &Tensor, spec: &LossSpec) -> Result<(Tensor, Tensor)> {
        loss::loss(self.itself(), pred, target, spec)
    }
    fn adamw(
        &self,
        p: &AdamWStep,
        param: &mut Tensor,
        grad: &Tensor,
        moments: (&mut Tensor, &mut Tensor),
    ) -> Result<()> {
        optimizer::adamw(self.itself(), p, param, grad, moments)
    }
    fn add_at(&self, flat: &mut Tensor, offset: usize, x: &Tensor) -> Result<()> {
        optimizer::add_at(self.itself(), flat, offset, x)
    }
}
