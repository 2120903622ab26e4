//! Rules of the learning-rate schedule.

use super::Check;
use crate::lr::Course;
use crate::options::{IntOrFloat, LrScheduler};

impl Check<'_> {
    /// The schedule and its settings. What depends on the length of the run is checked in
    /// [`crate::lr::Schedule::new`].
    pub(super) fn schedule(&mut self, notes: &mut Vec<String>) {
        let o = self.options;
        let course = match o.read_lr_course() {
            Ok(course) => course,
            Err(fault) => return self.problems.push(fault.to_string()),
        };
        if o.is_schedule_free() || o.is_adafactor_relative() {
            self.note_unused_schedule(notes);
            return;
        }
        let by_class = !o.lr_scheduler_type.is_empty();
        if by_class && o.is_written("lr_scheduler") {
            notes.push(format!(
                "`lr_scheduler_type` is used in place of `lr_scheduler`: `{}`, not `{}`",
                o.lr_scheduler_type,
                o.lr_scheduler.as_str()
            ));
        }
        let name = if by_class { &o.lr_scheduler_type } else { o.lr_scheduler.as_str() };
        if !course.has_warmup() && o.lr_warmup_steps != IntOrFloat::Steps(0) {
            let fault = format!("has no place in the schedule `{name}`");
            let hint = "use `lr_scheduler = \"constant_with_warmup\"`";
            match course {
                Course::PiecewiseConstant { .. } => notes.push(format!(
                    "`lr_warmup_steps` has no effect with the schedule `{name}`: its `step_rules` can \
                     begin with a low factor"
                )),
                Course::Constant => self.problem("lr_warmup_steps", &fault, hint),
                _ => self.problem("lr_warmup_steps", &fault, "remove it; LinearLR is a warm-up"),
            }
        }
    }

    /// An optimizer that finds its own rate leaves the schedule without effect.
    fn note_unused_schedule(&self, notes: &mut Vec<String>) {
        let o = self.options;
        let (why, advice) = if o.is_schedule_free() {
            ("is schedule-free: its rate stays constant", "`optimizer_args` take `warmup_steps`")
        } else {
            ("finds its own rate", "`relative_step=False` in `optimizer_args` follows a schedule")
        };
        let expected = [LrScheduler::Constant, LrScheduler::Adafactor];
        if !expected.contains(&o.lr_scheduler)
            || !o.lr_scheduler_type.is_empty()
            || o.lr_warmup_steps != IntOrFloat::Steps(0)
        {
            notes.push(format!(
                "`{}` {why}, the schedule and `lr_warmup_steps` have no effect ({advice})",
                o.optimizer_type
            ));
        }
    }
}
