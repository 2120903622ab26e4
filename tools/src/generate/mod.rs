//! `generate`: pictures from a model and LoRAs, with the option names of sd-scripts' `gen_img`.
//!
//! Everything that can be refused is refused before the model is loaded, and nothing is written then.
//! Each picture is written when it is made, with a text that says how; its path goes to stdout.

mod device;
mod layout;
mod lettering;
mod networks;
mod options;
mod outdir;
mod plan;
mod preview;
mod record;
mod report;
mod seeds;
mod sheet;
mod source;
mod studio;
mod tags;
#[cfg(test)]
mod tests;
mod unavailable;

use std::collections::BTreeSet;
use std::io::BufRead;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use formats::atomic::write_atomic;
use formats::prompt_lines::{PromptLine, parse_line, read_prompt_file};
use formats::{Family, OpenOptions, open_base_model};
use models::pipeline::{Picture, Request};
use pictures::{Pixels, encode_png};

use crate::Usage;
use crate::progress::tell;
use networks::Networks;
pub use options::Options;
use outdir::Names;
use plan::{Planner, SDXL_SIDE, Shot};
use preview::Protocol;
use record::Facts;
use report::Report;
use sheet::Sheet;
use source::Sources;
use studio::Studio;

/// Does the work.
///
/// # Errors
/// Options and prompts that cannot be meant, files that cannot be read or do not fit each other, a
/// folder that cannot be written to.
pub fn run(options: &Options) -> anyhow::Result<()> {
    options.unavailable.check()?;
    let ckpt = asked_model(options)?;
    outdir::check(&options.files.outdir)?;
    let networks = Networks::open(&options.lora, options.files.grid)?;
    let sources = Sources::open(&options.source)?;
    tell_notes(options, &networks);
    let lines = read_lines(options)?;
    let count = lines.as_ref().map(Vec::len);
    let mut planner = Planner::new(options, &networks, &sources, count)?;
    if options.model.sdxl || is_sdxl(options, ckpt) {
        planner.default_side = SDXL_SIDE;
    }
    let mut shots = match lines {
        Some(lines) => planner.all(lines)?,
        None => Vec::new(),
    };
    by_multipliers(&mut shots);
    let first = shots.first().map_or(networks.applied_multipliers(), |shot| &shot.multipliers);
    let studio = Studio::open(options, ckpt, &networks, first)?;
    let facts = Facts::new(&studio.pipeline.files);
    let sheet = options.files.grid.then(|| Sheet::new(planner.layout.columns.clone()));
    let mut work = Work {
        options,
        networks: &networks,
        studio,
        facts,
        sheet,
        names: Names::new(&options.files.outdir, options.files.sequential_file_name),
        written: BTreeSet::new(),
        made: 0,
        report: Report::new(shots.len()),
        preview: options.files.preview.then(Protocol::of_terminal).flatten(),
    };
    match count {
        Some(_) => work.make(&shots)?,
        None => work.converse(&mut planner)?,
    }
    work.finish(&planner)
}

/// The model's name, if model and prompt are there.
fn asked_model(options: &Options) -> Result<&str, Usage> {
    let asked = &options.prompts;
    let has_prompt = asked.prompt.is_some() || asked.from_file.is_some() || asked.interactive;
    let lacking = |what: &str| {
        Err(Usage(format!(
            "{what}\nhint: `lorarun generate --ckpt model.safetensors --prompt 'a red ring' --outdir \
             pictures`; `lorarun generate --help` has more examples"
        )))
    };
    match &options.model.ckpt {
        None => lacking("which model makes the pictures? `--ckpt` is missing"),
        Some(_) if !has_prompt => lacking(
            "what do the pictures show? `--prompt`, `--from_file` or `--interactive` is missing",
        ),
        Some(ckpt) => Ok(ckpt),
    }
}

/// Whether the model tells that it is an SDXL, looked at only where a default depends on it. One that
/// cannot be opened is told when it is loaded.
fn is_sdxl(options: &Options, ckpt: &str) -> bool {
    let (model, picture) = (&options.model, &options.picture);
    let settled = model.v1 || model.v2 || picture.width.is_some() && picture.height.is_some();
    let family = || open_base_model(ckpt, &OpenOptions::default()).map(|files| files.family);
    !settled && family().is_ok_and(|family| family == Family::Sdxl)
}

