//! Option list: images, buckets, caches and captions. A dataset file's own keys win over these.
//!
//! The doc comment of an entry is what `lorarun train --help` prints.

macro_rules! dataset_options {
    ([$($rest:ident)*] $($lists:tt)*) => { chain_lists! { [$($rest)*] $($lists)* group Dataset {
        /// TOML or JSON file with `[general]`, `[[datasets]]` and `[[datasets.subsets]]`. The same
        /// tables may stand in the config file itself.
        dataset_config: Option<PathBuf> = None, Supported;
        /// Folder that holds image folders named `N_class tokens` (N repeats each image N times an
        /// epoch). Give the parent, not the image folder itself.
        train_data_dir: Option<PathBuf> = None, Supported;
        /// Like `--train_data_dir` for regularization images: their loss is weighted by
        /// `--prior_loss_weight`.
        reg_data_dir: Option<PathBuf> = None, Supported;
        /// JSON file with captions and tags of the images in `--train_data_dir` (fine-tuning
        /// style dataset).
        in_json: Option<PathBuf> = None, Supported;
        /// How often each image of `--in_json` is used in an epoch. Default 1.
        dataset_repeats: usize = 1, Supported;
        /// Python class of an own dataset.
        dataset_class: Option<String> = None, Refused("it names a Python class, and there is no Python here; describe the data in `dataset_config`");
        /// Size that images are trained at in pixels: `512` or `width,height`. With buckets it sets
        /// the area. Use the size of the base model; required here or in the dataset file.
        resolution: Option<Resolution> = None, Supported;
        /// Images in one step of one rank. Default 1. More gives steadier gradients and needs more
        /// memory.
        train_batch_size: usize = 1, Supported;
        /// Sort images by aspect ratio into buckets instead of cropping all to one shape.
        enable_bucket: bool = false, Supported;
        /// Shortest side of a bucket in pixels. Default 256; a multiple of `--bucket_reso_steps`.
        min_bucket_reso: usize = 256, Supported;
        /// Longest side of a bucket in pixels. Default 1024; a multiple of `--bucket_reso_steps`.
        max_bucket_reso: usize = 1024, Supported;
        /// Bucket sides are multiples of this. Default 64; must be a multiple of 8.
        bucket_reso_steps: usize = 64, Supported;
        /// Never enlarge an image to fill a bucket; small images make small buckets.
        bucket_no_upscale: bool = false, Supported;
        /// How images are resized. Default: by area when shrinking, Lanczos when growing.
        resize_interpolation: Option<ResizeInterpolation> = None, Supported;
        /// Change colours slightly at random. Cannot be combined with `--cache_latents`.
        color_aug: bool = false, Supported;
        /// Mirror images left-right at random. Wrong for what is not symmetric (text, hairstyles).
        flip_aug: bool = false, Supported;
        /// Cut around the face named in the file name, enlarged by a random factor, e.g. `2.0,4.0`.
        face_crop_aug_range: Option<CropRange> = None, Supported;
        /// Crop at a random place instead of the centre. Cannot be combined with `--cache_latents`.
        random_crop: bool = false, Supported;
        /// Weight the loss by the image's alpha channel: transparent parts are not learned.
        alpha_mask: bool = false, Supported;
        /// Weight the loss by mask pictures: white parts are learned, black ones not, grey ones in
        /// part. They lie in the `conditioning_data_dir` of a subset, each with the name and the size
        /// of its image. `--alpha_mask` alone is enough for alpha channels.
        masked_loss: bool = false, Supported;
        /// Folder of mask pictures for all training images, with `--masked_loss`; better named for
        /// each subset in the dataset file.
        conditioning_data_dir: Option<PathBuf> = None, Supported;
        /// Encode every image once before training and keep the latents. Much faster; excludes
        /// `--color_aug` and `--random_crop`.
        cache_latents: bool = false, Supported;
        /// Keep these latents on disk, so that the next run starts at once. Turns
        /// `--cache_latents` on.
        cache_latents_to_disk: bool = false, Supported;
        /// Images encoded at once while caching. Default 1.
        vae_batch_size: usize = 1, Supported;
        /// Read every caption once before training and keep what the text encoders say: then the text
        /// encoders go, and the U-Net has the memory for itself. Needs `--network_train_unet_only`,
        /// and captions that stay the same: no shuffling, no dropout, no wildcards.
        cache_text_encoder_outputs: bool = false, Supported;
        /// Keep it on disk, a file for each image, so that the next run loads no text encoder. Turns
        /// `--cache_text_encoder_outputs` on. Files of another tokenizer, text encoder or caption
        /// stop the run.
        cache_text_encoder_outputs_to_disk: bool = false, Supported;
        /// Captions that are read together while caching. Default 16.
        text_encoder_batch_size: Option<usize> = None, Supported;
        /// Trust cached files without looking inside. Checking costs next to nothing; without it text
        /// encoder outputs of another model or of other captions are trained with.
        skip_cache_check: bool = false, Supported;
        /// Keep captions and image sizes in a file for a faster start.
        cache_info: bool = false, NoEffect("only the header of each image is read at the start, which is fast");
        /// Print what the steps of the first epochs would see (image, size, crop, caption) instead
        /// of training.
        debug_dataset: bool = false, Supported;
        /// Stop at the first damaged image instead of naming and skipping it.
        strict_data: bool = false, Supported;
        /// Threads that load and prepare images ahead of the training step. Default 8, at most the
        /// number of cores.
        max_data_loader_n_workers: usize = 8, Supported;
        /// Keep the loader's workers between epochs.
        persistent_data_loader_workers: bool = false, NoEffect("the loader's workers always persist between epochs");
    } } };
}

