//! Samplers: from noise to a picture's latents in a few evaluations of the U-Net.
//!
//! Plain numbers over slices: the caller evaluates the U-Net, guides its prediction and keeps the
//! source of random numbers. Results equal diffusers' schedulers (0.42.1) in the configuration of
//! sd-scripts' gen_img; `tests/data/samplers` holds their trajectories. Where diffusers is known to
//! differ, the file of the sampler says so.
//!
//! ```
//! use models::sampler::{Sampler, SamplerKind, SamplerOptions};
//!
//! let kind: SamplerKind = "k_euler_a".parse()?;
//! let mut sampler = Sampler::new(kind, &SamplerOptions::new(20))?;
//! let mut noise = |values: &mut [f32]| values.fill(0.1); // normal numbers, by seed
//! let mut latents = vec![0.; 4 * 8 * 8];
//! noise(&mut latents);
//! sampler.scale_initial_noise(&mut latents);
//! while let Some(timestep) = sampler.timestep() {
//!     let input = sampler.scale_input(&latents);
//!     let prediction: Vec<f32> = input.iter().map(|x| x * timestep / 1000.).collect(); // the U-Net
//!     sampler.step(&prediction, &mut latents, &mut noise)?;
//! }
//! # Ok::<(), models::sampler::SamplerError>(())
//! ```

mod ddim;
mod ddpm;
mod dpm_2;
mod dpm_single;
mod dpm_solver;
mod error;
mod euler;
mod evaluation;
mod heun;
mod kind;
mod level;
mod lms;
mod options;
mod pndm;
mod schedule;
#[cfg(test)]
mod tests;
mod unipc;

pub use error::SamplerError;
pub use kind::SamplerKind;
pub use level::Level;
pub use options::{MOST_STEPS, Prediction, SamplerOptions, Spacing};
pub use schedule::Schedule;

use dpm_solver::Algorithm;
use evaluation::Evaluation;
use schedule::Grid;

/// Fills a slice with numbers of the normal distribution. A slice belongs to the whole batch; it is
/// asked for in the order of the evaluations.
pub type NoiseSource<'a> = dyn FnMut(&mut [f32]) + 'a;

/// The state of a method between evaluations.
#[derive(Clone, Debug)]
enum Method {
    Ddim(ddim::Ddim),
    Ddpm,
    Pndm(pndm::Pndm),
    Lms(lms::Lms),
    Euler,
    EulerAncestral,
    Heun(heun::Heun),
    Dpm2(dpm_2::Dpm2),
    DpmSolver(dpm_solver::DpmSolver),
    DpmSingle(dpm_single::DpmSingle),
    UniPc(unipc::UniPc),
}

/// One run of a sampler.
#[derive(Clone, Debug)]
pub struct Sampler {
    kind: SamplerKind,
    prediction: Prediction,
    schedule: Schedule,
    method: Method,
    initial_noise_scale: f64,
    done: usize,
}

impl Sampler {
    /// Lays the run out; nothing is computed yet.
    pub fn new(kind: SamplerKind, options: &SamplerOptions) -> Result<Self, SamplerError> {
        let skipped = check(kind, options)?;
        let grid = Grid::new(kind, options, skipped);
        let (schedule, method) = lay_out(kind, &grid);
        let starts_at_noise = schedule.levels.first().is_some_and(|level| level.signal == 0.);
        if starts_at_noise && options.prediction == Prediction::Epsilon {
            return Err(SamplerError::PureNoise { kind });
        }
        Ok(Self {
            kind,
            prediction: options.prediction,
            schedule,
            method,
            initial_noise_scale: grid.initial_noise_scale,
            done: 0,
        })
    }

    /// Which sampler it is.
    pub fn kind(&self) -> SamplerKind {
        self.kind
    }

    /// All evaluations of the run.
    pub fn schedule(&self) -> &Schedule {
        &self.schedule
    }

    /// How often the U-Net is evaluated in all.
    pub fn evaluations(&self) -> usize {
        self.schedule.timesteps.len()
    }

    /// How often it has been evaluated.
    pub fn done(&self) -> usize {
        self.done
    }

    /// Timestep of the next evaluation; `None` when the latents are the picture's.
    pub fn timestep(&self) -> Option<f32> {
        self.schedule.timesteps.get(self.done).copied()
    }

    /// How much picture and noise the latents hold now.
    pub fn level(&self) -> Level {
        self.schedule.levels[self.done]
    }

    /// Factor that unit noise gets before the first evaluation of a run from noise.
    pub fn initial_noise_scale(&self) -> f64 {
        self.initial_noise_scale
    }

    /// Multiplies unit noise by [`Sampler::initial_noise_scale`].
    pub fn scale_initial_noise(&self, noise: &mut [f32]) {
        let factor = self.initial_noise_scale();
        noise.iter_mut().for_each(|value| *value = (f64::from(*value) * factor) as f32);
    }

    /// Latents of a picture with noise as it should be now: before the first evaluation to start
    /// from a picture (`strength`), later to put back what a mask keeps.
    pub fn add_noise(&self, picture: &[f32], noise: &[f32]) -> Result<Vec<f32>, SamplerError> {
        same_length("the noise", picture, noise)?;
        let level = self.level();
        Ok(level::blend(&[(level.signal, picture), (level.noise, noise)]))
    }

