//! Sample pictures while training: what the LoRA makes of a few prompts, as sd-scripts'
//! `--sample_prompts`.
//!
//! Samples look and change nothing: their noise comes from seeds of their own, no state of the
//! training is touched, and a run with them writes the same LoRA as one without. They show the weights
//! that would be saved now, without dropout. Rank r makes the prompts r, r+N, ...; after each round
//! rank 0 gets what the others have made, writes the files and the log. A signal ends the work after
//! the present evaluation; the training's next step then stops the run as ever.
//!
//! The VAE is read from its mapped file for each picture and goes again: 330 MB in float32 that are
//! used once in hundreds of steps. Where latents are not cached the training has it, and lends it.

mod memory;
mod prompts;
mod studio;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod whole_runs;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use collectives::{Comm, Phase, signals};
use engine::ParamStore;
use formats::atomic::{remove_leftovers, write_atomic_if};
use formats::model_spec::civil_time;
use models::Tiling;
use models::pipeline::Predictor;
use models::prompt::Tokenizers;

use crate::base::Base;
use crate::console;
use crate::latents::VaeEncoder;
use crate::monitor::Moment;
use crate::options::Options;
use crate::rng::{Purpose, stream};
use crate::saver::Saver;
use crate::step::Models;
use crate::text_cache::Encoders;
use crate::train::{Trainer, Work};

pub use memory::{PictureBytes, bytes_on_cpu, picture_bytes};
pub use prompts::{MOST_CHUNKS, Occasion, SamplePlan, SamplePrompt};
use studio::{Encoded, Made, VaeAt, VaeFile, encode, make};

/// Longest time that one picture may take on any rank while others wait.
const PATIENCE: Duration = Duration::from_secs(2 * 3600);

/// The folder of the pictures.
pub fn sample_folder(output_dir: &Path) -> PathBuf {
    output_dir.join("sample")
}

/// The samples of a run on one rank.
pub struct Samples {
    plan: SamplePlan,
    folder: PathBuf,
    /// `output_name` and an underscore.
    prefix: String,
    /// Facts for the texts in the pictures.
    facts: Vec<(&'static str, String)>,
    tokenizers: Arc<Tokenizers>,
    clip_skip: Option<usize>,
    /// Hidden states of this rank's prompts, where the text encoder is not trained.
    encoded: Option<BTreeMap<usize, Encoded>>,
    vae: Option<VaeFile>,
    /// How pictures are decoded.
    tiling: Tiling,
}

/// A picture that is written.
#[derive(Clone, Debug)]
pub struct Sample {
    /// Its place among the prompts, from 0.
    pub number: usize,
    /// What it shows.
    pub prompt: String,
    /// Columns and rows.
    pub size: [usize; 2],
    /// The file's bytes.
    pub png: Vec<u8>,
}

/// What pictures are made with.
#[derive(Clone, Copy)]
struct Scene<'a> {
    models: &'a Models,
    params: &'a ParamStore,
    /// The training's, where latents are not cached.
    vae: Option<&'a RefCell<VaeEncoder>>,
}

/// What rank 0 does with pictures.
type Keep<'a> = dyn FnMut(&SamplePrompt, Made) -> Result<()> + 'a;

impl Samples {
    /// For a run with this base model.
    pub fn new(
        plan: SamplePlan,
        (options, base): (&Options, &Base),
        tokenizers: &Arc<Tokenizers>,
    ) -> Result<Self> {
        let output = options.output_dir.as_deref().context("`output_dir` is missing")?;
        let mut facts = vec![("Model", base.files.name.clone())];
        if let Some(skip) = options.clip_skip.filter(|skip| *skip > 1) {
            facts.push(("Clip skip", skip.to_string()));
        }
        Ok(Self {
            plan,
            folder: sample_folder(output),
            prefix: options.output_name.as_ref().map_or(String::new(), |name| format!("{name}_")),
            facts,
            tokenizers: Arc::clone(tokenizers),
            clip_skip: options.clip_skip,
            encoded: None,
            vae: None,
            tiling: Tiling::Never,
        })
    }

    /// The same, this rank's prompts encoded where the text encoder reads them alike for the whole
    /// run: it may go afterwards.
    pub fn encoded(
        mut self,
        comm: &Comm,
        encoders: &mut Encoders<'_>,
        reads_alike: bool,
    ) -> Result<Self> {
        if !reads_alike {
            return Ok(self);
        }
        let mut encoded = BTreeMap::new();
        for prompt in self.plan.prompts.iter().skip(comm.rank()).step_by(comm.world_size()) {
            let reader = (&*self.tokenizers, self.clip_skip);
            encoded.insert(prompt.number, encode(reader, (encoders.get()?, None), prompt)?);
            comm.live();
        }
        self.encoded = Some(encoded);
        Ok(self)
    }

