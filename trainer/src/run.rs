//! The way of a run: from checked options to a trained file, on one rank.

use std::cell::RefCell;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use collectives::{Comm, Env, Phase};
use engine::{DType, Device, ParamStore};
use models::Unet;
use models::lora::LoraNetwork;

use crate::base::Base;
use crate::card::LossScale;
use crate::card_plan::{Target, plan_run};
use crate::checkpoint::{Saving, check_writable};
use crate::console;
use crate::data_plan::{dataset_defaults, dataset_input, missing_masks};
use crate::dataset::{
    CacheOptions, CachePlace, DatasetGroup, FixedBatches, LatentStore, Loader, LoaderOptions,
    LoaderParts, Sampler, TokenLength, cache_latents, caption, plan_datasets, worker_count,
};
use crate::debug_dataset::print_batches;
use crate::device;
use crate::ema::{Ema, average_path};
use crate::host_plan::HostPlan;
use crate::latents::{VaeEncoder, vae_fingerprint};
use crate::lease::{self, Lease};
use crate::logs;
use crate::lr::Schedule;
use crate::memory::{peak_resident, refuse_beyond_memory, show_bytes};
use crate::monitor::Monitor;
use crate::network::PreparedNetwork;
use crate::noising::Noising;
use crate::objective::Objective;
use crate::optimizer::{Build, Optimize, TensorForm};
use crate::options::{Options, Parsed};
use crate::plan::{Plan, choose_seed, describe};
use crate::precision::{round_weights, weights_type};
use crate::progress::format_summary;
use crate::reproducible;
use crate::samples::{SamplePlan, Samples, bytes_on_cpu, sample_folder};
use crate::saver::{DatasetNumbers, Saver};
use crate::snapshot::Memory;
use crate::state::{self, Keeper, Resume, RunFacts, Sources, Start, run_facts};
use crate::step::Models;
use crate::text_cache::{self, Encoders, TextCache};
use crate::train::{Ending, Trainer};
use crate::validation::Validation;
use crate::watch::Watch;
use crate::world::World;

/// Shortest time between two lines about the cache.
const LINE_INTERVAL: Duration = Duration::from_secs(5);

/// A run that is resolved and checked; nothing heavy has happened yet.
pub struct Run {
    options: Options,
    comm: Comm,
    /// Ranks of this machine.
    local_ranks: usize,
    base: Base,
    group: DatasetGroup,
    /// Images to validate with.
    held_out: Option<DatasetGroup>,
    prepared: PreparedNetwork,
    plan: Plan,
    /// What was planned for main memory, where the CPU computes.
    host: Option<HostPlan>,
    /// Sample pictures, where they are asked for.
    samples: Option<SamplePlan>,
    /// The plan for people.
    summary: String,
    /// Where snapshots are kept.
    memory: Option<Memory>,
    resume: Option<Resume>,
    facts: RunFacts,
    start: Start,
}

impl Run {
    /// A run that is resolved, told and checked. What fails here is a wrong configuration.
    pub fn prepare(parsed: &Parsed, env: &Env) -> Result<Self> {
        engine::return_freed_buffers();
        let run = Self::resolve(parsed, env)?;
        console::note(&run.summary);
        for note in &run.prepared.notes {
            console::note(note);
        }
        run.check()?;
        Ok(run)
    }

