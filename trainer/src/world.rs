//! How many ranks there are, how many the run is made for, and what a rank computes of a batch.
//!
//! The global batch belongs to the run, not to this start: it is `train_batch_size` for each of the
//! *full* number of ranks. That number is the one of the state which the run goes on from, else what
//! the launcher says (ranks when no node is missing), else the ranks that are there. However many are
//! there, they share each global batch evenly (within a sample where a job has lost nodes), and a rank
//! computes its share in micro-steps of at most `train_batch_size` samples: fewer ranks take more
//! micro-steps, not more memory.

use anyhow::{Result, bail};
use collectives::Env;

use crate::options::Options;
use crate::state::Facts;

/// Most numbers of ranks that a hint names.
const NAMED: usize = 8;

/// Ranks of this start, and ranks that the run is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct World {
    /// Ranks that are there.
    pub ranks: usize,
    /// Ranks whose batches make a global batch.
    pub full: usize,
}

impl World {
    /// All ranks are there.
    pub fn whole(ranks: usize) -> Self {
        Self { ranks, full: ranks }
    }

    /// The world of a run whose datasets have these batch sizes, and which goes on from `state`.
    ///
    /// # Errors
    /// A batch of the run cannot be shared evenly among the ranks.
    pub fn choose(
        options: &Options,
        batch_sizes: &[usize],
        state: Option<&Facts>,
        env: &Env,
    ) -> Result<Self> {
        let ranks = env.world_size;
        if options.allow_batch_change {
            return Ok(Self::whole(ranks));
        }
        let launched = env.full_world_size.unwrap_or(ranks);
        // Where the config's batch is not the state's, the same global batch can still be meant: half
        // the batch on twice the ranks.
        let is_of_state = |full: &usize| {
            let global = batch_sizes.iter().map(|size| size * full);
            state.is_some_and(|state| global.eq(state.run.data.global_batches.iter().copied()))
        };
        let recorded = state.map_or(launched, |state| state.ranks);
        let full = [recorded, launched, ranks].into_iter().find(is_of_state).unwrap_or(launched);
        let world = Self { ranks, full };
        // A job that has lost a node goes on with what is left, even if shares differ by a sample: it
        // is the same batch. `reproducible` cannot, its sum needs shares that are subtrees.
        let lacks_nodes = ranks < launched && full == launched;
        if !lacks_nodes || options.reproducible {
            for size in batch_sizes {
                world.check(*size, options.reproducible)?;
            }
        }
        Ok(world)
    }

    /// Samples of all ranks in one batch.
    pub fn global_batch(self, batch_size: usize) -> usize {
        batch_size.max(1) * self.full
    }

    /// Samples of one rank in a full batch.
    pub fn share(self, batch_size: usize) -> usize {
        self.global_batch(batch_size).div_ceil(self.ranks)
    }

    /// Micro-steps in which a rank computes its share of one batch; the same number on all ranks.
    pub fn micro_steps(self) -> usize {
        self.full.div_ceil(self.ranks)
    }

    /// Samples that a rank computes at once, at most.
    pub fn at_once(self, batch_size: usize) -> usize {
        batch_size.max(1).min(self.share(batch_size))
    }

    /// Sizes of the micro-steps of a full share, each once.
    pub fn micro_batches(self, batch_size: usize) -> Vec<usize> {
        let at_once = self.at_once(batch_size);
        let rest = self.share(batch_size) % at_once;
        [at_once, rest].into_iter().filter(|size| *size > 0).collect()
    }

    /// Refuses a number of ranks by which a batch cannot be shared evenly. Ranks can be a multiple of
    /// the samples: some have none then.
    fn check(self, batch_size: usize, reproducible: bool) -> Result<()> {
        let global = self.global_batch(batch_size);
        let fits = |ranks: usize| global.is_multiple_of(ranks) || ranks.is_multiple_of(global);
        if fits(self.ranks) {
            return Ok(());
        }
        let has_tree = |ranks: &usize| !reproducible || ranks.is_power_of_two();
        let mut fitting: Vec<usize> =
            (1..=global).filter(|ranks| fits(*ranks)).filter(has_tree).collect();
        fitting.sort_by_key(|ranks| ranks.abs_diff(self.ranks));
        fitting.truncate(NAMED);
        fitting.sort_unstable();
        bail!(
            "a batch of this run has {global} images ({batch_size} x {} ranks), which so many ranks \
             cannot share evenly: {}\nhint: give it {} ranks; or `--allow_batch_change`, with which a \
             batch has {} images from here on",
            self.full,
            self.ranks,
            listed(&fitting),
            batch_size * self.ranks
        );
    }

    /// The batch of the run in words.
    pub fn describe(self, batch_size: usize, accumulation: usize) -> String {
        let images = self.global_batch(batch_size) * accumulation;
        let accumulated = match accumulation {
            1 => String::new(),
            count => format!(", {count} accumulated"),
        };
        let Self { ranks, full } = self;
        let plural = if ranks == 1 { "" } else { "s" };
        let shared = match ranks.cmp(&full) {
            std::cmp::Ordering::Equal => {
                format!("{batch_size} a rank, {ranks} rank{plural}, {accumulation} accumulated")
            }
            std::cmp::Ordering::Less => format!(
                "{batch_size} a rank, {ranks} of {full} ranks, in {} micro-steps{accumulated}",
                self.micro_steps()
            ),
            std::cmp::Ordering::Greater => {
                let without = ranks.saturating_sub(self.global_batch(batch_size));
                let idle = match without {
                    0 => String::new(),
                    count => format!(" ({count} have none)"),
                };
                format!(
                    "{} of {batch_size} a rank, {ranks} ranks in place of {full}{idle}{accumulated}",
                    self.share(batch_size)
                )
            }
        };
        format!("{shared}: {images} images a step")
    }
}