    /// What the U-Net is given for these latents: of the variance that it was trained on.
    pub fn scale_input(&self, latents: &[f32]) -> Vec<f32> {
        level::blend(&[(self.input_scale(), latents)])
    }

    /// The factor of [`Sampler::scale_input`].
    pub fn input_scale(&self) -> f64 {
        self.level().input_scale()
    }

    /// The picture that a prediction promises, for a preview. To be asked for before
    /// [`Sampler::step`].
    pub fn promised(&self, prediction: &[f32], latents: &[f32]) -> Result<Vec<f32>, SamplerError> {
        same_length("the prediction", latents, prediction)?;
        Ok(self.level().picture(self.prediction).of(latents, prediction))
    }

    /// Moves the latents on by the prediction for [`Sampler::timestep`].
    pub fn step(
        &mut self,
        prediction: &[f32],
        latents: &mut [f32],
        noise: &mut NoiseSource<'_>,
    ) -> Result<(), SamplerError> {
        same_length("the prediction", latents, prediction)?;
        let Some(timestep) = self.timestep() else {
            return Err(SamplerError::Finished(self.evaluations()));
        };
        let levels = &self.schedule.levels;
        let at = Evaluation {
            index: self.done,
            timestep,
            here: levels[self.done],
            next: levels[self.done + 1],
            prediction: self.prediction,
            output: prediction,
            latents,
        };
        let is_last = self.done + 1 == self.schedule.timesteps.len();
        let moved = match &mut self.method {
            Method::Ddim(ddim) => ddim.step(&at),
            Method::Ddpm => ddpm::step(&at, noise),
            Method::Pndm(pndm) => pndm.step(&at),
            Method::Lms(lms) => lms.step(&at, levels),
            Method::Euler => euler::step(&at),
            Method::EulerAncestral => euler::ancestral_step(&at, noise),
            Method::Heun(heun) => heun.step(&at),
            Method::Dpm2(dpm_2) => dpm_2.step(&at, noise),
            Method::DpmSolver(solver) => solver.step(&at, is_last, noise),
            Method::DpmSingle(single) => single.step(&at, noise),
            Method::UniPc(unipc) => unipc.step(&at, is_last),
        };
        latents.copy_from_slice(&moved);
        self.done += 1;
        Ok(())
    }
}

/// Whether the sampler offers what was chosen; gives the steps to leave out at the start.
fn check(kind: SamplerKind, options: &SamplerOptions) -> Result<usize, SamplerError> {
    let steps = options.steps;
    if !(1..=MOST_STEPS).contains(&steps) {
        return Err(SamplerError::Steps(steps));
    }
    if options.karras && !kind.offers_karras() {
        return Err(SamplerError::Karras { kind });
    }
    if options.zero_terminal_snr && !kind.offers_zero_terminal_snr() {
        return Err(SamplerError::ZeroTerminalSnr { kind });
    }
    if options.spacing.is_some_and(|spacing| spacing != Spacing::Linspace) && !kind.offers_spacing()
    {
        return Err(SamplerError::Spacing { kind });
    }
    let Some(strength) = options.strength else { return Ok(0) };
    // Cut off as `int()` does. A strength that is no number makes none.
    let made = (steps as f64 * strength) as usize;
    if made == 0 || strength > 1. {
        return Err(SamplerError::Strength { strength, steps });
    }
    Ok(steps - made)
}

fn lay_out(kind: SamplerKind, grid: &Grid) -> (Schedule, Method) {
    let multistep =
        |algorithm| Method::DpmSolver(dpm_solver::DpmSolver::new(algorithm, grid.of_steps));
    let single = |algorithm| Method::DpmSingle(dpm_single::DpmSingle::new(algorithm, grid));
    let method = match kind {
        SamplerKind::Ddim => Method::Ddim(ddim::Ddim::new(grid)),
        SamplerKind::Ddpm => Method::Ddpm,
        SamplerKind::Pndm => {
            let (schedule, pndm) = pndm::Pndm::new(grid);
            return (schedule, Method::Pndm(pndm));
        }
        SamplerKind::Lms => Method::Lms(lms::Lms::default()),
        SamplerKind::Euler => Method::Euler,
        SamplerKind::EulerAncestral => Method::EulerAncestral,
        SamplerKind::Heun => {
            let (schedule, heun) = heun::Heun::new(grid);
            return (schedule, Method::Heun(heun));
        }
        SamplerKind::Dpm2 | SamplerKind::Dpm2Ancestral => {
            let (schedule, dpm_2) = dpm_2::Dpm2::new(grid, kind == SamplerKind::Dpm2Ancestral);
            return (schedule, Method::Dpm2(dpm_2));
        }
        SamplerKind::DpmSolver => multistep(Algorithm::Noise),
        SamplerKind::DpmSolverPlus => multistep(Algorithm::Picture),
        SamplerKind::DpmSolverPlusSde => multistep(Algorithm::StochasticPicture),
        SamplerKind::DpmSingle => single(Algorithm::Picture),
        SamplerKind::DpmSingleSde => single(Algorithm::StochasticPicture),
        SamplerKind::UniPc => Method::UniPc(unipc::UniPc::default()),
    };
    (grid.schedule(), method)
}

fn same_length(what: &'static str, latents: &[f32], values: &[f32]) -> Result<(), SamplerError> {
    if latents.len() == values.len() {
        return Ok(());
    }
    Err(SamplerError::Length { what, expected: latents.len(), got: values.len() })
}
