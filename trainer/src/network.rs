//! The LoRA of a run: from the options to modules, values and learning rates.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use engine::{Device, ParamStore};
use formats::{Family, Weights};
use models::lora::{
    BlockLayout, FileRanks, LoraNetwork, MergedWeights, NormReport, ParamGroup, Part, Rank,
    RankRule, RootRanks, Target, UniformRanks, name_key, outer_targets, unet_targets,
};

use crate::base::Base;
use crate::logs::KeyNorms;
use crate::lora_input::read_lora;
use crate::memory::refuse_beyond_memory;
use crate::optimizer::Choice;
use crate::options::{NetworkArgs, Options};
use crate::rng::{Purpose, stream};

/// A trainable number and its gradient, f32; the optimizer's state comes on top.
const WEIGHT_BYTES: f64 = 8.;

/// The modules of a run, with their values before the first step.
pub struct PreparedNetwork {
    /// Modules and names.
    pub network: LoraNetwork,
    /// One vector per parameter.
    pub values: Vec<Vec<f32>>,
    /// Bytes of weights, gradients and optimizer state.
    pub training_bytes: usize,
    /// What the user should know: modules that `network_weights` lacks or has in excess.
    pub notes: Vec<String>,
}

/// Which parts of the model get a LoRA.
pub fn trains(options: &Options, part: Part) -> bool {
    match part {
        Part::TextEncoder | Part::TextEncoder2 => !options.network_train_unet_only,
        Part::Unet => !options.network_train_text_encoder_only,
    }
}

impl PreparedNetwork {
    /// Chooses modules and ranks, and draws or reads their values.
    pub fn new(options: &Options, base: &Base, seed: u64) -> Result<Self> {
        let weights = match &options.network_weights {
            Some(path) => {
                Some(read_lora(path, base.files.family).context("cannot use `network_weights`")?)
            }
            None => None,
        };
        let mut targets: Vec<Target> = Vec::new();
        if trains(options, Part::TextEncoder) {
            targets.extend(base.text_targets());
        }
        let args = options.read_network_args()?;
        let preset = options.read_preset_ranks(&args);
        if trains(options, Part::Unet) {
            targets.extend(unet_targets(&*base.files.unet));
            // LyCORIS knows the outer layers by names that SDXL does not have.
            if preset.is_some() && base.files.family != Family::Sdxl {
                targets.extend(outer_targets(&*base.files.unet));
            }
        }
        let layout = BlockLayout::of(base.files.family);
        let mut notes = text_rate_notes(options, base.files.family);
        let rates = args.read_block_rates(layout, &mut notes)?;
        let alpha = options.network_alpha;
        let blocks =
            args.read_block_ranks(layout, (options.network_rank(), alpha), rates.as_ref())?;
        let rule: Box<dyn RankRule> = match (&weights, options.dim_from_weights, blocks) {
            (Some(file), true, _) => Box::new(FileRanks::new(&file.tensors)?),
            (None, true, _) => bail!("`dim_from_weights` needs `network_weights`"),
            (_, false, Some(blocks)) => Box::new(blocks),
            (_, false, None) => match preset {
                Some(preset) => Box::new(preset),
                None => Box::new(UniformRanks {
                    linear: Rank::new(options.network_rank(), alpha as f32),
                    // sd-scripts' DyLoRA has one alpha for all layers.
                    conv: args.conv_dim.map(|dim| match options.is_dylora() {
                        true => Rank::new(dim, alpha as f32),
                        false => Rank::new(dim, args.conv_alpha as f32),
                    }),
                }),
            },
        };
        // The alphas of a file have it in them.
        let rule: Box<dyn RankRule> = match args.lycoris.rs_lora && !options.dim_from_weights {
            true => Box::new(RootRanks(rule)),
            false => rule,
        };
        let all = targets.iter().filter(|target| is_asked_for(target, &args)).count();
        let algorithm = options.read_algorithm(&args)?;
        let mut network = LoraNetwork::new(targets, &*rule, algorithm)?;
        network.dropouts = options.read_dropouts()?;
        let left_out = all.saturating_sub(network.modules().len());
        if left_out > 0 && !options.dim_from_weights && preset.is_none() {
            notes.push(format!(
                "{left_out} of {all} modules are left out: rank or learning rate of their block is 0"
            ));
        }
        network.set_rates(rates, args.loraplus);
        let optimizer = options.choose_optimizer()?;
        let rates: Vec<f64> =
            network.groups().iter().map(|group| learning_rate(options, group)).collect();
        optimizer.check_rates(&rates)?;
        let training_bytes = training_bytes(&optimizer, network.element_count());
        let hint = "lower `network_dim` (and `conv_dim`), or use `optimizer_type = \"AdamW8bit\"`";
        let what = "the LoRA's weights, gradients and optimizer state";
        refuse_beyond_memory(what, training_bytes, hint)?;
        let mut values = network.initial_values(&mut |key, count| {
            let mut rng = stream(seed, Purpose::LoraInit, name_key(key), 0);
            (0..count).map(|_| rng.uniform_f32()).collect()
        });
        let merged: BTreeMap<Part, MergedWeights<'_>> =
            base.parts().map(|(part, weights)| (part, base.merge.over(part, weights))).collect();
        let frozen = merged.iter().map(|(part, weights)| (*part, weights as &dyn Weights));
        network.set_magnitudes(&mut values, &frozen.collect())?;
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
        Ok(Self { network, values, training_bytes, notes })
    }

