//! The options of `generate`, under the names of sd-scripts' `gen_img`, in groups for `--help`.

use std::path::PathBuf;

use clap::Args;

use super::unavailable::Unavailable;

/// What `--help` ends with.
const EXAMPLES: &str = "\
Options of a prompt, on the command line and in files (they win over the options above):
  --w --h    size               --s   steps           --l   scale
  --d 1,2    seed of each       --n   what not        --ss  sampler
  --t        strength           --am 0.5,0.7  multiplier of each LoRA
  --f NAME   name of the file
  Of SDXL:   --p2 --n2  prompts of its second text encoder
             --ow --oh --nw --nh --cl --ct  sizes that it is told
  `(word:1.2)` weighs a word, `<lora:NAME:0.7>` sets the multiplier of the LoRA in NAME.safetensors.

Examples:
  lorarun generate --ckpt model.safetensors --prompt 'a red ring on a table --n blurred'
  lorarun generate --ckpt model.safetensors --network_weights ring.safetensors --network_mul 0.8 \\
      --prompt 'a sks ring' --images_per_prompt 4 --steps 20 --sampler 'dpmsolver++' --karras
  lorarun generate --ckpt model.safetensors --from_file prompts.txt --outdir pictures
  # Which rank of a DyLoRA? Same seeds, a column for each file, one more without a LoRA.
  lorarun generate --ckpt model.safetensors --network_weights ring-0004.safetensors \\
      ring-0008.safetensors ring-0016.safetensors --prompt 'a sks ring --d 1,2,3' \\
      --images_per_prompt 3 --grid
  # How strong? A column for each multiplier.
  lorarun generate --ckpt model.safetensors --network_weights ring.safetensors \\
      --network_mul 0.4 0.6 0.8 1 --prompt 'a sks ring' --seed 1 --grid

The paths of the pictures go to stdout. A picture's PNG holds how it was made, as WebUI writes and reads it.";

/// Options of `generate`.
#[derive(Debug, Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Options {
    #[command(flatten)]
    pub(super) model: ModelOptions,
    #[command(flatten)]
    pub(super) prompts: PromptOptions,
    #[command(flatten)]
    pub(super) picture: PictureOptions,
    #[command(flatten)]
    pub(super) sizes: SizeOptions,
    #[command(flatten)]
    pub(super) lora: LoraOptions,
    #[command(flatten)]
    pub(super) source: SourceOptions,
    #[command(flatten)]
    pub(super) files: FileOptions,
    #[command(flatten)]
    pub(super) machine: MachineOptions,
    #[command(flatten)]
    pub(super) unavailable: Unavailable,
}

/// Which model.
#[derive(Debug, Args)]
#[command(next_help_heading = "Model")]
pub(super) struct ModelOptions {
    /// The model: a `.safetensors` or `.ckpt` file, a diffusers folder or a hub id
    #[arg(long = "ckpt", value_name = "MODEL")]
    pub ckpt: Option<String>,
    /// The model is a Stable Diffusion 1.x; it tells so itself, this is only checked
    #[arg(long = "v1", conflicts_with_all = ["v2", "sdxl"])]
    pub v1: bool,
    /// The model is a Stable Diffusion 2.x; it tells so itself, this is only checked
    #[arg(long = "v2", conflicts_with = "sdxl")]
    pub v2: bool,
    /// The model is Stable Diffusion XL; it tells so itself, this is only checked
    #[arg(long = "sdxl")]
    pub sdxl: bool,
    /// The model predicts v, as Stable Diffusion 2.x at 768 pixels does; a diffusers folder tells so
    /// itself
    #[arg(long = "v_parameterization")]
    pub v_parameterization: bool,
    /// The model was trained with zero terminal SNR
    #[arg(long = "zero_terminal_snr")]
    pub zero_terminal_snr: bool,
    /// Another VAE: file, folder or hub id
    #[arg(long = "vae", value_name = "VAE")]
    pub vae: Option<String>,
}