/// `1, 2 or 4`.
fn listed(numbers: &[usize]) -> String {
    let words: Vec<String> = numbers.iter().map(usize::to_string).collect();
    match words.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{} or {last}", rest.join(", ")),
        _ => words.concat(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::test_facts;

    fn env(ranks: usize, full: Option<usize>) -> Env {
        Env { world_size: ranks, full_world_size: full, ..Env::single() }
    }

    fn choose(batch: usize, state: Option<usize>, env: &Env) -> Result<World> {
        let state = state.map(|ranks| {
            let mut facts = test_facts();
            facts.ranks = ranks;
            // 8 images in a batch of all ranks.
            facts.run.data.global_batches = vec![8];
            facts
        });
        World::choose(&Options::default(), &[batch], state.as_ref(), env)
    }

    #[test]
    fn the_full_number_of_ranks_is_the_states_else_the_launchers_else_what_is_there() {
        let full = |batch, state, env: &Env| choose(batch, state, env).unwrap().full;
        assert_eq!(full(2, None, &env(3, None)), 3);
        assert_eq!(full(2, None, &env(2, Some(4))), 4);
        assert_eq!(full(2, Some(4), &env(2, Some(2))), 4);
        assert_eq!(full(2, Some(4), &env(8, None)), 4);
        // Another batch in the config: the same images on other ranks.
        assert_eq!(full(1, Some(4), &env(8, None)), 8);
        assert_eq!(full(1, Some(4), &env(4, Some(8))), 8);
        // Other images: what the config says, which is then judged by the position.
        assert_eq!(full(3, Some(4), &env(2, None)), 2);
        let options = Options { allow_batch_change: true, ..Options::default() };
        let state = test_facts();
        let world = World::choose(&options, &[2], Some(&state), &env(3, Some(4))).unwrap();
        assert_eq!(world, World::whole(3));
    }

    #[test]
    fn ranks_that_cannot_share_a_batch_are_told_what_would_work() {
        assert!(choose(4, None, &env(3, None)).is_ok(), "a new run takes what it gets");
        for env in [env(3, None), env(3, Some(2))] {
            let error = choose(4, Some(2), &env).unwrap_err().to_string();
            assert!(error.starts_with("a batch of this run has 8 images (4 x 2 ranks)"), "{error}");
            assert!(
                error.contains("cannot share evenly: 3\nhint: give it 1, 2, 4 or 8 ranks; or ")
            );
            assert!(error.contains("a batch has 12 images"), "{error}");
        }
        assert!(choose(4, None, &env(3, Some(2))).is_err(), "nor on other ranks than launched");
        let left = choose(1, None, &env(2, Some(3))).unwrap();
        assert_eq!((left.share(1), left.micro_steps()), (2, 2), "a lost node is borne");
        let options = Options { reproducible: true, ..Options::default() };
        assert!(World::choose(&options, &[1], None, &env(2, Some(3))).is_err());
        let error = World::choose(&options, &[3], None, &env(5, Some(4))).unwrap_err().to_string();
        assert!(error.contains("give it 1, 2 or 4 ranks"), "{error}");
    }

    #[test]
    fn fewer_ranks_take_more_micro_steps_and_more_ranks_smaller_shares() {
        let world = |ranks, full| World { ranks, full };
        for (world, share, micro_steps, at_once) in [
            (world(4, 4), 2, 1, 2),
            (world(2, 4), 4, 2, 2),
            (world(1, 4), 8, 4, 2),
            (world(8, 4), 1, 1, 1),
            (world(16, 4), 1, 1, 1),
        ] {
            assert_eq!(world.share(2), share);
            assert_eq!(world.micro_steps(), micro_steps);
            assert_eq!(world.at_once(2), at_once);
        }
        // Shares that are no multiple of the batch size.
        assert_eq!((world(3, 4).share(3), world(3, 4).micro_steps()), (4, 2));
        assert_eq!(world(3, 4).micro_batches(3), [3, 1]);
        assert_eq!(world(2, 4).micro_batches(3), [3]);
        assert_eq!(world(8, 4).micro_batches(2), [1]);
        assert_eq!(world(1, 1).describe(2, 1), "2 a rank, 1 rank, 1 accumulated: 2 images a step");
        assert_eq!(
            world(2, 4).describe(2, 1),
            "2 a rank, 2 of 4 ranks, in 2 micro-steps: 8 images a step"
        );
        assert_eq!(
            world(8, 4).describe(2, 3),
            "1 of 2 a rank, 8 ranks in place of 4, 3 accumulated: 24 images a step"
        );
        assert_eq!(
            world(4, 2).describe(1, 1),
            "1 of 1 a rank, 4 ranks in place of 2 (2 have none): 2 images a step"
        );
    }
}
