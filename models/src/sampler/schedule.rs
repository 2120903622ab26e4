//! Which timesteps a run visits, and how much noise there is at each.
//!
//! Values equal those of diffusers' schedulers as sd-scripts sets them up: betas `scaled_linear`
//! 0.00085 to 0.012, `steps_offset` 1. Noise levels are rounded to f32 where diffusers does.
//! One difference: a single step of a sampler with `linspace` starts at the last timestep, where
//! diffusers would start at timestep 0.

use super::kind::SamplerKind;
use super::level::Level;
use super::options::{SamplerOptions, Spacing};
use crate::schedule::{NoiseSchedule, ScheduleSettings};

/// Timesteps of training.
const TRAINED: usize = 1000;
/// `steps_offset` of sd-scripts' configuration; only leading spacing has it.
const OFFSET: usize = 1;
/// `ᾱ` of pure noise for samplers that divide by it: the smallest number of half precision.
const ALMOST_NOTHING: f32 = 1. / 16_777_216.;

/// The evaluations of the U-Net in a run, in order.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    /// Timestep of each evaluation. Some samplers have fractions.
    pub timesteps: Vec<f32>,
    /// Level of the latents before each evaluation, and after the last.
    pub levels: Vec<Level>,
    /// Steps that are made: evaluations less those within a step.
    pub steps: usize,
}

/// How a group of samplers looks at the noise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Group {
    /// `ᾱ` at whole timesteps: DDIM, DDPM, PNDM.
    Bars,
    /// σ between whole timesteps, latents that keep the picture: Euler and its kin.
    Sigmas,
    /// σ at whole timesteps, latents that keep the variance: DPM-Solver, UniPC.
    Ratios,
}

fn group(kind: SamplerKind) -> Group {
    match kind {
        SamplerKind::Ddim | SamplerKind::Ddpm | SamplerKind::Pndm => Group::Bars,
        SamplerKind::Lms
        | SamplerKind::Euler
        | SamplerKind::EulerAncestral
        | SamplerKind::Heun
        | SamplerKind::Dpm2
        | SamplerKind::Dpm2Ancestral => Group::Sigmas,
        SamplerKind::DpmSolver
        | SamplerKind::DpmSolverPlus
        | SamplerKind::DpmSolverPlusSde
        | SamplerKind::DpmSingle
        | SamplerKind::DpmSingleSde
        | SamplerKind::UniPc => Group::Ratios,
    }
}

/// The spacing that diffusers gives a sampler.
fn usual_spacing(group: Group) -> Spacing {
    match group {
        Group::Bars => Spacing::Leading,
        Group::Sigmas | Group::Ratios => Spacing::Linspace,
    }
}

/// The noise of training, by timestep.
#[derive(Clone, Debug)]
pub(super) struct Table {
    bars: Vec<f32>,
    sigmas: Vec<f32>,
    log_sigmas: Vec<f32>,
}

impl Table {
    fn new(zero_terminal_snr: bool, group: Group) -> Self {
        let settings = ScheduleSettings { zero_terminal_snr, ..ScheduleSettings::default() };
        let mut bars = NoiseSchedule::new(settings).alphas_cumprod;
        if let (true, Some(last)) = (zero_terminal_snr && group != Group::Bars, bars.last_mut()) {
            *last = ALMOST_NOTHING;
        }
        let sigmas: Vec<f32> = bars.iter().map(|bar| ((1. - bar) / bar).sqrt()).collect();
        let log_sigmas = sigmas.iter().map(|sigma| sigma.ln()).collect();
        Self { bars, sigmas, log_sigmas }
    }

    /// Level at a whole timestep; `below` where there is none any more.
    pub(super) fn level(&self, timestep: i64, below: Level) -> Level {
        match usize::try_from(timestep) {
            Ok(timestep) => Level::of_bar(self.bars[timestep.min(TRAINED - 1)]),
            Err(_) => below,
        }
    }

    /// σ at a timestep, linear between whole ones.
    fn sigma(&self, timestep: f64) -> f64 {
        let left = (timestep.max(0.) as usize).min(TRAINED - 2);
        let (low, high) = (f64::from(self.sigmas[left]), f64::from(self.sigmas[left + 1]));
        low + (high - low) * (timestep - left as f64).clamp(0., 1.)
    }

