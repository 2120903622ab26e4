//! Options of sd-scripts' generation scripts that are not there: named, not unknown.
//!
//! What would change the picture is refused; what says how a machine computes is passed over with a
//! line.

use clap::{Arg, ArgMatches, Args, Command, FromArgMatches};

use crate::Usage;
use crate::progress::tell;

/// Why an option does nothing here.
#[derive(Clone, Copy)]
enum Verdict {
    Refused(&'static str),
    Ignored(&'static str),
}

use Verdict::{Ignored, Refused};

const CONTROL: Verdict = Refused("ControlNet is not there");
const SHRINK: Verdict = Refused("Deep Shrink is not there");
const GRADUAL: Verdict = Refused("Gradual Latent is not there");
const GUIDED: Verdict = Refused("guidance by CLIP or VGG16 is not there");
const NOISE: Verdict = Refused("other noise to start from is not there");
const ATTENTION: Verdict = Ignored("attention is always computed without large matrices");

/// Option, whether values follow, verdict.
const OPTIONS: [(&str, bool, Verdict); 42] = [
    ("control_net_models", true, CONTROL),
    ("control_net_lllite_models", true, CONTROL),
    ("control_net_preps", true, CONTROL),
    ("control_net_multipliers", true, CONTROL),
    ("control_net_weights", true, CONTROL),
    ("control_net_ratios", true, CONTROL),
    ("guide_image_path", true, CONTROL),
    ("highres_fix_disable_control_net", false, Ignored("no ControlNet takes part")),
    ("highres_fix_upscaler", true, Refused("upscalers are Python modules")),
    ("highres_fix_upscaler_args", true, Refused("upscalers are Python modules")),
    ("from_module", true, Refused("prompts cannot come from a Python module; use `--from_file`")),
    ("prompter_module_args", true, Refused("prompts cannot come from a Python module")),
    ("clip_guidance_scale", true, GUIDED),
    ("clip_image_guidance_scale", true, GUIDED),
    ("vgg16_guidance_scale", true, GUIDED),
    ("vgg16_guidance_layer", true, GUIDED),
    ("clip_vision_strength", true, GUIDED),
    ("ds_depth_1", true, SHRINK),
    ("ds_timesteps_1", true, SHRINK),
    ("ds_depth_2", true, SHRINK),
    ("ds_timesteps_2", true, SHRINK),
    ("ds_ratio", true, SHRINK),
    ("gradual_latent_timesteps", true, GRADUAL),
    ("gradual_latent_ratio", true, GRADUAL),
    ("gradual_latent_ratio_step", true, GRADUAL),
    ("gradual_latent_every_n_steps", true, GRADUAL),
    ("gradual_latent_s_noise", true, GRADUAL),
    ("gradual_latent_unsharp_params", true, GRADUAL),
    ("pyramid_noise_prob", true, NOISE),
    ("pyramid_noise_discount_range", true, NOISE),
    ("noise_offset_prob", true, NOISE),
    ("noise_offset_range", true, NOISE),
    ("negative_scale", true, Refused("the negative prompt has no scale of its own")),
    ("emb_normalize_mode", true, Refused("weighted words keep the mean of the prompt")),
    ("force_scheduler_zero_steps_offset", false, Refused("each sampler has its own offset")),
    ("network_regional_mask_max_color_codes", true, Refused("LoRAs act on the whole picture")),
    ("textual_inversion_embeddings", true, Refused("textual inversion is not there")),
    ("tokenizer_cache_dir", true, Ignored("the tokenizer is built in")),
    ("xformers", false, ATTENTION),
    ("sdpa", false, ATTENTION),
    ("diffusers_xformers", false, ATTENTION),
    ("opt_channels_last", false, Ignored("channels are always last")),
];

/// Those that were given.
#[derive(Debug, Default)]
pub(super) struct Unavailable {
    given: Vec<&'static str>,
}

impl Unavailable {
    /// Refuses what would change the picture, says what has no effect.
    ///
    /// # Errors
    /// A [`Usage`] that names the option and the reason.
    pub fn check(&self) -> Result<(), Usage> {
        for (name, _, verdict) in OPTIONS.iter().filter(|(name, ..)| self.given.contains(name)) {
            match verdict {
                Refused(reason) => {
                    let hint = "hint: leave the option out";
                    return Err(Usage(format!("`--{name}` cannot be done: {reason}\n{hint}")));
                }
                Ignored(reason) => tell(&format!("`--{name}` has no effect: {reason}")),
            }
        }
        Ok(())
    }
}

impl FromArgMatches for Unavailable {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let is_given =
            |name: &str| matches.value_source(name) == Some(clap::parser::ValueSource::CommandLine);
        let given = OPTIONS.iter().map(|(name, ..)| *name).filter(|name| is_given(name)).collect();
        Ok(Self { given })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl Args for Unavailable {
    fn augment_args(command: Command) -> Command {
        OPTIONS.iter().fold(command, |command, (name, has_values, _)| {
            let option = Arg::new(*name).long(*name).hide(true);
            command.arg(match has_values {
                true => option.num_args(0..).allow_negative_numbers(true),
                false => option.action(clap::ArgAction::SetTrue),
            })
        })
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}
