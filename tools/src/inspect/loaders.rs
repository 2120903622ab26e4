//! Which programs would load an adapter, what each would drop and what it would misread.
//!
//! Facts read off the programs' public code (A1111 WebUI 1.10, ComfyUI 0.3 to the end of 2025, Forge,
//! diffusers 0.42, sd-scripts 0.10); those of diffusers are checked by running it. A program that
//! changes makes a line here wrong, not the file.

use std::collections::BTreeMap;

use formats::Family;
use formats::adapter::{AdapterFile, AdapterKind, AdapterModule, Naming};
use serde::Serialize;

/// How much of a file a program takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Loads {
    /// All of it, as it was meant.
    Yes,
    /// Some keys are dropped, or some modules get another strength.
    Partly,
    /// Nothing, or it stops with an error.
    No,
}

/// What one program would do with the file.
#[derive(Debug, Serialize)]
pub(crate) struct Verdict {
    /// `webui`, `forge`, `comfyui`, `diffusers`, `sd-scripts`.
    pub program: &'static str,
    pub loads: Loads,
    /// Why not all, and what else to know.
    pub reasons: Vec<String>,
    /// Keys that have no effect there.
    pub dropped: Vec<String>,
    /// Modules that have another effect there than in training.
    pub misread: Vec<String>,
}

impl Verdict {
    fn new(program: &'static str) -> Self {
        let (reasons, dropped, misread) = (Vec::new(), Vec::new(), Vec::new());
        Self { program, loads: Loads::Yes, reasons, dropped, misread }
    }

    fn because(&mut self, reason: &str) {
        if !self.reasons.iter().any(|said| said == reason) {
            self.reasons.push(reason.to_owned());
        }
    }

    fn drop_keys(&mut self, keys: impl IntoIterator<Item = String>, reason: &str) {
        self.dropped.extend(keys);
        self.because(reason);
    }

    fn misread(&mut self, module: &AdapterModule, reason: &str) {
        if self.misread.last() != Some(&module.name) {
            self.misread.push(module.name.clone());
        }
        self.because(reason);
    }

    fn refuse(&mut self, reason: String) {
        self.loads = Loads::No;
        self.reasons.insert(0, reason);
    }

    /// Sets what follows from the lists; `total` is the number of the file's keys.
    fn judged(mut self, file: &AdapterFile) -> Self {
        let total = file.file.names().len();
        self.dropped.sort();
        self.dropped.dedup();
        if self.loads == Loads::No {
            // What stops the program makes the rest idle.
            self.dropped.clear();
            self.misread.clear();
        } else if self.dropped.len() == total {
            self.loads = Loads::No;
        } else if !self.dropped.is_empty() || !self.misread.is_empty() {
            self.loads = Loads::Partly;
        }
        self
    }
}

/// The verdicts of all programs.
pub(crate) fn verdicts(file: &AdapterFile) -> Vec<Verdict> {
    vec![
        webui(file),
        comfyui(file, "forge"),
        comfyui(file, "comfyui"),
        diffusers(file),
        sd_scripts(file),
    ]
}

/// Every key of a module, the alpha's too.
fn all_keys(file: &AdapterFile, module: &AdapterModule) -> Vec<String> {
    let alpha = alpha_key(file, module);
    module.keys().into_iter().map(str::to_owned).chain(alpha).collect()
}

fn alpha_key(file: &AdapterFile, module: &AdapterModule) -> Option<String> {
    let key = format!("{}.alpha", module.stored);
    file.file.describe(&key).is_some().then_some(key)
}

fn is_dotted(module: &AdapterModule) -> bool {
    module.stored.contains('.')
}

/// Alpha stands beside the tensors only, and changes the strength.
fn has_hidden_alpha(file: &AdapterFile, module: &AdapterModule) -> bool {
    alpha_key(file, module).is_none() && (module.scale(file) - 1.0).abs() > 1e-6
}

/// DoRA's magnitudes stand for the outputs: `[out, 1, ...]`.
fn is_dora_of_outputs(file: &AdapterFile, module: &AdapterModule) -> bool {
    let shape = module.dora_scale.as_deref().and_then(|key| file.file.shape(key));
    let out = module.layer_shape(file).first().copied();
    shape.is_some_and(|shape| shape.first().copied() == out && shape.len() > 1 && out != Some(1))
}

const CONVERT: &str = "`lorarun convert --to kohya` makes a file that it reads";

