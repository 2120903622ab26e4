//! Which parts of the network a micro-step leaves out: dropouts, and the ranks that DyLoRA trains.
//!
//! Everything is keyed: what one sample sees by its global index, what all samples share by the
//! place of the batch in the run. So every rank, any number of ranks, a checkpointed segment that is
//! computed again and a resumed run choose the same.

use std::rc::Rc;

use engine::{Drawn, Draws};
use models::lora::LoraNetwork;

use crate::dataset::Batch;
use crate::rng::{Purpose, stream};

/// The draws of one micro-step on one rank.
#[derive(Clone, Debug, PartialEq)]
struct BatchDraws {
    seed: u64,
    /// Epoch and batch in the epoch.
    batch: u64,
    /// Global indices of this rank's samples.
    samples: Vec<u64>,
}

/// The draws of a batch; `None` where the network leaves nothing out.
pub fn draws_for(network: &LoraNetwork, seed: u64, batch: &Batch) -> Option<Rc<dyn Draws>> {
    network.draws_in_training().then(|| {
        let samples = batch.samples.iter().map(|sample| sample.global_index).collect();
        let batch = batch.epoch << 32 | batch.index as u64;
        Rc::new(BatchDraws { seed, batch, samples }) as Rc<dyn Draws>
    })
}

impl Draws for BatchDraws {
    fn samples(&self) -> usize {
        self.samples.len()
    }

    fn uniform(&self, drawn: Drawn, module: u64, out: &mut [f32]) {
        let sample = |index: usize| self.samples.get(index).copied().unwrap_or(u64::MAX);
        let (purpose, key) = match drawn {
            Drawn::Module => (Purpose::ModuleDropout, self.batch),
            Drawn::Block => (Purpose::DyLoraRank, self.batch),
            Drawn::Rank { sample: index } => (Purpose::RankDropout, sample(index)),
            Drawn::Element { sample: index } => (Purpose::Dropout, sample(index)),
        };
        let mut rng = stream(self.seed, purpose, module, key);
        out.iter_mut().for_each(|number| *number = rng.uniform_f32());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_choices_depend_on_the_batch_and_others_on_the_sample() {
        let draws = |batch, samples: &[u64]| BatchDraws { seed: 1, batch, samples: samples.into() };
        let one = |draws: &BatchDraws, drawn, module| {
            let mut out = [0.; 8];
            draws.uniform(drawn, module, &mut out);
            out
        };
        // Two ranks with two samples each, and one with all four.
        let (whole, second) = (draws(7, &[4, 5, 6, 7]), draws(7, &[6, 7]));
        for drawn in [Drawn::Module, Drawn::Block] {
            assert_eq!(one(&whole, drawn, 3), one(&second, drawn, 3));
            assert_ne!(one(&whole, drawn, 3), one(&whole, drawn, 4));
            assert_ne!(one(&whole, drawn, 3), one(&draws(8, &[4]), drawn, 3));
        }
        let element = |sample| Drawn::Element { sample };
        assert_eq!(one(&whole, element(2), 3), one(&second, element(0), 3));
        assert_ne!(one(&whole, element(2), 3), one(&whole, element(1), 3));
        let rank = Drawn::Rank { sample: 2 };
        assert_ne!(one(&whole, element(2), 3), one(&whole, rank, 3));
    }
}