    /// The timestep of a σ, linear in its logarithm.
    pub(super) fn timestep(&self, sigma: f64) -> f64 {
        let log = sigma.max(1e-10).ln();
        let above = self.log_sigmas.partition_point(|known| f64::from(*known) <= log);
        let left = above.saturating_sub(1).min(TRAINED - 2);
        let (low, high) = (f64::from(self.log_sigmas[left]), f64::from(self.log_sigmas[left + 1]));
        left as f64 + ((log - low) / (high - low)).clamp(0., 1.)
    }

    fn extreme_sigmas(&self) -> (f64, f64) {
        (self.sigma((TRAINED - 1) as f64), self.sigma(0.))
    }
}

/// One point per step, before a sampler adds evaluations within steps.
#[derive(Clone, Debug)]
pub(super) struct Grid {
    pub(super) table: Table,
    /// Steps of the whole schedule, from pure noise.
    pub(super) of_steps: usize,
    /// Steps at its beginning that are left out.
    pub(super) skipped: usize,
    /// Timestep at the start of each step.
    pub(super) timesteps: Vec<f64>,
    /// Level at the start of each step, and at the end.
    pub(super) levels: Vec<Level>,
    /// Factor of unit noise at the start of the whole schedule.
    pub(super) initial_noise_scale: f64,
}

impl Grid {
    /// The steps that `options` ask for, without the first `skipped`.
    pub(super) fn new(kind: SamplerKind, options: &SamplerOptions, skipped: usize) -> Self {
        let group = group(kind);
        let table = Table::new(options.zero_terminal_snr, group);
        let spacing = options.spacing.unwrap_or_else(|| usual_spacing(group));
        let mut timesteps = timesteps(group, spacing, options.steps);
        let mut levels: Vec<Level> = match group {
            Group::Bars => {
                timesteps.iter().map(|t| table.level(*t as i64, Level::of_bar(1.))).collect()
            }
            Group::Sigmas | Group::Ratios => {
                let sigmas = sigmas(&table, group, options.karras, &mut timesteps);
                if options.karras && rounds_karras(kind) {
                    timesteps.iter_mut().for_each(|t| *t = t.round_ties_even());
                }
                let level = if group == Group::Sigmas { Level::of_sigma } else { Level::of_ratio };
                sigmas.into_iter().map(|sigma| level(f64::from(sigma as f32))).collect()
            }
        };
        let initial_noise_scale = match (levels.first(), spacing) {
            // These reach the last timestep, where the share of the picture is neglected.
            (Some(first), Spacing::Linspace | Spacing::Trailing) if group == Group::Sigmas => {
                first.noise
            }
            (Some(first), _) => 1. / first.input_scale(),
            (None, _) => 1.,
        };
        levels.push(end(kind, &table));
        timesteps.drain(..skipped);
        levels.drain(..skipped);
        Self { table, of_steps: options.steps, skipped, timesteps, levels, initial_noise_scale }
    }

    /// Distance of timesteps in DDIM and PNDM, whatever the spacing.
    pub(super) fn distance(&self) -> i64 {
        (TRAINED / self.of_steps) as i64
    }

    /// One evaluation per step.
    pub(super) fn schedule(&self) -> Schedule {
        Schedule {
            timesteps: self.timesteps.iter().map(|t| *t as f32).collect(),
            levels: self.levels.clone(),
            steps: self.timesteps.len(),
        }
    }
}

/// The level that a run ends at.
fn end(kind: SamplerKind, table: &Table) -> Level {
    match kind {
        // `set_alpha_to_one` is off.
        SamplerKind::Pndm => Level::of_bar(table.bars[0]),
        // Steps in λ cannot reach σ = 0.
        SamplerKind::DpmSolver => Level::of_ratio(f64::from(table.sigmas[0])),
        _ => match group(kind) {
            Group::Bars | Group::Ratios => Level { signal: 1., noise: 0. },
            Group::Sigmas => Level::of_sigma(0.),
        },
    }
}

