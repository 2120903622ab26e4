//! Rules of noise and loss.

use super::Check;
use crate::options::{HuberSchedule, LossType};

impl Check<'_> {
    /// Noise and loss.
    pub(super) fn objective(&mut self, notes: &mut Vec<String>) {
        let o = self.options;
        self.forbid(
            o.adaptive_noise_scale.is_some() && o.noise_offset.is_none(),
            "adaptive_noise_scale",
            "needs `noise_offset`",
            "add `noise_offset = 0.05`",
        );
        self.noise();
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

    /// What is added to the noise.
    fn noise(&mut self) {
        let o = self.options;
        if let Some(gamma) = o.ip_noise_gamma.filter(|gamma| !(0. ..=1.).contains(gamma)) {
            let fault = format!("must be from 0 to 1: `{gamma}`");
            self.problem("ip_noise_gamma", &fault, "0.1 is usual");
        }
        let multires = o.multires_noise_iterations.is_some_and(|count| count > 0);
        let discount = o.multires_noise_discount;
        if multires && !(discount > 0. && discount <= 1.) {
            let fault = format!("must be above 0 and at most 1: `{discount}`");
            let hint = "0.3 is usual: each octave is that much weaker than the one before";
            self.problem("multires_noise_discount", &fault, hint);
        }
        let curved = matches!(o.loss_type, LossType::Huber | LossType::SmoothL1);
        self.forbid(
            curved && o.huber_schedule == HuberSchedule::Exponential && o.huber_c == 0.,
            "huber_c",
            "must be above 0 with `huber_schedule = \"exponential\"`",
            "0.1 is usual",
        );
    }
}
