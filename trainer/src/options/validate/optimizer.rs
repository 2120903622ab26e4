//! Rules of the optimizer and the learning rates.

use super::Check;

impl Check<'_> {
    /// Optimizer and learning rate.
    pub(super) fn optimizer(&mut self, notes: &mut Vec<String>) {
        let o = self.options;
        self.optimizer_type(notes);
        if !o.is_written("learning_rate") && (o.unet_lr.is_none() || o.text_encoder_lr.is_none()) {
            notes.push(format!(
                "`learning_rate` is not given: `{}` is used, which is low for a LoRA",
                o.learning_rate
            ));
        }
    }
}