/// Whether timesteps of Karras spacing are whole.
fn rounds_karras(kind: SamplerKind) -> bool {
    group(kind) == Group::Ratios || matches!(kind, SamplerKind::Dpm2 | SamplerKind::Dpm2Ancestral)
}

/// Timesteps at the start of each step, falling.
fn timesteps(group: Group, spacing: Spacing, steps: usize) -> Vec<f64> {
    // DPM-Solver counts the end of the last step as a point.
    let points = if group == Group::Ratios { steps + 1 } else { steps };
    let from_the_top = (0..steps).map(|i| points - 1 - i);
    match spacing {
        Spacing::Linspace => {
            let last = (TRAINED - 1) as f64;
            let width = last / (points - 1).max(1) as f64;
            let whole = |t: f64| if group == Group::Sigmas { t } else { t.round_ties_even() };
            // The first is exact, however its product would be rounded.
            let point = |i| if i + 1 == points { last } else { whole(i as f64 * width) };
            from_the_top.map(point).map(|t| f64::from(t as f32)).collect()
        }
        Spacing::Leading => {
            let width = TRAINED / points;
            from_the_top.map(|i| (i * width + OFFSET) as f64).collect()
        }
        Spacing::Trailing => {
            let width = TRAINED as f64 / steps as f64;
            (0..steps).map(|i| (TRAINED as f64 - i as f64 * width).round_ties_even() - 1.).collect()
        }
    }
}

/// σ of each step. With `karras` the timesteps follow from σ.
fn sigmas(table: &Table, group: Group, karras: bool, timesteps: &mut [f64]) -> Vec<f64> {
    let plain: Vec<f64> = timesteps.iter().map(|t| table.sigma(*t)).collect();
    if !karras {
        return plain;
    }
    let (highest, lowest) = match (group, plain.as_slice()) {
        (Group::Sigmas, [one]) => (*one, *one),
        (Group::Sigmas, [first, .., last]) => (*first, *last),
        _ => table.extreme_sigmas(),
    };
    let sigmas = karras_sigmas(highest, lowest, timesteps.len());
    for (timestep, sigma) in timesteps.iter_mut().zip(&sigmas) {
        *timestep = table.timestep(*sigma);
    }
    sigmas
}

/// Equal distances in `σ^(1/7)` (Karras et al., arXiv:2206.00364, equation 5).
fn karras_sigmas(highest: f64, lowest: f64, steps: usize) -> Vec<f64> {
    const RHO: f64 = 7.;
    let (from, to) = (highest.powf(1. / RHO), lowest.powf(1. / RHO));
    let width = 1. / (steps - 1).max(1) as f64;
    (0..steps).map(|i| (from + i as f64 * width * (to - from)).powf(RHO)).collect()
}

#[cfg(test)]
mod tests {
    use super::super::options::MOST_STEPS;
    use super::*;

    #[test]
    fn a_timestep_and_its_sigma_are_inverse() {
        let table = Table::new(false, Group::Sigmas);
        for timestep in [0usize, 1, 250, 998, 999] {
            let found = table.timestep(table.sigma(timestep as f64));
            assert!((found - timestep as f64).abs() < 1e-3, "{timestep}: {found}");
        }
        assert_eq!(table.timestep(0.), 0.);
        assert_eq!(table.timestep(1e6), 999.);
    }

    #[test]
    fn a_single_step_starts_at_the_last_timestep() {
        for group in [Group::Bars, Group::Sigmas, Group::Ratios] {
            assert_eq!(timesteps(group, Spacing::Linspace, 1), [999.]);
            assert_eq!(timesteps(group, Spacing::Trailing, 1), [999.]);
        }
    }

    #[test]
    fn timesteps_fall_and_stay_in_the_table() {
        for steps in 1..=MOST_STEPS {
            for group in [Group::Bars, Group::Sigmas, Group::Ratios] {
                for spacing in [Spacing::Linspace, Spacing::Leading, Spacing::Trailing] {
                    let times = timesteps(group, spacing, steps);
                    assert_eq!(times.len(), steps);
                    assert!(times.iter().all(|t| (0. ..=999.).contains(t)), "{steps} {spacing:?}");
                    assert!(times.windows(2).all(|t| t[0] > t[1]), "{steps} {spacing:?}");
                }
            }
        }
    }
}
