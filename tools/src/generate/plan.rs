//! Prompts to pictures that are to be made: everything is settled here, before the model is loaded.

use std::path::Path;

use formats::prompt_lines::PromptLine;
use models::pipeline::{HighresFix, Request, SizeHints};
use models::sampler::{Prediction, Sampler, SamplerKind, SamplerOptions};

use super::layout::{Layout, Multipliers};
use super::networks::Networks;
use super::options::Options;
use super::seeds::Seeds;
use super::source::{Source, Sources};
use super::tags;
use crate::Usage;

/// Sides of a picture that is made of a picture are multiples of this, as in the reference.
const IMAGE_MULTIPLE: usize = 32;
/// The least side.
const LEAST_SIDE: usize = 64;
/// Sides where none are given.
const DEFAULT_SIDE: usize = 512;
pub(super) const SDXL_SIDE: usize = 1024;
const DEFAULT_STRENGTH: f64 = 0.8;

/// A picture to be made.
#[derive(Clone, Debug)]
pub(super) struct Shot {
    pub request: Request,
    /// One for each applied LoRA.
    pub multipliers: Multipliers,
    /// A name of its own.
    pub file_name: Option<String>,
    /// The name of the picture that it starts from.
    pub origin: Option<String>,
    /// Where it stands in the sheet: rows and columns.
    pub cells: Vec<[usize; 2]>,
}

/// A row of the sheet.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Row {
    pub prompt: String,
    pub seed: u64,
    /// What tells it from other rows of this prompt and seed; may be empty.
    pub band: String,
}

/// Makes the plan.
pub(super) struct Planner<'a> {
    options: &'a Options,
    networks: &'a Networks,
    sources: &'a Sources,
    /// The file of the prompts.
    file: Option<&'a Path>,
    sampler: SamplerKind,
    pub layout: Layout,
    seeds: Seeds,
    /// The seed of the only picture.
    only_seed: Option<u64>,
    /// A side that nobody gives.
    pub default_side: usize,
    /// Prompts taken so far, each as often as it has pictures.
    taken: usize,
    pub rows: Vec<Row>,
}

impl<'a> Planner<'a> {
    /// Checks what holds for all prompts. `prompts` is their number, if it is known.
    ///
    /// # Errors
    /// A [`Usage`] that names the option.
    pub fn new(
        options: &'a Options,
        networks: &'a Networks,
        sources: &'a Sources,
        prompts: Option<usize>,
    ) -> Result<Self, Usage> {
        check(options)?;
        let sampler = options.picture.sampler.parse();
        let sampler = sampler.map_err(|error| Usage(format!("`--sampler`: {error}")))?;
        let asked = &options.prompts;
        let is_only = prompts == Some(1) && asked.images_per_prompt == 1 && asked.n_iter == 1;
        Ok(Self {
            options,
            networks,
            sources,
            file: asked.from_file.as_deref(),
            sampler,
            layout: Layout::new(options, networks)?,
            seeds: Seeds::new(asked.seed),
            only_seed: asked.seed.filter(|_| is_only),
            default_side: DEFAULT_SIDE,
            taken: 0,
            rows: Vec::new(),
        })
    }

    /// All pictures of all iterations.
    ///
    /// # Errors
    /// A [`Usage`] that names the line.
    pub fn all(&mut self, mut lines: Vec<PromptLine>) -> Result<Vec<Shot>, Usage> {
        let mut shots = Vec::new();
        for _ in 0..self.options.prompts.n_iter {
            let shared = self.options.prompts.iter_same_seed.then(|| self.draw_seed());
            if self.options.prompts.shuffle_prompts {
                self.seeds.shuffle(&mut lines);
            }
            for line in &lines {
                shots.extend(self.of_line(line, shared)?);
            }
        }
        Ok(shots)
    }

    /// The pictures of one prompt; `shared` is the seed of those without one of their own.
    ///
    /// # Errors
    /// A [`Usage`] that names the line.
    pub fn of_line(&mut self, line: &PromptLine, shared: Option<u64>) -> Result<Vec<Shot>, Usage> {
        let file = self.file;
        let at = |said: String| match (file, line.line) {
            (Some(file), number) => Usage(format!("{}:{number}: {said}", file.display())),
            (None, _) => Usage(said),
        };
        let tagged = tags::take_out(&line.prompt, self.networks).map_err(at)?;
        let own = self.own_multipliers(line, tagged.multipliers).map_err(at)?;
        let mut shots: Vec<Shot> = Vec::new();
        for index in 0..self.options.prompts.images_per_prompt {
            let source = self.sources.picture(self.taken).cloned();
            let mut request = self.request(line, &tagged.prompt, source.as_ref()).map_err(at)?;
            request.mask = self.sources.mask(self.taken);
            // Where seeds run out, the last one stays.
            let given = line.seeds.get(index).or(line.seeds.last()).copied();
            request.seed = given.or(shared).unwrap_or_else(|| self.draw_seed());
            self.taken += 1;
            let first_of_picture = shots.len();
            for band in &self.layout.bands {
                let row = self.rows.len();
                let (prompt, seed) = (tagged.prompt.clone(), request.seed);
                self.rows.push(Row { prompt, seed, band: band.label.clone() });
                for (column, multipliers) in band.cells.iter().enumerate() {
                    let multipliers = own.as_ref().unwrap_or(multipliers);
                    let same = |shot: &&mut Shot| shot.multipliers == *multipliers;
                    let cell = [row, column];
                    if let Some(shot) = shots[first_of_picture..].iter_mut().find(same) {
                        shot.cells.push(cell);
                        continue;
                    }
                    // One file of a name: the first picture's.
                    let is_first = shots.is_empty();
                    shots.push(Shot {
                        request: request.clone(),
                        multipliers: multipliers.clone(),
                        file_name: line.file_name.clone().filter(|_| is_first),
                        origin: source.as_ref().map(|source| source.name.clone()),
                        cells: vec![cell],
                    });
                }
            }
        }
        Ok(shots)
    }