fn webui(file: &AdapterFile) -> Verdict {
    let mut verdict = Verdict::new("webui");
    let sdxl = file.family == Some(Family::Sdxl);
    for module in &file.modules {
        let keys = all_keys(file, module);
        if is_dotted(module) {
            verdict.drop_keys(keys, "it knows no names with dots (diffusers, PEFT)");
            verdict.because(CONVERT);
        } else if sdxl && module.stored.starts_with("lora_te_") {
            verdict
                .drop_keys(keys, "with SDXL it knows text encoders as `lora_te1_` and `lora_te2_`");
        } else if sdxl && module.stored.ends_with("up_blocks_0_upsamplers_0_conv") {
            verdict.drop_keys(keys, "it looks for SDXL's first upsampler under SD1's number");
        } else if let AdapterKind::Norm { w_norm, b_norm } = &module.kind
            && (w_norm.is_none() || b_norm.is_none())
        {
            let name = &module.stored;
            verdict.refuse(format!(
                "it stops at a bias or norm that is not a pair of `w_norm` and `b_norm`: `{name}`"
            ));
        } else if is_dora_of_outputs(file, module) {
            verdict.misread(
                module,
                "it takes DoRA's magnitudes for those of the inputs, which these are not",
            );
        }
    }
    // Of other kinds than the ones read here it knows these.
    let known = |key: &str| {
        ["oft_", ".a1.", ".a2.", ".b1.", ".b2.", ".on_input"].iter().any(|part| key.contains(part))
    };
    let unknown = file.unknown.iter().filter(|key| !known(key)).cloned();
    drop_unknown(&mut verdict, unknown.collect());
    note_hiding(&mut verdict, file);
    verdict.judged(file)
}

fn drop_unknown(verdict: &mut Verdict, unknown: Vec<String>) {
    if !unknown.is_empty() {
        verdict.drop_keys(unknown, "it knows no such keys");
    }
}

/// WebUI and Forge show a file only with models of the family that they read off its metadata.
fn note_hiding(verdict: &mut Verdict, file: &AdapterFile) {
    let get = |key: &str| file.metadata.get(key).map_or("", String::as_str);
    let shown = if get("ss_base_model_version").starts_with("sdxl_") {
        Family::Sdxl
    } else if get("ss_v2") == "True" {
        Family::Sd2
    } else if file.metadata.is_empty() {
        return;
    } else {
        Family::Sd1
    };
    if let Some(family) = file.family
        && family != shown
    {
        verdict.because(&format!(
            "its Lora page hides the file beside {} models, for its metadata (`ss_base_model_version`, \
             `ss_v2`) read as {}; writing its name in the prompt works",
            family.title(),
            shown.title()
        ));
    }
}

fn comfyui(file: &AdapterFile, program: &'static str) -> Verdict {
    let mut verdict = Verdict::new(program);
    for module in &file.modules {
        if let Err(reason) = comfyui_knows(file, module) {
            verdict.drop_keys(all_keys(file, module), reason);
            if is_dotted(module) {
                verdict.because(CONVERT);
            }
            continue;
        }
        if let AdapterKind::Norm { w_norm: None, b_norm: Some(key) } = &module.kind
            && key.ends_with(".b_norm")
        {
            verdict.drop_keys([key.clone()], "it reads `b_norm` beside `w_norm` only");
        }
        if has_hidden_alpha(file, module) {
            verdict.misread(
                module,
                "it reads alphas from `.alpha` tensors only, not from PEFT's settings",
            );
        }
        match &module.dora_scale {
            Some(key) if !key.ends_with(".dora_scale") => {
                verdict.drop_keys([key.clone()], "it knows no `lora_magnitude_vector`");
                verdict.misread(module, "without its magnitudes a DoRA is another change");
            }
            Some(_) if is_dora_of_outputs(file, module) => verdict.misread(
                module,
                "it divides by the length of the unchanged weights, DoRA by that of the changed",
            ),
            _ => {}
        }
    }
    drop_unknown(&mut verdict, file.unknown.clone());
    if program == "forge" {
        note_hiding(&mut verdict, file);
    }
    verdict.judged(file)
}

