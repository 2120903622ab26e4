//! Updates whose weight is made whole before it is used: Hadamard and Kronecker products, and any
//! update with a trained magnitude of its rows (DoRA, arXiv:2402.09353).
//!
//! `weight = frozen + scale·update`, in f32, rounded once to the compute type: what mixed precision
//! does with any trained weight. It is made again in the backward pass instead of kept: keeping it
//! would cost a copy of every adapted layer, making it costs about `rank/tokens` of the layer's own
//! product. The gradient of the whole weight, f32, lives only while the layer's backward runs.

use super::draws::Dropouts;
use super::factor::Factor;
use crate::tape::Gradients;
use crate::{DType, EngineError, ParamId, Result, Tape, Tensor, Value};

/// How a layer's update comes from its factors.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Update<P = ParamId> {
    /// The factor itself.
    Plain(Factor<P>),
    /// Product element by element (LoHa, arXiv:2108.06098).
    Hadamard(Factor<P>, Factor<P>),
    /// Each element of the first, which has no window, times the second (LoKr, arXiv:2212.10650).
    Kronecker(Factor<P>, Factor<P>),
}

/// The trained lengths of the weight's rows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Magnitude<P = ParamId> {
    /// `[out]`.
    pub rows: P,
    /// How far the lengths go from those of the updated weight (0) to the trained ones (1).
    pub multiplier: f32,
}

/// An adapter that replaces the layer's weight.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ComposedAdapter {
    /// What is added to the frozen weight.
    pub update: Update,
    /// Factor of the update; without a magnitude, times the multiplier.
    pub scale: f32,
    /// Trained lengths of the rows of the sum.
    pub magnitude: Option<Magnitude>,
    /// What is left out in training; single elements never are.
    pub dropouts: Dropouts,
    /// Key of the module's draws.
    pub module: u64,
}

/// The adapter at work on one input.
pub(in crate::ops) struct Active {
    update: Update<Value>,
    scale: f32,
    magnitude: Option<Magnitude<Value>>,
    /// Factors of the update's rows.
    rows: Option<Vec<f32>>,
    frozen: Tensor,
    x: Tensor,
    params: Vec<Value>,
}

