//! The adapters of a merge, each with how much of it is taken.

use std::path::PathBuf;

use formats::adapter::AdapterFile;

use crate::Usage;
use crate::lbw::BlockWeights;

/// An adapter and its ratio.
#[derive(Debug)]
pub(crate) struct Input {
    /// The file.
    pub file: AdapterFile,
    /// How much of it is taken.
    pub ratio: f64,
    /// And in each block of the network.
    blocks: Option<BlockWeights>,
}

impl Input {
    /// Opens all files.
    ///
    /// # Errors
    /// What cannot be read.
    pub fn open_all(models: &[PathBuf], ratios: &[f64]) -> anyhow::Result<Vec<Self>> {
        let open = |(path, ratio): (&PathBuf, &f64)| {
            Ok(Self { file: AdapterFile::open(path)?, ratio: *ratio, blocks: None })
        };
        models.iter().zip(ratios).map(open).collect()
    }

    /// Gives the files weights for their blocks, in this order; none leaves them as they are.
    ///
    /// # Errors
    /// A [`Usage`] for a list that is none of the file's family.
    pub fn set_blocks(inputs: &mut [Self], lists: &[String]) -> Result<(), Usage> {
        for (input, weights) in inputs.iter_mut().zip(BlockWeights::parse_all(lists)?) {
            weights.check_family(input.file.family)?;
            input.blocks = Some(weights);
        }
        Ok(())
    }

    /// How much of a module is taken.
    pub fn ratio_of(&self, module: &str) -> f32 {
        (self.ratio * self.block_weight(module)) as f32
    }

    /// What sd-scripts multiplies up and down by when it adds or stacks files: the ratio counts in
    /// both, its sign in one, the block's weight in both.
    pub fn reference_factors(&self, module: &str, alphas: f64) -> (f32, f32) {
        let (scale, weight) = (alphas * self.ratio, self.block_weight(module));
        ((scale.abs() * weight) as f32, (scale * weight) as f32)
    }

    /// The weight of a module's block, 1 without weights.
    pub fn block_weight(&self, module: &str) -> f64 {
        self.blocks.as_ref().map_or(1.0, |blocks| blocks.weight_of(module))
    }
}
