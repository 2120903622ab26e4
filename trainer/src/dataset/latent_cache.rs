//! `cache_latents` and `cache_latents_to_disk`: every image goes through the VAE once.
//!
//! All ranks share the work through the cache folder: they look for what is missing, divide it,
//! encode, and write one file for each image (see [`super::latent_file`]). A file appears whole or
//! not at all, so a kill loses at most the image that was being encoded. Work goes in rounds of a few
//! seconds with an exchange after each: no rank waits long for another, and an error on one rank ends
//! all of them with its message.

use super::error::DatasetError;
use super::group::{DatasetGroup, ImageEntry};
use super::latent_file::{self, Alpha, CachedLatents, LatentSettings, MOMENT_CHANNELS};
use super::ordered::Ordered;
use super::picture::{LATENT_SCALE, Picture, Variation, mirrored, prepare};
use collectives::{Comm, signals};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Name of the folder beside the images.
pub const CACHE_FOLDER: &str = ".lorarun-cache";

/// How long a round of encoding lasts before the ranks exchange their progress.
const ROUND: Duration = Duration::from_secs(2);

/// Longest time that one image may take on any rank.
const PATIENCE: Duration = Duration::from_secs(3600);

/// The VAE's encoder as the cache uses it.
pub trait LatentEncoder {
    /// Mean and log-variance (in this order, not scaled) of images `[B,H,W,3]` in [-1,1]: values of
    /// `[B,H/8,W/8,8]`. `shape` is `[B,H,W,3]`.
    ///
    /// # Errors
    /// Whatever the encoder finds wrong; it ends the run.
    fn encode(&mut self, images: &[f32], shape: [usize; 4]) -> anyhow::Result<Vec<f32>>;

    /// What to say of values that are no numbers: whose they are, and on a line of its own what helps.
    fn blame(&self) -> String;
}

/// Where the cache lies and how long.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CachePlace {
    /// `cache_latents_to_disk`: in [`CACHE_FOLDER`] beside the images, to stay; read again for each
    /// sample.
    BesideImages,
    /// `cache_latents`: in this folder while the ranks share the work; then all of it is in memory
    /// and the folder is removed. All ranks of a host name the same folder, which holds nothing else.
    Temporary(PathBuf),
}

/// How latents are cached.
pub struct CacheOptions<'a> {
    /// Where.
    pub place: CachePlace,
    /// Number of this rank among those that share the work and the place, and how many they are:
    /// those of its host for a temporary folder, which other hosts do not see.
    pub share: (usize, usize),
    /// Identity of the VAE: a hash of its weights and the precision it computes in.
    pub vae: String,
    /// Images of one size that are encoded together (`vae_batch_size`).
    pub batch_size: usize,
    /// Threads that decode images ahead.
    pub workers: usize,
    /// Refuse damaged images instead of leaving them out.
    pub strict_data: bool,
    /// `skip_cache_check`: believe in files that exist.
    pub skip_check: bool,
    /// Called with images done and images to do, over all ranks.
    pub progress: &'a mut dyn FnMut(usize, usize),
}

/// One image to cache.
#[derive(Debug, Clone)]
struct Item {
    dataset: u32,
    image: u32,
    file: PathBuf,
    settings: LatentSettings,
}

enum Held {
    Memory(Arc<CachedLatents>),
    Disk(PathBuf, LatentSettings),
}

/// The latents of all images of a group.
pub struct LatentStore {
    held: HashMap<(u32, u32), Held>,
}

impl LatentStore {
    /// The latents of image `image` of dataset `dataset`.
    ///
    /// # Errors
    /// A cache file that was removed or damaged since the run began.
    pub fn get(&self, dataset: u32, image: u32) -> Result<Arc<CachedLatents>, DatasetError> {
        match self.held.get(&(dataset, image)) {
            Some(Held::Memory(latents)) => Ok(latents.clone()),
            Some(Held::Disk(file, settings)) => {
                let read = latent_file::read(file, settings);
                let unusable = |problem| DatasetError::CacheFile { path: file.clone(), problem };
                read.map(Arc::new).map_err(unusable)
            }
            None => Err(DatasetError::CacheFile {
                path: PathBuf::new(),
                problem: format!("image {image} of dataset {dataset} was never cached"),
            }),
        }
    }

    /// Number of images.
    pub fn len(&self) -> usize {
        self.held.len()
    }