    /// Finds the data, opens the model, chooses the modules, plans the card's memory.
    pub fn resolve(parsed: &Parsed, env: &Env) -> Result<Self> {
        let mut options = parsed.options.clone();
        console::configure(options.console_log_level, options.console_log_file.as_deref())?;
        for note in &parsed.notes {
            console::note(note);
        }
        let samples = SamplePlan::read(&options)?;
        for note in samples.iter().flat_map(|samples| &samples.notes) {
            console::warn(note);
        }
        let datasets = plan_datasets(&dataset_input(parsed)?, &dataset_defaults(&options)?)?;
        let (group, held_out) = DatasetGroup::open_split(datasets, options.strict_data)?;
        check_cacheable(&options, &group, held_out.as_ref())?;
        for warning in group.warnings.iter().chain(&missing_masks(&options, &group)) {
            console::warn(warning);
        }
        let device = match device::for_rank(&options, env) {
            // A plan alone can be made for a card that is not there.
            Err(_) if options.dry_run && options.vram_limit.is_some() => Device::Cpu,
            device => device?,
        };
        let mut base = Base::prepare(&options, device)?;
        let comm = Comm::connect(env).context("connect the ranks")?;
        comm.enter_phase(Phase::Loading);
        let memory = Memory::open(env)?;
        claim_names(&options, env)?;
        let from = Sources { options: &options, env, memory: memory.as_ref() };
        let resume = Resume::find(from, &comm)?;
        let world = World::choose(
            &options,
            &group.batch_sizes(),
            resume.as_ref().and_then(Resume::facts),
            env,
        )?;
        if options.reproducible {
            reproducible::check(comm.world_size())?;
        }
        let seed = agree_on_seed(&options, resume.as_ref(), &comm)?;
        let prepared = PreparedNetwork::new(&options, &base, seed)?;
        let card = match Target::find(&options, device) {
            Some(target) => {
                let groups = (&group, held_out.as_ref(), world);
                Some(plan_run(
                    &options,
                    &base,
                    groups,
                    (&prepared, samples.as_ref()),
                    &target.agree(&comm)?,
                )?)
            }
            None => None,
        };
        if let Some(card) = &card {
            card.apply(&mut options);
            base.store(&options);
        }
        let mut plan = Plan::new(&options, &group, &base, seed, world)?;
        match (&card, &samples) {
            (Some(card), _) => {
                plan.checkpointing = card.chosen.checkpointing.clone();
                plan.tiled_samples = card.chosen.tiled_samples;
            }
            (None, Some(samples)) => plan.sample_bytes = bytes_on_cpu(samples, &base)?,
            (None, None) => {}
        }
        let host = match &card {
            Some(_) => None,
            None => {
                let groups = (&group, held_out.as_ref(), world);
                Some(HostPlan::new(&options, &base, groups, (&plan, &prepared))?)
            }
        };
        let told = (&base, card.as_ref(), host.as_ref());
        let mut rows = describe(&options, &plan, &group, told, &prepared);
        if let Some(samples) = &samples {
            let text = samples.describe(&sample_folder(&plan.saving.output_dir));
            rows.push(("samples".to_owned(), text));
        }
        if let Some(text) = text_cache::describe(&options, &base, &group) {
            rows.push(("captions".to_owned(), text));
        }
        let rows: Vec<(&str, String)> = rows.iter().map(|(k, v)| (k.as_str(), v.clone())).collect();
        let summary = format_summary("plan", &rows);
        let facts = run_facts(&options, &plan, &base, &prepared.network, &group)?;
        let start = state::begin(resume.as_ref(), &options, &facts, (&plan, &group))?;
        Ok(Self {
            options,
            comm,
            local_ranks: env.local_world_size,
            base,
            group,
            held_out,
            prepared,
            plan,
            host,
            samples,
            summary,
            memory,
            resume,
            facts,
            start,
        })
    }

    /// What would fail only after minutes of loading and caching.
    pub fn check(&self) -> Result<()> {
        let Self { options, comm, base, plan, .. } = self;
        Schedule::new(options, plan.steps)?;
        let layers = base.text_encoder.layers;
        if base.text_encoder_2.is_none() && options.clip_skip.is_some_and(|skip| skip > layers) {
            anyhow::bail!(
                "`clip_skip` leaves no layer of the text encoder's {layers}: {}",
                options.clip_skip.unwrap_or_default()
            );
        }
        if let Some(samples) = &self.samples {
            samples.check_lengths(&base.tokenizers()?.first)?;
        }
        if let Some(host) = &self.host {
            let hint = "lower the batch size or the resolution, or set \
                        `gradient_checkpointing`, `mixed_precision = \"bf16\"`";
            let need = host.total() * self.local_ranks;
            refuse_beyond_memory("the ranks of this machine", need, hint)?;
        }
        if comm.rank() == 0 && !options.dry_run {
            check_writable(&plan.saving.output_dir)?;
            if self.samples.is_some() {
                check_writable(&sample_folder(&plan.saving.output_dir))?;
            }
            logs::check(options)?;
        }
        Ok(())
    }

    /// Prints for people, as data, what the run will do and take, and the files it will write.
    pub fn print_summary(&self) {
        console::data(&self.summary);
        for note in &self.prepared.notes {
            console::data(&format!("  {note}"));
        }
        console::data("files");
        for path in self.planned_files() {
            console::data(&format!("  {}", path.display()));
        }
    }

    fn planned_files(&self) -> Vec<PathBuf> {
        let mut files = Vec::new();
        for path in self.plan.saving.planned(self.plan.steps, self.plan.epochs) {
            let average = self.options.ema_decay.is_some().then(|| average_path(&path));
            files.extend([path].into_iter().chain(average));
        }
        files
    }