/// What is accepted and does nothing, or something else than in the reference.
fn tell_notes(options: &Options, networks: &Networks) {
    if options.machine.vae_batch_size.is_some() {
        tell("`--vae_batch_size` has no effect: pictures are decoded one at a time");
    }
    if options.source.mask_path.is_some() && !networks.all.is_empty() {
        tell("the mask says where the picture is made anew; LoRAs act on all of it");
    }
}

/// The prompts; `None` if they come from the terminal.
fn read_lines(options: &Options) -> anyhow::Result<Option<Vec<PromptLine>>> {
    let asked = &options.prompts;
    let lines = match (&asked.from_file, &asked.prompt) {
        (Some(file), _) => read_prompt_file(file).map_err(|error| Usage(error.to_string()))?,
        (_, Some(prompt)) => {
            vec![parse_line(prompt, 0).map_err(|error| Usage(format!("`--prompt`: {error}")))?]
        }
        _ => return Ok(None),
    };
    for line in &lines {
        line.notes.iter().for_each(|note| tell(&in_line(options, line, note)));
    }
    Ok(Some(lines))
}

/// A sentence about a line with its place.
fn in_line(options: &Options, line: &PromptLine, said: &str) -> String {
    match &options.prompts.from_file {
        Some(file) => format!("{}:{}: {said}", file.display(), line.line),
        None => said.to_owned(),
    }
}

/// Pictures of the same multipliers one after the other: to change them takes time.
fn by_multipliers(shots: &mut [Shot]) {
    let mut seen: Vec<Vec<f32>> = Vec::new();
    for shot in shots.iter() {
        if !seen.contains(&shot.multipliers) {
            seen.push(shot.multipliers.clone());
        }
    }
    shots.sort_by_key(|shot| seen.iter().position(|one| *one == shot.multipliers));
}

/// A run that is going on.
struct Work<'a> {
    options: &'a Options,
    networks: &'a Networks,
    studio: Studio,
    facts: Facts,
    sheet: Option<Sheet>,
    names: Names,
    /// Files of this run.
    written: BTreeSet<PathBuf>,
    /// Pictures of this run.
    made: usize,
    report: Report,
    preview: Option<Protocol>,
}

