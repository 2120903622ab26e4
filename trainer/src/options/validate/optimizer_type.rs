//! Rules of the optimizer: which one, its settings, and what it makes of the learning rates.

use super::Check;
use crate::optimizer::{Choice, Pace};
use crate::options::{LrScheduler, Options};

impl Check<'_> {
    /// The optimizer, its settings, and the learning rates that it can use.
    pub(super) fn optimizer_type(&mut self, notes: &mut Vec<String>) {
        let choice = match self.options.choose_optimizer() {
            Ok(choice) => choice,
            Err(fault) => return self.problems.push(fault.to_string()),
        };
        notes.extend(choice.notes.iter().map(|note| format!("optimizer {}: {note}", choice.name)));
        let o = self.options;
        match choice.recipe.pace() {
            Pace::Given if choice.name == "AdaFactor" => adafactor_advice(o, notes),
            Pace::Given => {}
            Pace::Estimated => self.estimated_rates(&choice, notes),
            Pace::Relative => {
                notes.push(format!(
                    "optimizer {}: `relative_step` is on, so it chooses its learning rate by \
                     itself: `learning_rate`, `unet_lr` and `text_encoder_lr` have no effect; \
                     `optimizer_args = [\"relative_step=False\"]` uses them",
                    choice.name
                ));
                // As in the reference, a group whose rate is 0 is not trained at all.
                let none =
                    o.learning_rate == 0. && o.unet_lr.is_none() && o.text_encoder_lr.is_none();
                self.forbid(
                    none,
                    "learning_rate",
                    "of 0 trains nothing, also where AdaFactor chooses the rate: `0`",
                    "leave it out, or give any other number",
                );
            }
            Pace::ScheduleFree => {}
        }
    }

    /// What D-Adaptation and Prodigy make of learning rates.
    fn estimated_rates(&mut self, choice: &Choice, notes: &mut Vec<String>) {
        let o = self.options;
        let text = o.text_encoder_lr.as_ref().and_then(|rates| rates.first().copied());
        let text = (!o.network_train_unet_only).then(|| text.unwrap_or(o.learning_rate));
        let unet =
            (!o.network_train_text_encoder_only).then(|| o.unet_lr.unwrap_or(o.learning_rate));
        let rates: Vec<f64> =
            [text, unet].into_iter().flatten().filter(|rate| *rate > 0.).collect();
        if let Some(rate) = rates.first().filter(|rate| **rate <= 0.1) {
            notes.push(format!(
                "optimizer {}: it finds the learning rate by itself and multiplies it with yours, \
                 which should be about 1.0, not: `{rate}`",
                choice.name
            ));
        }
        if rates.windows(2).any(|pair| pair[0] != pair[1]) {
            let fault = format!(
                "must have one learning rate for all with {}, there are: {rates:?}",
                choice.name
            );
            let hint = "give only `learning_rate = 1.0`; 0 leaves a part untrained";
            self.problem("optimizer_type", &fault, hint);
        }
    }
}

fn adafactor_advice(o: &Options, notes: &mut Vec<String>) {
    let mut advise = |text: &str| notes.push(format!("optimizer AdaFactor: {text}"));
    if o.max_grad_norm != 0. {
        advise("it limits its own steps, consider `max_grad_norm = 0`");
    }
    if o.lr_scheduler != LrScheduler::ConstantWithWarmup {
        advise("`lr_scheduler = \"constant_with_warmup\"` suits it");
    }
    let clips = |item: &String| {
        item.split_once('=').is_some_and(|(key, value)| {
            key.trim() == "clip_threshold" && value.trim().parse() != Ok(1.)
        })
    };
    if o.optimizer_args.iter().flatten().any(clips) {
        advise("`clip_threshold=1.0` suits it");
    }
}
