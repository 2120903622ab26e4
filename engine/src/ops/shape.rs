//! Operations that move elements without arithmetic.

use crate::{EngineError, Result, RowChoice, Tape, Tensor, Value};

impl<'m> Tape<'m> {
    /// The same elements under another shape; no copy.
    pub fn reshape(&self, x: &Value, shape: &[usize]) -> Result<Value> {
        let y = x.tensor().reshape(shape)?;
        let (before, origin) = (x.shape().to_vec(), x.origin());
        Ok(self.record(y, &[x], move |dy, grads| grads.add(origin, dy.reshape(&before)?)))
    }

    /// Joins two values along the last axis (channels).
    pub fn concat_last(&self, a: &Value, b: &Value) -> Result<Value> {
        let backend = a.tensor().device().backend();
        let y = backend.concat_last(a.tensor(), b.tensor())?;
        let at = a.tensor().last_dim();
        let (left, right) = (a.origin(), b.origin());
        Ok(self.record(y, &[a, b], move |dy, grads| {
            let (da, db) = dy.device().backend().split_last(&dy, at)?;
            grads.add(left, da)?;
            grads.add(right, db)
        }))
    }

    /// Each pixel of `[B,H,W,C]` four times (nearest neighbour): `[B,2H,2W,C]`.
    pub fn upsample2x(&self, x: &Value) -> Result<Value> {
        let y = x.tensor().device().backend().upsample2x(x.tensor())?;
        let origin = x.origin();
        Ok(self.record(y, &[x], move |dy, grads| {
            grads.add(origin, dy.device().backend().upsample2x_backward(&dy)?)
        }))
    }

    /// Rows `rows` of the value read as `[rows, last axis]`, in that order: `[rows.len(), C]`.
    ///
    /// Joins the chunks of a long prompt: the gradient of a row chosen once goes back to its place.
    pub fn gather_rows(&self, x: &Value, rows: &[u32]) -> Result<Value> {
        self.gather(x, &RowChoice::constant(x.tensor().device(), rows, x.tensor().rows())?)
    }

    /// [`Tape::gather_rows`] with rows that may differ each time the operation runs.
    pub fn gather(&self, x: &Value, choice: &RowChoice) -> Result<Value> {
        let (count, width) = (x.tensor().rows(), x.tensor().last_dim());
        if choice.back.len() != count {
            let detail = format!("rows of {} for {:?}", choice.back.len(), x.shape());
            return Err(EngineError::shape("gather", detail));
        }
        let flat = x.tensor().reshape(&[count, width])?;
        let y = flat.device().backend().embedding(&flat, &choice.rows)?;
        let (before, origin, back) = (x.shape().to_vec(), x.origin(), choice.back.clone());
        Ok(self.record(y, &[x], move |dy, grads| {
            let backend = dy.device().backend();
            // Rows that were not chosen read from one row of zeros behind the gradient.
            let zero = Tensor::zeros(dy.device(), &[1, width], dy.dtype())?;
            let padded = backend.concat_rows(&dy, &zero)?;
            grads.add(origin, backend.embedding(&padded, &back)?.reshape(&before)?)
        }))
    }

    /// Multiplies row `i` of the value read as `[rows, last axis]` by `factors[i]`, f32.
    pub fn scale_rows(&self, x: &Value, factors: &Tensor) -> Result<Value> {
        if factors.len() != x.tensor().rows() {
            let detail = format!("factors {:?} for {:?}", factors.shape(), x.shape());
            return Err(EngineError::shape("scale_rows", detail));
        }
        let y = x.tensor().device().backend().scale_rows(x.tensor(), factors)?;
        let (factors, origin) = (factors.clone(), x.origin());
        Ok(self.record(y, &[x], move |dy, grads| {
            grads.add(origin, dy.device().backend().scale_rows(&dy, &factors)?)
        }))
    }
}