    /// The same with pictures decoded in tiles, if `tiled`.
    pub fn tiled(self, tiled: bool) -> Self {
        Self { tiling: if tiled { Tiling::Always } else { Tiling::Never }, ..self }
    }

    /// Keeps the file of the VAE; the rest of the base model is closed.
    pub fn keep_vae(&mut self, base: Base) {
        self.vae = Some(VaeFile::of(base));
    }

    /// What a killed run of this name has left half written goes.
    fn clear_leftovers(&self) {
        let ours = |name: &str| is_sample_of(&self.prefix, name);
        if self.folder.is_dir()
            && let Err(error) = remove_leftovers(&self.folder, &ours)
        {
            console::warn(&format!("cannot clear what a killed run has left: {error}"));
        }
    }

    /// Makes all pictures; on rank 0 `keep` gets each with its prompt, in the order of the prompts.
    /// All ranks call it.
    fn run(
        &self,
        comm: &Comm,
        scene: Scene<'_>,
        moment: Moment,
        keep: &mut Keep<'_>,
    ) -> Result<()> {
        let before = comm.set_deadline(PATIENCE);
        let result = self.rounds(comm, scene, moment, keep);
        comm.set_deadline(before);
        result
    }

    fn rounds(
        &self,
        comm: &Comm,
        scene: Scene<'_>,
        moment: Moment,
        keep: &mut Keep<'_>,
    ) -> Result<()> {
        let world = comm.world_size();
        for round in self.plan.prompts.chunks(world) {
            let own = match round.get(comm.rank()) {
                Some(prompt) => Some(self.one(comm, scene, moment, prompt)?),
                None => None,
            };
            let all = comm.all_gather(&pack(own.as_ref())).context("gather the samples")?;
            let made: Vec<Made> =
                all.into_iter().take(round.len()).map(unpack).collect::<Result<_>>()?;
            let stopped = made.contains(&Made::Stopped);
            if comm.rank() == 0 {
                for (prompt, made) in round.iter().zip(made) {
                    keep(prompt, made)?;
                }
            }
            if stopped {
                break;
            }
        }
        Ok(())
    }

    /// This rank's picture of a round.
    fn one(
        &self,
        comm: &Comm,
        Scene { models, params, vae }: Scene<'_>,
        moment: Moment,
        prompt: &SamplePrompt,
    ) -> Result<Made> {
        let mut gone = None;
        let mut live = || {
            comm.live();
            gone = comm.check_aborted().err();
            match gone.is_some() || signals::stop_requested() {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            }
        };
        let encoded = match self.encoded.as_ref().and_then(|all| all.get(&prompt.number)) {
            Some(encoded) => encoded.clone(),
            None => {
                let encoder = models.text_encoder.as_ref().context("the text encoder is gone")?;
                let reader = (&*self.tokenizers, self.clip_skip);
                encode(reader, (encoder, Some(params)), prompt)?
            }
        };
        let predictor = Predictor { unet: &models.unet, params: Some(params) };
        let vae = match (vae, &self.vae) {
            (Some(loaded), _) => VaeAt::Training(loaded),
            (None, file) => VaeAt::File(file.as_ref().context("the VAE is gone")?),
        };
        let seed = prompt.seed.unwrap_or_else(|| random_seed(prompt.number));
        let mut facts = self.facts.clone();
        facts.push(("Training step", moment.step.to_string()));
        let made = make((predictor, vae, self.tiling), (prompt, &encoded, seed), &facts, &mut live)
            .with_context(|| {
                format!("the sample of this prompt could not be made: {}", prompt.prompt)
            })?;
        match gone {
            Some(error) => Err(error).context("make samples"),
            None => Ok(made),
        }
    }

    /// Name of a picture: sd-scripts'. The time is UTC.
    fn file_name(&self, occasion: Occasion, prompt: &SamplePrompt, seconds: i64) -> String {
        let [year, month, day, hour, minute, second] = civil_time(seconds);
        let time = format!("{year:04}{month:02}{day:02}{hour:02}{minute:02}{second:02}");
        let seed = prompt.seed.map_or(String::new(), |seed| format!("_{seed}"));
        format!("{}{}_{:02}_{time}{seed}.png", self.prefix, occasion.name(), prompt.number)
    }

    /// Writes a picture, if this run still may.
    fn write(&self, saver: &Saver, name: &str, png: &[u8]) -> Result<()> {
        std::fs::create_dir_all(&self.folder)
            .with_context(|| format!("cannot make the folder: {}", self.folder.display()))?;
        let fill = |file: &mut dyn std::io::Write| file.write_all(png);
        let lease = saver.lease();
        write_atomic_if(&self.folder.join(name), fill, || lease.check())
            .map_err(|error: anyhow::Error| lease.cause(error))
            .context("a sample could not be saved")
    }
}