impl Work<'_> {
    /// Makes and writes pictures.
    fn make(&mut self, shots: &[Shot]) -> anyhow::Result<()> {
        self.studio.check_prompts(shots)?;
        let mut rest = shots;
        while let Some(first) = rest.first() {
            let goes_with = |shot: &&Shot| are_alike(shot, first);
            let most = rest.len().min(self.options.machine.batch_size);
            let count = rest[..most].iter().take_while(goes_with).count();
            let (batch, after) = rest.split_at(count);
            self.make_batch(batch)?;
            rest = after;
        }
        Ok(())
    }

    fn make_batch(&mut self, batch: &[Shot]) -> anyhow::Result<()> {
        self.studio.set(&batch[0].multipliers)?;
        let requests: Vec<Request> = batch.iter().map(|shot| shot.request.clone()).collect();
        if self.options.source.highres_fix_save_1st {
            let firsts: Vec<Request> = requests.iter().filter_map(first_stage).collect();
            let pictures = self.compute(&firsts)?;
            for (index, (picture, (shot, request))) in
                pictures.iter().zip(batch.iter().zip(firsts)).enumerate()
            {
                let path = self.names.of(self.made + index, request.seed, "0");
                let shot = Shot { request, ..shot.clone() };
                let path = self.write(&shot, picture, path)?;
                self.report.show_path(&path);
            }
        }
        let pictures = self.compute(&requests)?;
        for (shot, picture) in batch.iter().zip(&pictures) {
            let path = self.path_of(shot);
            let path = self.write(shot, picture, path)?;
            self.made += 1;
            self.report.wrote(&path);
        }
        Ok(())
    }

    fn compute(&mut self, requests: &[Request]) -> anyhow::Result<Vec<Picture>> {
        let (studio, report) = (&self.studio, &mut self.report);
        report.begin(requests.len());
        let mut watch = |progress| {
            report.step(requests.len(), progress);
            ControlFlow::Continue(())
        };
        Ok(studio.make(requests, &mut watch)?)
    }

    fn path_of(&self, shot: &Shot) -> PathBuf {
        let as_origin = shot.origin.as_ref().filter(|_| self.options.files.use_original_file_name);
        let stage = if shot.request.highres_fix.is_some() { "1" } else { "" };
        match shot.file_name.as_ref().or(as_origin) {
            Some(name) => self.names.called(name),
            None => self.names.of(self.made, shot.request.seed, stage),
        }
    }

    /// Writes a picture with its texts; gives the path, with a number where this run has already
    /// written that one.
    fn write(&mut self, shot: &Shot, picture: &Picture, path: PathBuf) -> anyhow::Result<PathBuf> {
        let pixels = Pixels {
            width: picture.width,
            height: picture.height,
            channels: 3,
            data: picture.to_rgb8(),
        };
        let texts = record::texts(shot, self.networks, &mut self.facts);
        let texts: Vec<(&str, &str)> =
            texts.iter().map(|(key, text)| (*key, text.as_str())).collect();
        let path = self.fresh(path);
        let png = self.write_png(&path, &pixels, &texts)?;
        if let Some(protocol) = self.preview {
            self.report.beside_bar(|| protocol.show(&pixels, &png));
        }
        if let Some(sheet) = &mut self.sheet {
            sheet.put(&shot.cells, &pixels);
        }
        Ok(path)
    }

    fn write_png(
        &self,
        path: &Path,
        pixels: &Pixels,
        texts: &[(&str, &str)],
    ) -> anyhow::Result<Vec<u8>> {
        let png = encode_png(pixels, texts)?;
        self.names.make_folder()?;
        write_atomic(path, |file| file.write_all(&png))?;
        Ok(png)
    }

    /// A path that this run has not written yet.
    fn fresh(&mut self, path: PathBuf) -> PathBuf {
        let numbered = |number: usize| match number {
            1 => path.clone(),
            _ => {
                let stem = networks::name_of(&path);
                path.with_file_name(format!("{stem}-{number}.png"))
            }
        };
        let paths = (1..).map(numbered);
        let fresh = paths.into_iter().find(|path| !self.written.contains(path)).unwrap_or_default();
        self.written.insert(fresh.clone());
        fresh
    }

    /// Makes pictures of what is typed, until an empty line or the end.
    fn converse(&mut self, planner: &mut Planner<'_>) -> anyhow::Result<()> {
        let mut typed = String::new();
        let mut stdin = std::io::stdin().lock();
        loop {
            self.report.beside_bar(|| tell("prompt (an empty line ends):"));
            typed.clear();
            if stdin.read_line(&mut typed)? == 0 || typed.trim().is_empty() {
                return Ok(());
            }
            // What is wrong with one prompt does not end the conversation.
            let planned = parse_line(&typed, 0)
                .map_err(|error| anyhow::anyhow!("{error}"))
                .and_then(|line| {
                    line.notes.iter().for_each(|note| tell(note));
                    Ok(planner.of_line(&line, None)?)
                })
                .and_then(|mut shots| {
                    self.studio.check_prompts(&shots)?;
                    by_multipliers(&mut shots);
                    Ok(shots)
                });
            match planned {
                Ok(shots) => {
                    self.report.add(shots.len());
                    self.make(&shots)?;
                }
                Err(error) => self.report.beside_bar(|| tell(&format!("error: {error:#}"))),
            }
        }
    }

    /// Writes the sheet.
    fn finish(mut self, planner: &Planner<'_>) -> anyhow::Result<()> {
        let Some(sheet) = self.sheet.take() else { return Ok(()) };
        if planner.rows.is_empty() {
            return Ok(());
        }
        let drawn = sheet.draw(&planner.rows)?;
        let path = self.fresh(self.names.of_grid());
        let png = self.write_png(&path, &drawn, &[])?;
        if let Some(protocol) = self.preview {
            self.report.beside_bar(|| protocol.show(&drawn, &png));
        }
        self.report.show_path(&path);
        Ok(())
    }
}

/// Whether two pictures can be in one batch.
fn are_alike(one: &Shot, other: &Shot) -> bool {
    let (a, b) = (&one.request, &other.request);
    one.multipliers == other.multipliers
        && (a.width, a.height, a.sampler) == (b.width, b.height, b.sampler)
        && (&a.options, a.guidance_scale, a.strength) == (&b.options, b.guidance_scale, b.strength)
}

/// The smaller picture of `--highres_fix_scale` by itself.
fn first_stage(request: &Request) -> Option<Request> {
    Some(request.highres_fix?.first(request))
}
