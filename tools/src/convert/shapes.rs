//! Configs of diffusers and transformers for a model's components, from the shapes of its tensors.
//!
//! What no shape tells (heads, activations, the scaling of latents) is the published models'.

use anyhow::Context;
use formats::model_files::{ComponentKind, ModelFiles};
use formats::{Component, Family, Weights};
use serde_json::{Value, json};

/// The version of diffusers whose configs these are.
pub(super) const VERSION: &str = "0.30.0";

/// The config of a component.
///
/// # Errors
/// A tensor that gives a size is missing.
pub(super) fn config(model: &ModelFiles, kind: ComponentKind) -> anyhow::Result<Value> {
    let component = model.component(kind).context("the model lacks this component")?;
    let sizes = Sizes { component };
    match kind {
        ComponentKind::Unet => unet(&sizes, model),
        ComponentKind::Vae => vae(&sizes, model.family),
        ComponentKind::TextEncoder | ComponentKind::TextEncoder2 => {
            text(&sizes, model.family, kind)
        }
    }
}

/// Pictures' side in pixels that a family is made for.
fn side(family: Family) -> usize {
    match family {
        Family::Sd1 => 512,
        Family::Sd2 => 768,
        Family::Sdxl => 1024,
    }
}

/// Reads sizes off shapes.
struct Sizes<'m> {
    component: &'m Component,
}

impl Sizes<'_> {
    /// Size of an axis of a tensor.
    fn of(&self, name: &str, axis: usize) -> anyhow::Result<usize> {
        let shape = self.component.shape(name);
        shape.and_then(|shape| shape.get(axis).copied()).with_context(|| {
            format!(
                "tensor missing from `{}`, its config cannot be made: `{name}`",
                self.component.path().display()
            )
        })
    }

    fn has(&self, name: &str) -> bool {
        self.component.contains(name)
    }

    /// How many of `name(0)`, `name(1)`, ... are there.
    fn count(&self, name: impl Fn(usize) -> String) -> usize {
        (0..).take_while(|index| self.has(&name(*index))).count()
    }
}

/// A number where all are the same, else the list.
fn one_or_list(values: &[usize]) -> Value {
    match values {
        [first, rest @ ..] if rest.iter().all(|value| value == first) => json!(first),
        _ => json!(values),
    }
}

fn unet(sizes: &Sizes<'_>, model: &ModelFiles) -> anyhow::Result<Value> {
    let family = model.family;
    let levels = sizes.count(|level| format!("down_blocks.{level}.resnets.0.conv1.weight"));
    let (mut channels, mut layers, mut depths) = (Vec::new(), Vec::new(), Vec::new());
    for level in 0..levels {
        let path = format!("down_blocks.{level}");
        channels.push(sizes.of(&format!("{path}.resnets.0.conv1.weight"), 0)?);
        layers.push(sizes.count(|block| format!("{path}.resnets.{block}.conv1.weight")));
        let blocks = format!("{path}.attentions.0.transformer_blocks");
        depths.push(sizes.count(|block| format!("{blocks}.{block}.attn1.to_q.weight")));
    }
    check_depths(sizes, &layers, &depths)?;
    let names = |attention: &'static str, plain: &'static str| {
        depths.iter().map(move |depth| if *depth > 0 { attention } else { plain })
    };
    let down: Vec<&str> = names("CrossAttnDownBlock2D", "DownBlock2D").collect();
    let up: Vec<&str> = names("CrossAttnUpBlock2D", "UpBlock2D").rev().collect();
    let context = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight";
    let heads = match family {
        Family::Sd1 => json!(8),
        Family::Sd2 | Family::Sdxl => {
            json!(channels.iter().map(|width| (width / 64).max(1)).collect::<Vec<_>>())
        }
    };
    let depths: Vec<usize> = depths.iter().map(|depth| (*depth).max(1)).collect();
    let mut config = json!({
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": VERSION,
        "act_fn": "silu",
        "attention_head_dim": heads,
        "block_out_channels": channels,
        "center_input_sample": false,
        "cross_attention_dim": sizes.of(context, 1)?,
        "down_block_types": down,
        "downsample_padding": 1,
        "dual_cross_attention": false,
        "flip_sin_to_cos": true,
        "freq_shift": 0,
        "in_channels": sizes.of("conv_in.weight", 1)?,
        "layers_per_block": one_or_list(&layers),
        "mid_block_scale_factor": 1,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "norm_eps": 1e-5,
        "norm_num_groups": 32,
        "out_channels": sizes.of("conv_out.weight", 0)?,
        "sample_size": side(family) / 8,
        "transformer_layers_per_block": one_or_list(&depths),
        "up_block_types": up,
        "upcast_attention": family == Family::Sd2,
        "use_linear_projection": family != Family::Sd1,
    });
    if family == Family::Sdxl {
        let input = sizes.of("add_embedding.linear_1.weight", 1)?;
        let second = model.component(ComponentKind::TextEncoder2);
        let second = second.context("the model lacks its second text encoder")?;
        let pooled = Sizes { component: second }.of("text_projection.weight", 0)?;
        config["addition_embed_type"] = json!("text_time");
        // Six numbers: original size, place of the crop, target size.
        config["addition_time_embed_dim"] = json!(input.saturating_sub(pooled) / 6);
        config["projection_class_embeddings_input_dim"] = json!(input);
    }
    Ok(config)
}

