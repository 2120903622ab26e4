//! Gradients that are the same bits for every number of ranks that is a power of two.
//!
//! Each sample goes through the models alone, and the gradients of a global batch are added in one
//! fixed binary tree over the places of a full batch: halve the places, sum each half, add the two.
//! A rank's samples are contiguous and fill a whole subtree, so it sums those, and the ranks' sums
//! are added in pairs, which are the upper levels of the same tree. Places without a sample (the
//! last batch of a bucket) are left out. Micro-steps are added one after the other, each reduced
//! over the ranks before.
//!
//! The cost: no batching within a rank, and a reduction that hides behind nothing. See
//! `benches/README.md`.

use std::ops::Range;

use anyhow::{Context, Result, bail};
use collectives::{Comm, signals};
use engine::{ParamId, Tensor};

use crate::dataset::Batch;
use crate::gradients::{Control, Gradients};

/// Refuses what has no fixed tree.
pub fn check(world_size: usize) -> Result<()> {
    if world_size.is_power_of_two() {
        return Ok(());
    }
    bail!(
        "`reproducible` needs 1, 2, 4, 8... ranks, this run has: {world_size}\n\
         hint: only then do the ranks' shares halve evenly; change `--num_processes`, or leave \
         `reproducible` out"
    )
}

/// Gets the gradient of each parameter when it is final.
pub type Ready<'a> = dyn FnMut(ParamId, Tensor) -> engine::Result<()> + 'a;

/// Forward and backward of a batch of one; gives its loss.
pub type OneSample<'a> = dyn FnMut(&Batch, &mut Ready) -> Result<f32> + 'a;

/// Adds the gradient of one global batch to `gradients`; gives the control words of all ranks. A
/// collective.
pub fn add_batch(
    batch: &Batch,
    gradients: &mut Gradients,
    comm: &Comm,
    one_sample: &mut OneSample,
) -> Result<Control> {
    let layout = gradients.layout();
    let mut sum = tree_sum(0..batch.full_share, batch.samples.len(), &mut |index| {
        let mut row = layout.row();
        let loss = one_sample(&batch.sample(index), &mut |id, gradient| {
            layout.put(&mut row, id, &gradient.to_vec_f32()?);
            Ok(())
        })?;
        layout.control(&mut row, loss);
        Ok(row)
    })?
    .unwrap_or_else(|| layout.row());
    layout.ask_to_stop(&mut sum, signals::stop_requested());
    comm.all_reduce_in_pairs(&mut sum).context("gradient all-reduce")?;
    gradients.add_row(&sum);
    Ok(layout.read_control(&sum))
}

/// Sums the leaves of `places` that lie below `present` in the fixed tree; `None` if there are none.
fn tree_sum(
    places: Range<usize>,
    present: usize,
    leaf: &mut dyn FnMut(usize) -> Result<Vec<f32>>,
) -> Result<Option<Vec<f32>>> {
    if places.start >= present || places.is_empty() {
        return Ok(None);
    }
    if places.len() == 1 {
        return leaf(places.start).map(Some);
    }
    let middle = places.start + places.len().div_ceil(2);
    let left = tree_sum(places.start..middle, present, leaf)?;
    let right = tree_sum(middle..places.end, present, leaf)?;
    Ok(match (left, right) {
        (Some(mut left), Some(right)) => {
            left.iter_mut().zip(&right).for_each(|(sum, x)| *sum += x);
            Some(left)
        }
        (left, right) => left.or(right),
    })
}

/// How the gradient of a sample or of several is laid out with what travels beside it: all
/// parameters, the control words, one count of gradients per parameter.
pub struct Layout {
    /// Elements of each parameter.
    pub ranges: Vec<Range<usize>>,
    /// Elements of all.
    pub len: usize,
}

const CONTROL_WORDS: usize = 3;

impl Layout {
    fn row(&self) -> Vec<f32> {
        vec![0.; self.len + CONTROL_WORDS + self.ranges.len()]
    }

    fn put(&self, row: &mut [f32], id: ParamId, values: &[f32]) {
        row[self.ranges[id.0].clone()].iter_mut().zip(values).for_each(|(sum, x)| *sum += x);
        row[self.len + CONTROL_WORDS + id.0] = 1.;
    }

    fn control(&self, row: &mut [f32], loss: f32) {
        row[self.len] = loss;
        row[self.len + 1] = f32::from(u8::from(!loss.is_finite()));
    }

    fn ask_to_stop(&self, row: &mut [f32], stop: bool) {
        row[self.len + 2] = f32::from(u8::from(stop));
    }

    fn read_control(&self, row: &[f32]) -> Control {
        Control { loss: row[self.len], non_finite: row[self.len + 1], stop: row[self.len + 2] }
    }

    /// Which parameters have a gradient in the row.
    pub fn touched<'a>(&self, row: &'a [f32]) -> impl Iterator<Item = bool> + use<'a> {
        row[self.len + CONTROL_WORDS..].iter().map(|count| *count > 0.)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(places: Range<usize>, present: usize, values: &[f32]) -> Option<f32> {
        let start = places.start;
        let mut leaf = |place: usize| Ok(vec![values[place]]);
        assert!(start <= values.len());
        tree_sum(places, present, &mut leaf).unwrap().map(|sum| sum[0])
    }

    #[test]
    fn ranks_that_halve_the_places_add_up_to_the_same_bits() {
        let values: Vec<f32> = (0..24).map(|n| 1.37_f32.powi(n) - 3.).collect();
        for (places, present) in [(24, 24), (24, 17), (8, 5), (8, 1), (12, 7)] {
            let whole = sum(0..places, present, &values).unwrap();
            for ranks in [2, 4] {
                let share = places / ranks;
                let parts: Vec<f32> = (0..ranks)
                    .map(|rank| {
                        let own = &values[rank * share..];
                        let present = present.saturating_sub(rank * share).min(share);
                        sum(0..share, present, own).unwrap_or(0.)
                    })
                    .collect();
                let pairs: Vec<f32> = parts.chunks(2).map(|pair| pair.iter().sum()).collect();
                let total: f32 = if ranks == 2 { pairs[0] } else { pairs[0] + pairs[1] };
                assert_eq!(total.to_bits(), whole.to_bits(), "{present} of {places}, {ranks}");
            }
        }
        assert_eq!(sum(0..4, 0, &values), None);
    }

    #[test]
    fn ranks_that_do_not_halve_are_refused() {
        for world_size in [1, 2, 4, 8] {
            check(world_size).unwrap();
        }
        let error = check(3).unwrap_err().to_string();
        assert!(error.contains("1, 2, 4, 8... ranks, this run has: 3\nhint: "), "{error}");
    }
}