    /// True if no image is held.
    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }
}

/// Caches the latents of all images. All ranks call it with the same group.
///
/// Gives back the group without images that turned out damaged (named in its warnings), and the
/// latents. Sampling must use the group that comes back.
///
/// # Errors
/// Options that change pixels each time, latents that are not finite, a cache that cannot be
/// written, with `strict_data` a damaged image, or any of these on another rank.
pub fn cache_latents(
    group: DatasetGroup,
    encoder: &mut dyn LatentEncoder,
    comm: &Comm,
    options: CacheOptions<'_>,
) -> Result<(DatasetGroup, LatentStore), DatasetError> {
    group.check_latents_cacheable()?;
    let before = comm.set_deadline(PATIENCE);
    let result = cache_together(group, encoder, comm, options);
    comm.set_deadline(before);
    result
}

fn cache_together(
    group: DatasetGroup,
    encoder: &mut dyn LatentEncoder,
    comm: &Comm,
    mut options: CacheOptions<'_>,
) -> Result<(DatasetGroup, LatentStore), DatasetError> {
    let items = list_items(&group, &options);
    let mut created = Ok(());
    for folder in items.iter().filter_map(|item| item.file.parent()).collect::<BTreeSet<_>>() {
        if created.is_ok() {
            created = create_folder(folder, "cache_latents", comm.rank() == 0);
        }
    }
    let missing = find_missing(&group, &items, comm, &options, created)?;
    let group = Arc::new(group);
    let unusable = encode_missing(&group, &items, &missing, encoder, comm, &mut options)?;
    let group = Arc::try_unwrap(group).unwrap_or_else(|shared| (*shared).clone());
    let files: HashMap<&Path, &String> =
        unusable.iter().map(|(index, problem)| (items[*index].file.as_path(), problem)).collect();
    let group = if files.is_empty() { group } else { leave_out(group, &files, &options)? };
    let loaded = load(&group, &options);
    // Nobody removes the folder before everybody has read it.
    let failure = loaded.as_ref().err().map(ToString::to_string);
    exchange(comm, &Report { error: failure, ..Report::default() })?;
    if let (CachePlace::Temporary(folder), 0) = (&options.place, options.share.0) {
        std::fs::remove_dir_all(folder)
            .map_err(|error| DatasetError::file("remove the folder", folder, error))?;
    }
    Ok((group, LatentStore { held: loaded? }))
}

/// Makes a cache folder of `option`; rank 0 also clears away what killed runs left half written in
/// it.
pub(crate) fn create_folder(folder: &Path, option: &str, clear: bool) -> Result<(), DatasetError> {
    std::fs::create_dir_all(folder).map_err(|error| DatasetError::CacheFile {
        path: folder.to_owned(),
        problem: format!(
            "the folder cannot be created: {error}\nhint: `{option}` without `{option}_to_disk` \
             needs no place beside the images"
        ),
    })?;
    if clear {
        let old = |path: &Path| {
            let modified = path.metadata().and_then(|metadata| metadata.modified()).ok()?;
            Some(modified.elapsed().ok()? > PATIENCE)
        };
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        for path in entries.map(|entry| entry.path()) {
            if path.extension().is_some_and(|extension| extension == "part")
                && old(&path) == Some(true)
            {
                // Another run may have been faster; a file that stays does no harm.
                let _ = std::fs::remove_file(&path);
            }
        }
    }
    Ok(())
}

/// The group without the images, in whichever dataset, of the cache files that could not be made.
fn leave_out(
    group: DatasetGroup,
    files: &HashMap<&Path, &String>,
    options: &CacheOptions<'_>,
) -> Result<DatasetGroup, DatasetError> {
    let mut lost = BTreeMap::new();
    for (dataset, images) in group.datasets.iter().enumerate() {
        for (image, entry) in images.images.iter().enumerate() {
            let key = (dataset as u32, image as u32);
            let item = item_of(&group, key, entry, options);
            if let Some(problem) = files.get(item.file.as_path()) {
                lost.insert(key, (*problem).clone());
            }
        }
    }
    group.without(&lost)
}

/// All images, each cache file once.
fn list_items(group: &DatasetGroup, options: &CacheOptions<'_>) -> Vec<Item> {
    let mut items = BTreeMap::new();
    for (dataset, images) in group.datasets.iter().enumerate() {
        for (image, entry) in images.images.iter().enumerate() {
            let item = item_of(group, (dataset as u32, image as u32), entry, options);
            items.entry(item.file.clone()).or_insert(item);
        }
    }
    items.into_values().collect()
}

