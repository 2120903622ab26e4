//! Where a run begins: the number of its first step, the data it sees first, and how far its
//! learning rate has come.
//!
//! Three counts that usually agree. `initial_step` (or `initial_epoch`) sets the number alone, as
//! sd-scripts documents it: with `skip_until_initial_step` the data that the undisturbed run would
//! have used up to that step are passed over as well (at no cost: their order is a function of the
//! position), and the schedule follows the number only when a state is resumed, from where the state
//! was. All three count optimizer steps, so gradient accumulation changes nothing.

use anyhow::{Result, bail};

use super::facts::{DataFacts, Facts};
use crate::options::Options;

/// Where a run begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Start {
    /// Steps that count as done.
    pub step: usize,
    /// How far the count is ahead of the data.
    pub data_offset: i64,
    /// How far the count is ahead of the schedule.
    pub schedule_offset: i64,
}

/// What a run goes on from.
#[derive(Clone, Copy, Debug)]
pub enum Origin<'a> {
    /// A new run.
    Nothing,
    /// A state of ours.
    State(&'a Facts),
    /// A state of sd-scripts after so many steps.
    Foreign(usize),
}

/// What the run that wants to go on is.
pub struct Here<'a> {
    /// Its data.
    pub data: &'a DataFacts,
    /// Its steps.
    pub run_steps: usize,
    /// The step of its data nearest at or before those of a step of other batches of the same images.
    pub nearest: &'a dyn Fn(&DataFacts, usize) -> usize,
}

/// A count `offset` behind `step`; the parts of a start never are below 0.
fn behind(step: usize, offset: i64) -> usize {
    usize::try_from(step as i64 - offset).unwrap_or(0)
}

impl Start {
    /// Step of the data that the step counted `step` uses, both from 0.
    pub fn data_of(&self, step: usize) -> usize {
        behind(step, self.data_offset)
    }

    /// Step of the schedule that the step counted `step` has, both from 0.
    pub fn schedule_of(&self, step: usize) -> usize {
        behind(step, self.schedule_offset)
    }

    /// Decides from the options and what is resumed. Remarks for the user come with it.
    ///
    /// # Errors
    /// The state has more steps than the run, or lies within an epoch that is another one now.
    pub fn choose(options: &Options, from: Origin, here: &Here) -> Result<(Self, Vec<String>)> {
        let Here { data, run_steps, .. } = *here;
        let mut notes = Vec::new();
        let asked = match (options.initial_step, options.initial_epoch) {
            (Some(step), _) => Some(step),
            (None, Some(epoch)) => Some(epoch.saturating_sub(1) * data.steps_per_epoch),
            (None, None) => None,
        };
        let start = match (&from, asked) {
            (_, None) => match from {
                Origin::Nothing => Self::default(),
                Origin::Foreign(step) => Self { step, ..Self::default() },
                Origin::State(state) => {
                    Self::of_state(state, here, options.allow_batch_change, &mut notes)?
                }
            },
            (_, Some(step)) => {
                let schedule = match from {
                    Origin::Nothing => 0,
                    Origin::Foreign(step) => step as i64,
                    Origin::State(state) => behind(state.step, state.schedule_offset) as i64,
                };
                let name = if options.initial_step.is_some() { "step" } else { "epoch" };
                notes.push(format!(
                    "`initial_{name}`: the count of steps begins at {step}, the data at {}, the \
                     schedule of the learning rate at {schedule}",
                    if options.skip_until_initial_step { "that step" } else { "their beginning" }
                ));
                let data = if options.skip_until_initial_step { 0 } else { step as i64 };
                Self { step, data_offset: data, schedule_offset: step as i64 - schedule }
            }
        };
        let refused =
            if asked.is_some() { start.step >= run_steps } else { start.step > run_steps };
        if refused {
            let origin = match asked {
                Some(_) => "`initial_step` is not below the run's steps",
                None => "the state has more steps than the run",
            };
            bail!(
                "{origin}, {run_steps}: {}\nhint: raise `max_train_steps` or `max_train_epochs`; \
                 they count from the very beginning",
                start.step
            );
        }
        Ok((start, notes))
    }

