//! Rules across options: what is not built yet, what contradicts, what must not be zero.
//!
//! All broken rules are reported at once, each with the place where the option was written.

use super::{
    Device, IntOrFloat, LogWith, LrScheduler, MixedPrecision, OPTIONS, Options, Origin, Support,
};
use anyhow::{Result, bail};

/// Completes options that follow from others, then checks all rules. Returns remarks for the user;
/// the error holds every broken rule.
pub(super) fn check_and_complete(
    options: &mut Options,
    inline_datasets: bool,
) -> Result<Vec<String>> {
    let mut notes = Vec::new();
    complete(options, &mut notes)?;
    let mut check = Check { options, problems: Vec::new() };
    check.support(&mut notes);
    check.values();
    check.model();
    check.network();
    check.dataset(inline_datasets, &mut notes);
    check.optimizer(&mut notes);
    check.objective(&mut notes);
    check.output(&mut notes);
    if check.problems.is_empty() { Ok(notes) } else { bail!(check.problems.join("\n")) }
}

/// Old spellings, and options that others imply.
fn complete(options: &mut Options, notes: &mut Vec<String>) -> Result<()> {
    if let Some(extension) = options.caption_extention.take() {
        options.caption_extension = extension;
        if let Some(origin) = options.written.remove("caption_extention") {
            options.written.insert("caption_extension", origin);
        }
        notes.push("`caption_extention` is an old spelling of `caption_extension`".to_owned());
    }
    for (old, new) in [("use_8bit_adam", "AdamW8bit"), ("use_lion_optimizer", "Lion")] {
        let set =
            if old == "use_8bit_adam" { options.use_8bit_adam } else { options.use_lion_optimizer };
        if !set {
            continue;
        }
        if !options.optimizer_type.is_empty() {
            bail!(
                "`{old}` and `optimizer_type` both choose an optimizer: `{}`\nhint: give only `optimizer_type`",
                options.optimizer_type
            );
        }
        options.optimizer_type = new.to_owned();
        if let Some(origin) = options.written.get(old).cloned() {
            options.written.insert("optimizer_type", origin);
        }
    }
    if options.cache_latents_to_disk && !options.cache_latents {
        options.cache_latents = true;
        notes.push("`cache_latents_to_disk` turns `cache_latents` on".to_owned());
    }
    if options.max_token_length == Some(75) {
        options.max_token_length = None;
    }
    Ok(())
}

/// The rules, each of which may add a problem.
struct Check<'a> {
    options: &'a Options,
    problems: Vec<String>,
}