    /// Whether the user asked for the plan alone.
    pub fn is_dry(&self) -> bool {
        self.options.dry_run
    }

    /// Whether the user asked for the batches alone.
    pub fn is_debug(&self) -> bool {
        self.options.debug_dataset
    }

    /// Prints what the steps of the first epoch would see.
    pub fn print_batches(self, env: &Env) -> Result<()> {
        let Self { options, base, group, plan, .. } = self;
        let steps = plan.steps.min(plan.steps_per_epoch);
        let (parts, loading) = loader_parts(&options, env, &base, (Arc::new(group), None), &plan)?;
        print_batches(&mut Loader::start(parts, loading)?, steps)
    }

    /// Prints options and files of the plan as data.
    pub fn print_plan(&self) {
        console::data(&self.options.to_toml());
        for path in self.planned_files() {
            console::data(&format!("# writes {}", path.display()));
        }
    }
}

/// Makes sure, on rank 0, that no other run is writing files of these names, and clears what a killed
/// one has left half written.
fn claim_names(options: &Options, env: &Env) -> Result<()> {
    if env.rank != 0 || options.dry_run || options.debug_dataset {
        return Ok(());
    }
    // What is wrong with the options is said later.
    let Ok(saving) = Saving::from_options(options, 1) else { return Ok(()) };
    lease::refuse_rival(&saving, env)?;
    if let Err(error) = saving.clear_leftovers() {
        console::warn(&format!("cannot clear what a killed run has left: {error:#}"));
    }
    Ok(())
}

/// Whether what is to be cached is the same each time.
fn check_cacheable(
    options: &Options,
    group: &DatasetGroup,
    held_out: Option<&DatasetGroup>,
) -> Result<()> {
    if options.cache_latents {
        group.check_latents_cacheable()?;
    }
    if options.cache_text_encoder_outputs {
        caption::check_cacheable(group)?;
        held_out.map_or(Ok(()), caption::check_cacheable)?;
    }
    Ok(())
}

/// Ranks that chose a seed each would train different things.
fn agree_on_seed(options: &Options, resume: Option<&Resume>, comm: &Comm) -> Result<u64> {
    if let Some(seed) = options.seed.or(resume.and_then(Resume::seed)) {
        return Ok(seed);
    }
    let own = choose_seed(options).to_le_bytes().to_vec();
    let agreed = comm.broadcast(0, own).context("agree on a seed")?;
    let bytes: [u8; 8] = agreed.try_into().map_err(|_| anyhow::anyhow!("not a seed"))?;
    Ok(u64::from_le_bytes(bytes))
}

