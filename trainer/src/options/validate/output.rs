//! Rules of files and logs.

use super::Check;
use crate::options::LogWith;

impl Check<'_> {
    /// Files and logs.
    pub(super) fn output(&mut self, notes: &mut Vec<String>) {
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
        self.forbid(
            o.log_with.is_some() && o.logging_dir.is_none(),
            "log_with",
            "needs a folder for the logs",
            "add `logging_dir`; `wandb` writes an offline run there",
        );
        let wandb = matches!(o.log_with, Some(LogWith::Wandb | LogWith::All));
        if o.wandb_run_name.is_some() && !wandb {
            notes.push(
                "`wandb_run_name` has no effect: `log_with` does not ask for `wandb`".to_owned(),
            );
        }
        if o.logging_dir.is_none() {
            for (name, set) in [
                ("log_prefix", o.log_prefix.is_some()),
                ("log_tracker_name", o.log_tracker_name.is_some()),
                ("log_tracker_config", o.log_tracker_config.is_some()),
                ("log_config", o.log_config),
            ] {
                if set {
                    notes.push(format!("`{name}` has no effect without `logging_dir`"));
                }
            }
        }
        self.validation(notes);
        self.samples(notes);
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
        self.states(notes);
    }

    /// States and going on from them.
    fn states(&mut self, notes: &mut Vec<String>) {
        let o = self.options;
        let kept = [
            ("save_last_n_epochs_state", o.save_last_n_epochs_state),
            ("save_last_n_steps_state", o.save_last_n_steps_state),
        ];
        for (name, count) in kept {
            self.forbid(count == Some(0), name, "must be 1 or more, not: `0`", "");
            if count.is_some() && !o.save_state {
                notes.push(format!("`{name}` has no effect without `save_state`"));
            }
        }
        self.forbid(
            o.initial_epoch == Some(0),
            "initial_epoch",
            "counts from 1, not: `0`",
            "the first epoch is 1",
        );
        if o.initial_epoch.is_some() && o.initial_step.is_some() {
            notes.push("`initial_epoch` has no effect beside `initial_step`".to_owned());
        }
        if o.skip_until_initial_step && o.initial_epoch.is_none() && o.initial_step.is_none() {
            // With `resume`, sd-scripts needs it to find the position in the data; a state of ours
            // knows it.
            if o.resume.is_none() {
                let needed = "`initial_step` or `initial_epoch`";
                notes.push(format!("`skip_until_initial_step` has no effect without {needed}"));
            }
        }
    }

    /// Sample pictures.
    fn samples(&self, notes: &mut Vec<String>) {
        let o = self.options;
        let (steps, epochs) = (o.sample_every_n_steps.is_some(), o.sample_every_n_epochs.is_some());
        let wanted = steps || epochs || o.sample_at_first;
        if o.sample_prompts.is_some() && !wanted {
            notes.push(
                "`sample_prompts` has no effect without `sample_every_n_steps`, \
                 `sample_every_n_epochs` or `sample_at_first`"
                    .to_owned(),
            );
        }
        for (name, set) in [
            ("sample_every_n_steps", steps),
            ("sample_every_n_epochs", epochs),
            ("sample_at_first", o.sample_at_first),
        ] {
            if set && o.sample_prompts.is_none() {
                notes.push(format!("`{name}` has no effect without `sample_prompts`"));
            }
        }
        if steps && epochs && o.sample_prompts.is_some() {
            notes.push(
                "`sample_every_n_steps` has no effect beside `sample_every_n_epochs`".to_owned(),
            );
        }
    }

    /// Validation. The dataset configuration may ask for it on its own, so its absence here says
    /// nothing when there is one.
    fn validation(&self, notes: &mut Vec<String>) {
        let o = self.options;
        if o.validation_split > 0. || o.dataset_config.is_some() {
            return;
        }
        for (name, set) in [
            ("validate_every_n_steps", o.validate_every_n_steps.is_some()),
            ("max_validation_steps", o.max_validation_steps.is_some()),
        ] {
            if set {
                notes.push(format!(
                    "`{name}` acts only where images are held out: see `validation_split`"
                ));
            }
        }
    }
}