/// Whether the map of names that ComfyUI makes of a model holds the module.
fn comfyui_knows(file: &AdapterFile, module: &AdapterModule) -> Result<(), &'static str> {
    const LAYERS: [&str; 6] = ["q_proj", "k_proj", "v_proj", "out_proj", "mlp_fc1", "mlp_fc2"];
    let stored = module.stored.as_str();
    if !is_dotted(module) {
        if let Some(layer) = stored.strip_prefix("lora_te") {
            let known = LAYERS.iter().any(|name| layer.ends_with(name));
            return if known {
                Ok(())
            } else {
                Err("it knows attention and MLP of text encoders only")
            };
        }
        return Ok(());
    }
    if stored.starts_with("base_model.") || stored.contains(".base_model.") {
        return Err("it knows no `base_model.model.` names for these families");
    }
    if let Some(path) =
        stored.strip_prefix("text_encoder_2.").or(stored.strip_prefix("text_encoder."))
    {
        if !path.starts_with("text_model.") {
            return Err("it knows text encoders with `text_model.` in the name only");
        }
        let second = stored.starts_with("text_encoder_2.");
        if second && file.family != Some(Family::Sdxl) {
            return Err("only SDXL has a second text encoder");
        }
        let named = ["q_proj", "k_proj", "v_proj", "out_proj", "mlp.fc1", "mlp.fc2"];
        return if named.iter().any(|name| path.ends_with(name)) {
            Ok(())
        } else {
            Err("it knows no such names in text encoders")
        };
    }
    let attention = [".to_q", ".to_k", ".to_v", ".to_out", ".to_out.0"];
    let plain =
        !stored.contains(".processor.") && attention.iter().any(|name| stored.ends_with(name));
    if plain {
        Err("it looks for the attention of dotted names under `.processor.`")
    } else {
        Ok(())
    }
}

fn diffusers(file: &AdapterFile) -> Verdict {
    let mut verdict = Verdict::new("diffusers");
    let dotted = file.modules.iter().filter(|module| is_dotted(module)).count();
    if dotted > 0 && dotted < file.modules.len() {
        verdict.refuse("it reads one naming in a file, this one mixes two".to_owned());
        return verdict.judged(file);
    }
    let stops = file.modules.iter().find_map(|module| diffusers_stops_at(file, module));
    let unknown = file.unknown.iter().find(|key| dotted == 0 || !key.contains("lora"));
    if let Some(reason) =
        stops.or_else(|| unknown.map(|key| format!("it stops at this key: `{key}`")))
    {
        verdict.refuse(reason);
        return verdict.judged(file);
    }
    for module in &file.modules {
        if let Some(key) = module.dora_scale.as_ref().filter(|key| key.ends_with(".dora_scale")) {
            verdict.drop_keys([key.clone()], "it leaves `dora_scale` out, with a warning");
            verdict.misread(module, "without its magnitudes a DoRA is another change");
            verdict.because("`lorarun convert --to diffusers` makes a file that it reads");
        }
        let prefixed = ["unet.", "text_encoder.", "text_encoder_2."];
        if dotted > 0 && !prefixed.iter().any(|prefix| module.stored.starts_with(prefix)) {
            verdict.drop_keys(
                all_keys(file, module),
                "a pipeline passes over names that do not begin with a component (`unet.`)",
            );
            verdict.because("`lorarun convert --to diffusers` makes a file that it reads");
        }
        let in_header = file.metadata.contains_key("lora_adapter_metadata");
        if dotted > 0 && !in_header && has_hidden_alpha(file, module) {
            verdict.misread(
                module,
                "it does not read `adapter_config.json`: alpha is taken for the rank",
            );
        }
    }
    if file.naming == Naming::Kohya {
        for module in mis_scaled(file) {
            verdict.misread(
                module,
                "of several alphas in a file it gives the most frequent one to attention and text \
                 encoders",
            );
        }
        if !verdict.misread.is_empty() {
            verdict
                .because("`lorarun convert --to diffusers` writes strengths that it reads right");
        }
    }
    verdict.judged(file)
}

/// Why a module makes diffusers stop.
fn diffusers_stops_at(file: &AdapterFile, module: &AdapterModule) -> Option<String> {
    let name = &module.stored;
    let kind = match &module.kind {
        AdapterKind::LowRank { mid: None, .. } => None,
        AdapterKind::LowRank { .. } => Some("LoRA in Tucker form"),
        AdapterKind::Hadamard { .. } => Some("LoHa"),
        AdapterKind::Kronecker { .. } => Some("LoKr"),
        AdapterKind::Full { .. } => Some("whole difference"),
        AdapterKind::Norm { .. } => Some("norm or bias"),
    };
    if let Some(kind) = kind {
        return Some(format!(
            "its Stable Diffusion pipelines know LoRA alone, this is a {kind}: `{name}`"
        ));
    }
    if module.bias.is_some() {
        return Some(format!("it stops at the difference of a bias: `{name}`"));
    }
    if !is_dotted(module) {
        return None;
    }
    if let Some(key) = alpha_key(file, module) {
        return Some(format!("beside dotted names it refuses keys without `lora`: `{key}`"));
    }
    name.contains(".base_model.").then(|| format!("it finds no layer of this name: `{name}`"))
}

