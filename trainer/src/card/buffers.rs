//! The input of a micro-step in fixed places of a card's memory, one set for each shape.
//!
//! A captured step reads the same addresses each time. Numbers come in two stages: the copy stream
//! brings a batch to the waiting places while the card computes, and when its turn comes the compute
//! stream moves it, within the card, to the places that the step reads.

use anyhow::{Context, Result};
use engine::{DType, Device, Ids, Tensor};
use models::Unet;

use crate::inputs::{Array, MicroBatch, StepInputs};

/// Arrays begin at multiples of so many numbers: 256 bytes, as tensors of their own would.
const ALIGN: usize = 64;

/// What makes steps alike: one of another shape is another sequence of work.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct StepShape {
    /// Shapes of all arrays, in their order.
    arrays: Vec<Vec<usize>>,
    /// Ids of the prompts, and chunks of each.
    prompts: Option<(usize, usize)>,
    masked: bool,
}

impl StepShape {
    /// The shape of a micro-batch with these arrays.
    pub fn of(micro: &MicroBatch, arrays: &[Array]) -> Self {
        let prompts = &micro.prompts;
        Self {
            arrays: arrays.iter().map(|(shape, _)| shape.clone()).collect(),
            prompts: micro.encoded.is_none().then_some((prompts.ids.len(), prompts.chunks)),
            masked: micro.noised.mask.is_some(),
        }
    }
}

/// A batch that is on its way or there.
pub struct Buffers {
    /// All f32 arrays one behind the other.
    numbers: Tensor,
    waiting: Tensor,
    /// Ids that the step reads, and those that wait.
    ids: Option<(Ids, Ids)>,
    /// What the step reads, in `numbers`.
    pub inputs: StepInputs,
}

/// `arrays` one behind the other, and where each begins.
fn pack(arrays: &[Array]) -> (Vec<f32>, Vec<usize>) {
    let (mut numbers, mut starts) = (Vec::new(), Vec::new());
    for (_, data) in arrays {
        starts.push(numbers.len());
        numbers.extend_from_slice(data);
        numbers.resize(numbers.len().next_multiple_of(ALIGN), 0.);
    }
    (numbers, starts)
}

impl Buffers {
    /// Places for micro-batches like `micro`, with its numbers on their way into them.
    pub fn new(device: Device, micro: &MicroBatch, arrays: &[Array]) -> Result<Self> {
        let card = device.card().context("fixed places are for cards")?;
        let (packed, starts) = pack(arrays);
        let numbers = Tensor::zeros(device, &[packed.len()], DType::F32)?;
        let waiting = Tensor::zeros(device, &[packed.len()], DType::F32)?;
        let zeros = vec![0; micro.prompts.id_list()?.len()];
        let ids = match &micro.encoded {
            Some(_) => None,
            None => Some((Ids::new(device, &zeros)?, Ids::new(device, &zeros)?)),
        };
        let views = arrays.iter().zip(&starts).map(|((shape, _), at)| numbers.view(*at, shape));
        let tensors = views.collect::<engine::Result<_>>()?;
        let mut inputs = micro.assemble(tensors, ids.as_ref().map(|(ids, _)| ids.clone()))?;
        let samples = [micro.noised.shape[0]];
        inputs.loss.gradient_weight = Tensor::zeros(device, &samples, DType::F32)?;
        // The places were zeroed by the compute stream.
        card.copies_wait()?;
        let buffers = Self { numbers, waiting, ids, inputs };
        buffers.stage(micro, arrays)?;
        Ok(buffers)
    }

    /// Sends a micro-batch of this shape on its way, by the copy stream. The one before must have been
    /// taken.
    pub fn stage(&self, micro: &MicroBatch, arrays: &[Array]) -> Result<()> {
        self.waiting.stage(&pack(arrays).0)?;
        if let Some((_, waiting)) = &self.ids {
            waiting.stage(&micro.prompts.id_list()?)?;
        }
        Ok(())
    }

    /// Moves what is waiting to where the step reads it, and the loss weights times `loss_scale`.
    pub fn take(&self, micro: &MicroBatch, loss_scale: f32) -> Result<()> {
        let device = self.numbers.device();
        let card = device.card().context("fixed places are for cards")?;
        card.wait_for_copies()?;
        self.numbers.copy_from(&self.waiting)?;
        if let Some((ids, waiting)) = &self.ids {
            ids.copy_from(waiting)?;
        }
        card.copies_wait()?;
        let weights: Vec<f32> = micro.noised.weight.iter().map(|w| w * loss_scale).collect();
        self.inputs.loss.gradient_weight.refill(&weights)?;
        Ok(())
    }
}

/// A model's U-Net decides the width of the arrays; this only bundles the call.
pub fn arrays_of(unet: &Unet, micro: &MicroBatch) -> Result<(StepShape, Vec<Array>)> {
    let arrays = micro.arrays(unet.config())?;
    Ok((StepShape::of(micro, &arrays), arrays))
}
