//! The tensors of the CLIP text encoder and of the VAE in the original layout.

use crate::layout::{Collector, Preset, TensorSpec};

const VOCABULARY: usize = 49408;
const TOKENS: usize = 77;
const LATENT_CHANNELS: usize = 4;
const IMAGE_CHANNELS: usize = 3;
const ENCODER_RESNETS: usize = 2;

/// Names and shapes under `cond_stage_model.transformer.text_model.`, unsorted.
pub fn text_tensors(preset: &Preset) -> Vec<TensorSpec> {
    let mut c = Collector::new("cond_stage_model.transformer.text_model.");
    let (width, mlp) = (preset.text_width, preset.text_mlp_width);
    c.embedding("embeddings.token_embedding", VOCABULARY, width);
    c.embedding("embeddings.position_embedding", TOKENS, width);
    for layer in 0..preset.text_layers {
        let name = format!("encoder.layers.{layer}");
        for projection in ["q_proj", "k_proj", "v_proj", "out_proj"] {
            c.layer(&format!("{name}.self_attn.{projection}"), &[width, width]);
        }
        c.layer(&format!("{name}.mlp.fc1"), &[mlp, width]);
        c.layer(&format!("{name}.mlp.fc2"), &[width, mlp]);
        c.norm(&format!("{name}.layer_norm1"), width);
        c.norm(&format!("{name}.layer_norm2"), width);
    }
    c.norm("final_layer_norm", width);
    c.finish()
}

/// Names and shapes under `first_stage_model.`, unsorted.
pub fn vae_tensors(preset: &Preset) -> Vec<TensorSpec> {
    let mut c = Collector::new("first_stage_model.");
    let widths = preset.vae_widths;
    let (first, last) = (widths[0], widths[widths.len() - 1]);

    c.conv("encoder.conv_in", first, IMAGE_CHANNELS, 3);
    let mut width = first;
    for (level, &level_width) in widths.iter().enumerate() {
        for block in 0..ENCODER_RESNETS {
            resnet(&mut c, &format!("encoder.down.{level}.block.{block}"), width, level_width);
            width = level_width;
        }
        if level + 1 < widths.len() {
            c.conv(&format!("encoder.down.{level}.downsample.conv"), width, width, 3);
        }
    }
    middle(&mut c, "encoder.mid", last);
    c.norm("encoder.norm_out", last);
    // Mean and log-variance of every latent channel.
    c.conv("encoder.conv_out", LATENT_CHANNELS * 2, last, 3);
    c.conv("quant_conv", LATENT_CHANNELS * 2, LATENT_CHANNELS * 2, 1);

    c.conv("post_quant_conv", LATENT_CHANNELS, LATENT_CHANNELS, 1);
    c.conv("decoder.conv_in", last, LATENT_CHANNELS, 3);
    middle(&mut c, "decoder.mid", last);
    let mut width = last;
    for (level, &level_width) in widths.iter().enumerate().rev() {
        for block in 0..=ENCODER_RESNETS {
            resnet(&mut c, &format!("decoder.up.{level}.block.{block}"), width, level_width);
            width = level_width;
        }
        if level > 0 {
            c.conv(&format!("decoder.up.{level}.upsample.conv"), width, width, 3);
        }
    }
    c.norm("decoder.norm_out", width);
    c.conv("decoder.conv_out", IMAGE_CHANNELS, width, 3);
    c.finish()
}

fn middle(c: &mut Collector, name: &str, width: usize) {
    resnet(c, &format!("{name}.block_1"), width, width);
    c.norm(&format!("{name}.attn_1.norm"), width);
    for projection in ["q", "k", "v", "proj_out"] {
        c.conv(&format!("{name}.attn_1.{projection}"), width, width, 1);
    }
    resnet(c, &format!("{name}.block_2"), width, width);
}

fn resnet(c: &mut Collector, name: &str, input: usize, output: usize) {
    c.norm(&format!("{name}.norm1"), input);
    c.conv(&format!("{name}.conv1"), output, input, 3);
    c.norm(&format!("{name}.norm2"), output);
    c.conv(&format!("{name}.conv2"), output, output, 3);
    if input != output {
        c.conv(&format!("{name}.nin_shortcut"), output, input, 1);
    }
}
