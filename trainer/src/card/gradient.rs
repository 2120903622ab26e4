//! The flat gradient of a step in a card's memory, and behind it what the ranks tell each other.
//!
//! All parameters, then the loss, a word for `not finite` (a loss that is not shows by itself), the
//! wish to stop, and for each parameter how many ranks have a gradient for it: one buffer, so that
//! one reduction over the ranks carries it all, and the update reads it where it lies.

use std::ops::Range;

use anyhow::Result;
use engine::{DType, ParamId, ParamStore, Tensor};

use super::departure::Departure;
use crate::gradients::Control;

const LOSS: usize = 0;
const STOP: usize = 2;
const WORDS: usize = 3;

/// Gradient and control words of a step.
pub struct CardGradient {
    flat: Tensor,
    /// Elements of all parameters.
    len: usize,
    ranges: Vec<Range<usize>>,
    departure: Departure,
    /// f32 `[1]`: 1 where this rank was asked to stop.
    wish: Tensor,
    /// Which parameters the update may move at all.
    moving: Vec<bool>,
}

/// What the ranks told each other in a step.
#[derive(Clone, Debug)]
pub struct Agreed {
    /// Loss and wishes, summed over the ranks.
    pub control: Control,
    /// Parameters that some rank has a gradient for and that may move.
    pub touched: Vec<bool>,
}

impl CardGradient {
    /// Zeros for the parameters of `params`; those that are not `moving` never count as reached.
    pub fn new(params: &ParamStore, moving: Vec<bool>) -> Result<Self> {
        let count = params.count();
        let flat = Tensor::zeros(params.device(), &[params.len() + WORDS + count], DType::F32)?;
        let ranges: Vec<_> = (0..count).map(|id| params.range(ParamId(id))).collect();
        let wish = Tensor::zeros(params.device(), &[1], DType::F32)?;
        let departure = Departure::new(&ranges);
        Ok(Self { flat, len: params.len(), ranges, departure, wish, moving })
    }

    /// Forgets the last step, and takes the wish to stop into this one.
    pub fn clear(&mut self) -> engine::Result<()> {
        self.departure.begin();
        self.flat.clear()?;
        self.flat.view(self.len + STOP, &[1])?.copy_from(&self.wish)
    }

    /// Adds the losses `[B]` of a micro-step to the loss.
    pub fn add_losses(&mut self, losses: &Tensor) -> engine::Result<()> {
        let backend = losses.device().backend();
        let sum = backend.sum_rows(&losses.reshape(&[1, losses.len(), 1])?)?;
        backend.add_at(&mut self.flat, self.len + LOSS, &sum.reshape(&[1])?)
    }

    /// Writes which parameters this rank has a gradient for; the same in each step of a shape, so that
    /// a capture keeps it.
    pub fn close(&mut self, reached: &[bool]) -> engine::Result<()> {
        let flag = |(reached, moving): (&bool, &bool)| f32::from(u8::from(*reached && *moving));
        let flags: Vec<f32> = reached.iter().zip(&self.moving).map(flag).collect();
        self.touched()?.refill_constant(&flags)
    }

    /// Notes before a step whether this rank was asked to stop, for [`CardGradient::clear`].
    pub fn wish_to_stop(&self, stop: bool) -> Result<()> {
        Ok(self.wish.refill(&[f32::from(u8::from(stop))])?)
    }

    /// The gradient.
    pub fn gradient(&self) -> engine::Result<Tensor> {
        self.flat.view(0, &[self.len])
    }

    /// How many ranks reached each parameter, f32.
    pub fn touched(&self) -> engine::Result<Tensor> {
        self.flat.view(self.len + WORDS, &[self.ranges.len()])
    }

    /// Everything.
    pub fn whole(&self) -> &Tensor {
        &self.flat
    }

    /// The gradient of `id` was added and is final: the pieces of the whole that no gradient of this
    /// step changes any more and that did not leave yet.
    pub fn leaving(&mut self, id: ParamId) -> Vec<Range<usize>> {
        self.departure.arrived(id)
    }

    /// The pieces that did not leave, the last of them with the words.
    pub fn rest(&mut self) -> Vec<Range<usize>> {
        let mut rest = self.departure.rest();
        rest.push(self.len..self.flat.len());
        rest
    }

    /// The words, when the card is done.
    pub fn agreed(&self) -> Result<Agreed> {
        let words = self.flat.view(self.len, &[WORDS + self.ranges.len()])?.to_vec_f32()?;
        let control = Control { loss: words[LOSS], non_finite: words[1], stop: words[STOP] };
        Ok(Agreed { control, touched: words[WORDS..].iter().map(|count| *count > 0.).collect() })
    }

    /// The first parameter whose gradient is not finite.
    pub fn first_non_finite(&self) -> Result<Option<ParamId>> {
        let values = self.gradient()?.to_vec_f32()?;
        let bad = |range: &Range<usize>| values[range.clone()].iter().any(|x| !x.is_finite());
        Ok(self.ranges.iter().position(bad).map(ParamId))
    }
}