fn item_of(
    group: &DatasetGroup,
    (dataset, image): (u32, u32),
    entry: &ImageEntry,
    options: &CacheOptions<'_>,
) -> Item {
    let subset = &group.datasets[dataset as usize].plan.subsets[entry.subset].options;
    let interpolation = match subset.resize_interpolation {
        Some(interpolation) => format!("{interpolation:?}").to_lowercase(),
        None => "area or lanczos".to_owned(),
    };
    let settings = LatentSettings {
        bucket: entry.bucket,
        resized: entry.resized,
        interpolation,
        alpha: match &entry.mask {
            Some(mask) => Alpha::Mask(mask.hash.clone()),
            None if subset.alpha_mask => Alpha::Channel,
            None => Alpha::None,
        },
        flip: subset.flip_aug,
        vae: options.vae.clone(),
    };
    let file = match &options.place {
        CachePlace::BesideImages => {
            let folder = entry.path.parent().unwrap_or(Path::new(""));
            folder.join(CACHE_FOLDER).join(settings.file_name(&entry.path, false))
        }
        CachePlace::Temporary(folder) => folder.join(settings.file_name(&entry.path, true)),
    };
    Item { dataset, image, file, settings }
}

/// What a rank tells the others after each piece of work.
#[derive(Debug, Default, serde::Serialize, serde::Deserialize)]
struct Report {
    /// Images done since the start.
    done: usize,
    /// Nothing is left to do here.
    finished: bool,
    /// Item numbers: what is missing, or (with a problem) unusable.
    items: Vec<(usize, String)>,
    /// Why this rank cannot go on.
    error: Option<String>,
    /// This rank was asked to stop.
    stop: bool,
    /// What this rank takes for the dataset; in the first exchange.
    fingerprint: Option<[u8; 32]>,
}

/// Gives every rank the reports of all; an error of any rank is an error of all.
fn exchange(comm: &Comm, report: &Report) -> Result<Vec<Report>, DatasetError> {
    let lost = |error: String| DatasetError::Exchange(error);
    let bytes = serde_json::to_vec(report).map_err(|error| lost(error.to_string()))?;
    let gathered = comm.all_gather(&bytes).map_err(|error| lost(error.to_string()))?;
    let reports: Result<Vec<Report>, _> =
        gathered.iter().map(|bytes| serde_json::from_slice(bytes)).collect();
    let reports = reports.map_err(|error| lost(error.to_string()))?;
    let is_other = |(rank, report): (usize, &Report)| {
        let message = report.error.clone()?;
        (rank != comm.rank()).then_some(DatasetError::OtherRank { rank, message })
    };
    if report.error.is_none()
        && let Some(error) = reports.iter().enumerate().find_map(is_other)
    {
        return Err(error);
    }
    Ok(reports)
}

/// Which items must be encoded: every rank looks at its share, all know the whole.
fn find_missing(
    group: &DatasetGroup,
    items: &[Item],
    comm: &Comm,
    options: &CacheOptions<'_>,
    created: Result<(), DatasetError>,
) -> Result<Vec<usize>, DatasetError> {
    let error = created.as_ref().err().map(ToString::to_string);
    let fingerprint = Some(group.fingerprint());
    let mut report = Report { error, fingerprint, ..Report::default() };
    let (share, shares) = options.share;
    for (index, item) in items.iter().enumerate().skip(share).step_by(shares) {
        comm.live();
        let Some(entry) = group.image(item.dataset, item.image) else { continue };
        let state = if options.skip_check && item.file.exists() {
            Ok(())
        } else {
            latent_file::check(&item.file, &entry.path, &item.settings)
        };
        if let Err(reason) = state {
            report.items.push((index, reason));
        }
    }
    let reports = exchange(comm, &report)?;
    created?;
    if let Some(rank) = reports.iter().position(|other| other.fingerprint != fingerprint) {
        return Err(DatasetError::Exchange(format!(
            "rank {} and rank {rank} see different images or captions\nhint: every host needs the \
             same files in the same place",
            comm.rank()
        )));
    }
    let mut missing: Vec<usize> =
        reports.into_iter().flat_map(|report| report.items).map(|(index, _)| index).collect();
    // Images of one size are neighbours, so that they can be encoded together.
    missing.sort_by_key(|index| (items[*index].settings.bucket, *index));
    missing.dedup();
    Ok(missing)
}

