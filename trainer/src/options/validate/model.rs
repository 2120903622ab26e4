//! Rules of the base model, precision and device.

use super::Check;

impl Check<'_> {
    /// Base model, precision and device.
    pub(super) fn model(&mut self) {
        let o = self.options;
        if o.pretrained_model_name_or_path.as_deref().unwrap_or_default().is_empty() {
            self.problems.push(
                "`pretrained_model_name_or_path` is missing\nhint: name the base model: a .safetensors or .ckpt file, a diffusers folder or a hub id".to_owned(),
            );
        }
        self.forbid(
            o.sdxl && o.v2,
            "sdxl",
            "and `v2` name two kinds of models",
            "remove both: the model tells which it is",
        );
        if let Some(length) = o.max_token_length.filter(|length| ![150, 225].contains(length)) {
            let fault = format!("must be 75, 150 or 225, not: `{length}`");
            self.problem("max_token_length", &fault, "");
        }
    }
}
