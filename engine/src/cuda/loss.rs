//! The weighted loss of each sample and its gradient: the starts of `kernels/loss.cu`.

use super::card::Card;
use super::driver::Arg;
use super::elements::{floats, int, long, singles};
use crate::backend::{ElementLoss, LossSpec};
use crate::{DType, EngineError, Result, Tensor};

const OP: &str = "loss";
/// `PART` of the kernel.
const PART: usize = 2048;
/// `THREADS` of the kernel.
const THREADS: u32 = 256;

/// The kernel's number of an element's loss.
fn number(element: ElementLoss) -> i32 {
    match element {
        ElementLoss::L2 => 0,
        ElementLoss::L1 => 1,
        ElementLoss::Huber => 2,
        ElementLoss::SmoothL1 => 3,
    }
}

/// Elements of a sample, when all shapes fit each other.
fn sample_size(pred: &Tensor, target: &Tensor, spec: &LossSpec) -> Result<(usize, usize)> {
    let batch = pred.shape().first().copied().unwrap_or(0);
    let lists = [&spec.delta, &spec.weight, &spec.gradient_weight];
    let mask_fits = spec.mask.as_ref().is_none_or(|mask| mask.shape() == pred.shape());
    if pred.shape() != target.shape() || lists.iter().any(|list| list.len() != batch) || !mask_fits
    {
        let detail = format!(
            "prediction {:?}, target {:?}, mask {:?}, deltas and weights {lists:?}",
            pred.shape(),
            target.shape(),
            spec.mask
        );
        return Err(EngineError::shape(OP, detail));
    }
    match pred.len().checked_div(batch) {
        None | Some(0) => {
            Err(EngineError::shape(OP, format!("{:?} has no elements", pred.shape())))
        }
        Some(size) => Ok((batch, size)),
    }
}

pub(super) fn loss(
    card: &'static Card,
    pred: &Tensor,
    target: &Tensor,
    spec: &LossSpec,
) -> Result<(Tensor, Tensor)> {
    let (batch, size) = sample_size(pred, target, spec)?;
    let from = floats(card, OP, pred)?;
    let parts = size.div_ceil(PART);
    let Ok(blocks) = i32::try_from(batch * parts) else {
        return Err(EngineError::shape(OP, format!("too large for cards: {pred:?}")));
    };
    let mask = spec.mask.as_ref().map_or(Ok(0), |mask| singles(card, OP, mask))?;
    let gradient = card.empty(pred.shape(), pred.dtype())?;
    let losses = card.empty(&[batch], DType::F32)?;
    let sums = card.empty(&[batch, parts], DType::F32)?;
    let (size, parts) = (long(size), int(OP, parts)?);
    let args = [
        Arg::Address(gradient.address(OP)?),
        Arg::Address(sums.address(OP)?),
        Arg::Address(from),
        Arg::Address(singles(card, OP, target)?),
        Arg::Address(mask),
        Arg::Address(singles(card, OP, &spec.delta)?),
        Arg::Address(singles(card, OP, &spec.gradient_weight)?),
        size,
        parts,
        Arg::I32(number(spec.element)),
    ];
    card.launch(("loss", "loss_part"), pred.dtype(), ([blocks as u32, 1, 1], THREADS, 0), &args)?;
    let args = [
        Arg::Address(losses.address(OP)?),
        Arg::Address(sums.address(OP)?),
        Arg::Address(singles(card, OP, &spec.weight)?),
        size,
        parts,
    ];
    let grid = ([batch as u32, 1, 1], THREADS, 0);
    card.launch(("loss", "loss_total"), DType::F32, grid, &args)?;
    Ok((losses, gradient))
}
