//! How a picture was made, as texts beside its pixels: WebUI's `parameters`, and the keys of sd-scripts'
//! generation script.

use std::thread::JoinHandle;

use formats::picture_text::PictureText;
use formats::{BaseModel, Family};

use super::networks::Networks;
use super::plan::{Shot, first_stage_side};
use models::pipeline::Request;

/// Digits of a model's hash in WebUI's text.
const HASH_DIGITS: usize = 10;

/// What WebUI calls the spacing of noise levels without Karras', where there is a choice.
const PLAIN_SPACING: &str = "Uniform";

/// A hash that is computed while the first picture is made.
type Hash = JoinHandle<Option<String>>;

/// What is the same for all pictures of a run.
pub(super) struct Facts {
    is_sdxl: bool,
    model: String,
    model_hash: Result<Option<String>, Option<Hash>>,
    vae: Option<String>,
}

impl Facts {
    /// Starts to compute the model's hash.
    pub fn new(files: &BaseModel) -> Self {
        let identity = files.identity.clone();
        let hash = std::thread::spawn(move || identity.sha256().ok().flatten());
        let stem = |name: &str| {
            let without = [".safetensors", ".ckpt"].iter().find_map(|end| name.strip_suffix(end));
            without.unwrap_or(name).to_owned()
        };
        Self {
            is_sdxl: files.family == Family::Sdxl,
            model: stem(&files.name),
            model_hash: Err(Some(hash)),
            vae: files.vae_identity.as_ref().map(|vae| vae.name.clone()),
        }
    }

    /// Waits for the hash the first time.
    fn model_hash(&mut self) -> Option<&str> {
        if let Err(hash) = &mut self.model_hash {
            // A thread that panicked has no hash to give; a folder has none either.
            self.model_hash = Ok(hash.take().and_then(|hash| hash.join().ok()).flatten());
        }
        let hash = self.model_hash.as_ref().ok()?.as_deref()?;
        hash.get(..HASH_DIGITS)
    }
}

/// The texts of a picture, keyword and text.
pub(super) fn texts(
    shot: &Shot,
    networks: &Networks,
    facts: &mut Facts,
) -> Vec<(&'static str, String)> {
    let request = &shot.request;
    let mut texts = vec![
        ("parameters", parameters(shot, networks, facts).to_string()),
        ("prompt", request.prompt.clone()),
        ("seed", request.seed.to_string()),
        ("sampler", request.sampler.to_string()),
        ("steps", request.options.steps.to_string()),
        ("scale", request.guidance_scale.to_string()),
    ];
    if !request.negative_prompt.is_empty() {
        texts.push(("negative-prompt", request.negative_prompt.clone()));
    }
    if facts.is_sdxl {
        texts.extend(told_of_sdxl(request));
    }
    texts
}

/// What SDXL alone is told: second prompts, and sizes as sd-scripts writes them.
fn told_of_sdxl(request: &Request) -> Vec<(&'static str, String)> {
    let second = [
        ("prompt-2", request.prompt_2.clone()),
        ("negative-prompt-2", request.negative_prompt_2.clone()),
    ];
    let mut texts: Vec<_> =
        second.into_iter().filter_map(|(key, text)| Some((key, text?))).collect();
    let hints = request.size_ids.unwrap_or_default();
    let number = |side: Option<usize>| side.map_or("None".to_owned(), |side| side.to_string());
    let own = [request.width, request.height];
    let original = [0, 1].map(|side| hints.original[side].unwrap_or(own[side]).to_string());
    texts.extend([
        ("original-height", original[1].clone()),
        ("original-width", original[0].clone()),
        ("original-height-negative", number(hints.original_negative[1])),
        ("original-width-negative", number(hints.original_negative[0])),
        ("crop-top", hints.crop[1].to_string()),
        ("crop-left", hints.crop[0].to_string()),
    ]);
    texts
}

/// As WebUI writes it, so that its reader fills in the same picture.
fn parameters(shot: &Shot, networks: &Networks, facts: &mut Facts) -> PictureText {
    let request = &shot.request;
    let mut text = PictureText {
        prompt: with_tags(request, shot, networks),
        negative_prompt: request.negative_prompt.clone(),
        settings: Vec::new(),
    };
    // WebUI names the first stage, and what the second adds.
    let highres = request.highres_fix.as_ref();
    text.set("Steps", highres.map_or(request.options.steps, |highres| highres.steps));
    text.set("Sampler", request.sampler.webui_label());
    if request.sampler.offers_karras() {
        text.set("Schedule type", if request.options.karras { "Karras" } else { PLAIN_SPACING });
    }
    text.set("CFG scale", request.guidance_scale);
    text.set("Seed", request.seed);
    let [width, height] = match highres {
        Some(highres) => {
            [request.width, request.height].map(|side| first_stage_side(side, highres.scale))
        }
        None => [request.width, request.height],
    };
    text.set("Size", format!("{width}x{height}"));
    if let Some(hash) = facts.model_hash() {
        text.set("Model hash", hash);
    }
    text.set("Model", &facts.model);
    if let Some(vae) = &facts.vae {
        text.set("VAE", vae);
    }
    if request.image.is_some() || highres.is_some() {
        text.set("Denoising strength", request.strength);
    }
    if let Some(skip) = request.clip_skip.filter(|skip| *skip > 1) {
        text.set("Clip skip", skip);
    }
    // The noise is that of PyTorch's CPU generator.
    text.set("RNG", "CPU");
    if let Some(highres) = highres {
        text.set("Hires resize", format!("{}x{}", request.width, request.height));
        text.set("Hires steps", request.options.steps);
        text.set("Hires upscaler", if highres.latents { "Latent (bicubic)" } else { "Lanczos" });
    }
    if !networks.all.is_empty() {
        let hashes: Vec<String> = networks
            .all
            .iter()
            .map(|network| format!("{}: {}", network.name, network.hash))
            .collect();
        text.set("Lora hashes", hashes.join(", "));
    }
    text.set("Version", concat!("lorarun ", env!("CARGO_PKG_VERSION")));
    text
}

/// The prompt with a tag for each LoRA at work; one that is off has none, unless all are off.
fn with_tags(request: &Request, shot: &Shot, networks: &Networks) -> String {
    let merged = networks.multipliers[..networks.merged].iter();
    let all: Vec<f32> = merged.chain(&shot.multipliers).copied().collect();
    let is_off = all.iter().all(|multiplier| *multiplier == 0.);
    let tags = networks.all.iter().zip(&all).filter(|(_, number)| is_off || **number != 0.);
    let tags = tags.map(|(network, number)| format!(" <lora:{}:{number}>", network.name));
    format!("{}{}", request.prompt, tags.collect::<String>())
}
