//! Random choices of adapters in training: what is left out of one forward pass.
//!
//! The engine has no generator. The tape carries a source of numbers that depend on nothing but
//! their key, so that a checkpointed segment run again, and any number of ranks, choose the same.

use crate::{DType, EngineError, Result, Tape, Tensor};

/// What a number is drawn for. `sample` counts the images of this pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drawn {
    /// Whether a module takes part.
    Module,
    /// Which ranks of a nested module are trained, which rows of a composed update take part.
    Block,
    /// Which ranks one sample sees.
    Rank {
        /// Image of the pass.
        sample: usize,
    },
    /// Which elements of the hidden values one sample sees.
    Element {
        /// Image of the pass.
        sample: usize,
    },
}

/// A source of numbers for one forward pass.
pub trait Draws {
    /// Images of the pass.
    fn samples(&self) -> usize;

    /// Fills `out` with uniform numbers in 0..1; equal arguments give equal numbers.
    fn uniform(&self, drawn: Drawn, module: u64, out: &mut [f32]);
}

/// Probabilities with which parts of a module are left out in training.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Dropouts {
    /// An element of the hidden values; the others grow by 1/(1-p).
    pub element: f32,
    /// A rank for one sample; the others grow by 1/(1-p). Where the update is made whole, one of its
    /// rows for a whole pass.
    pub rank: f32,
    /// The module for a whole pass.
    pub module: f32,
}

/// One number for a module.
pub(super) fn one(draws: &dyn Draws, drawn: Drawn, module: u64) -> f32 {
    let mut out = [0.];
    draws.uniform(drawn, module, &mut out);
    out[0]
}

impl Dropouts {
    /// Whether a module sits this pass out.
    pub(super) fn skips(&self, tape: &Tape, module: u64) -> bool {
        match tape.draws() {
            Some(draws) if self.module > 0. => one(draws, Drawn::Module, module) < self.module,
            _ => false,
        }
    }

    /// Factors of the rows of an update that is made whole: 0 for those that sit this pass out. The
    /// others do not grow, as in LyCORIS. `None` where all are 1.
    pub(super) fn rows(&self, tape: &Tape, module: u64, count: usize) -> Option<Vec<f32>> {
        let draws = tape.draws().filter(|_| self.rank > 0.)?;
        let mut rows = vec![0.; count];
        draws.uniform(Drawn::Block, module, &mut rows);
        rows.iter_mut().for_each(|row| *row = if *row > self.rank { 1. } else { 0. });
        Some(rows)
    }

    /// Factors of the hidden values, f32 of their shape `[...,r]`; `None` where all are 1.
    ///
    /// `rows` is the outermost axis of the layer's input: images, or captions in chunks, those of a
    /// sample behind one another. A row has one choice of ranks for all its tokens or pixels.
    pub(super) fn mask(
        &self,
        tape: &Tape,
        module: u64,
        rows: usize,
        hidden: &Tensor,
    ) -> Result<Option<Tensor>> {
        let Some(draws) = tape.draws() else { return Ok(None) };
        if (self.element <= 0. && self.rank <= 0.) || hidden.is_empty() {
            return Ok(None);
        }
        let (samples, ranks) = (draws.samples().max(1), hidden.last_dim());
        if !rows.is_multiple_of(samples) {
            let detail = format!("{rows} rows of {samples} samples");
            return Err(EngineError::shape("dropout", detail));
        }
        let (per_sample, per_row) = (hidden.len() / samples, hidden.len() / rows);
        let mut mask = vec![1_f32; hidden.len()];
        let mut drawn = vec![0_f32; per_sample];
        for (sample, mask) in mask.chunks_mut(per_sample).enumerate() {
            if self.element > 0. {
                draws.uniform(Drawn::Element { sample }, module, &mut drawn);
                let keep = 1. / (1. - self.element);
                for (factor, draw) in mask.iter_mut().zip(&drawn) {
                    *factor = if *draw < self.element { 0. } else { keep };
                }
            }
            if self.rank > 0. {
                let drawn = &mut drawn[..per_sample / per_row * ranks];
                draws.uniform(Drawn::Rank { sample }, module, drawn);
                let keep = 1. / (1. - self.rank);
                for (row, drawn) in mask.chunks_mut(per_row).zip(drawn.chunks(ranks)) {
                    for pixel in row.chunks_mut(ranks) {
                        for (factor, draw) in pixel.iter_mut().zip(drawn) {
                            *factor *= if *draw > self.rank { keep } else { 0. };
                        }
                    }
                }
            }
        }
        Ok(Some(Tensor::from_f32(hidden.device(), hidden.shape(), &mask, DType::F32)?))
    }
}

/// `x` times a mask, in the type of `x`.
pub(super) fn masked(x: Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
    let Some(mask) = mask else { return Ok(x) };
    let product = x.device().backend().multiply(&x.to_dtype(DType::F32)?, mask)?;
    product.to_dtype(x.dtype())
}
