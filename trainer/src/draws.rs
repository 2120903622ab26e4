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

    /// The choices of many modules, samples and batches fall as evenly as chance has it.
    #[test]
    fn choices_are_even_over_modules_samples_and_batches() {
        let (modules, batches, blocks) = (40_u64, 250_u64, 4);
        let mut counts = [0_u32; 4];
        let (mut skipped, mut dropped, mut elements) = (0_u32, 0_u32, 0_u32);
        for batch in 0..batches {
            let draws = BatchDraws { seed: 3, batch, samples: vec![2 * batch, 2 * batch + 1] };
            for module in (0..modules).map(|n| models::lora::name_key(&format!("lora_unet_{n}"))) {
                let mut one = [0.];
                draws.uniform(Drawn::Block, module, &mut one);
                counts[(one[0] * blocks as f32) as usize] += 1;
                draws.uniform(Drawn::Module, module, &mut one);
                skipped += u32::from(one[0] < 0.3);
                let mut ranks = [0.; 8];
                draws.uniform(Drawn::Rank { sample: 1 }, module, &mut ranks);
                dropped += ranks.iter().filter(|draw| **draw <= 0.3).count() as u32;
                draws.uniform(Drawn::Element { sample: 0 }, module, &mut ranks);
                elements += ranks.iter().filter(|draw| **draw < 0.3).count() as u32;
            }
        }
        // Five deviations of 10,000 draws at 0.25 and 0.3, and of 80,000 at 0.3.
        assert!(counts.iter().all(|count| count.abs_diff(2_500) < 217), "{counts:?}");
        assert!(skipped.abs_diff(3_000) < 230, "{skipped}");
        assert!(dropped.abs_diff(24_000) < 649, "{dropped}");
        assert!(elements.abs_diff(24_000) < 649, "{elements}");
    }
}
