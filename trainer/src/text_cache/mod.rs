//! `cache_text_encoder_outputs` and `cache_text_encoder_outputs_to_disk`: every caption goes through
//! the text encoders once, then they leave the memory, before the U-Net comes.
//!
//! Each different caption is encoded by one rank. In memory, the ranks of a host share one mapped copy;
//! the outputs travel to other hosts with the exchange. On disk ([`file`]), each rank writes the files
//! of what it encoded, and a later run reads them without loading the text encoders. On a card captions
//! are encoded in advance whenever they stay the same; on the CPU where the option asks for it.

pub mod file;
mod place;
mod settings;
mod share;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use collectives::{Comm, Env, Phase};
use engine::Device;
use models::TextEncoders;
use models::prompt::Tokenizers;

use self::file::Found;
use self::place::Place;
use self::settings::{Setting, settings_of};
use self::share::{Said, exchange, rounds, share};
use crate::base::Base;
use crate::console;
use crate::dataset::latent_cache::{CACHE_FOLDER, create_folder};
use crate::dataset::{DatasetError, DatasetGroup, TokenLength, Tokens};
use crate::encoded::{Caption, Encoded, Form, Key, Row, constant_captions, encode_captions};
use crate::memory::show_bytes;
use crate::options::Options;

/// Captions that go through the text encoders together, unless `text_encoder_batch_size` says.
const TOGETHER: usize = 16;

/// Longest time that a batch may take on any rank.
const PATIENCE: Duration = Duration::from_secs(3600);

/// Text encoders that are loaded when they are first needed.
pub struct Encoders<'a> {
    base: &'a Base,
    loaded: Option<TextEncoders>,
}

impl<'a> Encoders<'a> {
    /// Those of a base model, not loaded yet.
    pub fn of(base: &'a Base) -> Self {
        Self { base, loaded: None }
    }

    /// The text encoders.
    ///
    /// # Errors
    /// As [`Base::load_text_encoder`].
    pub fn get(&mut self) -> Result<&TextEncoders> {
        if self.loaded.is_none() {
            self.loaded = Some(self.base.load_text_encoder()?);
        }
        self.loaded.as_ref().context("the text encoder is gone")
    }

    /// The text encoders where they are needed further; else they go.
    ///
    /// # Errors
    /// As [`Base::load_text_encoder`].
    pub fn kept(mut self, needed: bool) -> Result<Option<TextEncoders>> {
        if needed {
            self.get()?;
        }
        Ok(self.loaded.filter(|_| needed))
    }
}

fn unusable(problem: String) -> anyhow::Error {
    DatasetError::TextOutputs(problem).into()
}

/// An image and its caption.
#[derive(Clone, Debug)]
struct Item {
    image: PathBuf,
    file: PathBuf,
    /// Place in [`TextCache::captions`].
    caption: usize,
}

/// The captions of a run, to be encoded before the training.
pub struct TextCache {
    /// Each once, in the order of the images.
    captions: Vec<Caption>,
    /// Each image once; with files beside the images.
    items: Vec<Item>,
    /// What outputs depend on; with files beside the images.
    settings: Vec<Setting>,
    form: Form,
    clip_skip: Option<usize>,
    batch: usize,
    to_disk: bool,
    skip_check: bool,
    /// Numbers of items without a file; see [`TextCache::find_missing`].
    missing: Vec<usize>,
}

/// A line of the plan: what becomes of the captions, where the option asks for it.
pub fn describe(options: &Options, base: &Base, group: &DatasetGroup) -> Option<String> {
    if !options.cache_text_encoder_outputs {
        return None;
    }
    Some(match options.cache_text_encoder_outputs_to_disk {
        true => format!("encoded before training, kept in {CACHE_FOLDER} beside the images"),
        false => {
            let bytes = show_bytes(bytes_in_memory(options, base, group));
            format!("encoded before training, kept in main memory ({bytes})")
        }
    })
}

/// Bytes of main memory that the captions of `group` take, encoded before the training.
pub fn bytes_in_memory(options: &Options, base: &Base, group: &DatasetGroup) -> usize {
    let length = options.max_token_length.and_then(|length| u32::try_from(length).ok());
    let chunks = TokenLength::from_option(length).unwrap_or_default().chunks();
    let images = group.datasets.iter().flat_map(|dataset| &dataset.images);
    let captions: BTreeSet<&str> = images.map(|image| image.caption.as_str()).collect();
    match options.cache_text_encoder_outputs_to_disk {
        true => 0,
        false => captions.len() * Form::new(base, chunks).bytes(),
    }
}

/// Whether the captions of these groups are encoded before the training, the text encoders not being
/// trained.
pub fn is_wanted(options: &Options, device: Device) -> bool {
    options.cache_text_encoder_outputs || device != Device::Cpu
}

/// Captions that go through the text encoders together.
pub fn together(options: &Options) -> usize {
    options.text_encoder_batch_size.unwrap_or(TOGETHER).max(1)
}