/// What is drawn, and how often.
#[derive(Debug, Args)]
#[command(next_help_heading = "Prompts")]
pub(super) struct PromptOptions {
    /// What the picture shows; options of a prompt may follow in the same text
    #[arg(long = "prompt", value_name = "TEXT", allow_hyphen_values = true)]
    pub prompt: Option<String>,
    /// A file of prompts: one on each line (`#` begins a comment), or `.toml` or `.json` as for
    /// sample prompts of a training
    #[arg(long = "from_file", value_name = "FILE", conflicts_with = "prompt")]
    pub from_file: Option<PathBuf>,
    /// Read prompts from stdin, one after the other; an empty line or its end ends
    #[arg(long = "interactive", conflicts_with_all = ["prompt", "from_file"])]
    pub interactive: bool,
    /// What pictures do not show, for prompts without an `--n` of their own
    #[arg(long = "negative_prompt", value_name = "TEXT", default_value = "")]
    pub negative_prompt: String,
    /// Of SDXL: what its second text encoder reads, for prompts without a `--p2` of their own
    /// [default: the prompt]
    #[arg(long = "prompt_2", value_name = "TEXT")]
    pub prompt_2: Option<String>,
    /// Of SDXL: what its second text encoder reads in place of the negative prompt, for prompts
    /// without an `--n2` of their own [default: the negative prompt]
    #[arg(long = "negative_prompt_2", value_name = "TEXT")]
    pub negative_prompt_2: Option<String>,
    /// Pictures of each prompt
    #[arg(long = "images_per_prompt", value_name = "NUMBER", default_value_t = 1)]
    pub images_per_prompt: usize,
    /// Go over all prompts so often
    #[arg(long = "n_iter", value_name = "NUMBER", default_value_t = 1)]
    pub n_iter: usize,
    /// The seed of a single picture; of several, what their seeds are drawn from
    #[arg(long = "seed", value_name = "NUMBER")]
    pub seed: Option<u64>,
    /// The same seed for all prompts that have none of their own
    #[arg(long = "iter_same_seed")]
    pub iter_same_seed: bool,
    /// Another order of the prompts in each iteration
    #[arg(long = "shuffle_prompts")]
    pub shuffle_prompts: bool,
}

/// How a picture is made.
#[derive(Debug, Args)]
#[command(next_help_heading = "Picture")]
pub(super) struct PictureOptions {
    /// Width in pixels, a multiple of 8 [default: 512, of SDXL 1024]
    #[arg(long = "W", value_name = "PIXELS")]
    pub width: Option<usize>,
    /// Height in pixels, a multiple of 8 [default: 512, of SDXL 1024]
    #[arg(long = "H", value_name = "PIXELS")]
    pub height: Option<usize>,
    /// Steps of the sampler
    #[arg(long = "steps", value_name = "NUMBER", default_value_t = 50)]
    pub steps: usize,
    /// Weight of the prompt over the negative prompt; 1 leaves the latter out, in half the time
    #[arg(long = "scale", value_name = "NUMBER", default_value_t = 7.5)]
    pub scale: f32,
    /// ddim, ddpm, pndm, lms, euler, euler_a, heun, dpm_2, dpm_2_a, dpmsolver, dpmsolver++,
    /// dpmsolver++_sde, dpmsingle, dpmsingle_sde, unipc; k_ forms and WebUI's labels too
    #[arg(long = "sampler", value_name = "NAME", default_value = "ddim")]
    pub sampler: String,
    /// Space the noise levels as Karras et al. do, where the sampler can
    #[arg(long = "karras")]
    pub karras: bool,
    /// DDIM is deterministic: only 0 can be meant
    #[arg(long = "ddim_eta", value_name = "NUMBER", default_value_t = 0., hide = true)]
    pub ddim_eta: f64,
    /// Take the text encoder's Nth last layer: 1 is the last [default: 1, of SDXL 2]
    #[arg(long = "clip_skip", value_name = "NUMBER")]
    pub clip_skip: Option<usize>,
    /// A prompt may have 75 times so many tokens [default: 1]
    #[arg(long = "max_embeddings_multiples", value_name = "NUMBER")]
    pub max_embeddings_multiples: Option<usize>,
}

/// What SDXL is told of a picture's size; other models are told nothing.
#[derive(Debug, Args)]
#[command(next_help_heading = "Sizes that SDXL is told")]
pub(super) struct SizeOptions {
    /// Width of the picture before it was resized [default: its own]
    #[arg(long = "original_width", value_name = "PIXELS")]
    pub original_width: Option<usize>,
    /// Height of the picture before it was resized [default: its own]
    #[arg(long = "original_height", value_name = "PIXELS")]
    pub original_height: Option<usize>,
    /// The same width for the negative prompt [default: that of the prompt]
    #[arg(long = "original_width_negative", value_name = "PIXELS")]
    pub original_width_negative: Option<usize>,
    /// The same height for the negative prompt [default: that of the prompt]
    #[arg(long = "original_height_negative", value_name = "PIXELS")]
    pub original_height_negative: Option<usize>,
    /// Rows that were cut off at the top
    #[arg(long = "crop_top", value_name = "PIXELS", default_value_t = 0)]
    pub crop_top: usize,
    /// Columns that were cut off at the left
    #[arg(long = "crop_left", value_name = "PIXELS", default_value_t = 0)]
    pub crop_left: usize,
}

