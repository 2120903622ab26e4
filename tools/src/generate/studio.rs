//! The loaded model with its LoRAs, set as each picture wants them.

use anyhow::Context;
use formats::Family;
use models::Tiling;
use models::pipeline::{
    LoraHandle, Picture, Pipeline, PipelineError, PipelineOptions, Request, Watch,
};
use models::prompt::{CHUNK, parse_weights};

use super::device;
use super::layout::Multipliers;
use super::networks::Networks;
use super::options::Options;
use super::plan::Shot;
use crate::progress::tell;

/// Tokens of a chunk without its begin and end.
const TOKENS: usize = CHUNK - 2;

/// Who makes the pictures.
pub(super) struct Studio {
    pub pipeline: Pipeline,
    /// The LoRAs that are applied, and their multipliers now.
    applied: Vec<(LoraHandle, f32)>,
}

/// What `--sdxl` and `--v1` say.
fn check_family(family: Family, options: &Options) -> anyhow::Result<()> {
    let model = &options.model;
    if model.sdxl && family != Family::Sdxl || model.v1 && family != Family::Sd1 {
        let said = if model.sdxl { "--sdxl" } else { "--v1" };
        anyhow::bail!(
            "`{said}` does not fit the model, it is: {}\nhint: leave `{said}` out, the model tells",
            family.title()
        );
    }
    Ok(())
}

impl Studio {
    /// Loads the model, merges and applies the LoRAs, the latter with `multipliers`.
    ///
    /// # Errors
    /// A model or a LoRA that cannot be read, or that do not fit each other.
    pub fn open(
        options: &Options,
        ckpt: &str,
        networks: &Networks,
        multipliers: &[f32],
    ) -> anyhow::Result<Self> {
        let (model, machine) = (&options.model, &options.machine);
        let device = device::open(&machine.device)?;
        let (dtype, vae_dtype) = device::types(machine, device);
        let told = |flag: bool| flag.then_some(true);
        let how = PipelineOptions {
            v2: if model.v1 { Some(false) } else { told(model.v2) },
            vae: model.vae.clone(),
            v_parameterization: told(model.v_parameterization),
            zero_terminal_snr: told(model.zero_terminal_snr),
            device,
            dtype,
            vae_dtype,
            tiling: machine.vae_slices.map_or(Tiling::Auto, |_| Tiling::Always),
            ..PipelineOptions::default()
        };
        let mut pipeline = Pipeline::load(ckpt, &how)?;
        pipeline.files.notes.iter().for_each(|note| tell(note));
        check_family(pipeline.files.family, options)?;
        let mut applied = Vec::new();
        for (index, network) in networks.all.iter().enumerate() {
            if index == networks.merged && index > 0 {
                pipeline.merge_loras();
            }
            let place = index.checked_sub(networks.merged);
            let own = place.and_then(|place| multipliers.get(place));
            let multiplier = *own.unwrap_or(&networks.multipliers[index]);
            let handle = pipeline.add_lora(&network.path, multiplier).with_context(|| {
                format!("the LoRA cannot be used: `{}`", network.path.display())
            })?;
            let report = pipeline.lora_report(handle)?;
            if let Some(first) = report.unused.first() {
                let (name, count) = (&network.name, report.unused.len());
                tell(&format!(
                    "`{name}`: the model has no layer for {count} of its modules, `{first}` and so on"
                ));
            }
            if place.is_some() {
                applied.push((handle, multiplier));
            }
        }
        if networks.merged == networks.all.len() && networks.merged > 0 {
            pipeline.merge_loras();
        }
        Ok(Self { pipeline, applied })
    }

    /// An error if a prompt or negative prompt has more tokens than it may have.
    ///
    /// # Errors
    /// [`PipelineError::LongPrompt`].
    pub fn check_prompts(&self, shots: &[Shot]) -> Result<(), PipelineError> {
        for Shot { request, .. } in shots {
            let second = [&request.prompt_2, &request.negative_prompt_2];
            let first = [&request.prompt, &request.negative_prompt];
            for prompt in first.into_iter().chain(second.into_iter().flatten()) {
                let mut tokens = 0;
                for (part, _) in parse_weights(prompt) {
                    tokens += self.pipeline.tokenizers.first.encode(&part)?.len();
                }
                let most = TOKENS * request.most_chunks;
                if tokens > most {
                    let (needed, prompt) = (tokens.div_ceil(TOKENS), prompt.clone());
                    return Err(PipelineError::LongPrompt { tokens, most, needed, prompt });
                }
            }
        }
        Ok(())
    }

    /// Sets the multipliers of the applied LoRAs.
    ///
    /// # Errors
    /// A LoRA that cannot be read any more.
    pub fn set(&mut self, multipliers: &Multipliers) -> Result<(), PipelineError> {
        for ((handle, now), wanted) in self.applied.iter_mut().zip(multipliers) {
            if now != wanted {
                self.pipeline.set_multiplier(*handle, *wanted)?;
                *now = *wanted;
            }
        }
        Ok(())
    }

    /// The pictures of requests that can be made together.
    ///
    /// # Errors
    /// Those of the pipeline.
    pub fn make(
        &self,
        requests: &[Request],
        watch: &mut Watch<'_>,
    ) -> Result<Vec<Picture>, PipelineError> {
        self.pipeline.generate_batch(requests, watch)
    }
}