impl TextCache {
    /// The captions of these images, and which of them are beside the images already; `None` where
    /// captions are encoded when they are needed. All ranks call it, before anything is loaded.
    ///
    /// # Errors
    /// Files of something else, an image that has two captions, a folder that cannot be made.
    pub fn find(
        (options, base): (&Options, &Base),
        groups: &[DatasetGroup],
        comm: &Comm,
    ) -> Result<Option<Self>> {
        if !is_wanted(options, base.device) {
            return Ok(None);
        }
        let Some(mut texts) = Self::new(options, base, &base.tokenizers()?, groups)? else {
            return Ok(None);
        };
        texts.find_missing(comm)?;
        Ok(Some(texts))
    }

    fn new(
        options: &Options,
        base: &Base,
        tokenizers: &Tokenizers,
        groups: &[DatasetGroup],
    ) -> Result<Option<Self>> {
        let length = options.max_token_length.map(|length| length as u32);
        let length =
            TokenLength::from_option(length).context("`max_token_length` must be 150 or 225")?;
        let to_disk = options.cache_text_encoder_outputs_to_disk;
        let mut cache = Self {
            captions: Vec::new(),
            items: Vec::new(),
            settings: match to_disk {
                true => settings_of(options, base, tokenizers)?,
                false => Vec::new(),
            },
            form: Form::new(base, length.chunks()),
            clip_skip: options.clip_skip,
            batch: together(options),
            to_disk,
            skip_check: options.skip_cache_check,
            missing: Vec::new(),
        };
        let reading = (length, options.weighted_captions);
        let (mut known, mut images) = (HashMap::new(), BTreeMap::new());
        for group in groups {
            let Some(captions) = constant_captions(group) else { return Ok(None) };
            let entries = group.datasets.iter().flat_map(|dataset| &dataset.images);
            for (entry, text) in entries.zip(captions) {
                let number = match known.get(&text) {
                    Some(number) => *number,
                    None => {
                        let tokens = Tokens::of(tokenizers, &text, reading)?;
                        cache.captions.push(Caption { text: text.clone(), tokens });
                        known.insert(text, cache.captions.len() - 1);
                        cache.captions.len() - 1
                    }
                };
                cache.add_image(&entry.path, number, &mut images)?;
            }
        }
        Ok(Some(cache))
    }

    fn add_image(
        &mut self,
        image: &Path,
        caption: usize,
        seen: &mut BTreeMap<PathBuf, usize>,
    ) -> Result<()> {
        if !self.to_disk {
            return Ok(());
        }
        match seen.insert(image.to_owned(), caption) {
            None => {
                let (image, file) = (image.to_owned(), file::path_of(image));
                self.items.push(Item { image, file, caption });
            }
            Some(before) if before != caption => {
                return Err(unusable(format!(
                    "`cache_text_encoder_outputs_to_disk` keeps one caption for each image, `{}` has \
                 two: `{}` and `{}`\nhint: `cache_text_encoder_outputs` alone takes both",
                    image.display(),
                    self.captions[before].text,
                    self.captions[caption].text
                )));
            }
            Some(_) => {}
        }
        Ok(())
    }

    /// Looks at the files beside the images.
    fn find_missing(&mut self, comm: &Comm) -> Result<()> {
        if !self.to_disk {
            return Ok(());
        }
        let before = comm.set_deadline(PATIENCE);
        let found = self.look_at_files(comm);
        comm.set_deadline(before);
        self.missing = found?;
        Ok(())
    }

    fn look_at_files(&self, comm: &Comm) -> Result<Vec<usize>> {
        let folders: BTreeSet<&Path> =
            self.items.iter().filter_map(|item| item.file.parent()).collect();
        let created = folders.into_iter().try_for_each(|folder| {
            create_folder(folder, "cache_text_encoder_outputs", comm.rank() == 0)
        });
        let created = created.map_err(anyhow::Error::from);
        let mut said = Said::outcome(&created);
        let own = self.items.iter().enumerate().skip(comm.rank()).step_by(comm.world_size());
        for (number, item) in own {
            comm.live();
            if self.skip_check && item.file.exists() {
                continue;
            }
            let caption = &self.captions[item.caption];
            match file::check(&item.file, &self.settings, caption, &self.form) {
                Found::Fits => {}
                Found::Nothing => said.files.push((number, String::new())),
                Found::Other(difference) => said.files.push((number, difference)),
            }
        }
        let all = exchange(comm, said, &[])?;
        created?;
        let mut files: Vec<(usize, String)> = all.into_iter().flat_map(|(s, _)| s.files).collect();
        files.sort();
        let other: Vec<&(usize, String)> = files.iter().filter(|(_, o)| !o.is_empty()).collect();
        if let Some((number, difference)) = other.first() {
            let Item { image, file, .. } = &self.items[*number];
            return Err(unusable(format!(
                "cached text encoder outputs of {} of {} images are for something else, the first \
                 of them `{}`: {difference}\nhint: if that was changed on purpose, remove the files \
                 and start again: `find {} -name '*_te_outputs.safetensors' -delete`; \
                 `cache_text_encoder_outputs` alone reads no files",
                other.len(),
                self.items.len(),
                file.display(),
                image.parent().unwrap_or(Path::new(".")).display()
            )));
        }
        Ok(files.into_iter().map(|(number, _)| number).collect())
    }