macro_rules! caption_options {
    ([$($rest:ident)*] $($lists:tt)*) => { chain_lists! { [$($rest)*] $($lists)* group Captions {
        /// Suffix of caption files beside the images. Default `.caption`; many collections use
        /// `.txt`, and with the wrong one only the class tokens are learned.
        caption_extension: String = ".caption".into(), Supported;
        /// Old misspelling of `--caption_extension`.
        caption_extention: Option<String> = None, Supported;
        /// What separates tags in a caption. Default `,`.
        caption_separator: String = ",".into(), Supported;
        /// Put the tags of a caption into a new order every time.
        shuffle_caption: bool = false, Supported;
        /// How many tags at the start stay in place when shuffling or dropping. Default 0.
        keep_tokens: usize = 0, Supported;
        /// Text that divides a caption into a fixed start and a part to shuffle, e.g. `|||`; used
        /// in place of `--keep_tokens`.
        keep_tokens_separator: String = String::new(), Supported;
        /// Text that joins tags which move together, e.g. `;;;`; replaced by the separator at the
        /// end.
        secondary_separator: Option<String> = None, Supported;
        /// Choose one alternative of `{a|b|c}` at random, and one line of a caption with several.
        enable_wildcard: bool = false, Supported;
        /// Text put before every caption.
        caption_prefix: Option<String> = None, Supported;
        /// Text put after every caption.
        caption_suffix: Option<String> = None, Supported;
        /// Probability of training an image with an empty caption (0 to 1). Default 0.
        caption_dropout_rate: f64 = 0.0, Supported;
        /// Train every Nth epoch with empty captions. Default 0: never.
        caption_dropout_every_n_epochs: usize = 0, Supported;
        /// Probability of leaving out each tag (0 to 1). Default 0.
        caption_tag_dropout_rate: f64 = 0.0, Supported;
        /// Tags that are used in the first step of `--token_warmup_step`. Default 1; kept tags
        /// (`--keep_tokens`) come on top.
        token_warmup_min: usize = 1, Supported;
        /// Begin with the first tags of a caption and add the others one by one up to this step (a
        /// share of all steps when below 1). Default 0: all tags at once.
        token_warmup_step: f64 = 0.0, Supported;
    } } };
}
