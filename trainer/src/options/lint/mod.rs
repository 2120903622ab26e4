//! What is unusual about a set of options: settings without effect, values outside what makes sense.
//!
//! Rules that stop a run are in `validate`. A finding here is advice: the run would go, and perhaps
//! not do what was meant. Each rule is one line of a table-like list, by chapter.

#[cfg(test)]
mod tests;

use super::{HuberSchedule, IntOrFloat, LossType, Options, Origin};

/// Settings of a schedule and the schedules that read them.
const SCHEDULE_SETTINGS: &[(&str, &[&str])] = &[
    ("lr_decay_steps", &["warmup_stable_decay"]),
    (
        "lr_scheduler_num_cycles",
        &["cosine_with_restarts", "cosine_with_min_lr", "warmup_stable_decay"],
    ),
    ("lr_scheduler_power", &["polynomial"]),
    ("lr_scheduler_timescale", &["inverse_sqrt"]),
    ("lr_scheduler_min_lr_ratio", &["cosine_with_min_lr", "warmup_stable_decay"]),
];

/// Advice about `options`, each with the place where the option was written.
pub fn lint(options: &Options) -> Vec<String> {
    let mut lint = Lint { o: options, found: Vec::new() };
    lint.learning_rate();
    lint.schedule();
    lint.network();
    lint.images();
    lint.captions();
    lint.noise();
    lint.length_and_files();
    lint.found
}

struct Lint<'a> {
    o: &'a Options,
    found: Vec<String>,
}

/// Optimizers that find the learning rate themselves; `learning_rate` is a factor on it.
fn adapts(optimizer: &str) -> bool {
    let name = optimizer.to_lowercase();
    name.contains("prodigy") || name.contains("dadapt")
}