    fn draw_seed(&mut self) -> u64 {
        self.only_seed.unwrap_or_else(|| self.seeds.draw())
    }

    /// What `--am` or tags say, for each applied LoRA.
    fn own_multipliers(
        &self,
        line: &PromptLine,
        tagged: Option<Multipliers>,
    ) -> Result<Option<Multipliers>, String> {
        let count = self.networks.applied().len();
        let given = line.multipliers.len();
        if (given > 0 || tagged.is_some()) && self.options.files.grid {
            return Err(
                "with `--grid` multipliers are those of its columns, the prompt sets its own\n\
                        hint: take `--am` and `<lora:...>` out of the prompt"
                    .to_owned(),
            );
        }
        if given > count {
            return Err(format!(
                "`--am` gives {given} multipliers, LoRAs that are applied: {count}\n\
                 hint: `--network_weights` names them; merged ones do not count"
            ));
        }
        match (given, tagged) {
            (0, tagged) => Ok(tagged),
            (_, Some(_)) => {
                Err("the prompt has both `--am` and `<lora:...>`\nhint: take one of the \
                                 two out"
                    .to_owned())
            }
            (_, None) => {
                // As in the reference, the last one stands for those that are missing.
                let mut own = line.multipliers.clone();
                own.resize(count, own.last().copied().unwrap_or(1.));
                Ok(Some(own))
            }
        }
    }

    fn request(
        &self,
        line: &PromptLine,
        prompt: &str,
        source: Option<&Source>,
    ) -> Result<Request, String> {
        let (picture, from) = (&self.options.picture, &self.options.source);
        let [width, height] = self.size(line, source)?;
        let sampler = match &line.sampler {
            Some(name) => name.parse().map_err(|error| format!("`--ss`: {error}"))?,
            None => self.sampler,
        };
        let asked = &self.options.prompts;
        let negative = line.negative.as_ref().unwrap_or(&asked.negative_prompt);
        let highres_fix = from.highres_fix_scale.map(|scale| HighresFix {
            scale,
            steps: from.highres_fix_steps,
            strength: from.highres_fix_strength,
            latents: from.highres_fix_latents_upscaling,
        });
        let mut options = SamplerOptions::new(line.steps.unwrap_or(picture.steps));
        options.karras = picture.karras;
        let request = Request {
            prompt: prompt.to_owned(),
            negative_prompt: negative.clone(),
            prompt_2: line.prompt_2.clone().or_else(|| asked.prompt_2.clone()),
            negative_prompt_2: line.negative_2.clone().or_else(|| asked.negative_prompt_2.clone()),
            width,
            height,
            sampler,
            options,
            guidance_scale: line.scale.unwrap_or(picture.scale),
            clip_skip: picture.clip_skip,
            most_chunks: picture.max_embeddings_multiples.unwrap_or(1),
            image: source.map(|source| source.picture.clone()),
            strength: line.strength.or(from.strength).unwrap_or(DEFAULT_STRENGTH),
            highres_fix,
            size_ids: Some(self.size_hints(line)),
            ..Request::default()
        };
        self.check_sampling(&request)?;
        Ok(request)
    }

    /// What SDXL is told: the prompt's numbers, else the command line's.
    fn size_hints(&self, line: &PromptLine) -> SizeHints {
        let (all, own) = (&self.options.sizes, line.told);
        SizeHints {
            original: [
                own.original[0].or(all.original_width),
                own.original[1].or(all.original_height),
            ],
            original_negative: [
                own.original_negative[0].or(all.original_width_negative),
                own.original_negative[1].or(all.original_height_negative),
            ],
            crop: [own.crop[0].unwrap_or(all.crop_left), own.crop[1].unwrap_or(all.crop_top)],
        }
    }

