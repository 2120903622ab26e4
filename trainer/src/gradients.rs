//! The gradients of one optimizer step: added up over micro-steps, reduced over the ranks.
//!
//! The flat gradient is cut into buckets. In the last micro-step a bucket is sent off as soon as its
//! last parameter is final, while the backward pass goes on. Buckets leave in one fixed order (the
//! last of the flat tensor first, as the backward pass reaches them), so that every rank makes the
//! same calls whatever it has computed. The last bucket to leave carries the control words: loss,
//! non-finite and stop flags, and which parameters were reached at all. All ranks therefore stop,
//! save or fail at the same step.

use anyhow::{Context, Result};
use collectives::{Comm, Pending};
use engine::{ParamId, ParamStore, Tensor};

use crate::reproducible::Layout;

/// Elements of a bucket: 1 Mi f32 are 4 MiB, large enough to run at memory speed and small enough
/// to leave most of a backward pass to hide behind.
const BUCKET_ELEMENTS: usize = 1 << 20;

/// What the ranks tell each other along with the gradients; sums over ranks after the reduction.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Control {
    /// Weighted loss of this rank's samples.
    pub loss: f32,
    /// 1 when this rank's loss or gradient is not finite.
    pub non_finite: f32,
    /// 1 when this rank was asked to stop.
    pub stop: f32,
}

impl std::ops::Add for Control {
    type Output = Control;

    fn add(self, other: Control) -> Control {
        Control {
            loss: self.loss + other.loss,
            non_finite: self.non_finite + other.non_finite,
            stop: self.stop + other.stop,
        }
    }
}

const CONTROL_WORDS: usize = 3;

struct Bucket {
    range: std::ops::Range<usize>,
    params: usize,
    waiting: usize,
}

/// Flat gradient of all parameters and the buckets it travels in.
pub struct Gradients {
    flat: Vec<f32>,
    /// Whether any micro-step of this step reached the parameter.
    touched: Vec<bool>,
    /// The first parameter whose gradient was not finite on this rank, in the order of arrival.
    non_finite: Option<ParamId>,
    bucket_of: Vec<usize>,
    /// Ascending over the flat tensor; they leave in descending order.
    buckets: Vec<Bucket>,
    ranges: Vec<std::ops::Range<usize>>,
}

/// The buckets over a flat tensor of parameters with these ranges, ascending.
pub fn bucket_ranges(ranges: &[std::ops::Range<usize>]) -> Vec<std::ops::Range<usize>> {
    let mut buckets: Vec<std::ops::Range<usize>> = Vec::new();
    for range in ranges {
        match buckets.last_mut() {
            Some(bucket) if bucket.len() < BUCKET_ELEMENTS => bucket.end = range.end,
            _ => buckets.push(range.clone()),
        }
    }
    buckets
}

/// The reduction of one step in flight.
pub struct Reduction<'g> {
    gradients: &'g mut Gradients,
    comm: &'g Comm,
    /// Number of buckets not sent yet: `buckets[..unsent]`.
    unsent: usize,
    in_flight: Vec<(usize, Pending)>,
}

impl Gradients {
    /// Buckets for the parameters of `params`.
    pub fn new(params: &ParamStore) -> Self {
        let ranges: Vec<_> = (0..params.count()).map(|i| params.range(ParamId(i))).collect();
        let mut buckets: Vec<Bucket> = bucket_ranges(&ranges)
            .into_iter()
            .map(|range| Bucket { range, params: 0, waiting: 0 })
            .collect();
        let mut bucket_of = Vec::with_capacity(ranges.len());
        for range in &ranges {
            let bucket = buckets.partition_point(|bucket| bucket.range.end < range.end);
            buckets[bucket].params += 1;
            bucket_of.push(bucket);
        }
        let touched = vec![false; ranges.len()];
        Self { flat: vec![0.; params.len()], touched, non_finite: None, bucket_of, buckets, ranges }
    }

    /// Forgets the last step.
    pub fn clear(&mut self) {
        self.flat.fill(0.);
        self.touched.fill(false);
        self.non_finite = None;
    }