/// Encodes what is missing, shared by the ranks; gives the items whose images are damaged.
fn encode_missing(
    group: &Arc<DatasetGroup>,
    items: &[Item],
    missing: &[usize],
    encoder: &mut dyn LatentEncoder,
    comm: &Comm,
    options: &mut CacheOptions<'_>,
) -> Result<BTreeMap<usize, String>, DatasetError> {
    let mut unusable = BTreeMap::new();
    if missing.is_empty() {
        return Ok(unusable);
    }
    (options.progress)(0, missing.len());
    let batches = cut_batches(items, missing, options.batch_size.max(1));
    let own: Vec<Vec<usize>> =
        batches.into_iter().skip(options.share.0).step_by(options.share.1).collect();
    let flat: Vec<(u32, u32)> =
        own.iter().flatten().map(|index| (items[*index].dataset, items[*index].image)).collect();
    let mut pictures = decode_ahead(group.clone(), flat, options)?;
    let mut own = own.into_iter();
    let mut report = Report::default();
    loop {
        report.items.clear();
        let started = Instant::now();
        let mut failure = None;
        while failure.is_none()
            && !report.finished
            && !signals::stop_requested()
            && started.elapsed() < ROUND
        {
            match own.next() {
                None => report.finished = true,
                Some(batch) => {
                    comm.live();
                    report.done += batch.len();
                    let encoded = encode_batch(&batch, (group, items), &mut pictures, encoder);
                    match encoded {
                        Ok(damaged) if options.strict_data && !damaged.is_empty() => {
                            let (index, problem) = &damaged[0];
                            let entry = group.image(items[*index].dataset, items[*index].image);
                            let path = entry.map(|entry| entry.path.clone()).unwrap_or_default();
                            failure = Some(DatasetError::image(&path, problem.clone()));
                        }
                        Ok(damaged) => report.items.extend(damaged),
                        Err(error) => failure = Some(error),
                    }
                }
            }
        }
        report.error = failure.as_ref().map(ToString::to_string);
        report.stop = signals::stop_requested();
        let reports = exchange(comm, &report)?;
        if let Some(error) = failure {
            return Err(error);
        }
        let done: usize = reports.iter().map(|report| report.done).sum();
        (options.progress)(done * options.share.1 / comm.world_size(), missing.len());
        let finished = reports.iter().all(|report| report.finished);
        let stop = reports.iter().any(|report| report.stop);
        unusable.extend(reports.into_iter().flat_map(|report| report.items));
        if finished {
            return Ok(unusable);
        }
        if stop {
            return Err(DatasetError::Stopped { what: "latents", option: "cache_latents_to_disk" });
        }
    }
}

/// Runs of equal size, at most `batch_size` long.
fn cut_batches(items: &[Item], missing: &[usize], batch_size: usize) -> Vec<Vec<usize>> {
    missing
        .chunk_by(|left, right| items[*left].settings.bucket == items[*right].settings.bucket)
        .flat_map(|run| run.chunks(batch_size).map(<[usize]>::to_vec))
        .collect()
}

type Decoded = Result<Picture, String>;

fn decode_ahead(
    group: Arc<DatasetGroup>,
    images: Vec<(u32, u32)>,
    options: &CacheOptions<'_>,
) -> Result<Ordered<Decoded>, DatasetError> {
    let ahead = options.workers.max(1) + options.batch_size.max(1);
    let jobs = images.len() as u64;
    let decode = move |job: u64| {
        let (dataset, image) = images[job as usize];
        let dataset = &group.datasets[dataset as usize];
        prepare(dataset, &dataset.images[image as usize], Variation::None)
    };
    Ordered::start(jobs, options.workers, ahead, decode)
        .map_err(|error| DatasetError::file("start a thread to decode", Path::new(""), error))
}

