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
