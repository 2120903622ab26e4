//! Rules of noise and loss.

use super::Check;

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
}
