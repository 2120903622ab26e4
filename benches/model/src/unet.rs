//! The tensors of the U-Net in the original layout: input blocks, middle block, output blocks.

use crate::layout::{Collector, Preset, TensorSpec};

const LATENT_CHANNELS: usize = 4;
const RESNETS_PER_LEVEL: usize = 2;
/// The deepest level has no attention.
const LEVELS_WITH_ATTENTION: usize = 3;

struct Sizes {
    time: usize,
    context: usize,
}

/// Names and shapes under `model.diffusion_model.`, unsorted.
pub fn unet_tensors(preset: &Preset) -> Vec<TensorSpec> {
    let mut c = Collector::new("model.diffusion_model.");
    let widths = preset.unet_widths;
    let sizes = Sizes { time: widths[0] * 4, context: preset.text_width };
    c.layer("time_embed.0", &[sizes.time, widths[0]]);
    c.layer("time_embed.2", &[sizes.time, sizes.time]);
    c.conv("input_blocks.0.0", widths[0], LATENT_CHANNELS, 3);

    // Output widths of the input blocks, last one on top: what the output blocks take as skip connections.
    let mut skips = vec![widths[0]];
    let mut width = widths[0];
    let mut index = 1;
    for (level, &level_width) in widths.iter().enumerate() {
        for _ in 0..RESNETS_PER_LEVEL {
            resnet(&mut c, &format!("input_blocks.{index}.0"), width, level_width, &sizes);
            width = level_width;
            if level < LEVELS_WITH_ATTENTION {
                transformer(&mut c, &format!("input_blocks.{index}.1"), width, &sizes);
            }
            skips.push(width);
            index += 1;
        }
        if level + 1 < widths.len() {
            c.conv(&format!("input_blocks.{index}.0.op"), width, width, 3);
            skips.push(width);
            index += 1;
        }
    }

    resnet(&mut c, "middle_block.0", width, width, &sizes);
    transformer(&mut c, "middle_block.1", width, &sizes);
    resnet(&mut c, "middle_block.2", width, width, &sizes);

    let mut index = 0;
    for (level, &level_width) in widths.iter().enumerate().rev() {
        for resnet_index in 0..=RESNETS_PER_LEVEL {
            let name = format!("output_blocks.{index}");
            // The input blocks pushed exactly one skip for each of these resnets.
            let skip = skips.pop().unwrap_or(0);
            resnet(&mut c, &format!("{name}.0"), width + skip, level_width, &sizes);
            width = level_width;
            let attention = level < LEVELS_WITH_ATTENTION;
            if attention {
                transformer(&mut c, &format!("{name}.1"), width, &sizes);
            }
            if level > 0 && resnet_index == RESNETS_PER_LEVEL {
                let place = 1 + usize::from(attention);
                c.conv(&format!("{name}.{place}.conv"), width, width, 3);
            }
            index += 1;
        }
    }
    c.norm("out.0", width);
    c.conv("out.2", LATENT_CHANNELS, width, 3);
    c.finish()
}

fn resnet(c: &mut Collector, name: &str, input: usize, output: usize, sizes: &Sizes) {
    c.norm(&format!("{name}.in_layers.0"), input);
    c.conv(&format!("{name}.in_layers.2"), output, input, 3);
    c.layer(&format!("{name}.emb_layers.1"), &[output, sizes.time]);
    c.norm(&format!("{name}.out_layers.0"), output);
    c.conv(&format!("{name}.out_layers.3"), output, output, 3);
    if input != output {
        c.conv(&format!("{name}.skip_connection"), output, input, 1);
    }
}

fn transformer(c: &mut Collector, name: &str, width: usize, sizes: &Sizes) {
    c.norm(&format!("{name}.norm"), width);
    c.conv(&format!("{name}.proj_in"), width, width, 1);
    let block = format!("{name}.transformer_blocks.0");
    for (attention, context) in [("attn1", width), ("attn2", sizes.context)] {
        c.weight(&format!("{block}.{attention}.to_q"), &[width, width]);
        c.weight(&format!("{block}.{attention}.to_k"), &[width, context]);
        c.weight(&format!("{block}.{attention}.to_v"), &[width, context]);
        c.layer(&format!("{block}.{attention}.to_out.0"), &[width, width]);
    }
    // GEGLU: value and gate, four times as wide as the block.
    c.layer(&format!("{block}.ff.net.0.proj"), &[width * 8, width]);
    c.layer(&format!("{block}.ff.net.2"), &[width, width * 4]);
    for norm in ["norm1", "norm2", "norm3"] {
        c.norm(&format!("{block}.{norm}"), width);
    }
    c.conv(&format!("{name}.proj_out"), width, width, 1);
}
