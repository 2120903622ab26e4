//! What one module of a LoRA file, of whatever kind and naming, does to the weight of its layer.
//!
//! The weight is a matrix `[out, in·kh·kw]` in the order of files, f32. The formulas are those of
//! `lorarun merge` (`tools/src/delta.rs`), which works on blocks of rows within one core; here a layer is
//! made at a time, by the engine's products on all cores.

use engine::backend::Gemm;
use engine::{DType, Device, Tensor};
use formats::FormatError;
use formats::adapter::{AdapterFile, AdapterKind, AdapterModule, KronFactor, Naming};

use super::target::{LayerKind, Target};
use crate::{ModelError, Result};

/// A module at work on the layer `target`.
#[derive(Clone, Copy)]
pub(super) struct Change<'f> {
    pub file: &'f AdapterFile,
    pub module: &'f AdapterModule,
    pub target: &'f Target,
    /// 0 changes nothing, 1 is what was trained.
    pub multiplier: f32,
}

/// A Tucker core `[i, j, window]`.
struct Core {
    sizes: [usize; 3],
    values: Vec<f32>,
}

impl Change<'_> {
    /// The weight `before`, changed.
    ///
    /// DoRA gives `before` plus the update the trained lengths; the multiplier leads from `before` to
    /// there, as in ComfyUI and the WebUI.
    pub fn apply(&self, before: Tensor) -> Result<Tensor> {
        let Some(key) = &self.module.dora_scale else { return self.add(before, self.multiplier) };
        let old = before.to_vec_f32()?;
        let mut new = self.add(before, 1.)?.to_vec_f32()?;
        self.stretch(key, &mut new)?;
        let towards = |(new, old): (f32, f32)| old + self.multiplier * (new - old);
        let sum: Vec<f32> = new.into_iter().zip(old).map(towards).collect();
        matrix(self.target.out, sum)
    }

    /// `before + factor·scale·update`.
    fn add(&self, before: Tensor, factor: f32) -> Result<Tensor> {
        let factor = factor * self.module.scale(self.file);
        let product = |left: &Tensor, right: &Tensor| {
            self.fits(left.dim(1), right.dim(0))?;
            self.fits(left.dim(0) * right.dim(1), before.len())?;
            let product = Gemm::new(left, false, right, false);
            let gemm = Gemm { alpha: factor, residual: Some(&before), ..product };
            Ok(before.device().backend().gemm(&gemm)?)
        };
        let update = match &self.module.kind {
            AdapterKind::LowRank { down, up, mid: None } => {
                return product(&self.matrix(up)?, &self.matrix(down)?);
            }
            AdapterKind::LowRank { down, up, mid: Some(mid) } => {
                return product(&self.matrix(up)?, &self.half(mid, down)?);
            }
            AdapterKind::Hadamard { w1_a, w1_b, w2_a, w2_b, t1, t2 } => {
                let mut first = self.product(w1_a, w1_b, t1.as_deref())?.to_vec_f32()?;
                let second = self.product(w2_a, w2_b, t2.as_deref())?.to_vec_f32()?;
                self.fits(first.len(), second.len())?;
                first.iter_mut().zip(second).for_each(|(x, y)| *x *= y);
                first
            }
            AdapterKind::Kronecker { w1, w2, t2 } => {
                kronecker(&self.factor(w1, None)?, &self.factor(w2, t2.as_deref())?)?
            }
            AdapterKind::Full { diff } => self.values(diff)?,
            AdapterKind::Norm { .. } => return Err(no_layer(self.module)),
        };
        self.fits(update.len(), before.len())?;
        let mut sum = before.to_vec_f32()?;
        sum.iter_mut().zip(update).for_each(|(sum, update)| *sum += factor * update);
        matrix(self.target.out, sum)
    }

    /// What is added to the layer's bias, if the module has that.
    pub fn add_bias(&self, bias: &mut [f32]) -> Result<()> {
        let Some(key) = &self.module.bias else { return Ok(()) };
        let update = self.values(key)?;
        self.fits(update.len(), bias.len())?;
        bias.iter_mut().zip(update).for_each(|(sum, update)| *sum += self.multiplier * update);
        Ok(())
    }

    /// Gives the rows of a weight, or its inputs, the lengths of `key`.
    fn stretch(&self, key: &str, weight: &mut [f32]) -> Result<()> {
        let shape = self.file.view(key)?.shape;
        let lengths = self.values(key)?;
        let ones = |sizes: &[usize]| sizes.iter().all(|size| *size == 1);
        let (out, input) = (self.target.out, self.target.input);
        let of_rows = match *shape.as_slice() {
            [n, ref rest @ ..] if n == out && ones(rest) => true,
            [1, n, ref rest @ ..] if n == out && ones(rest) && self.file.naming == Naming::Peft => {
                true
            }
            [1, n, ref rest @ ..] if n == input && ones(rest) => false,
            _ => return Err(self.bad(format!("its lengths have the shape {shape:?}"), key)),
        };
        let columns = self.target.weight_columns();
        let square = |x: &f32| f64::from(*x).powi(2);
        if of_rows {
            for (row, length) in weight.chunks_mut(columns).zip(lengths) {
                let norm = row.iter().map(square).sum::<f64>().sqrt() as f32;
                row.iter_mut().for_each(|x| *x *= length / (norm + f32::EPSILON));
            }
            return Ok(());
        }
        let window = match self.target.kind {
            LayerKind::Linear => 1,
            LayerKind::Conv { kernel: (height, width) } => height * width,
        };
        let mut squares = vec![0.; input];
        for row in weight.chunks(columns) {
            for (sum, cell) in squares.iter_mut().zip(row.chunks(window)) {
                *sum += cell.iter().map(square).sum::<f64>();
            }
        }
        for row in weight.chunks_mut(columns) {
            for ((cell, square), length) in row.chunks_mut(window).zip(&squares).zip(&lengths) {
                let norm = square.sqrt() as f32;
                cell.iter_mut().for_each(|x| *x *= length / (norm + f32::EPSILON));
            }
        }
        Ok(())
    }

    /// `a·b`, or with a core `t` the sum of `t[i,j,w]·a[i,o]·b[j,c]`.
    fn product(&self, a: &str, b: &str, t: Option<&str>) -> Result<Tensor> {
        let (left, right) = match t {
            None => (self.matrix(a)?, self.matrix(b)?),
            Some(t) => (self.matrix(a)?, self.half(t, b)?),
        };
        let turned = t.is_some();
        self.fits(left.dim(usize::from(!turned)), right.dim(0))?;
        Ok(left.device().backend().gemm(&Gemm::new(&left, turned, &right, false))?)
    }

    /// One side of a Kronecker product.
    fn factor(&self, factor: &KronFactor, t: Option<&str>) -> Result<Tensor> {
        match factor {
            KronFactor::Whole(key) => self.matrix(key),
            KronFactor::Product(a, b) => self.product(a, b, t),
        }
    }

    /// The sum over `j` of `core[i,j,w]·b[j,c]`, as `[i, c·window]`.
    fn half(&self, core: &str, b: &str) -> Result<Tensor> {
        let shape = self.file.view(core)?.shape;
        let &[outer, inner, ref window @ ..] = shape.as_slice() else {
            return Err(self.bad(format!("its core has the shape {shape:?}"), core));
        };
        let core =
            Core { sizes: [outer, inner, window.iter().product()], values: self.values(core)? };
        let right = self.matrix(b)?;
        self.fits(inner, right.dim(0))?;
        let (columns, right) = (right.dim(1), right.to_vec_f32()?);
        let [outer, inner, window] = core.sizes;
        let mut out = vec![0.; outer * columns * window];
        for (i, row) in out.chunks_mut(columns * window).enumerate() {
            for (j, of_right) in right.chunks(columns).enumerate() {
                let taps = &core.values[(i * inner + j) * window..][..window];
                for (cell, x) in row.chunks_mut(window).zip(of_right) {
                    cell.iter_mut().zip(taps).for_each(|(sum, tap)| *sum += tap * x);
                }
            }
        }
        matrix(outer, out)
    }

    /// A tensor of the file as `[rows, all else]`.
    fn matrix(&self, key: &str) -> Result<Tensor> {
        let rows = self.file.view(key)?.shape.first().copied().unwrap_or(1);
        matrix(rows, self.values(key)?)
    }

    fn values(&self, key: &str) -> Result<Vec<f32>> {
        let values = self.file.view(key)?.to_f32();
        if values.is_empty() || values.iter().any(|x| !x.is_finite()) {
            let reason = "it has no numbers, or some that are not finite, in this key";
            return Err(self.bad(reason.to_owned(), key));
        }
        Ok(values)
    }

    fn fits(&self, one: usize, other: usize) -> Result<()> {
        match one == other {
            true => Ok(()),
            false => Err(self.bad(
                format!("its tensors do not fit each other or the layer, {one} and {other}"),
                &self.module.stored,
            )),
        }
    }

    fn bad(&self, reason: String, key: &str) -> ModelError {
        let path = self.file.path.clone();
        FormatError::BadLora { path, reason, key: key.to_owned() }.into()
    }
}

/// A kind of module that changes no layer.
pub(super) fn no_layer(module: &AdapterModule) -> ModelError {
    ModelError::Network(format!(
        "the LoRA changes a normalisation, only linear layers and convolutions can be changed, by: \
         {}\nhint: `lorarun merge` puts it into the model, of which pictures can be made then",
        module.stored
    ))
}

/// `values` as `[rows, all else]`.
fn matrix(rows: usize, values: Vec<f32>) -> Result<Tensor> {
    let rows = rows.max(1);
    let shape = [rows, values.len() / rows];
    Ok(Tensor::from_f32(Device::Cpu, &shape, &values, DType::F32)?)
}

/// Each element of the first times all of the second, whose window stays innermost.
fn kronecker(first: &Tensor, second: &Tensor) -> Result<Vec<f32>> {
    let (columns, inner) = (first.dim(1).max(1), second.dim(1).max(1));
    let (first, second) = (first.to_vec_f32()?, second.to_vec_f32()?);
    let mut product = Vec::with_capacity(first.len() * second.len());
    for left in first.chunks(columns) {
        for right in second.chunks(inner) {
            for factor in left {
                product.extend(right.iter().map(|x| factor * x));
            }
        }
    }
    Ok(product)
}