/// Modules that get another alpha in diffusers: of a component with several it makes the most frequent
/// one (the first met of equals) the rule, and its exceptions miss the U-Net's attention (whose old
/// names there end in `_lora`) and, since transformers 5 names text models shorter, all of theirs.
fn mis_scaled(file: &AdapterFile) -> Vec<&AdapterModule> {
    let mut components: BTreeMap<&str, Vec<(&AdapterModule, Option<f32>)>> = BTreeMap::new();
    for module in &file.modules {
        let stored = alpha_key(file, module).and(module.alpha);
        components.entry(part_of(&module.name)).or_default().push((module, stored));
    }
    let mut found = Vec::new();
    for modules in components.values() {
        let mut counts: Vec<(f32, usize)> = Vec::new();
        for alpha in modules.iter().filter_map(|(_, alpha)| *alpha) {
            match counts.iter_mut().find(|(known, _)| *known == alpha) {
                Some((_, count)) => *count += 1,
                None => counts.push((alpha, 1)),
            }
        }
        let most = counts.iter().map(|(_, count)| *count).max().unwrap_or_default();
        let Some((common, _)) = counts.iter().find(|(_, count)| *count == most) else { continue };
        for (module, alpha) in modules {
            let own = module.scale(file) * module.rank(file) as f32;
            let excepted = alpha.is_some() && !is_missed(&module.name);
            if !excepted && (own - common).abs() > 1e-6 * own.abs() {
                found.push(*module);
            }
        }
    }
    found
}

fn is_missed(name: &str) -> bool {
    const ATTENTION: [&str; 4] = ["_to_q", "_to_k", "_to_v", "_to_out_0"];
    part_of(name) != "unet" || ATTENTION.iter().any(|ending| name.ends_with(ending))
}

fn sd_scripts(file: &AdapterFile) -> Verdict {
    let mut verdict = Verdict::new("sd-scripts");
    let mut lycoris = false;
    for module in &file.modules {
        let keys = all_keys(file, module);
        match &module.kind {
            _ if is_dotted(module) => {
                verdict
                    .drop_keys(keys, "`networks.lora` knows no names with dots (diffusers, PEFT)");
                verdict.because(CONVERT);
            }
            AdapterKind::LowRank { mid: None, .. } if is_outer(&module.name) => {
                verdict.drop_keys(keys, "`networks.lora` has no module for the outer layers");
            }
            AdapterKind::LowRank { mid: None, .. } => {
                let extra: Vec<String> =
                    module.dora_scale.iter().chain(&module.bias).cloned().collect();
                lycoris |= !extra.is_empty();
                if module.dora_scale.is_some() {
                    verdict.misread(module, "without its magnitudes a DoRA is another change");
                }
                if !extra.is_empty() {
                    verdict.drop_keys(
                        extra,
                        "`networks.lora` knows neither `dora_scale` nor `diff_b`",
                    );
                }
            }
            AdapterKind::LowRank { mid: Some(_), .. } => {
                let name = &module.stored;
                verdict.refuse(format!("`networks.lora` stops at a LoRA in Tucker form: `{name}`"));
                lycoris = true;
            }
            _ => {
                verdict.drop_keys(keys, "`networks.lora` knows LoRA alone, not LyCORIS' kinds");
                lycoris = true;
            }
        }
    }
    drop_unknown(&mut verdict, file.unknown.clone());
    if lycoris {
        verdict.because("`--network_module=lycoris.kohya` reads it");
    }
    verdict.judged(file)
}

fn is_outer(name: &str) -> bool {
    const OUTER: [&str; 9] = [
        "lora_unet_conv_in",
        "lora_unet_conv_out",
        "lora_unet_time_embed",
        "lora_unet_add_embedding",
        "lora_unet_label_emb",
        "lora_unet_input_blocks_0_0",
        "lora_unet_out_2",
        "lora_te_text_model_embeddings",
        "lora_te1_text_model_embeddings",
    ];
    OUTER.iter().any(|start| name.starts_with(start))
}

/// `unet`, `te`, `te1`, `te2`: the network of a module's name.
pub(crate) fn part_of(name: &str) -> &'static str {
    const PARTS: [(&str, &str); 4] =
        [("lora_unet_", "unet"), ("lora_te_", "te"), ("lora_te1_", "te1"), ("lora_te2_", "te2")];
    PARTS.iter().find(|(prefix, _)| name.starts_with(prefix)).map_or("other", |(_, part)| part)
}

#[cfg(test)]
mod tests;