impl Lint<'_> {
    /// Adds advice about an option where `unusual`.
    fn advise(&mut self, unusual: bool, option: &str, advice: &str) {
        if unusual {
            let name = match self.o.written.get(option) {
                Some(origin @ Origin::File { .. }) => origin.name_option(option),
                _ => format!("`{option}`"),
            };
            self.found.push(format!("{name} {advice}"));
        }
    }

    fn is_default(&self, option: &str) -> bool {
        super::find_option(option).is_none_or(|spec| spec.is_default(self.o))
    }

    /// Adds advice about an option that was written although it does nothing.
    fn idle(&mut self, idle: bool, option: &str, because: &str) {
        let written = self.o.is_written(option);
        self.advise(idle && written, option, &format!("has no effect: {because}"));
    }

    fn learning_rate(&mut self) {
        let o = self.o;
        let kind = o.optimizer_type.to_lowercase();
        let text_encoder = o.text_encoder_lr.as_ref().and_then(|rates| rates.first().copied());
        let rates = [
            ("learning_rate", o.is_written("learning_rate").then_some(o.learning_rate)),
            ("unet_lr", o.unet_lr),
            ("text_encoder_lr", text_encoder),
        ];
        for (name, rate) in rates {
            let Some(rate) = rate.filter(|rate| *rate > 0.) else { continue };
            if adapts(&kind) {
                self.advise(
                    rate < 0.1,
                    name,
                    &format!(
                        "is only a factor on the rate that `{}` finds, 1 is usual: `{rate}`",
                        o.optimizer_type
                    ),
                );
                continue;
            }
            // Lion and other sign methods move every weight by the rate itself.
            let (high, usual) = match kind.as_str() {
                name if name.contains("lion") => (1e-3, "1e-5 to 1e-4"),
                name if name.contains("sgd") => (f64::MAX, ""),
                _ => (5e-3, "1e-4 to 1e-3"),
            };
            let given = if o.optimizer_type.is_empty() { "AdamW" } else { &o.optimizer_type };
            self.advise(
                rate > high,
                name,
                &format!("is far above what `{given}` takes, {usual} is usual: `{rate}`"),
            );
        }
        self.idle(o.network_train_unet_only, "text_encoder_lr", "`network_train_unet_only` is set");
        self.idle(
            o.network_train_text_encoder_only,
            "unet_lr",
            "`network_train_text_encoder_only` is set",
        );
        self.advise(
            text_encoder == Some(0.) && !o.network_train_unet_only,
            "text_encoder_lr",
            "of 0 still writes the text encoder's modules; `network_train_unet_only` leaves them out",
        );
        let batch = o.train_batch_size * o.gradient_accumulation_steps;
        let rate = o.unet_lr.unwrap_or(o.learning_rate);
        self.advise(
            batch >= 16 && rate <= 1e-4 && !adapts(&kind) && o.is_written("learning_rate"),
            "train_batch_size",
            &format!("with accumulation averages {batch} images a step: at the rate of `{rate}` that learns slowly"),
        );
        self.advise(
            o.train_data_dir.is_some()
                && batch <= 1
                && rate > 1e-3
                && rate <= 5e-3
                && !adapts(&kind),
            "learning_rate",
            "is high for steps of one image",
        );
        self.advise(
            o.max_grad_norm == 0. && !adapts(&kind),
            "max_grad_norm",
            "of 0 never clips: one bad image can spoil the LoRA",
        );
    }

    fn schedule(&mut self) {
        let o = self.o;
        let name = o.lr_schedule_name();
        for (option, readers) in SCHEDULE_SETTINGS {
            let is_read = readers.contains(&name);
            self.idle(
                !is_read && !self.is_default(option),
                option,
                &format!("`{name}` does not read it"),
            );
        }
        self.advise(
            name == "warmup_stable_decay" && o.lr_decay_steps == IntOrFloat::Steps(0),
            "lr_scheduler",
            "of `warmup_stable_decay` never falls without `lr_decay_steps`, `0.2` is usual",
        );
        let warmup_share = match o.lr_warmup_steps {
            IntOrFloat::Share(share) => share,
            IntOrFloat::Steps(steps) if o.max_train_epochs.is_none() => {
                steps as f64 / o.max_train_steps.max(1) as f64
            }
            IntOrFloat::Steps(_) => 0.,
        };
        self.advise(warmup_share > 0.5, "lr_warmup_steps", "takes more than half of the run");
    }

    fn network(&mut self) {
        let o = self.o;
        let rank = o.network_rank();
        let alpha = if o.network_alpha == 0. { rank as f64 } else { o.network_alpha };
        self.advise(
            alpha > rank as f64,
            "network_alpha",
            &format!(
                "is above `network_dim`: the LoRA's output is multiplied by {:.3}",
                alpha / rank as f64
            ),
        );
        self.advise(
            rank >= 16 && alpha <= 1. && !adapts(&o.optimizer_type) && o.learning_rate < 3e-4,
            "network_alpha",
            &format!("of {alpha} divides the LoRA's output by {:.0}: raise it (half of `network_dim` is usual) or the learning rate", rank as f64 / alpha),
        );
        self.advise(
            rank > 128,
            "network_dim",
            &format!("is far more than a subject or style needs, 4 to 32 serve most: `{rank}`"),
        );
        self.idle(o.dim_from_weights, "network_dim", "`dim_from_weights` takes it from the file");
        self.advise(
            o.network_dropout.is_some_and(|share| share > 0.5),
            "network_dropout",
            "of more than 0.5 hardly learns, 0.1 to 0.5 is usual",
        );
        self.idle(
            o.base_weights.is_none(),
            "base_weights_multiplier",
            "there is no `base_weights`",
        );
        self.advise(
            o.v_parameterization && !o.v2,
            "v_parameterization",
            "is unusual for Stable Diffusion 1",
        );
    }

    fn images(&mut self) {
        let o = self.o;
        self.advise(
            !o.cache_latents && !o.color_aug && !o.random_crop,
            "cache_latents",
            "is off: every step encodes its images anew, which takes much longer",
        );
        if let Some(size) = o.resolution {
            self.advise(
                !size.width.is_multiple_of(64) || !size.height.is_multiple_of(64),
                "resolution",
                &format!("is not a multiple of 64: `{},{}`", size.width, size.height),
            );
            let area = size.width * size.height;
            self.advise(
                area < 256 * 256,
                "resolution",
                "is below 256: a Stable Diffusion model draws little at that size",
            );
            self.advise(
                area > 1024 * 1024,
                "resolution",
                "is above 1024: Stable Diffusion 1 and 2 repeat their subjects at that size",
            );
        }
        for option in
            ["min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "bucket_no_upscale"]
        {
            let is_default = self.is_default(option);
            self.idle(
                !o.enable_bucket && !is_default && o.resolution.is_some(),
                option,
                "`enable_bucket` is not set",
            );
        }
        self.advise(
            o.resolution.is_some() && !o.enable_bucket,
            "enable_bucket",
            "is off: images of another shape than `resolution` are cropped",
        );
        self.idle(!o.masked_loss, "conditioning_data_dir", "`masked_loss` is not set");
        self.idle(!o.cache_latents, "vae_batch_size", "`cache_latents` is not set");
        self.idle(
            o.prior_loss_weight != 1. && o.reg_data_dir.is_none() && o.train_data_dir.is_some(),
            "prior_loss_weight",
            "there is no `reg_data_dir`",
        );
    }

    fn captions(&mut self) {
        let o = self.o;
        let moves_tags = o.shuffle_caption || o.caption_tag_dropout_rate > 0.;
        self.idle(
            !moves_tags && o.keep_tokens > 0 && o.train_data_dir.is_some(),
            "keep_tokens",
            "neither `shuffle_caption` nor `caption_tag_dropout_rate` is set",
        );
        self.advise(
            o.weighted_captions && o.shuffle_caption,
            "weighted_captions",
            "with `shuffle_caption` breaks weights whose brackets hold a separator",
        );
        self.advise(
            o.caption_dropout_rate > 0.5,
            "caption_dropout_rate",
            "of more than 0.5 trains most images without their caption",
        );
        self.advise(
            o.caption_tag_dropout_rate > 0.5,
            "caption_tag_dropout_rate",
            "of more than 0.5 leaves out most tags",
        );
        self.advise(
            o.caption_dropout_every_n_epochs == 1,
            "caption_dropout_every_n_epochs",
            "of 1 trains every epoch without captions",
        );
    }

    fn noise(&mut self) {
        let o = self.o;
        if let Some(gamma) = o.min_snr_gamma {
            self.advise(
                gamma < 1.,
                "min_snr_gamma",
                &format!("acts stronger the lower it is, 5 is usual: `{gamma}`"),
            );
            self.advise(
                gamma > 20.,
                "min_snr_gamma",
                &format!("of that size hardly does anything, 5 is usual: `{gamma}`"),
            );
            self.advise(
                o.debiased_estimation_loss,
                "debiased_estimation_loss",
                "weighs timesteps like `min_snr_gamma`: one of the two is enough",
            );
        }
        if let Some(offset) = o.noise_offset {
            self.advise(
                offset.abs() > 0.2,
                "noise_offset",
                &format!("washes images out, 0.05 to 0.1 is usual: `{offset}`"),
            );
            self.advise(
                o.multires_noise_iterations.is_some(),
                "multires_noise_iterations",
                "serves the same end as `noise_offset`: one of the two is enough",
            );
            self.advise(
                o.zero_terminal_snr,
                "noise_offset",
                "is not needed with `zero_terminal_snr`",
            );
        }
        self.idle(
            o.noise_offset.is_none() && o.noise_offset_random_strength,
            "noise_offset_random_strength",
            "there is no `noise_offset`",
        );
        self.idle(
            o.multires_noise_iterations.is_none() && !matches!(o.multires_noise_discount, 0. | 0.3),
            "multires_noise_discount",
            "there is no `multires_noise_iterations`",
        );
        self.advise(
            o.multires_noise_iterations.is_some() && o.multires_noise_discount > 0.8,
            "multires_noise_discount",
            &format!("is strong, 0.1 to 0.8 is usual: `{}`", o.multires_noise_discount),
        );
        self.advise(
            o.ip_noise_gamma.is_some_and(|gamma| gamma > 0.3),
            "ip_noise_gamma",
            "is strong, 0.1 is usual",
        );
        self.idle(
            o.ip_noise_gamma.is_none() && o.ip_noise_gamma_random_strength,
            "ip_noise_gamma_random_strength",
            "there is no `ip_noise_gamma`",
        );
        let has_threshold = matches!(o.loss_type, LossType::Huber | LossType::SmoothL1);
        self.idle(
            !has_threshold && o.huber_c != 0.1,
            "huber_c",
            "it is for the losses `huber` and `smooth_l1`",
        );
        self.idle(
            has_threshold && o.huber_schedule == HuberSchedule::Snr && o.huber_scale != 1.,
            "huber_scale",
            "`huber_schedule` is `snr`, which sd-scripts does not scale",
        );
        let span = o.max_timestep.unwrap_or(1000).saturating_sub(o.min_timestep.unwrap_or(0));
        self.advise(
            span < 200,
            "max_timestep",
            &format!(
                "with `min_timestep` leaves {span} of 1000 timesteps: the LoRA acts only there"
            ),
        );
    }

    fn length_and_files(&mut self) {
        let o = self.o;
        self.idle(o.max_train_epochs.is_some(), "max_train_steps", "`max_train_epochs` is given");
        self.advise(
            !o.is_written("max_train_steps") && o.max_train_epochs.is_none(),
            "max_train_steps",
            "and `max_train_epochs` are not given: 1600 steps are trained",
        );
        if let (Some(every), Some(epochs)) = (o.save_every_n_epochs, o.max_train_epochs) {
            self.advise(
                every >= epochs,
                "save_every_n_epochs",
                &format!("never saves before the end: `{every}` of {epochs} epochs"),
            );
        }
        if let (Some(every), None) = (o.save_every_n_steps, o.max_train_epochs) {
            let steps = o.max_train_steps;
            self.advise(
                every >= steps,
                "save_every_n_steps",
                &format!("never saves before the end: `{every}` of {steps} steps"),
            );
        }
        self.advise(o.seed.is_none(), "seed", "is not given: every run gives another file");
        self.advise(
            o.save_precision.is_none(),
            "save_precision",
            "is not given: the file has float32 weights, twice the size of fp16",
        );
        for option in ["log_prefix", "log_tracker_name", "log_config"] {
            self.idle(o.logging_dir.is_none(), option, "there is no `logging_dir`");
        }
    }
}