    /// Adds the gradient of one parameter.
    pub fn add(&mut self, id: ParamId, gradient: &Tensor) -> engine::Result<()> {
        self.touched[id.0] = true;
        let values = gradient.to_vec_f32()?;
        if self.non_finite.is_none() && values.iter().any(|x| !x.is_finite()) {
            self.non_finite = Some(id);
        }
        for (sum, x) in self.flat[self.ranges[id.0].clone()].iter_mut().zip(&values) {
            *sum += x;
        }
        Ok(())
    }

    /// How a row of a sum in a fixed tree is laid out.
    pub fn layout(&self) -> Layout {
        Layout { ranges: self.ranges.clone(), len: self.flat.len() }
    }

    /// Adds a row of this layout.
    pub fn add_row(&mut self, row: &[f32]) {
        self.flat.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
        let touched = self.layout().touched(row);
        self.touched.iter_mut().zip(touched).for_each(|(flag, touched)| *flag |= touched);
    }

    /// Starts the micro-step whose gradients complete the step.
    pub fn start_reduction<'g>(&'g mut self, comm: &'g Comm) -> Reduction<'g> {
        for bucket in &mut self.buckets {
            bucket.waiting = bucket.params;
        }
        let unsent = self.buckets.len();
        Reduction { gradients: self, comm, unsent, in_flight: Vec::new() }
    }

    /// The flat gradient.
    pub fn flat(&self) -> &[f32] {
        &self.flat
    }

    /// Which parameters have a gradient in this step, on any rank.
    pub fn touched(&self) -> &[bool] {
        &self.touched
    }

    /// The first parameter, as the backward pass reached them, whose gradient is not finite on this
    /// rank.
    pub fn first_non_finite(&self) -> Option<ParamId> {
        self.non_finite
    }

    /// The first parameter whose gradient, summed over the ranks, is not finite.
    pub fn first_non_finite_sum(&self) -> Option<ParamId> {
        let bad = |range: &std::ops::Range<usize>| {
            self.flat[range.clone()].iter().any(|x| !x.is_finite())
        };
        self.ranges.iter().position(bad).map(ParamId)
    }

    /// Euclidean norm over all parameters, summed in f64.
    pub fn norm(&self) -> f64 {
        self.flat.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>().sqrt()
    }

    /// Scales the gradient down to the norm `max` (0: never), as `clip_grad_norm_` does; gives the
    /// norm before.
    pub fn clip(&mut self, max: f64) -> f64 {
        let norm = self.norm();
        let factor = max / (norm + 1e-6);
        if max > 0. && factor < 1. {
            let factor = factor as f32;
            self.flat.iter_mut().for_each(|x| *x *= factor);
        }
        norm
    }
}