    /// The parameters, laid out for the tape.
    pub fn parameters(&self, base: &Base) -> Result<ParamStore> {
        Ok(self.network.parameters(base.device, self.values.clone())?)
    }
}

/// Learning rates of text encoders that the model does not have.
fn text_rate_notes(options: &Options, family: Family) -> Vec<String> {
    let (encoders, have) = match family {
        Family::Sd1 | Family::Sd2 => (1, "one text encoder, only the first counts"),
        Family::Sdxl => (2, "two text encoders, only the first two count"),
    };
    let given = options.text_encoder_lr.as_ref().map_or(0, Vec::len);
    let note = || format!("`text_encoder_lr` has {given} values: this model has {have}");
    (given > encoders).then(note).into_iter().collect()
}

/// Bytes of so many trainable numbers with their gradients and the optimizer's state.
fn training_bytes(optimizer: &Choice, elements: usize) -> usize {
    (elements as f64 * (WEIGHT_BYTES + optimizer.recipe.state_bytes())).ceil() as usize
}

/// Whether a layer would get a module if no block were left out.
fn is_asked_for(target: &Target, args: &NetworkArgs) -> bool {
    let conv = args.conv_dim.is_some() || args.block_ranks.conv_dims.is_some();
    conv || (target.in_transformer && target.is_pointwise())
}

/// Learning rate of a part before the schedule: its own, else the common one.
pub fn part_rate(options: &Options, part: Part) -> f64 {
    let own = match part {
        Part::TextEncoder => {
            options.text_encoder_lr.as_ref().and_then(|rates| rates.first().copied())
        }
        // One rate is for both.
        Part::TextEncoder2 => options
            .text_encoder_lr
            .as_ref()
            .and_then(|rates| rates.get(1).or(rates.first()).copied()),
        Part::Unet => options.unet_lr,
    };
    own.unwrap_or(options.learning_rate)
}

/// Learning rate of a group before the schedule: its part's, times weight of the block and LoRA+.
pub fn learning_rate(options: &Options, group: &ParamGroup) -> f64 {
    part_rate(options, group.part) * group.lr_factor
}

/// Scales modules down whose norm grew too large (`scale_weight_norms`); `None` where none was asked
/// for. sd-scripts does it for `networks.lora` alone.
pub fn limit_norms(
    options: &Options,
    network: &LoraNetwork,
    params: &mut ParamStore,
) -> Result<Option<KeyNorms>> {
    let limit = options.scale_weight_norms.filter(|limit| *limit > 0. && !options.is_dylora());
    let Some(limit) = limit else { return Ok(None) };
    if params.device() == Device::Cpu {
        return Ok(Some(key_norms(network.limit_norms(params, limit)?)));
    }
    // One way to the host and back: on a card each norm would be waited for.
    let mut host = params.to_device(Device::Cpu)?;
    let report = network.limit_norms(&mut host, limit)?;
    if report.scaled > 0 {
        let values = host.flat().to_vec_f32()?;
        params.update(|flat| flat.copy_from_slice(&values))?;
    }
    Ok(Some(key_norms(report)))
}

fn key_norms(report: NormReport) -> KeyNorms {
    let NormReport { scaled, mean, max } = report;
    KeyNorms { scaled, mean, max }
}
