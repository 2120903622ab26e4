//! The adapters of a merge, each with how much of it is taken.

use std::path::{Path, PathBuf};

use clap::Args;
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

/// Options that say which adapters are taken, and how much of each.
#[derive(Debug, Args)]
pub(crate) struct Mix {
    /// The adapters: LoRA in the names of sd-scripts, diffusers or PEFT, LoHa, LoKr, whole
    /// differences
    #[arg(long = "models", value_name = "FILE", num_args = 1.., required = true, overrides_with = "models")]
    models: Vec<PathBuf>,
    /// How much of each adapter is taken, in the order of `models`: 1 is its full strength
    #[arg(
        long = "ratios",
        value_name = "NUMBER",
        num_args = 1..,
        required = true,
        allow_negative_numbers = true,
        overrides_with = "ratios"
    )]
    ratios: Vec<f64>,
    /// How much of each adapter is taken in each block, a JSON list for each: 17 or 26 numbers for
    /// SD1 and SD2, 12 or 20 for SDXL
    #[arg(long = "lbws", value_name = "LIST", num_args = 1.., overrides_with = "lbws")]
    lbws: Vec<String>,
}

impl Mix {
    /// The files that will be read.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.models.iter().map(PathBuf::as_path)
    }

    /// What can be said before any file is read.
    ///
    /// # Errors
    /// Lists that are not equally long, ratios that are no numbers.
    pub fn check(&self) -> Result<(), Usage> {
        for (name, count) in [("ratios", self.ratios.len()), ("lbws", self.lbws.len())] {
            let is_given = name == "ratios" || count > 0;
            if is_given && count != self.models.len() {
                return Err(Usage(format!(
                    "`models` and `{name}` should be equally many, they are: {} and {count}",
                    self.models.len()
                )));
            }
        }
        match self.ratios.iter().find(|ratio| !ratio.is_finite()) {
            Some(ratio) => Err(Usage(format!("`ratios` should be numbers, one is: {ratio}"))),
            None => Ok(()),
        }
    }

    /// Opens all files.
    ///
    /// # Errors
    /// What cannot be read, a list of block weights that is none of its file's family.
    pub fn open(&self) -> anyhow::Result<Vec<Input>> {
        let open = |(path, ratio): (&PathBuf, &f64)| {
            anyhow::Ok(Input { file: AdapterFile::open(path)?, ratio: *ratio, blocks: None })
        };
        let inputs = self.models.iter().zip(&self.ratios).map(open);
        let mut inputs = inputs.collect::<anyhow::Result<Vec<Input>>>()?;
        for (input, weights) in inputs.iter_mut().zip(BlockWeights::parse_all(&self.lbws)?) {
            weights.check_family(input.file.family)?;
            input.blocks = Some(weights);
        }
        Ok(inputs)
    }
}

impl Input {
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