    /// Goes on exactly where the state was; where a step means other data now, at an epoch's border,
    /// or with `allow_batch_change` at the samples that come next.
    fn of_state(
        state: &Facts,
        here: &Here,
        allow_batch_change: bool,
        notes: &mut Vec<String>,
    ) -> Result<Self> {
        let Facts { step, data_offset, schedule_offset, .. } = *state;
        let data = here.data;
        let before = &state.run.data;
        if before.same_positions(data) {
            return Ok(Self { step, data_offset, schedule_offset });
        }
        let what = if before.images_hash != data.images_hash {
            "the images are others than the state's".to_owned()
        } else {
            format!(
                "a step takes {} images (accumulation x batch of all processes), the state's took: {}",
                data.images_a_step(),
                before.images_a_step()
            )
        };
        let data_step = behind(step, data_offset);
        if allow_batch_change && before.images_hash == data.images_hash {
            let nearest = (here.nearest)(before, data_step);
            let counted = usize::try_from(nearest as i64 + data_offset).unwrap_or(nearest);
            notes.push(format!(
                "{what}; goes on where the data of step {counted} begin (the state's step {step}): \
                 until the epoch ends some images can come twice or not at all"
            ));
            return Ok(Self { step: counted, data_offset, schedule_offset });
        }
        let per_epoch = before.steps_per_epoch.max(1);
        if !data_step.is_multiple_of(per_epoch) || data_offset != 0 || schedule_offset != 0 {
            bail!(
                "{what}\nhint: the state lies within an epoch (step {step}, {per_epoch} an epoch), \
                 so it goes on only with the same images, the same train_batch_size x processes and \
                 the same gradient_accumulation_steps; `allow_batch_change` goes on with another batch \
                 of the same images, states saved at the end of an epoch also go on otherwise, and \
                 `initial_step` with `skip_until_initial_step` says where to go on regardless"
            );
        }
        let epochs = data_step / per_epoch;
        let step = epochs * data.steps_per_epoch;
        notes.push(format!(
            "{what}; goes on after epoch {epochs}, which is step {step} of this run (step {} of the \
             state's)",
            state.step
        ));
        Ok(Self { step, data_offset: 0, schedule_offset: 0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::tests::facts;

    fn options(step: Option<usize>, epoch: Option<usize>, skip: bool) -> Options {
        Options {
            initial_step: step,
            initial_epoch: epoch,
            skip_until_initial_step: skip,
            ..Options::default()
        }
    }

    fn choose_within(
        options: &Options,
        from: Origin,
        data: &DataFacts,
        run_steps: usize,
    ) -> Result<(Start, Vec<String>)> {
        // As if no batch were smaller than the others.
        let nearest = |before: &DataFacts, step: usize| {
            let batch = |data: &DataFacts| data.accumulation * data.global_batches[0];
            step * batch(before) / batch(data)
        };
        Start::choose(options, from, &Here { data, run_steps, nearest: &nearest })
    }

    fn choose(options: &Options, from: Origin, data: &DataFacts) -> Result<Start> {
        Ok(choose_within(options, from, data, 100)?.0)
    }

    #[test]
    fn the_count_the_data_and_the_schedule_begin_where_the_options_say() {
        let data = facts().run.data;
        let plain = options(None, None, false);
        assert_eq!(choose(&plain, Origin::Nothing, &data).unwrap(), Start::default());
        // 5 steps an epoch: the fourth epoch begins after 15.
        for (asked, skip, data_step) in [
            (options(Some(12), Some(9), false), false, 0),
            (options(Some(12), None, true), true, 12),
            (options(None, Some(4), false), false, 0),
            (options(None, Some(4), true), true, 15),
        ] {
            let start = choose(&asked, Origin::Nothing, &data).unwrap();
            assert_eq!(start.step, if asked.initial_step.is_some() { 12 } else { 15 });
            assert_eq!(start.data_of(start.step), data_step, "skip: {skip}");
            assert_eq!(start.schedule_of(start.step), 0);
        }
        let state = facts();
        let start = choose(&options(Some(40), None, false), Origin::State(&state), &data).unwrap();
        assert_eq!((start.step, start.data_of(start.step)), (40, 0));
        assert_eq!(start.schedule_of(start.step), 12, "the state's schedule goes on");
    }

    #[test]
    fn a_state_goes_on_where_it_was_and_other_data_at_a_border() {
        let (plain, mut state) = (options(None, None, false), facts());
        let data = state.run.data.clone();
        let start = choose(&plain, Origin::State(&state), &data).unwrap();
        assert_eq!((start.step, start.data_of(start.step)), (12, 12));

        let twice = DataFacts { global_batches: vec![8], steps_per_epoch: 3, ..data };
        let error = choose(&plain, Origin::State(&state), &twice).unwrap_err().to_string();
        assert!(
            error.starts_with("a step takes 1 x 8 images (")
                && error.contains("took: 1 x 4\nhint: "),
            "{error}"
        );
        state.step = 15;
        let start = choose(&plain, Origin::State(&state), &twice).unwrap();
        assert_eq!((start.step, start.data_of(start.step)), (9, 9));
        let (_, notes) = choose_within(&plain, Origin::State(&state), &twice, 100).unwrap();
        assert!(notes[0].contains("after epoch 3, which is step 9"), "{notes:?}");
    }

    #[test]
    fn another_batch_goes_on_at_the_samples_that_come_next_where_it_is_allowed() {
        let mut state = facts();
        let data = state.run.data.clone();
        let three = DataFacts { global_batches: vec![3], steps_per_epoch: 7, ..data.clone() };
        let plain = options(None, None, false);
        let error = choose(&plain, Origin::State(&state), &three).unwrap_err().to_string();
        assert!(error.contains("`allow_batch_change` goes on with another batch"), "{error}");
        let allowed = Options { allow_batch_change: true, ..plain };
        let same = choose(&allowed, Origin::State(&state), &data).unwrap();
        assert_eq!(same, Start { step: 12, ..Start::default() });
        // 12 steps of 4 images are 16 of 3.
        let (start, notes) = choose_within(&allowed, Origin::State(&state), &three, 100).unwrap();
        assert_eq!((start.step, start.data_of(16), start.schedule_of(16)), (16, 16, 16));
        assert!(notes[0].contains("some images can come twice or not at all"), "{notes:?}");
        // A count that began ahead of the data stays ahead of them.
        (state.step, state.data_offset, state.schedule_offset) = (112, 100, 100);
        let (start, _) = choose_within(&allowed, Origin::State(&state), &three, 200).unwrap();
        assert_eq!((start.step, start.data_of(116), start.schedule_of(116)), (116, 16, 16));
        let other = DataFacts { images_hash: "other".into(), ..three };
        assert!(choose_within(&allowed, Origin::State(&state), &other, 200).is_err());
    }

    #[test]
    fn a_start_beyond_the_end_is_refused() {
        let (plain, state) = (options(None, None, false), facts());
        let data = &state.run.data;
        assert!(choose_within(&plain, Origin::State(&state), data, 12).is_ok(), "all is done");
        let error = choose_within(&plain, Origin::State(&state), data, 11).unwrap_err();
        assert!(error.to_string().contains("more steps than the run, 11: 12"), "{error}");
        let asked = options(Some(12), None, false);
        let error = choose_within(&asked, Origin::Nothing, data, 12).unwrap_err();
        assert!(error.to_string().contains("not below"), "{error}");
        assert!(choose_within(&plain, Origin::Foreign(12), data, 11).is_err());
    }
}