    /// Encodes what is missing, shared by the ranks. All ranks call it.
    ///
    /// # Errors
    /// A full disk, outputs that are not finite, or these on another rank; being asked to stop.
    pub fn encode(self, encoders: &mut Encoders<'_>, comm: &Comm, env: &Env) -> Result<Encoded> {
        let before = comm.set_deadline(PATIENCE);
        comm.enter_phase(Phase::Caching);
        let encoded = match self.to_disk {
            true => self.encode_to_disk(encoders, comm),
            false => self.encode_to_memory(encoders, comm, env),
        };
        comm.enter_phase(Phase::Loading);
        comm.set_deadline(before);
        encoded
    }

    /// The outputs of some captions.
    fn outputs(&self, encoders: &mut Encoders<'_>, captions: &[&Caption]) -> Result<Vec<Vec<u8>>> {
        if captions.is_empty() {
            return Ok(Vec::new());
        }
        encode_captions((encoders.get()?, self.clip_skip), captions, &self.form)
    }

    fn encode_to_disk(self, encoders: &mut Encoders<'_>, comm: &Comm) -> Result<Encoded> {
        let mut images: BTreeMap<usize, Vec<&Item>> = BTreeMap::new();
        for number in &self.missing {
            let item = &self.items[*number];
            images.entry(item.caption).or_default().push(item);
        }
        let numbers: Vec<usize> = images.keys().copied().collect();
        let world = (comm.rank(), comm.world_size());
        for round in 0..rounds(numbers.len(), self.batch, world.1) {
            comm.live();
            let own = &numbers[share(numbers.len(), self.batch, world, round)];
            let captions: Vec<&Caption> = own.iter().map(|n| &self.captions[*n]).collect();
            let written = self.outputs(encoders, &captions).and_then(|outputs| {
                for ((number, caption), bytes) in own.iter().zip(captions).zip(&outputs) {
                    for item in images.get(number).into_iter().flatten() {
                        file::write(&item.file, &self.settings, caption, (bytes, &self.form))?;
                    }
                }
                Ok(())
            });
            exchange(comm, Said::outcome(&written), &[])?;
            written?;
        }
        let (made, all) = (self.missing.len(), self.items.len());
        console::note(&format!(
            "text encoder outputs of {all} images are on disk, {} of them from earlier runs",
            all - made
        ));
        let mut rows: HashMap<Key, Row> = HashMap::new();
        for item in self.items {
            let key = self.captions[item.caption].key();
            rows.entry(key).or_insert(Row::Beside(item.file));
        }
        Ok(Encoded::new(rows, self.form))
    }

    fn encode_to_memory(
        self,
        encoders: &mut Encoders<'_>,
        comm: &Comm,
        env: &Env,
    ) -> Result<Encoded> {
        let world = (comm.rank(), comm.world_size());
        let place = match env.local_world_size {
            0 | 1 => None,
            _ => Some(Place::agree(comm, env)?),
        };
        let mut rows: HashMap<Key, Row> = HashMap::new();
        // What became of the last round's bytes on this rank.
        let mut kept: Result<()> = Ok(());
        let rounds = rounds(self.captions.len(), self.batch, world.1);
        for round in 0..rounds {
            comm.live();
            let own = &self.captions[share(self.captions.len(), self.batch, world, round)];
            let captions: Vec<&Caption> = own.iter().collect();
            let outputs = kept.and_then(|()| self.outputs(encoders, &captions));
            let bytes = outputs.as_ref().map(|rows| rows.concat()).unwrap_or_default();
            let all = exchange(comm, Said::outcome(&outputs), &bytes)?;
            outputs?;
            let bytes: Vec<u8> = all.into_iter().flat_map(|(_, bytes)| bytes).collect();
            let first = round * self.batch * world.1;
            kept = match &place {
                Some(place) => place.keep(round, bytes, &self.form),
                None => {
                    for (caption, row) in
                        self.captions[first..].iter().zip(bytes.chunks(self.form.bytes()))
                    {
                        rows.insert(caption.key(), Row::Memory(row.to_vec()));
                    }
                    Ok(())
                }
            };
        }
        if let Some(place) = &place {
            exchange(comm, Said::outcome(&kept), &[])?;
            kept?;
            let opened = (0..rounds).map(|round| place.open(round)).collect::<Result<Vec<_>>>();
            // Nobody removes the folder before everybody has mapped the files.
            exchange(comm, Said::outcome(&opened), &[])?;
            let (opened, each) = (opened?, self.batch * world.1);
            for (number, caption) in self.captions.iter().enumerate() {
                let row = Row::Shared(Arc::clone(&opened[number / each]), number % each);
                rows.insert(caption.key(), row);
            }
        }
        let encoded = Encoded::new(rows, self.form);
        let (count, bytes) = encoded.size();
        console::note(&format!("{count} captions are encoded ({})", show_bytes(bytes)));
        Ok(encoded)
    }
}