/// A config tells one depth of the transformers for each level, the same on the way down and up,
/// and the last one for the middle.
fn check_depths(sizes: &Sizes<'_>, layers: &[usize], depths: &[usize]) -> anyhow::Result<()> {
    let depth = |path: String| {
        sizes.count(|block| format!("{path}.transformer_blocks.{block}.attn1.to_q.weight"))
    };
    let levels = layers.len();
    for (level, (layers, expected)) in layers.iter().zip(depths).enumerate() {
        let down = (0..*layers).map(|block| format!("down_blocks.{level}.attentions.{block}"));
        let up = levels - 1 - level;
        let up = (0..=*layers).map(|block| format!("up_blocks.{up}.attentions.{block}"));
        let paths: Vec<String> = down.chain(up).collect();
        for path in paths {
            let found = depth(path.clone());
            if found != *expected {
                return Err(irregular(sizes, &path, found, *expected));
            }
        }
    }
    let (path, expected) =
        ("mid_block.attentions.0", depths.last().map_or(1, |depth| *depth.max(&1)));
    let found = depth(path.to_owned());
    if found != expected {
        return Err(irregular(sizes, path, found, expected));
    }
    Ok(())
}

fn irregular(sizes: &Sizes<'_>, path: &str, found: usize, expected: usize) -> anyhow::Error {
    anyhow::anyhow!(
        "`{}` is built in another way than Stable Diffusion, no config can be made from its \
         shapes: `{path}` has {found} transformer blocks instead of {expected}\nhint: convert its \
         diffusers folder, which has a config, or to a single file",
        sizes.component.path().display()
    )
}

fn vae(sizes: &Sizes<'_>, family: Family) -> anyhow::Result<Value> {
    let levels = sizes.count(|level| format!("encoder.down_blocks.{level}.resnets.0.conv1.weight"));
    let channels: Vec<usize> = (0..levels)
        .map(|level| sizes.of(&format!("encoder.down_blocks.{level}.resnets.0.conv1.weight"), 0))
        .collect::<anyhow::Result<_>>()?;
    let layers = sizes.count(|block| format!("encoder.down_blocks.0.resnets.{block}.conv1.weight"));
    Ok(json!({
        "_class_name": "AutoencoderKL",
        "_diffusers_version": VERSION,
        "act_fn": "silu",
        "block_out_channels": channels,
        "down_block_types": vec!["DownEncoderBlock2D"; levels],
        "force_upcast": true,
        "in_channels": sizes.of("encoder.conv_in.weight", 1)?,
        "latent_channels": sizes.of("decoder.conv_in.weight", 1)?,
        "layers_per_block": layers,
        "norm_num_groups": 32,
        "out_channels": sizes.of("decoder.conv_out.weight", 0)?,
        "sample_size": side(family),
        "scaling_factor": if family == Family::Sdxl { 0.13025 } else { 0.18215 },
        "up_block_types": vec!["UpDecoderBlock2D"; levels],
        "use_post_quant_conv": sizes.has("post_quant_conv.weight"),
        "use_quant_conv": sizes.has("quant_conv.weight"),
    }))
}

fn text(sizes: &Sizes<'_>, family: Family, kind: ComponentKind) -> anyhow::Result<Value> {
    let layer = |index: usize| format!("text_model.encoder.layers.{index}.layer_norm1.weight");
    let width = sizes.of("text_model.embeddings.token_embedding.weight", 1)?;
    let second = kind == ComponentKind::TextEncoder2;
    let is_open_clip = second || family == Family::Sd2;
    let class = if second { "CLIPTextModelWithProjection" } else { "CLIPTextModel" };
    let projection = if second { sizes.of("text_projection.weight", 0)? } else { width };
    Ok(json!({
        "architectures": [class],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "dropout": 0.0,
        "eos_token_id": 2,
        "hidden_act": if is_open_clip { "gelu" } else { "quick_gelu" },
        "hidden_size": width,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": sizes.of("text_model.encoder.layers.0.mlp.fc1.weight", 0)?,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings":
            sizes.of("text_model.embeddings.position_embedding.weight", 0)?,
        "model_type": "clip_text_model",
        "num_attention_heads": (width / 64).max(1),
        "num_hidden_layers": sizes.count(layer),
        "pad_token_id": 1,
        "projection_dim": projection,
        "vocab_size": sizes.of("text_model.embeddings.token_embedding.weight", 0)?,
    }))
}