    /// Columns and rows: the prompt's, else both of the command line's, else those of the picture it
    /// starts from.
    fn size(&self, line: &PromptLine, source: Option<&Source>) -> Result<[usize; 2], String> {
        let (wide, high) = (self.options.picture.width, self.options.picture.height);
        let Some(source) = source.filter(|_| wide.is_none() || high.is_none()) else {
            let or =
                |own: Option<usize>, all: Option<usize>| own.or(all).unwrap_or(self.default_side);
            return Ok([or(line.width, wide), or(line.height, high)]);
        };
        let (width, height) = (source.picture.width, source.picture.height);
        let cut = |side: usize| side - side % IMAGE_MULTIPLE;
        let own = [line.width.unwrap_or(cut(width)), line.height.unwrap_or(cut(height))];
        if own.iter().any(|side| *side < LEAST_SIDE) {
            return Err(format!(
                "the picture to start from is too small, 64x64 is the least, it is: `{}`, \
                 {width}x{height}\nhint: `--W` and `--H` enlarge it",
                source.name
            ));
        }
        Ok(own)
    }

    /// Lays the sampler's run out, as it will be.
    fn check_sampling(&self, request: &Request) -> Result<(), String> {
        let lay_out = |options: &SamplerOptions, strength: Option<f64>| {
            let is_v = self.options.model.v_parameterization;
            let prediction = if is_v { Prediction::Velocity } else { Prediction::Epsilon };
            // A folder tells what it predicts only when it is loaded.
            let zero_terminal_snr = is_v && self.options.model.zero_terminal_snr;
            let options =
                SamplerOptions { prediction, zero_terminal_snr, strength, ..options.clone() };
            Sampler::new(request.sampler, &options).map(|_| ()).map_err(|error| error.to_string())
        };
        let is_from_image = request.image.is_some();
        let Some(highres) = &request.highres_fix else {
            return lay_out(&request.options, is_from_image.then_some(request.strength));
        };
        let first = SamplerOptions { steps: highres.steps, ..request.options.clone() };
        let strength = highres.strength.unwrap_or(request.strength);
        lay_out(&first, is_from_image.then_some(strength))?;
        lay_out(&request.options, Some(request.strength))?;
        for side in [request.width, request.height] {
            let smaller = first_stage_side(side, highres.scale);
            if smaller < LEAST_SIDE || smaller >= side {
                return Err(format!(
                    "with `--highres_fix_scale {}` the first stage of {}x{} would be smaller than 64 \
                     or not smaller than the picture: {smaller}\nhint: 0.5 halves both sides",
                    highres.scale, request.width, request.height
                ));
            }
        }
        Ok(())
    }
}

/// A side at the smaller size of `--highres_fix_scale`.
pub(super) fn first_stage_side(side: usize, scale: f64) -> usize {
    let side = (side as f64 * scale + 0.5) as usize;
    side - side % IMAGE_MULTIPLE
}

/// An error if an option can mean nothing by itself.
fn check(options: &Options) -> Result<(), Usage> {
    let refuse = |name: &str, should: &str, value: String| {
        Err(Usage(format!("`--{name}` should be {should}, it is: {value}")))
    };
    let (picture, asked) = (&options.picture, &options.prompts);
    for (name, side) in [("W", picture.width), ("H", picture.height)] {
        let Some(side) = side else { continue };
        if side < LEAST_SIDE || !side.is_multiple_of(8) {
            let below = (side - side % 8).max(LEAST_SIDE);
            let near = if side < LEAST_SIDE {
                "64".to_owned()
            } else {
                format!("{below} or {}", below + 8)
            };
            return Err(Usage(format!(
                "`--{name}` should be a number of pixels that 8 divides, 64 at least, it is: {side}\n\
                 hint: take {near}"
            )));
        }
    }
    let counts = [
        ("images_per_prompt", asked.images_per_prompt),
        ("n_iter", asked.n_iter),
        ("batch_size", options.machine.batch_size),
        ("clip_skip", picture.clip_skip.unwrap_or(1)),
        ("max_embeddings_multiples", picture.max_embeddings_multiples.unwrap_or(1)),
    ];
    if let Some((name, _)) = counts.iter().find(|(_, count)| *count == 0) {
        return refuse(name, "at least 1", "0".to_owned());
    }
    if !picture.scale.is_finite() {
        return refuse("scale", "a number", picture.scale.to_string());
    }
    let shares = [
        ("strength", options.source.strength),
        ("highres_fix_strength", options.source.highres_fix_strength),
    ];
    for (name, share) in shares {
        if let Some(share) = share.filter(|share| !(0. ..=1.).contains(share)) {
            return refuse(name, "between 0 and 1", share.to_string());
        }
    }
    if picture.ddim_eta != 0. {
        return Err(Usage(format!(
            "`--ddim_eta` can only be 0, DDIM is deterministic here: {}\nhint: `--sampler ddpm` and \
             `euler_a` add noise at each step",
            picture.ddim_eta
        )));
    }
    Ok(())
}
