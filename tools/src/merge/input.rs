//! The adapters of a merge, each with how much of it is taken.

use std::path::PathBuf;

use formats::adapter::AdapterFile;

/// An adapter and its ratio.
#[derive(Debug)]
pub(crate) struct Input {
    /// The file.
    pub file: AdapterFile,
    /// How much of it is taken.
    pub ratio: f64,
}

impl Input {
    /// Opens all files.
    ///
    /// # Errors
    /// What cannot be read.
    pub fn open_all(models: &[PathBuf], ratios: &[f64]) -> anyhow::Result<Vec<Self>> {
        let open = |(path, ratio): (&PathBuf, &f64)| {
            Ok(Self { file: AdapterFile::open(path)?, ratio: *ratio })
        };
        models.iter().zip(ratios).map(open).collect()
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

    fn block_weight(&self, _module: &str) -> f64 {
        1.0
    }
}