impl Run {
    /// Caches latents, loads the models, trains, and writes the files.
    pub fn train(self, env: &Env) -> Result<Ending> {
        let Self { options, comm, base, group, held_out, mut prepared, plan, resume, .. } = self;
        let (mut facts, mut start) = (self.facts, self.start);
        let lease = match comm.rank() {
            0 => Some(Lease::take(&plan.saving, env)?),
            _ => None,
        };
        let groups: Vec<DatasetGroup> = [group].into_iter().chain(held_out).collect();
        comm.enter_phase(Phase::Caching);
        let reads_alike = !prepared.network.has_text_modules();
        let texts = reads_alike.then(|| TextCache::find((&options, &base), &groups, &comm));
        let texts = texts.transpose()?.flatten();
        let mut cached = cache(&options, (&comm, env), &base, groups)?.into_iter();
        comm.enter_phase(Phase::Loading);
        release_idle(&base);
        let (group, latents) = cached.next().context("the training images are gone")?;
        let held_out = cached.next();
        // Damaged images were left out: the plan must count what is there.
        let plan = plan.again(&options, &group, &base)?;
        if facts.data.steps_per_epoch != plan.steps_per_epoch {
            facts.data.steps_per_epoch = plan.steps_per_epoch;
            start = state::begin_again(resume.as_ref(), &options, &facts.data, (&plan, &group))?;
        }
        let mut loaded = resume.map(|resume| resume.load(&comm)).transpose()?;
        if let Some(loaded) = &mut loaded {
            loaded.replace_values(&mut prepared, &plan)?;
        }
        let group = Arc::new(group);
        let groups = (&*group, held_out.as_ref().map(|(group, _)| group));
        let saver = lease
            .map(|lease| prepare_saver((&options, &base), lease, &plan, &prepared, groups))
            .transpose()?;
        let monitor = Monitor::new(&options, &plan, &group, &comm)?;
        let has_latents = latents.is_some();
        let (parts, loading) = loader_parts(&options, env, &base, (group, latents), &plan)?;
        let loading = LoaderOptions {
            max_train_steps: start.data_of(plan.steps) as u64,
            first_step: start.data_of(start.step) as u64,
            ..loading
        };
        let mut encoders = Encoders::of(&base);
        let samples = self
            .samples
            .map(|plan| Samples::new(plan, (&options, &base), &parts.tokenizers))
            .map(|samples| {
                samples?.tiled(plan.tiled_samples).encoded(&comm, &mut encoders, reads_alike)
            })
            .transpose()?;
        let encoded = texts.map(|texts| texts.encode(&mut encoders, &comm, env)).transpose()?;
        // What read the captions is gone before the U-Net comes.
        let text_encoder = encoders.kept(encoded.is_none())?;
        let mut models = Models { text_encoder, unet: load_unet(&base, &comm)? };
        let weights_type = weights_type(&options);
        let params = prepare_params(&prepared, &base, weights_type)?;
        let network = prepared.network;
        drop(prepared.values);
        models.install(&network)?;
        let mut loader = Loader::start(parts, loading)?;
        let validation = held_out
            .map(|held_out| prepare_validation(&options, env, &base, held_out, &plan))
            .transpose()?;
        let noising = Noising {
            objective: Objective::from_options(&options)?,
            seed: plan.seed,
            scaling: base.vae.scaling,
            accumulation: options.gradient_accumulation_steps,
            encoded,
            pooled: base.pooled_width(),
            vae: if has_latents { None } else { Some(RefCell::new(VaeEncoder::load(&base)?)) },
        };
        let ema = options.ema_decay.map(|decay| Ema::new(decay, &params)).transpose()?;
        let mut trainer = Trainer {
            optimizer: build_optimizer(&options, &plan, &params, &network)?,
            schedule: Schedule::new(&options, plan.steps)?,
            options: &options,
            plan: &plan,
            comm: &comm,
            ways: env.into(),
            models,
            network,
            params,
            noising,
            ema,
            watch: Watch::new(options.max_skipped_steps),
            loss_scale: LossScale::new(base.dtype == DType::F16),
            weights_type,
            validation,
            samples,
            saver,
            monitor,
            start,
            keeper: Keeper::new(&plan, facts, start),
            memory: self.memory,
        };
        if let Some(loaded) = loaded {
            trainer.restore(loaded)?;
        }
        // The mapped files are read; their pages go back to the system.
        match &mut trainer.samples {
            Some(samples) => samples.keep_vae(base),
            None => drop(base),
        }
        trainer.run(&mut loader).inspect(|_| say_peak(self.host.as_ref()))
    }
}

/// The most that this rank took, beside what was planned.
fn say_peak(host: Option<&HostPlan>) {
    let Some(peak) = peak_resident() else { return };
    let planned = host.map_or(String::new(), |host| {
        let ratio = peak as f64 / host.total() as f64;
        format!(", planned: {} (x {ratio:.2})", show_bytes(host.total()))
    });
    console::note(&format!("peak memory of rank 0: {}{planned}", show_bytes(peak)));
}

/// The values of the network where they are trained, rounded to `dtype` if they are to be of it.
fn prepare_params(
    prepared: &PreparedNetwork,
    base: &Base,
    dtype: Option<DType>,
) -> Result<ParamStore> {
    let mut params = prepared.parameters(base)?;
    if let Some(dtype) = dtype {
        round_weights(&mut params, dtype)?;
    }
    if base.device.card().is_some() {
        params.keep_working(base.dtype, &prepared.network.factors(1.))?;
    }
    Ok(params)
}

/// What writes the LoRA.
fn prepare_saver(
    (options, base): (&Options, &Base),
    lease: Lease,
    plan: &Plan,
    prepared: &PreparedNetwork,
    (group, held_out): (&DatasetGroup, Option<&DatasetGroup>),
) -> Result<Saver> {
    let numbers = DatasetNumbers::new(group, held_out, plan);
    Saver::new((options, lease), plan, base, prepared, &numbers)
}

fn load_unet(base: &Base, comm: &Comm) -> Result<Unet> {
    release_idle(base);
    comm.live();
    let unet = base.load_unet()?;
    comm.live();
    engine::release_pool();
    Ok(unet)
}

/// Memory of models that are gone goes back, to the card or the system.
fn release_idle(base: &Base) {
    match base.device.card() {
        Some(card) => card.release_idle(),
        None => engine::release_pool(),
    }
}

