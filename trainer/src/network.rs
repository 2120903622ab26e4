//! The LoRA of a run: from the options to modules, values and learning rates.

use anyhow::{Context, Result, bail};
use engine::ParamStore;
use formats::lora_file;
use models::lora::{
    Algorithm, FileRanks, LoraNetwork, Part, Rank, RankRule, Target, UniformRanks,
    text_encoder_targets, unet_targets,
};

use crate::base::Base;
use crate::memory::refuse_beyond_memory;
use crate::options::Options;
use crate::rng::{Purpose, stream};

/// A trainable number, its gradient and its two moments, f32.
const STATE_BYTES: usize = 16;

/// The modules of a run, with their values before the first step.
pub struct PreparedNetwork {
    /// Modules and names.
    pub network: LoraNetwork,
    /// One vector per parameter.
    pub values: Vec<Vec<f32>>,
    /// What the user should know: modules that `network_weights` lacks or has in excess.
    pub notes: Vec<String>,
}

/// Which parts of the model get a LoRA.
pub fn trains(options: &Options, part: Part) -> bool {
    match part {
        Part::TextEncoder => !options.network_train_unet_only,
        Part::Unet => !options.network_train_text_encoder_only,
    }
}

impl PreparedNetwork {
    /// Chooses modules and ranks, and draws or reads their values.
    pub fn new(options: &Options, base: &Base, seed: u64) -> Result<Self> {
        let weights = match &options.network_weights {
            Some(path) => Some(lora_file::read(path).context("cannot read `network_weights`")?),
            None => None,
        };
        let mut targets: Vec<Target> = Vec::new();
        if trains(options, Part::TextEncoder) {
            targets.extend(text_encoder_targets(&*base.files.text_encoder));
        }
        if trains(options, Part::Unet) {
            targets.extend(unet_targets(&*base.files.unet));
        }
        let args = options.read_network_args()?;
        let rule: Box<dyn RankRule> = match (&weights, options.dim_from_weights) {
            (Some(file), true) => Box::new(FileRanks::new(&file.tensors)?),
            (None, true) => bail!("`dim_from_weights` needs `network_weights`"),
            (_, false) => Box::new(UniformRanks {
                linear: Rank::new(options.network_rank(), options.network_alpha as f32),
                conv: args.conv_dim.map(|dim| Rank::new(dim, args.conv_alpha as f32)),
            }),
        };
        let mut network = LoraNetwork::new(targets, &*rule, Algorithm::LowRank)?;
        let state = network.element_count().saturating_mul(STATE_BYTES);
        let hint = "lower `network_dim` (and `conv_dim`)";
        refuse_beyond_memory("the LoRA's weights, gradients and moments", state, hint)?;
        let mut values = network.initial_values(&mut |key, count| {
            let mut rng = stream(seed, Purpose::LoraInit, key_number(key), 0);
            (0..count).map(|_| rng.uniform_f32()).collect()
        });
        let mut notes = Vec::new();
        if let Some(file) = &weights {
            let path = file.path.display();
            let report = network
                .load_values(&mut values, &file.tensors)
                .with_context(|| format!("`network_weights` does not fit: {path}"))?;
            notes.push(format!("continue from {path}: {} modules", report.loaded));
            for (what, modules) in [("lacks", &report.missing), ("has in excess", &report.unused)] {
                if let Some(first) = modules.first() {
                    notes.push(format!(
                        "{path} {what} {} modules, the first: {first}",
                        modules.len()
                    ));
                }
            }
            if let Some((module, before, now)) = report.alphas.first() {
                let count = report.alphas.len();
                notes.push(format!(
                    "alpha comes from {path} for {count} modules, the first: {module}, {before} -> {now}"
                ));
            }
        }
        Ok(Self { network, values, notes })
    }

    /// The parameters, laid out for the tape.
    pub fn parameters(&self, base: &Base) -> Result<ParamStore> {
        Ok(self.network.parameters(base.device, self.values.clone())?)
    }
}

/// A number for a tensor's name that no other program version changes (FNV-1a).
fn key_number(key: &str) -> u64 {
    key.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// Learning rate of each part: its own, else the common one.
pub fn learning_rate(options: &Options, part: Part) -> f64 {
    let own = match part {
        Part::TextEncoder => {
            options.text_encoder_lr.as_ref().and_then(|rates| rates.first().copied())
        }
        Part::Unet => options.unet_lr,
    };
    own.unwrap_or(options.learning_rate)
}