impl Trainer<'_> {
    /// Samples before the first step.
    pub(crate) fn sample_at_first(&mut self, work: &mut Work) -> Result<()> {
        if let (Some(samples), Some(_)) = (&self.samples, &self.saver) {
            samples.clear_leftovers();
        }
        let wanted = self.samples.as_ref().is_some_and(|samples| samples.plan.is_due_at_first());
        if !wanted || self.start.step > 0 {
            return Ok(());
        }
        let moment = Moment { step: 0, epoch: 0, step_in_epoch: 0 };
        self.sample(Occasion::Epoch(0), moment, work)
    }

    /// Samples after a step, where they are due. All ranks call it.
    pub(crate) fn sample_if_due(
        &mut self,
        moment: Moment,
        epoch_ends: bool,
        work: &mut Work,
    ) -> Result<()> {
        let due = self
            .samples
            .as_ref()
            .and_then(|samples| samples.plan.due(moment.step, moment.epoch, epoch_ends));
        match due {
            Some(occasion) => self.sample(occasion, moment, work),
            None => Ok(()),
        }
    }

    fn sample(&mut self, occasion: Occasion, moment: Moment, work: &mut Work) -> Result<()> {
        let averaged = self.averaged_params()?;
        let Some(samples) = &self.samples else { return Ok(()) };
        self.comm.enter_phase(Phase::Sampling);
        console::note(&format!("making samples after step {}", moment.step));
        work.make_room();
        let params = averaged.as_ref().unwrap_or(&self.params);
        let (saver, monitor) = (self.saver.as_ref(), &mut self.monitor);
        let (mut written, mut stopped) = (0, false);
        let scene = Scene { models: &self.models, params, vae: self.noising.vae.as_ref() };
        samples.run(self.comm, scene, moment, &mut |prompt, made| {
            let png = match made {
                Made::Picture(png) => png,
                Made::Stopped => {
                    stopped = true;
                    return Ok(());
                }
                Made::NotFinite(why) => {
                    console::warn(&format!(
                        "no sample after step {} of the prompt `{}`: {why}",
                        moment.step, prompt.prompt
                    ));
                    return Ok(());
                }
            };
            let saver = saver.context("rank 0 writes the samples")?;
            let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_secs());
            samples.write(saver, &samples.file_name(occasion, prompt, seconds as i64), &png)?;
            written += 1;
            let (number, size) = (prompt.number, prompt.size);
            monitor.sampled(moment, &Sample { number, prompt: prompt.prompt.clone(), size, png })
        })?;
        let cut = if stopped { ", a signal asked to stop" } else { "" };
        console::note(&format!(
            "samples after step {}: {written} in {}{cut}",
            moment.step,
            samples.folder.display()
        ));
        drop(averaged);
        // What the pictures took goes back, to the system or the card.
        match self.params.device().card() {
            Some(card) => card.release_idle(),
            None => engine::release_pool(),
        }
        self.comm.enter_phase(Phase::Training);
        Ok(())
    }
}

/// Whether a file of this name is a sample of the run with this prefix.
fn is_sample_of(prefix: &str, name: &str) -> bool {
    let parts: Option<Vec<&str>> = name
        .strip_prefix(prefix)
        .and_then(|rest| rest.strip_suffix(".png"))
        .map(|rest| rest.strip_prefix('e').unwrap_or(rest).split('_').collect());
    let is_number = |part: &&str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
    parts.is_some_and(|parts| (3..=4).contains(&parts.len()) && parts.iter().all(is_number))
}

/// For a prompt without a seed: another one each time.
fn random_seed(number: usize) -> u64 {
    let clock = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos());
    let process = u64::from(std::process::id());
    u64::from(stream(clock as u64, Purpose::Preview, process, number as u64).next_u32())
}

const NOTHING: u8 = 0;
const PICTURE: u8 = 1;
const NOT_FINITE: u8 = 2;
const STOPPED: u8 = 3;

/// A result as bytes for rank 0.
fn pack(made: Option<&Made>) -> Vec<u8> {
    let (kind, bytes): (u8, &[u8]) = match made {
        None => (NOTHING, &[]),
        Some(Made::Picture(png)) => (PICTURE, png),
        Some(Made::NotFinite(why)) => (NOT_FINITE, why.as_bytes()),
        Some(Made::Stopped) => (STOPPED, &[]),
    };
    [&[kind], bytes].concat()
}

fn unpack(mut bytes: Vec<u8>) -> Result<Made> {
    let content = bytes.split_off(1.min(bytes.len()));
    Ok(match bytes.first() {
        Some(&PICTURE) => Made::Picture(content),
        Some(&NOT_FINITE) => Made::NotFinite(String::from_utf8_lossy(&content).into_owned()),
        Some(&STOPPED) => Made::Stopped,
        _ => bail!("a rank has made no sample of its prompt"),
    })
}
