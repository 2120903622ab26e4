//! UniPC of order 2 that predicts the picture, with B(h) = e^h - 1 (Zhao et al., arXiv:2302.04867):
//! each evaluation first corrects the step that led to it, then makes the next.

use super::evaluation::Evaluation;
use super::level::{Level, blend};

/// A point that was evaluated.
#[derive(Clone, Debug)]
struct Point {
    level: Level,
    picture: Vec<f32>,
}

/// The step that led to where the latents are now.
#[derive(Clone, Debug)]
struct Made {
    /// Latents it started from, corrected.
    latents: Vec<f32>,
    is_second: bool,
}

#[derive(Clone, Debug, Default)]
pub(super) struct UniPc {
    newest: Option<Point>,
    before: Option<Point>,
    made: Option<Made>,
}

impl UniPc {
    pub(super) fn step(&mut self, at: &Evaluation<'_>, is_last: bool) -> Vec<f32> {
        let picture = at.picture();
        let latents = match (&self.made, &self.newest) {
            (Some(made), Some(newest)) => self.corrected(made, newest, at.here, &picture),
            _ => at.latents.to_vec(),
        };
        self.before = self.newest.replace(Point { level: at.here, picture });
        let is_second = self.before.is_some() && !is_last;
        let moved = self.predicted(at, &latents, is_second);
        self.made = Some(Made { latents, is_second });
        moved
    }

    /// UniP: half of the difference to the picture before is taken on.
    fn predicted(&self, at: &Evaluation<'_>, latents: &[f32], is_second: bool) -> Vec<f32> {
        let Some(newest) = &self.newest else { return latents.to_vec() };
        let (of_latents, of_picture) = factors(at.here, at.next);
        match &self.before {
            Some(before) if is_second => {
                let h = at.next.lambda() - at.here.lambda();
                let ratio = (before.level.lambda() - at.here.lambda()) / h;
                let share = 0.5 / ratio;
                blend(&[
                    (of_latents, latents),
                    (of_picture * (1. - share), &newest.picture),
                    (of_picture * share, &before.picture),
                ])
            }
            _ => blend(&[(of_latents, latents), (of_picture, &newest.picture)]),
        }
    }

    /// UniC: the step once more, with the picture that was found at its end.
    fn corrected(&self, made: &Made, start: &Point, end: Level, picture: &[f32]) -> Vec<f32> {
        let (of_latents, of_picture) = factors(start.level, end);
        let latents = (of_latents, made.latents.as_slice());
        match &self.before {
            Some(before) if made.is_second => {
                let h = end.lambda() - start.level.lambda();
                let ratio = (before.level.lambda() - start.level.lambda()) / h;
                let (of_before, of_end) = second_order(h, ratio);
                let share = of_before / ratio;
                blend(&[
                    latents,
                    (of_picture * (1. - share - of_end), &start.picture),
                    (of_picture * share, &before.picture),
                    (of_picture * of_end, picture),
                ])
            }
            _ => blend(&[latents, (of_picture * 0.5, &start.picture), (of_picture * 0.5, picture)]),
        }
    }
}

/// Factors of latents and picture in a step with a constant picture.
fn factors(from: Level, to: Level) -> (f64, f64) {
    let h = to.lambda() - from.lambda();
    (to.noise / from.noise, -to.signal * (-h).exp_m1())
}

/// The corrector's weights of the differences to the point before and to the end of the step: they
/// match the first two moments of the exact solution.
fn second_order(h: f64, ratio: f64) -> (f64, f64) {
    let x = -h;
    let scale = x.exp_m1();
    let first = scale / x - 1.;
    let second = first / x - 0.5;
    let (first, second) = (first / scale, 2. * second / scale);
    let of_before = (first - second) / (1. - ratio);
    (of_before, first - of_before)
}