/// Encodes and writes one batch; gives the items whose images are damaged, with the reason.
fn encode_batch(
    batch: &[usize],
    (group, items): (&DatasetGroup, &[Item]),
    pictures: &mut Ordered<Decoded>,
    encoder: &mut dyn LatentEncoder,
) -> Result<Vec<(usize, String)>, DatasetError> {
    let mut damaged = Vec::new();
    let mut ready: Vec<(usize, Picture)> = Vec::new();
    for index in batch {
        match pictures.next() {
            Some(Ok(Ok(picture))) => ready.push((*index, picture)),
            Some(Ok(Err(problem))) => damaged.push((*index, problem)),
            Some(Err(panic)) => damaged.push((*index, format!("decoding it failed: {panic}"))),
            None => damaged.push((*index, "it was never decoded".into())),
        }
    }
    if ready.is_empty() {
        return Ok(damaged);
    }
    let path_of = |index: usize| {
        let entry = group.image(items[index].dataset, items[index].image);
        entry.map(|entry| entry.path.clone()).unwrap_or_default()
    };
    let moments = encode(&ready, encoder, path_of)?;
    let flipped = if ready.iter().any(|(index, _)| items[*index].settings.flip) {
        let mirror: Vec<(usize, Picture)> =
            ready.iter().map(|(index, picture)| (*index, mirrored(picture))).collect();
        Some(encode(&mirror, encoder, path_of)?)
    } else {
        None
    };
    for (at, (index, picture)) in ready.iter().enumerate() {
        let item = &items[*index];
        let (width, height) = (picture.size.0 as usize, picture.size.1 as usize);
        let latents = CachedLatents {
            latent_size: (width / LATENT_SCALE, height / LATENT_SCALE),
            moments: moments[at].clone(),
            moments_flipped: match &flipped {
                Some(flipped) if item.settings.flip => Some(flipped[at].clone()),
                _ => None,
            },
            alpha: picture.alpha.clone(),
        };
        latent_file::write(&item.file, &path_of(*index), &item.settings, &latents)?;
    }
    Ok(damaged)
}

/// The moments of each picture, checked to be finite and of the right number.
fn encode(
    pictures: &[(usize, Picture)],
    encoder: &mut dyn LatentEncoder,
    path_of: impl Fn(usize) -> PathBuf,
) -> Result<Vec<Vec<f32>>, DatasetError> {
    let (width, height) = (pictures[0].1.size.0 as usize, pictures[0].1.size.1 as usize);
    let images: Vec<f32> =
        pictures.iter().flat_map(|(_, picture)| picture.rgb.iter().copied()).collect();
    let failure =
        |index: usize, problem: String| DatasetError::Latents { path: path_of(index), problem };
    let first = pictures[0].0;
    let all = encoder
        .encode(&images, [pictures.len(), height, width, 3])
        .map_err(|error| failure(first, format!("{error:#}")))?;
    let each = (width / LATENT_SCALE) * (height / LATENT_SCALE) * MOMENT_CHANNELS;
    if all.len() != each * pictures.len() {
        let problem = format!("the VAE gave {} values, not {}", all.len(), each * pictures.len());
        return Err(failure(first, problem));
    }
    let mut out = Vec::with_capacity(pictures.len());
    for ((index, _), moments) in pictures.iter().zip(all.chunks_exact(each)) {
        if moments.iter().any(|value| !value.is_finite()) {
            return Err(failure(*index, encoder.blame()));
        }
        out.push(moments.to_vec());
    }
    Ok(out)
}

/// The latents of every image of `group`, in memory or by their files.
fn load(
    group: &DatasetGroup,
    options: &CacheOptions<'_>,
) -> Result<HashMap<(u32, u32), Held>, DatasetError> {
    let mut held = HashMap::new();
    let mut in_memory: HashMap<PathBuf, Arc<CachedLatents>> = HashMap::new();
    for (dataset, images) in group.datasets.iter().enumerate() {
        for (image, entry) in images.images.iter().enumerate() {
            let key = (dataset as u32, image as u32);
            let Item { file, settings, .. } = item_of(group, key, entry, options);
            if options.place == CachePlace::BesideImages {
                held.insert(key, Held::Disk(file, settings));
                continue;
            }
            let latents = match in_memory.get(&file) {
                Some(latents) => latents.clone(),
                None => {
                    let read = latent_file::read(&file, &settings);
                    let unusable =
                        |problem| DatasetError::CacheFile { path: file.clone(), problem };
                    let latents = Arc::new(read.map_err(unusable)?);
                    in_memory.insert(file.clone(), latents.clone());
                    latents
                }
            };
            held.insert(key, Held::Memory(latents));
        }
    }
    Ok(held)
}

#[cfg(test)]
mod tests;
