//! Training steps on a card: inputs in fixed places, a gradient that stays there, the loss scale of
//! fp16, and steps captured as one.
//!
//! The host is one batch ahead: while the card computes a step, the next batch is loaded, noised and
//! sent. Loss and norm are read when the step is done; one whose gradient is not finite has changed
//! nothing by then, as its update multiplies by NaN nowhere.

mod buffers;
mod departure;
mod gradient;
mod runner;
mod scale;
mod step;

use std::collections::HashMap;

use anyhow::{Context, Result};
use collectives::Comm;
use engine::cuda::Card;
use engine::{DType, Device, ParamStore, Tensor};
use models::lora::LoraNetwork;

pub use self::runner::GraphCounts;
pub use self::scale::LossScale;

use self::buffers::{Buffers, StepShape, arrays_of};
use self::gradient::CardGradient;
use self::runner::Runner;
use crate::console;
use crate::dataset::Batch;
use crate::inputs::MicroBatch;
use crate::memory::show_bytes;
use crate::network::learning_rate;
use crate::optimizer::Optimize;
use crate::options::Options;
use crate::reduce::{Reducer, Ways};
use crate::step::Models;

/// What a rank keeps on its card for the steps of a run.
pub struct CardWork {
    device: Device,
    buffers: HashMap<StepShape, Buffers>,
    gradient: CardGradient,
    /// f32 `[1]`: 1 by the loss scale.
    inverse_scale: Tensor,
    runner: Runner,
    reducer: Reducer,
    /// The next batch.
    ahead: Option<Ahead>,
}

/// A batch that was loaded before its turn.
struct Ahead {
    batch: Batch,
    /// `None` where this rank has no part in it.
    input: Option<(StepShape, MicroBatch)>,
}

/// What is trained, for [`CardWork::new`].
pub struct Trained<'a> {
    /// Modules.
    pub network: &'a LoraNetwork,
    /// Their values.
    pub params: &'a ParamStore,
    /// What moves them.
    pub optimizer: &'a mut dyn Optimize,
}

impl CardWork {
    /// For the card that holds the parameters.
    pub fn new(
        options: &Options,
        (comm, ways): (&Comm, Ways),
        trained: Trained<'_>,
    ) -> Result<Self> {
        let Trained { network, params, optimizer } = trained;
        let device = params.device();
        let card: &'static Card = device.card().context("the parameters are not on a card")?;
        let mut moving = vec![false; params.count()];
        for group in network.groups() {
            if learning_rate(options, &group) != 0. {
                group.params.iter().for_each(|id| moving[id.0] = true);
            }
        }
        if optimizer.on_card().is_none() {
            console::note(&format!(
                "this optimizer is computed on the host: in each step {} go from the card and {} to \
                 it; AdamW and AdamW8bit stay on the card",
                show_bytes(params.len() * 8),
                show_bytes(params.len() * 4)
            ));
        }
        let eager = if options.no_cuda_graph {
            Some("`no_cuda_graph` asks for it".to_owned())
        } else if network.draws_in_training() {
            Some("what the network leaves out is drawn anew in each".to_owned())
        } else {
            None
        };
        Ok(Self {
            device,
            buffers: HashMap::new(),
            gradient: CardGradient::new(params, moving)?,
            inverse_scale: Tensor::zeros(device, &[1], DType::F32)?,
            runner: Runner::new(card, eager),
            reducer: Reducer::connect(comm, card, ways)?,
            ahead: None,
        })
    }

    /// Which steps are captured.
    pub fn graphs(&self) -> GraphCounts {
        self.runner.counts()
    }

    /// Gives the memory of captured steps back: work of another kind is to be done. They are captured
    /// again when their turn comes.
    pub fn make_room(&mut self) {
        self.runner.forget();
        if let Some(card) = self.device.card() {
            card.release_idle();
        }
    }

    /// Sends `micro` to the card, behind what it computes now.
    fn send(&mut self, models: &Models, batch: Batch, micro: Option<MicroBatch>) -> Result<()> {
        let input = match micro {
            None => None,
            Some(micro) => {
                let (shape, arrays) = arrays_of(&models.unet, &micro)?;
                match self.buffers.get(&shape) {
                    Some(buffers) => buffers.stage(&micro, &arrays)?,
                    None => {
                        let buffers = Buffers::new(self.device, &micro, &arrays)?;
                        self.buffers.insert(shape.clone(), buffers);
                    }
                }
                Some((shape, micro))
            }
        };
        self.ahead = Some(Ahead { batch, input });
        Ok(())
    }
}