/// Networks beside the model.
#[derive(Debug, Args)]
#[command(next_help_heading = "LoRAs")]
pub(super) struct LoraOptions {
    /// LoRA files of any kind (LoRA, DyLoRA, LoHa, LoKr, DoRA) and naming (sd-scripts, LyCORIS,
    /// diffusers, PEFT); several are added up
    #[arg(long = "network_weights", value_name = "FILE", num_args = 1..)]
    pub weights: Vec<PathBuf>,
    /// How much of each is added, in their order; with `--grid` a row or column for each
    #[arg(
        long = "network_mul",
        value_name = "NUMBER",
        num_args = 1..,
        allow_negative_numbers = true
    )]
    pub multipliers: Vec<f32>,
    /// sd-scripts' module of each file, or one for all; the files tell, this is only checked
    #[arg(long = "network_module", value_name = "MODULE", num_args = 1..)]
    pub modules: Vec<String>,
    /// Without effect: the files tell
    #[arg(long = "network_args", value_name = "KEY=VALUE", num_args = 0.., hide = true)]
    pub args: Option<Vec<String>>,
    /// Print the metadata of each file
    #[arg(long = "network_show_meta")]
    pub show_meta: bool,
    /// Merge all files into the model first: the same pictures, each step a little faster
    #[arg(long = "network_merge")]
    pub merge: bool,
    /// Merge the first N files, apply the others
    #[arg(long = "network_merge_n_models", value_name = "N")]
    pub merge_n_models: Option<usize>,
    /// As `--network_merge` wherever the multipliers stay the same throughout
    #[arg(long = "network_pre_calc")]
    pub pre_calc: bool,
}

/// Pictures made of pictures.
#[derive(Debug, Args)]
#[command(next_help_heading = "From a picture")]
pub(super) struct SourceOptions {
    /// A picture, or a folder of them taken in turn, to start from (img2img). Its size counts, cut to
    /// multiples of 32, unless both `--W` and `--H` are given
    #[arg(long = "image_path", value_name = "PATH")]
    pub image_path: Option<PathBuf>,
    /// Where it is white the picture is made anew, where it is black it stays (inpainting)
    #[arg(long = "mask_path", value_name = "PATH", requires = "image_path")]
    pub mask_path: Option<PathBuf>,
    /// How much is made anew, 0 to 1 [default: 0.8]
    #[arg(long = "strength", value_name = "NUMBER")]
    pub strength: Option<f64>,
    /// Make the picture at this share of its size first, then enlarge it and make it anew
    #[arg(long = "highres_fix_scale", value_name = "SHARE")]
    pub highres_fix_scale: Option<f64>,
    /// Steps at the smaller size
    #[arg(long = "highres_fix_steps", value_name = "NUMBER", default_value_t = 28)]
    pub highres_fix_steps: usize,
    /// With `--image_path`: strength at the smaller size [default: that of `--strength`]
    #[arg(long = "highres_fix_strength", value_name = "NUMBER")]
    pub highres_fix_strength: Option<f64>,
    /// Save the smaller picture as well
    #[arg(long = "highres_fix_save_1st")]
    pub highres_fix_save_1st: bool,
    /// Enlarge latents, not pixels
    #[arg(long = "highres_fix_latents_upscaling")]
    pub highres_fix_latents_upscaling: bool,
}

/// What is written and shown.
#[derive(Debug, Args)]
#[command(next_help_heading = "Files")]
pub(super) struct FileOptions {
    /// Folder of the pictures, made if it is missing
    #[arg(long = "outdir", value_name = "FOLDER", default_value = "outputs")]
    pub outdir: PathBuf,
    /// Name them `im_000001.png` and so on, in place of time, number and seed
    #[arg(long = "sequential_file_name")]
    pub sequential_file_name: bool,
    /// Name them as the picture of `--image_path`
    #[arg(long = "use_original_file_name", requires = "image_path")]
    pub use_original_file_name: bool,
    /// Also write a contact sheet: a row for each prompt and seed, a column for each LoRA (each by
    /// itself) or, with one LoRA, for each multiplier
    #[arg(long = "grid")]
    pub grid: bool,
    /// Show each picture in the terminal, where it can (kitty, sixel)
    #[arg(long = "preview", overrides_with = "no_preview")]
    pub preview: bool,
    /// Show none (the default, as there)
    #[arg(long = "no_preview")]
    pub no_preview: bool,
}

/// Where and in which numbers it is computed.
#[derive(Debug, Args)]
#[command(next_help_heading = "Machine")]
pub(super) struct MachineOptions {
    /// `cpu`, `cuda`, `cuda:1`, or `auto`: a card where one can be used
    #[arg(long = "device", value_name = "DEVICE", default_value = "auto")]
    pub device: String,
    /// Compute in bfloat16
    #[arg(long = "bf16", conflicts_with = "fp16")]
    pub bf16: bool,
    /// Compute in float16 on a card; the CPU computes in float32
    #[arg(long = "fp16")]
    pub fp16: bool,
    /// Compute the VAE in float32 all the same
    #[arg(long = "no_half_vae")]
    pub no_half_vae: bool,
    /// Pictures that are made together
    #[arg(long = "batch_size", value_name = "NUMBER", default_value_t = 1)]
    pub batch_size: usize,
    /// Without effect: pictures are decoded one at a time
    #[arg(long = "vae_batch_size", value_name = "NUMBER", hide = true)]
    pub vae_batch_size: Option<f64>,
    /// Decode in tiles, which takes less memory
    #[arg(long = "vae_slices", value_name = "NUMBER")]
    pub vae_slices: Option<usize>,
}
