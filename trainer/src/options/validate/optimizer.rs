//! Rules of the optimizer and the learning rates.

use super::Check;

impl Check<'_> {
    /// Optimizer and learning rate.
    pub(super) fn optimizer(&mut self, notes: &mut Vec<String>) {
        let o = self.options;
        self.optimizer_type(notes);
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
}