fn build_optimizer(
    options: &Options,
    plan: &Plan,
    params: &ParamStore,
    network: &LoraNetwork,
) -> Result<Box<dyn Optimize>> {
    let forms = TensorForm::of(network);
    let learning_rate = options.learning_rate;
    plan.optimizer.recipe.build(&Build { params, forms: &forms, learning_rate })
}

/// A group of images and, where they are cached, their latents.
type Cached = (DatasetGroup, Option<Arc<LatentStore>>);

/// The latents of all images, where they are to be cached; the VAE is gone afterwards. Names the
/// images that turned out damaged.
fn cache(
    options: &Options,
    (comm, env): (&Comm, &Env),
    base: &Base,
    groups: Vec<DatasetGroup>,
) -> Result<Vec<Cached>> {
    if !options.cache_latents && !options.cache_latents_to_disk {
        return Ok(groups.into_iter().map(|group| (group, None)).collect());
    }
    let mut encoder = VaeEncoder::load(base)?;
    let vae = vae_fingerprint(base)?;
    let mut cached = Vec::with_capacity(groups.len());
    for group in groups {
        let known_warnings = group.warnings.len();
        let (place, share) = if options.cache_latents_to_disk {
            (CachePlace::BesideImages, (comm.rank(), comm.world_size()))
        } else {
            // The first rank of each host names the folder for those of its host.
            let own = std::env::temp_dir().join(format!("lorarun-latents-{}", std::process::id()));
            let mut all = comm.all_gather(own.display().to_string().as_bytes())?;
            let agreed = all.swap_remove(env.rank - env.local_rank);
            let place = CachePlace::Temporary(PathBuf::from(String::from_utf8(agreed)?));
            (place, (env.local_rank, env.local_world_size))
        };
        let mut shown = (Instant::now(), 0);
        let mut progress = |done: usize, all: usize| {
            if done != shown.1 && (done == all || shown.0.elapsed() > LINE_INTERVAL) {
                shown = (Instant::now(), done);
                console::note(&format!("latents of {done} of {all} images"));
            }
        };
        let options = CacheOptions {
            place,
            share,
            vae: vae.clone(),
            // Which images share a batch depends on the number of ranks.
            batch_size: if options.reproducible { 1 } else { options.vae_batch_size.max(1) },
            workers: worker_count(options.max_data_loader_n_workers, env.local_world_size),
            strict_data: options.strict_data,
            skip_check: options.skip_cache_check,
            progress: &mut progress,
        };
        let (group, store) = cache_latents(group, &mut encoder, comm, options)?;
        for warning in group.warnings.iter().skip(known_warnings) {
            console::warn(warning);
        }
        cached.push((group, Some(Arc::new(store))));
    }
    Ok(cached)
}

/// What all batches of a run share.
fn loader_parts(
    options: &Options,
    env: &Env,
    base: &Base,
    (group, latents): (Arc<DatasetGroup>, Option<Arc<LatentStore>>),
    plan: &Plan,
) -> Result<(LoaderParts, LoaderOptions)> {
    let accumulation = options.gradient_accumulation_steps;
    let sampler = Sampler::new(&group, plan.seed, plan.world.full, accumulation);
    let token_length = options.max_token_length.map(|length| length as u32);
    let token_length =
        TokenLength::from_option(token_length).context("`max_token_length` must be 150 or 225")?;
    let parts = LoaderParts {
        group,
        sampler: Arc::new(sampler),
        tokenizers: Arc::new(base.tokenizers()?),
        latents,
    };
    let options = LoaderOptions {
        rank: env.rank,
        world: plan.world,
        seed: plan.seed,
        max_train_steps: plan.steps as u64,
        first_step: 0,
        workers: worker_count(options.max_data_loader_n_workers, env.local_world_size),
        token_length,
        weighted_captions: options.weighted_captions,
        fill_ranks: options.reproducible,
    };
    Ok((parts, options))
}

/// The validation of a run that holds images out.
fn prepare_validation(
    options: &Options,
    env: &Env,
    base: &Base,
    (group, latents): Cached,
    plan: &Plan,
) -> Result<Validation> {
    let seed = options.validation_seed.unwrap_or(plan.seed);
    let (parts, loading) = loader_parts(options, env, base, (Arc::new(group), latents), plan)?;
    let loading = LoaderOptions { seed, ..loading };
    let batches = FixedBatches::new(parts, loading, options.max_validation_steps);
    Ok(Validation::new(options, seed, batches))
}
