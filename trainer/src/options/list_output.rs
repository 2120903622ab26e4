//! Option list: saving, metadata, resuming, logging, samples and validation.
//!
//! The doc comment of an entry is what `lorarun train --help` prints.

macro_rules! saving_options {
    ([$($rest:ident)*] $($lists:tt)*) => { chain_lists! { [$($rest)*] $($lists)* group Saving {
        /// Folder for the trained files; made when missing. Required.
        output_dir: Option<PathBuf> = None, Supported;
        /// Name of the trained files without suffix. Default `last` (`epoch`, `at` for files saved
        /// on the way).
        output_name: Option<String> = None, Supported;
        /// File format: `safetensors` (default), or a pickle as `ckpt` or `pt`.
        save_model_as: SaveModelAs = SaveModelAs::Safetensors, Supported;
        /// Number type in the file: `float`, `fp16` or `bf16`. Default: float32 as trained. fp16
        /// halves the file and loses nothing that shows.
        save_precision: Option<SavePrecision> = None, Supported;
        /// Save after every Nth epoch.
        save_every_n_epochs: Option<usize> = None, Supported;
        /// Save after every Nth step.
        save_every_n_steps: Option<usize> = None, Supported;
        /// Save at least this many times over the run, at epoch ends.
        save_n_epoch_ratio: Option<usize> = None, Supported;
        /// Of the files saved by epoch keep only the last N.
        save_last_n_epochs: Option<usize> = None, Supported;
        /// Of the files saved by step keep those of the last N steps.
        save_last_n_steps: Option<usize> = None, Supported;
        /// With every saved file also save a state: a folder `NAME-...-state` with the weights in
        /// full precision, the optimizer and the position, from which `--resume` goes on as if the
        /// run had never stopped. About three times as large as the LoRA in float32. Ctrl-C and
        /// SIGTERM save one whether this is set or not.
        save_state: bool = false, Supported;
        /// Save a state at the end of the run, so that it can be made longer later.
        save_state_on_train_end: bool = false, Supported;
        /// Of the states saved by epoch keep only the last N. Default: as
        /// `--save_last_n_epochs`.
        save_last_n_epochs_state: Option<usize> = None, Supported;
        /// Of the states saved by step keep those of the last N steps. Default: as
        /// `--save_last_n_steps`.
        save_last_n_steps_state: Option<usize> = None, Supported;
        /// Go on from a state: its folder, or `auto` for the newest whole state of this
        /// `--output_name` in `--output_dir` (none there: the run begins anew, so that one command
        /// serves for the first start and for every restart). Give the options of the first run:
        /// another network, optimizer, base model or seed is an error, other changes are told.
        /// `--max_train_steps` counts from the very beginning. The number of processes may change
        /// as long as batch size x processes stays; otherwise only a state of an epoch's end goes
        /// on. A state folder of sd-scripts gives its LoRA, its step and the moments of AdamW.
        resume: Option<PathBuf> = None, Supported;
        /// Pass over the data that the steps before `--initial_step` would have used (takes no
        /// time). Without it the data begin from the start. A resumed state has its own position.
        skip_until_initial_step: bool = false, Supported;
        /// Number of the first epoch, from 1: the count of steps begins at that epoch. The learning
        /// rate's schedule still begins at 0, unless a state is resumed.
        initial_epoch: Option<usize> = None, Supported;
        /// Steps that count as done, over all epochs; comes before `--initial_epoch` and before the
        /// step of a resumed state.
        initial_step: Option<usize> = None, Supported;
    } } };
}

macro_rules! metadata_options {
    ([$($rest:ident)*] $($lists:tt)*) => { chain_lists! { [$($rest)*] $($lists)* group Metadata {
        /// Free text kept in the file's metadata.
        training_comment: Option<String> = None, Supported;
        /// Write only what other programs need to load the file, nothing about the training.
        no_metadata: bool = false, Supported;
        /// Title in the file's metadata. Default: `--output_name`.
        metadata_title: Option<String> = None, Supported;
        /// Author in the file's metadata.
        metadata_author: Option<String> = None, Supported;
        /// Description in the file's metadata.
        metadata_description: Option<String> = None, Supported;
        /// Licence in the file's metadata.
        metadata_license: Option<String> = None, Supported;
        /// Tags in the file's metadata, separated by commas.
        metadata_tags: Option<String> = None, Supported;
        /// Advice for users in the file's metadata.
        metadata_usage_hint: Option<String> = None, Supported;
        /// Picture in the file's metadata: an image file, or a data URL.
        metadata_thumbnail: Option<String> = None, Supported;
        /// Names of the models that went into this one.
        metadata_merged_from: Option<String> = None, Supported;
        /// Words that call up what was learned.
        metadata_trigger_phrase: Option<String> = None, Supported;
        /// How the images were prepared.
        metadata_preprocessor: Option<String> = None, Supported;
        /// Whether this is a negative embedding.
        metadata_is_negative_embedding: Option<String> = None, Supported;
    } } };
}

