//! Option list: the run's config file, the base model and the network that is trained on it.
//!
//! The doc comment of an entry is what `lorarun train --help` prints.

macro_rules! config_options {
    ([$($rest:ident)*] $($lists:tt)*) => { chain_lists! { [$($rest)*] $($lists)* group Config {
        /// TOML file with any of these options as keys; the same as giving the file as first
        /// argument. Section names are only for the eye, the command line wins over the file, and
        /// the suffix `.toml` may be left out. Relative paths are taken from the current folder.
        config_file: Option<PathBuf> = None, Supported;
        /// Write the options of this command line to the file named by `--config_file` and end.
        /// An existing file is never overwritten.
        output_config: bool = false, Supported;
        /// Check the configuration and the data, print the resolved plan and end without training.
        dry_run: bool = false, Supported;
        /// Check the config and the dataset file without opening model or images: unknown and
        /// contradicting options, values out of the usual, missing files. Prints what it found and
        /// ends, with code 78 if something would stop the run.
        config_check: bool = false, Supported;
        /// Ignore unknown names in the config file and on the command line, with a warning, instead
        /// of refusing them. A mistyped option is then not trained with.
        allow_unknown: bool = false, Supported;
        /// Device that computes: `cpu`, `cuda`, an NVIDIA card for each rank, or `auto`: cards where
        /// this machine has one for each rank and what they need, else `cpu`. `lorarun doctor` says
        /// which it is and what is missing.
        device: Device = Device::Auto, Supported;
        /// How much of the card's memory this process may use, with its unit: `8GB` is 8·10^9
        /// bytes, `8GiB` is 2^33. As much as is needed is given up to stay below, in this order:
        /// blocks are checkpointed, AdamW keeps its state in 8 bits, the frozen U-Net is kept in 8
        /// bits. What cannot fit is refused before anything is loaded. Default: what is free on the
        /// card. Where there is no card, `lorarun plan` plans for an imagined one of this size.
        vram_limit: Option<ByteSize> = None, Supported;
        /// CPU threads of each rank. Default: the cores of this machine divided by its ranks.
        /// More threads than cores make every step slower.
        threads: Option<usize> = None, Supported;
    } } };
}

macro_rules! model_options {
    ([$($rest:ident)*] $($lists:tt)*) => { chain_lists! { [$($rest)*] $($lists)* group Model {
        /// Base model to train on: a single `.safetensors` or `.ckpt` file in the original layout,
        /// a folder in diffusers layout, or a hub id such as `org/name`. Required.
        pretrained_model_name_or_path: Option<String> = None, Supported;
        /// The base model is Stable Diffusion 2.x. It is recognised from the file as well; saying
        /// the wrong thing here stops the run instead of training a useless LoRA.
        v2: bool = false, Supported;
        /// The base model is SDXL. It is recognised from the file as well; `true` with another model
        /// stops the run.
        sdxl: bool = false, Supported;
        /// The base model predicts v (velocity) instead of the noise, as SD 2.x 768-v does. Wrong
        /// use gives a loss that looks fine and images that are broken.
        v_parameterization: bool = false, Supported;
        /// Another VAE in place of the base model's: a file or a diffusers folder.
        vae: Option<PathBuf> = None, Supported;
        /// Folder for a downloaded tokenizer.
        tokenizer_cache_dir: Option<PathBuf> = None,
            NoEffect("the tokenizer comes with the model folder or with the program, nothing is downloaded for it");
        /// Take the text encoder's output N layers before its last one (1 = last layer). Use what
        /// you use when generating: 2 is usual for anime models. Default: the last layer. SDXL is
        /// always read before the last layer, whatever is said here.
        clip_skip: Option<usize> = None, Supported;
        /// Longest caption in tokens: 150 or 225, in windows of 75 each. Default: 75; what is
        /// longer is cut off without being seen.
        max_token_length: Option<usize> = None, Supported;
        /// Read `(word:1.3)` and `[word]` in captions as weights of these words. Commas inside the
        /// parentheses break it when captions are shuffled.
        weighted_captions: bool = false, Supported;
    } } };
}

macro_rules! network_options {
    ([$($rest:ident)*] $($lists:tt)*) => { chain_lists! { [$($rest)*] $($lists)* group Network {
        /// Kind of network to train. `networks.lora` (the default here) is LoRA on linear and 1x1
        /// convolution layers, on 3x3 convolutions too with `--network_args conv_dim=N`.
        /// `networks.dylora` trains all ranks up to `--network_dim` in one run, `unit=N` ranks at a
        /// time: smaller LoRAs can be cut out of its file. `networks.loha` and `networks.lokr` train
        /// the same layers by products of matrices that say more with as many numbers.
        /// `lycoris.kohya` chooses by `--network_args algo=loha preset=attn-mlp`.
        network_module: Option<String> = None, Supported;
        /// Rank of the LoRA: more learns more detail, makes a larger file and overfits earlier.
        /// Default 4; 4 to 32 serve most subjects.
        network_dim: Option<usize> = None, Supported;
        /// The LoRA's output is scaled by alpha / dim. Default 1, which keeps early updates small:
        /// changing it changes the effective learning rate. 0 means the same as dim.
        network_alpha: f64 = 1.0, Supported;
        /// Probability with which each element between the LoRA's two halves is dropped in a step:
        /// from 0 up to but not 1, against overfitting; 0.1 to 0.3 are usual.
        network_dropout: Option<f64> = None, Supported;
        /// Further settings of the network as `key=value`: `conv_dim=4` `conv_alpha=1` train 3x3
        /// convolutions too (LoRA-C3Lier), `dora_wd=True` trains magnitudes (DoRA), `rs_lora=True`
        /// scales by alpha / √dim, `factor=8` splits a LoKr. `rank_dropout` and `module_dropout` leave
        /// out ranks and layers at random; `loraplus_lr_ratio=16` lets the upper half learn faster
        /// (LoRA+); `block_dims`, `block_alphas`, `conv_block_dims`, `conv_block_alphas` (25 numbers)
        /// and `down_lr_weight`, `mid_lr_weight`, `up_lr_weight` (12, 1 and 12 numbers, or for the
        /// long ones `sine`, `cosine`, `linear`, `reverse_linear`, `zeros`, each with `+offset`) set
        /// ranks and learning rates by block: a block with 0 is left out.
        network_args: Option<Vec<String>> = None, Supported;
        /// Existing LoRA file to continue from. Its rank must fit `--network_dim`, or give
        /// `--dim_from_weights`.
        network_weights: Option<PathBuf> = None, Supported;
        /// Take rank and alpha of every layer from the file given as `--network_weights`.
        dim_from_weights: bool = false, Supported;
        /// Train only the LoRA modules of the U-Net; the text encoder stays as it is.
        network_train_unet_only: bool = false, Supported;
        /// Train only the LoRA modules of the text encoder; the U-Net stays as it is.
        network_train_text_encoder_only: bool = false, Supported;
        /// After each step scale down modules whose weight norm exceeds this value, against
        /// overtrained layers (1 is a start). The logs count them. 0 turns it off.
        scale_weight_norms: Option<f64> = None, Supported;
        /// LoRA files to merge into the base model before training: the new LoRA learns what they
        /// lack, and is used together with them.
        base_weights: Option<Vec<String>> = None, Supported;
        /// Strength of each file of `--base_weights`. Default 1.0 each.
        base_weights_multiplier: Option<Vec<f64>> = None, Supported;
    } } };
}