impl Reduction<'_> {
    /// Adds a parameter's last gradient of this step and sends what is complete.
    pub fn add(&mut self, id: ParamId, gradient: &Tensor) -> Result<()> {
        self.gradients.add(id, gradient)?;
        let bucket = &mut self.gradients.buckets[self.gradients.bucket_of[id.0]];
        bucket.waiting = bucket.waiting.saturating_sub(1);
        // Bucket 0 stays: it leaves with the control words when the backward pass is over.
        while self.unsent > 1 && self.gradients.buckets[self.unsent - 1].waiting == 0 {
            self.send(Vec::new())?;
        }
        Ok(())
    }

    fn send(&mut self, tail: Vec<f32>) -> Result<()> {
        self.unsent -= 1;
        let mut data =
            self.gradients.flat[self.gradients.buckets[self.unsent].range.clone()].to_vec();
        data.extend(tail);
        let pending = self.comm.all_reduce_start(data);
        self.in_flight.push((self.unsent, pending));
        Ok(())
    }

    /// Sends the rest, waits for all buckets and gives the control words summed over the ranks.
    pub fn finish(mut self, control: Control) -> Result<Control> {
        if self.comm.world_size() == 1 || self.gradients.buckets.is_empty() {
            return Ok(control);
        }
        while self.unsent > 1 {
            self.send(Vec::new())?;
        }
        let mut tail = vec![control.loss, control.non_finite, control.stop];
        tail.extend(self.gradients.touched.iter().map(|t| f32::from(u8::from(*t))));
        self.send(tail)?;
        let mut summed = control;
        for (index, pending) in self.in_flight {
            let data = pending.wait().context("gradient all-reduce")?;
            let range = self.gradients.buckets[index].range.clone();
            let (gradient, tail) = data.split_at(range.len());
            self.gradients.flat[range].copy_from_slice(gradient);
            if let [loss, non_finite, stop, touched @ ..] = tail {
                summed = Control { loss: *loss, non_finite: *non_finite, stop: *stop };
                debug_assert_eq!(tail.len(), CONTROL_WORDS + self.gradients.touched.len());
                for (flag, sum) in self.gradients.touched.iter_mut().zip(touched) {
                    *flag = *sum > 0.;
                }
            }
        }
        Ok(summed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine::{DType, Device};

    fn store() -> ParamStore {
        let tensor = |n: usize| (vec![n], vec![0.; n]);
        ParamStore::new(Device::Cpu, &[tensor(3), tensor(BUCKET_ELEMENTS), tensor(2)]).unwrap()
    }

    fn gradient(values: &[f32]) -> Tensor {
        Tensor::from_f32(Device::Cpu, &[values.len()], values, DType::F32).unwrap()
    }

    #[test]
    fn buckets_cover_the_flat_gradient_once() {
        let gradients = Gradients::new(&store());
        let ends: Vec<_> = gradients.buckets.iter().map(|b| b.range.clone()).collect();
        assert_eq!(ends, [0..BUCKET_ELEMENTS + 3, BUCKET_ELEMENTS + 3..BUCKET_ELEMENTS + 5]);
    }

    #[test]
    fn micro_steps_add_up_and_the_norm_is_clipped() {
        let mut gradients = Gradients::new(&store());
        gradients.add(ParamId(0), &gradient(&[1., 0., 0.])).unwrap();
        gradients.add(ParamId(0), &gradient(&[2., 0., 0.])).unwrap();
        gradients.add(ParamId(2), &gradient(&[0., 4.])).unwrap();
        assert_eq!(gradients.touched(), [true, false, true]);
        assert_eq!(gradients.clip(1.), 5.);
        assert!((gradients.norm() - 1.).abs() < 1e-5);
        gradients.clear();
        assert_eq!(gradients.norm(), 0.);
    }

    #[test]
    fn the_first_bad_tensor_is_named() {
        let mut gradients = Gradients::new(&store());
        gradients.add(ParamId(2), &gradient(&[f32::MAX, 1.])).unwrap();
        assert_eq!((gradients.first_non_finite(), gradients.first_non_finite_sum()), (None, None));
        gradients.add(ParamId(2), &gradient(&[f32::MAX, 1.])).unwrap();
        // Each part is finite, their sum is not.
        assert_eq!(gradients.first_non_finite(), None);
        assert_eq!(gradients.first_non_finite_sum(), Some(ParamId(2)));
        gradients.add(ParamId(0), &gradient(&[0., f32::NAN, 0.])).unwrap();
        gradients.add(ParamId(2), &gradient(&[f32::NAN, 0.])).unwrap();
        assert_eq!(gradients.first_non_finite(), Some(ParamId(0)));
        assert!(!gradients.clip(1.).is_finite());
        gradients.clear();
        assert_eq!((gradients.first_non_finite(), gradients.first_non_finite_sum()), (None, None));
    }

    #[test]
    fn one_rank_keeps_its_own_control_words() {
        let comm = Comm::single();
        let mut gradients = Gradients::new(&store());
        let mut reduction = gradients.start_reduction(&comm);
        reduction.add(ParamId(2), &gradient(&[3., 4.])).unwrap();
        let control = Control { loss: 0.5, non_finite: 0., stop: 1. };
        assert_eq!(reduction.finish(control).unwrap(), control);
        assert_eq!(gradients.norm(), 5.);
    }
}