/// The factors of an update, with what they came to where the way back needs it.
enum Parts<'a> {
    Plain(&'a Factor<Value>),
    Hadamard([&'a Factor<Value>; 2], [Tensor; 2]),
    Kronecker([&'a Factor<Value>; 2], [Tensor; 2]),
}

impl ComposedAdapter {
    pub(super) fn activate(&self, tape: &Tape, x: &Value, frozen: &Tensor) -> Result<Active> {
        let update = match &self.update {
            Update::Plain(factor) => Update::Plain(factor.resolve(tape)?),
            Update::Hadamard(a, b) => Update::Hadamard(a.resolve(tape)?, b.resolve(tape)?),
            Update::Kronecker(a, b) => Update::Kronecker(a.resolve(tape)?, b.resolve(tape)?),
        };
        let magnitude = match &self.magnitude {
            Some(Magnitude { rows, multiplier }) => {
                Some(Magnitude { rows: tape.param(*rows)?, multiplier: *multiplier })
            }
            None => None,
        };
        let mut params = match &update {
            Update::Plain(factor) => factor.params(),
            Update::Hadamard(a, b) | Update::Kronecker(a, b) => [a.params(), b.params()].concat(),
        };
        params.extend(magnitude.iter().map(|magnitude| magnitude.rows.clone()));
        let rows = self.dropouts.rows(tape, self.module, frozen.dim(0));
        let (frozen, x) = (frozen.clone(), x.tensor().clone());
        Ok(Active { update, scale: self.scale, magnitude, rows, frozen, x, params })
    }
}

impl Active {
    /// The trainable inputs.
    pub(super) fn params(&self) -> &[Value] {
        &self.params
    }

    /// The weight of the layer with this adapter, in the compute type.
    pub(super) fn weight(&self) -> Result<Tensor> {
        let (sum, _) = self.compose()?;
        let weight = match &self.magnitude {
            Some(Magnitude { rows, multiplier }) => {
                let backend = sum.device().backend();
                backend.rescale_rows(&sum, rows.tensor(), *multiplier)?.0
            }
            None => sum,
        };
        weight.to_dtype(self.frozen.dtype())
    }

    /// `frozen + scale·update` in f32, before any magnitude.
    fn compose(&self) -> Result<(Tensor, Parts<'_>)> {
        let (update, parts) = self.update()?;
        let backend = self.frozen.device().backend();
        Ok((backend.accumulate(update, &self.frozen.to_dtype(DType::F32)?)?, parts))
    }

    /// `scale·update`, in the shape of the weight; the scale goes with the first factor.
    fn update(&self) -> Result<(Tensor, Parts<'_>)> {
        let backend = self.frozen.device().backend();
        let (update, parts) = match &self.update {
            Update::Plain(factor) => (factor.compose(self.scale)?, Parts::Plain(factor)),
            Update::Hadamard(left, right) => {
                let (first, second) = (left.compose(self.scale)?, right.compose(1.)?);
                let update = backend.multiply(&first, &second)?;
                (update, Parts::Hadamard([left, right], [first, second]))
            }
            Update::Kronecker(left, right) => {
                let first = left.compose(self.scale)?;
                let second = self.windowed(&first, &right.compose(1.)?)?;
                let update = backend.kronecker(&first, &second)?;
                (update, Parts::Kronecker([left, right], [first, second]))
            }
        };
        if update.len() != self.frozen.len() {
            let detail = format!("update {:?}, weight {:?}", update.shape(), self.frozen.shape());
            return Err(EngineError::shape("composed adapter", detail));
        }
        let update = self.with_rows_dropped(update)?;
        Ok((update.reshape(self.frozen.shape())?, parts))
    }

    fn with_rows_dropped(&self, update: Tensor) -> Result<Tensor> {
        let Some(rows) = &self.rows else { return Ok(update) };
        let matrix = update.reshape(&[rows.len(), update.len() / rows.len().max(1)])?;
        let factors = Tensor::from_f32(matrix.device(), &[rows.len()], rows, DType::F32)?;
        matrix.device().backend().scale_rows(&matrix, &factors)
    }

    /// The second matrix of a Kronecker product as `[c, window, d]`, by the shape of the weight.
    fn windowed(&self, first: &Tensor, second: &Tensor) -> Result<Tensor> {
        let (rows, columns) = (self.frozen.dim(0).max(1), self.frozen.last_dim().max(1));
        let window = self.frozen.len() / (rows * columns);
        second.reshape(&[second.dim(0), window, columns / first.last_dim().max(1)])
    }

    /// Adds the gradients of the parameters; gives [`Active::weight`] if `with_weight`.
    pub(super) fn backward(
        &self,
        dy: &Tensor,
        grads: &mut Gradients<'_, '_>,
        with_weight: bool,
        weight_gradient: impl FnOnce(&Tensor, &Tensor) -> Result<Tensor>,
    ) -> Result<Option<Tensor>> {
        let backend = dy.device().backend();
        let (sum, parts) = self.compose()?;
        let gradient = weight_gradient(&self.x, dy)?.reshape(self.frozen.shape())?;
        let (weight, gradient) = match &self.magnitude {
            Some(Magnitude { rows, multiplier }) => {
                let lengths = rows.tensor();
                let (weight, norms) = backend.rescale_rows(&sum, lengths, *multiplier)?;
                let (of_sum, of_lengths) =
                    backend.rescale_rows_backward(&gradient, &sum, &norms, lengths, *multiplier)?;
                grads.add(rows.origin(), of_lengths)?;
                (weight, of_sum)
            }
            None => (sum, gradient),
        };
        self.pull_back(parts, &gradient, grads)?;
        with_weight.then(|| weight.to_dtype(self.frozen.dtype())).transpose()
    }

    /// From the gradient of the sum to those of the factors' parameters.
    fn pull_back(
        &self,
        parts: Parts<'_>,
        gradient: &Tensor,
        grads: &mut Gradients<'_, '_>,
    ) -> Result<()> {
        let backend = gradient.device().backend();
        let rows = gradient.dim(0).max(1);
        let matrix = gradient.reshape(&[rows, gradient.len() / rows])?;
        let matrix = self.with_rows_dropped(matrix)?;
        match parts {
            Parts::Plain(factor) => factor.pull_back(&matrix, self.scale, grads),
            Parts::Hadamard([left, right], [first, second]) => {
                left.pull_back(&backend.multiply(&matrix, &second)?, self.scale, grads)?;
                right.pull_back(&backend.multiply(&matrix, &first)?, 1., grads)
            }
            Parts::Kronecker([left, right], [first, second]) => {
                let (of_first, of_second) = backend.kronecker_backward(&matrix, &first, &second)?;
                let rows = second.dim(0).max(1);
                let of_second = of_second.reshape(&[rows, second.len() / rows])?;
                left.pull_back(&of_first, self.scale, grads)?;
                right.pull_back(&of_second, 1., grads)
            }
        }
    }
}