macro_rules! logging_options {
    ([$($rest:ident)*] $($lists:tt)*) => { chain_lists! { [$($rest)*] $($lists)* group Logging {
        /// Folder for logs: each run makes a folder with its date and time, which holds TensorBoard
        /// events, `steps.jsonl` (one object per step: loss, learning rates, norms, time, memory) and
        /// `image_losses.csv` (at every epoch's end, count, mean and latest loss of every image).
        /// Without it nothing is logged.
        logging_dir: Option<PathBuf> = None, Supported;
        /// Where to log: `tensorboard`, `wandb` or `all`; needs `--logging_dir`. Default: TensorBoard
        /// when `--logging_dir` is given. `wandb` writes an offline run; `wandb sync FOLDER` uploads
        /// it (the folder is named at the start).
        log_with: Option<LogWith> = None, Supported;
        /// Text before the date in the name of a run's log folder.
        log_prefix: Option<String> = None, Supported;
        /// Name of the folder of TensorBoard's events inside a run's log folder, and of the project
        /// at Weights & Biases. Default `network_train`.
        log_tracker_name: Option<String> = None, Supported;
        /// TOML file with settings of the log tool: under `[wandb]` `name`, `entity`, `group`,
        /// `job_type`, `notes` and `tags`. TensorBoard has none.
        log_tracker_config: Option<PathBuf> = None, Supported;
        /// Write the run's options into the log as text.
        log_config: bool = false, Supported;
        /// Name of the run at Weights & Biases.
        wandb_run_name: Option<String> = None, Supported;
        /// Key for Weights & Biases.
        wandb_api_key: Option<String> = None, NoEffect("the run is written to disk; `wandb login` and `wandb sync` upload it");
        /// What is printed: INFO (default; DEBUG is the same) everything, WARNING warnings alone,
        /// ERROR and CRITICAL nothing but what ends the run. The progress bar stays.
        console_log_level: Option<LogLevel> = None, Supported;
        /// Write messages to the end of this file instead of the terminal. The progress bar and the
        /// error that ends a run stay on the terminal.
        console_log_file: Option<PathBuf> = None, Supported;
        /// Print messages without colours and columns.
        console_log_simple: bool = false, NoEffect("messages are always plain lines");
    } } };
}

macro_rules! sampling_options {
    ([$($rest:ident)*] $($lists:tt)*) => { chain_lists! { [$($rest)*] $($lists)* group Sampling {
        /// Make sample images after every Nth step.
        sample_every_n_steps: Option<usize> = None, Supported;
        /// Make sample images before the first step; not again in a run that is resumed.
        sample_at_first: bool = false, Supported;
        /// Make sample images at the end of every Nth epoch; comes before
        /// `--sample_every_n_steps`.
        sample_every_n_epochs: Option<usize> = None, Supported;
        /// File with the prompts of sample images: `.txt` with one on each line (`a cat --w 512
        /// --h 768 --d 1 --l 7.5 --s 28 --n blurred --ss euler_a`), `.toml` or `.json`. Without
        /// more a picture has 512x512 pixels, 30 steps, a scale of 7.5 and another seed each time.
        /// Pictures show the weights that would be saved, in `sample` in `--output_dir`, in
        /// TensorBoard and at Weights & Biases. They change nothing in the training.
        sample_prompts: Option<PathBuf> = None, Supported;
        /// Sampler of sample images. Default `ddim`.
        sample_sampler: SampleSampler = SampleSampler::Ddim, Supported;
    } } };
}

macro_rules! validation_options {
    ([$($rest:ident)*] $($lists:tt)*) => { chain_lists! { [$($rest)*] $($lists)* group Validation {
        /// Seed of everything random in a validation: which images are held out, their noise.
        /// Default: `--seed`. Keep it when you compare runs.
        validation_seed: Option<u64> = None, Supported;
        /// Share of the images of each subset that is not trained on but used to measure the loss
        /// (0 to 1). Default 0. A loss that falls in training and rises in validation means that
        /// the LoRA learns its images by heart. The dataset configuration may say it for a subset;
        /// 1 there makes a whole folder the validation set.
        validation_split: f64 = 0.0, Supported;
        /// Also validate after every Nth step.
        validate_every_n_steps: Option<usize> = None, Supported;
        /// Validate at the end of every Nth epoch. Default 1 where images are held out.
        validate_every_n_epochs: Option<usize> = None, Supported;
        /// Validate with at most this many batches, whatever the number of ranks. Default: all.
        max_validation_steps: Option<usize> = None, Supported;
    } } };
}