impl Check<'_> {
    /// The option as it was written, for the start of a sentence.
    fn name(&self, option: &str) -> String {
        match self.options.written.get(option) {
            Some(origin) => origin.name_option(option),
            None => Origin::CommandLine.name_option(option),
        }
    }

    /// Adds a problem with an option and, unless empty, a hint.
    fn problem(&mut self, option: &str, fault: &str, hint: &str) {
        let hint = if hint.is_empty() { String::new() } else { format!("\nhint: {hint}") };
        self.problems.push(format!("{} {fault}{hint}", self.name(option)));
    }

    /// Adds a problem where `broken`.
    fn forbid(&mut self, broken: bool, option: &str, fault: &str, hint: &str) {
        if broken {
            self.problem(option, fault, hint);
        }
    }

    /// Options that are known but not built, and options without effect.
    fn support(&mut self, notes: &mut Vec<String>) {
        for spec in OPTIONS.iter().filter(|spec| !spec.is_default(self.options)) {
            match spec.support {
                // Configs written by programs carry every key: empty and zero ask for nothing.
                Support::NotYet(_) if (spec.read)(self.options).is_some_and(|v| is_nothing(&v)) => {
                }
                Support::Supported => {}
                Support::NotYet(advice) => {
                    self.problem(spec.name, "is not supported yet", advice);
                }
                Support::NoEffect(reason) => {
                    notes.push(format!("{} has no effect here: {reason}", self.name(spec.name)));
                }
            }
        }
    }

    /// Numbers that must be at least 1, and shares between 0 and 1.
    fn values(&mut self) {
        let o = self.options;
        let counts = [
            ("train_batch_size", Some(o.train_batch_size)),
            ("gradient_accumulation_steps", Some(o.gradient_accumulation_steps)),
            ("max_train_steps", Some(o.max_train_steps)),
            ("max_train_epochs", o.max_train_epochs),
            ("vae_batch_size", Some(o.vae_batch_size)),
            ("dataset_repeats", Some(o.dataset_repeats)),
            ("network_dim", o.network_dim),
            ("clip_skip", o.clip_skip),
            ("threads", o.threads),
            ("save_every_n_epochs", o.save_every_n_epochs),
            ("save_every_n_steps", o.save_every_n_steps),
            ("save_n_epoch_ratio", o.save_n_epoch_ratio),
            ("save_last_n_epochs", o.save_last_n_epochs),
            ("save_last_n_steps", o.save_last_n_steps),
        ];
        for (name, count) in counts {
            self.forbid(count == Some(0), name, "must be 1 or more, not: `0`", "");
        }
        let shares = [
            ("caption_dropout_rate", o.caption_dropout_rate),
            ("caption_tag_dropout_rate", o.caption_tag_dropout_rate),
        ];
        for (name, share) in shares {
            let fault = format!("is a probability from 0 to 1, not: `{share}`");
            self.forbid(!(0.0..=1.0).contains(&share), name, &fault, "");
        }
        let amounts = [
            ("learning_rate", Some(o.learning_rate)),
            ("unet_lr", o.unet_lr),
            ("max_grad_norm", Some(o.max_grad_norm)),
            ("network_alpha", Some(o.network_alpha)),
            ("prior_loss_weight", Some(o.prior_loss_weight)),
            ("min_snr_gamma", o.min_snr_gamma),
            ("v_pred_like_loss", o.v_pred_like_loss),
            ("huber_c", Some(o.huber_c)),
            ("huber_scale", Some(o.huber_scale)),
        ];
        for (name, amount) in amounts {
            if let Some(amount) = amount.filter(|amount| *amount < 0.0) {
                self.problem(name, &format!("must not be negative: `{amount}`"), "");
            }
        }
        for rate in o.text_encoder_lr.iter().flatten().filter(|rate| **rate < 0.0) {
            self.problem("text_encoder_lr", &format!("must not be negative: `{rate}`"), "");
        }
    }

    /// Base model, precision and device.
    fn model(&mut self) {
        let o = self.options;
        if o.pretrained_model_name_or_path.as_deref().unwrap_or_default().is_empty() {
            self.problems.push(
                "`pretrained_model_name_or_path` is missing\nhint: name the base model: a .safetensors or .ckpt file, a diffusers folder or a hub id".to_owned(),
            );
        }
        self.forbid(
            o.mixed_precision == MixedPrecision::Fp16,
            "mixed_precision",
            "is not supported yet on the CPU: `fp16`",
            "use `bf16` or `no`",
        );
        self.forbid(
            o.device == Device::Cuda,
            "device",
            "is not supported yet: `cuda`",
            "use `cpu`",
        );
        if let Some(length) = o.max_token_length.filter(|length| ![150, 225].contains(length)) {
            let fault = format!("must be 75, 150 or 225, not: `{length}`");
            self.problem("max_token_length", &fault, "");
        }
    }

    /// Network and its settings.
    fn network(&mut self) {
        let o = self.options;
        if let Some(module) = o.network_module.as_deref().filter(|name| *name != "networks.lora") {
            let fault = format!("is not supported yet: `{module}`");
            self.problem("network_module", &fault, "use `networks.lora`");
        }
        self.forbid(
            o.network_train_unet_only && o.network_train_text_encoder_only,
            "network_train_unet_only",
            "and `network_train_text_encoder_only` together leave nothing to train",
            "give one of them, or neither to train both parts",
        );
        self.forbid(
            o.dim_from_weights && o.network_weights.is_none(),
            "dim_from_weights",
            "needs the file to take the rank from",
            "add `network_weights`",
        );
        if let Err(fault) = o.read_network_args() {
            self.problems.push(fault.to_string());
        }
    }

    /// Where images come from, and options that exclude each other.
    fn dataset(&mut self, inline: bool, notes: &mut Vec<String>) {
        let o = self.options;
        let folders = o.train_data_dir.is_some() || o.in_json.is_some();
        match (inline, &o.dataset_config) {
            (true, Some(_)) => self.problem(
                "dataset_config",
                "is given although the config file holds `[[datasets]]`",
                "keep one of them",
            ),
            (false, None) if !folders => self.problems.push(
                "no dataset is named\nhint: give `dataset_config`, `[[datasets]]` in the config file, or `train_data_dir`".to_owned(),
            ),
            (false, None) => {
                self.forbid(o.resolution.is_none(), "resolution", "is missing", "add `resolution = 512`");
                self.forbid(
                    o.train_data_dir.is_none(),
                    "in_json",
                    "needs the folder of its images",
                    "add `train_data_dir`",
                );
            }
            _ if folders || o.reg_data_dir.is_some() => notes.push(
                "`train_data_dir`, `reg_data_dir` and `in_json` are ignored, since a dataset config is given".to_owned(),
            ),
            _ => {}
        }
        for (name, set) in [("color_aug", o.color_aug), ("random_crop", o.random_crop)] {
            self.forbid(
                o.cache_latents && set,
                name,
                "changes images at random, which `cache_latents` excludes",
                "remove one of the two",
            );
        }
        if o.min_bucket_reso > o.max_bucket_reso {
            let fault = format!(
                "is above `max_bucket_reso`: `{}` > `{}`",
                o.min_bucket_reso, o.max_bucket_reso
            );
            let name =
                if o.is_written("min_bucket_reso") { "min_bucket_reso" } else { "max_bucket_reso" };
            match name {
                "min_bucket_reso" => self.problem(name, &fault, ""),
                _ => self.problem(
                    name,
                    &format!(
                        "is below `min_bucket_reso`: `{}` < `{}`",
                        o.max_bucket_reso, o.min_bucket_reso
                    ),
                    "",
                ),
            }
        }
        if o.bucket_reso_steps == 0 || !o.bucket_reso_steps.is_multiple_of(8) {
            let fault = format!(
                "must be a multiple of 8, since latents are 8 times smaller than images: `{}`",
                o.bucket_reso_steps
            );
            self.problem("bucket_reso_steps", &fault, "64 is usual");
        }
    }

    /// Optimizer and learning rate.
    fn optimizer(&mut self, notes: &mut Vec<String>) {
        let o = self.options;
        if !o.optimizer_type.is_empty() && !o.optimizer_type.eq_ignore_ascii_case("adamw") {
            let fault = format!("is not supported yet: `{}`", o.optimizer_type);
            self.problem("optimizer_type", &fault, "use `AdamW`");
        } else if let Err(fault) = o.read_adamw_args() {
            self.problems.push(fault.to_string());
        }
        let built = [
            LrScheduler::Constant,
            LrScheduler::ConstantWithWarmup,
            LrScheduler::Linear,
            LrScheduler::Cosine,
        ];
        if !built.contains(&o.lr_scheduler) {
            let fault = format!("is not supported yet: `{}`", o.lr_scheduler.as_str());
            self.problem(
                "lr_scheduler",
                &fault,
                "use constant, constant_with_warmup, linear or cosine",
            );
        }
        self.forbid(
            o.lr_scheduler == LrScheduler::Constant && o.lr_warmup_steps != IntOrFloat::Steps(0),
            "lr_warmup_steps",
            "has no place in the schedule `constant`",
            "use `lr_scheduler = \"constant_with_warmup\"`",
        );
        if o.text_encoder_lr.as_ref().is_some_and(|rates| rates.len() > 1) {
            notes.push("`text_encoder_lr` has more than one value: this model has one text encoder, only the first counts".to_owned());
        }
        if !o.is_written("learning_rate") && (o.unet_lr.is_none() || o.text_encoder_lr.is_none()) {
            notes.push(format!(
                "`learning_rate` is not given: `{}` is used, which is low for a LoRA",
                o.learning_rate
            ));
        }
    }

    /// Noise and loss.
    fn objective(&mut self, notes: &mut Vec<String>) {
        let o = self.options;
        self.forbid(
            o.adaptive_noise_scale.is_some() && o.noise_offset.is_none(),
            "adaptive_noise_scale",
            "needs `noise_offset`",
            "add `noise_offset = 0.05`",
        );
        self.forbid(
            o.scale_v_pred_loss_like_noise_pred && !o.v_parameterization,
            "scale_v_pred_loss_like_noise_pred",
            "is only for models that predict v",
            "add `v_parameterization` if the base model does, else remove it",
        );
        self.forbid(
            o.v_pred_like_loss.is_some_and(|weight| weight != 0.0) && o.v_parameterization,
            "v_pred_like_loss",
            "cannot be combined with `v_parameterization`",
            "the loss is a v-prediction loss already",
        );
        let (low, high) = (o.min_timestep.unwrap_or(0), o.max_timestep.unwrap_or(1000));
        if low >= high || high > 1000 {
            let name = if o.max_timestep.is_some() { "max_timestep" } else { "min_timestep" };
            let fault = format!("leaves no valid timesteps: `{low}` up to `{high}`");
            self.problem(name, &fault, "timesteps run from 0 up to 1000");
        }
        if o.zero_terminal_snr && !o.v_parameterization {
            notes.push("`zero_terminal_snr` without `v_parameterization`: the last timestep teaches nothing".to_owned());
        }
        if o.v2 && o.clip_skip.is_some() {
            notes.push("`clip_skip` is unusual for Stable Diffusion 2".to_owned());
        }
    }

    /// Files and logs.
    fn output(&mut self, notes: &mut Vec<String>) {
        let o = self.options;
        if o.output_dir.is_none() && !o.dry_run {
            self.problems.push(
                "`output_dir` is missing\nhint: name the folder for the trained files".to_owned(),
            );
        }
        if let Some(name) =
            o.output_name.as_deref().filter(|name| name.contains(['/', '\\']) || name.is_empty())
        {
            let fault = format!("must be a file name without folders, not: `{name}`");
            self.problem("output_name", &fault, "folders belong into `output_dir`");
        }
        if let Some(tool @ (LogWith::Wandb | LogWith::All)) = o.log_with {
            let fault = format!("is not supported yet: `{}`", tool.as_str());
            self.problem("log_with", &fault, "use `tensorboard`");
        }
        self.forbid(
            o.log_with == Some(LogWith::Tensorboard) && o.logging_dir.is_none(),
            "log_with",
            "needs a folder for the logs",
            "add `logging_dir`",
        );
        let pairs = [
            (
                "save_last_n_epochs",
                o.save_last_n_epochs,
                o.save_every_n_epochs.or(o.save_n_epoch_ratio),
                "save_every_n_epochs",
            ),
            ("save_last_n_steps", o.save_last_n_steps, o.save_every_n_steps, "save_every_n_steps"),
        ];
        for (last, keep, every, needed) in pairs {
            if keep.is_some() && every.is_none() {
                notes.push(format!("`{last}` has no effect without `{needed}`"));
            }
        }
    }
}

/// Whether a value asks for nothing: off, zero, or empty.
fn is_nothing(value: &toml::Value) -> bool {
    match value {
        toml::Value::Boolean(on) => !on,
        toml::Value::Integer(number) => *number == 0,
        toml::Value::Float(number) => *number == 0.,
        toml::Value::String(text) => text.is_empty(),
        toml::Value::Array(items) => items.is_empty(),
        _ => false,
    }
}
