//! Offline work on files: merge, extract, resize, convert, inspect; and pictures from models
//! (`generate`, the only one that computes networks). One process, all cores.
//!
//! Promises: option names and arithmetic are those of sd-scripts' tools; files are mapped and
//! streamed, so memory follows the largest tensor in work, not the model; what is written appears
//! complete or not at all. A tool is one file, one line in [`Command`] and one in [`Command::run`].
//! Results go to stdout, everything else to stderr.

mod convert;
mod delta;
mod dynamic_rank;
mod exit;
mod extract;
mod extract_dylora;
mod factors;
mod finite;
mod generate;
mod inspect;
mod lbw;
mod linalg;
mod matrix;
mod merge;
mod model_spec;
mod output;
mod precision;
mod progress;
mod resize_images;
mod resize_lora;
mod svd_merge;
mod verify;

use clap::Subcommand;

pub use exit::Usage;

/// The tools of the command line.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Convert a model: single file to diffusers folder and back, safetensors to ckpt and back
    Convert(convert::Options),
    /// Cut a DyLoRA into LoRAs, one for every multiple of `unit`
    #[command(name = "extract-dylora", alias = "extract_lora_from_dylora")]
    ExtractDylora(extract_dylora::Options),
    /// Merge LoRAs into a model, or into one LoRA
    #[command(
        name = "merge",
        visible_alias = "sdxl-merge",
        aliases = ["merge_lora", "sdxl_merge_lora"]
    )]
    Merge(merge::Options),
    /// Shrink a folder of pictures to one or more resolutions
    #[command(name = "resize-images", alias = "resize_images_to_resolution")]
    ResizeImages(resize_images::Options),
    /// Extract a LoRA from the difference of two models
    #[command(
        name = "extract",
        aliases = ["extract_lora", "extract_lora_from_models"]
    )]
    Extract(extract::Options),
    /// Cut a LoRA to a smaller rank
    #[command(name = "resize-lora", alias = "resize_lora")]
    ResizeLora(resize_lora::Options),
    /// Merge adapters of any kinds and ranks into one LoRA of a given rank
    #[command(name = "svd-merge", alias = "svd_merge_lora")]
    SvdMerge(svd_merge::Options),
    /// Make pictures with a model and LoRAs
    #[command(aliases = ["gen_img", "gen-img"])]
    Generate(Box<generate::Options>),
    /// Tell what a LoRA or a checkpoint is, and which programs would load it
    Inspect(inspect::Options),
    /// Check that files are whole and their numbers finite and consistent
    Verify(verify::Options),
}

impl Command {
    /// Does the work. Returns the process's exit code: 0, 64 for options that cannot be meant, 1
    /// for any other failure, whose message has gone to stderr.
    pub fn run(&self) -> i32 {
        let result = match self {
            Self::Convert(options) => convert::run(options),
            Self::ExtractDylora(options) => extract_dylora::run(options),
            Self::Merge(options) => merge::run(options),
            Self::ResizeImages(options) => resize_images::run(options),
            Self::Extract(options) => extract::run(options),
            Self::ResizeLora(options) => resize_lora::run(options),
            Self::SvdMerge(options) => svd_merge::run(options),
            Self::Generate(options) => generate::run(options),
            Self::Inspect(options) => inspect::run(options),
            Self::Verify(options) => verify::run(options),
        };
        exit::code_of(result)
    }
}

#[cfg(test)]
mod svd_tools_tests;
