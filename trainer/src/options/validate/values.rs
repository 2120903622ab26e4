//! Numbers that must be at least 1, and shares between 0 and 1.

use super::Check;

impl Check<'_> {
    /// Numbers that must be at least 1, and shares between 0 and 1.
    pub(super) fn values(&mut self) {
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
            ("validate_every_n_steps", o.validate_every_n_steps),
            ("validate_every_n_epochs", o.validate_every_n_epochs),
            ("max_validation_steps", o.max_validation_steps),
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
        let split = o.validation_split;
        let fault = format!("is a share from 0 to 1, not: `{split}`");
        self.forbid(!(0.0..=1.0).contains(&split), "validation_split", &fault, "");
        if let Some(decay) = o.ema_decay.filter(|decay| !(0.0..1.0).contains(decay)) {
            let fault = format!("must be from 0 up to, not including, 1: `{decay}`");
            self.problem("ema_decay", &fault, "0.99 to 0.9999 is usual");
        }
        self.forbid(
            o.ema_decay.is_some() && o.is_schedule_free(),
            "ema_decay",
            "does not go with a schedule-free optimizer",
            "remove it: such an optimizer saves an average of its own",
        );
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
}
