//! Models by hub id (`org/name`), through the cache that all Hugging Face tools share.
//!
//! Online, the repository's present commit decides and only missing files are fetched; offline
//! (`HF_HUB_OFFLINE`), or when the hub cannot be reached, the cached commit is used as it is.

use std::fs::File;
use std::path::{Path, PathBuf};

use hf_hub::api::sync::{ApiBuilder, ApiRepo};
use hf_hub::{Cache, Repo};

use crate::FormatError;
use crate::diffusers_dir::{self, Place, TEXT_ENCODER, TEXT_ENCODER_2, UNET, VAE};

/// Small files fetched when the repository has them.
const EXTRAS: [&str; 16] = [
    "model_index.json",
    "unet/config.json",
    "text_encoder/config.json",
    "text_encoder_2/config.json",
    "vae/config.json",
    "scheduler/scheduler_config.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/special_tokens_map.json",
    "tokenizer_2/vocab.json",
    "tokenizer_2/merges.txt",
    "tokenizer_2/tokenizer.json",
    "tokenizer_2/tokenizer_config.json",
    "tokenizer_2/special_tokens_map.json",
];

/// Where the hub and its cache are.
#[derive(Clone, Debug)]
pub struct HubOptions {
    /// Address of the hub.
    pub endpoint: String,
    /// The cache's `hub` folder.
    pub cache_dir: PathBuf,
    /// Use the cache alone.
    pub offline: bool,
    /// Show progress bars on stderr while downloading.
    pub progress: bool,
}

impl HubOptions {
    /// From `HF_ENDPOINT`, `HF_HOME` and `HF_HUB_OFFLINE`, read as Hugging Face's own tools do.
    /// Bars are shown when stderr is a terminal.
    pub fn from_env() -> Self {
        let endpoint = std::env::var("HF_ENDPOINT").ok().filter(|url| !url.is_empty());
        let endpoint = endpoint.unwrap_or_else(|| "https://huggingface.co".to_owned());
        let offline = std::env::var("HF_HUB_OFFLINE").unwrap_or_default().to_ascii_uppercase();
        // `Cache::from_env` needs a home directory; without one the folder below the present one
        // is as good as any.
        let cache_dir = match (std::env::var_os("HF_HOME"), std::env::home_dir()) {
            (Some(home), _) if !home.is_empty() => PathBuf::from(home).join("hub"),
            (_, Some(home)) => home.join(".cache/huggingface/hub"),
            _ => PathBuf::from(".cache/huggingface/hub"),
        };
        Self {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            cache_dir,
            offline: matches!(offline.as_str(), "1" | "ON" | "YES" | "TRUE"),
            progress: std::io::IsTerminal::is_terminal(&std::io::stderr()),
        }
    }
}

/// True for `org/name` in the characters the hub allows.
pub fn is_hub_id(text: &str) -> bool {
    let is_part = |part: &str| {
        !part.is_empty()
            && !part.starts_with(['.', '-'])
            && part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
    };
    text.split_once('/').is_some_and(|(org, name)| is_part(org) && is_part(name))
}

/// What is fetched.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Wanted {
    /// All components of a model; the flag says whether its VAE, too.
    Model { with_vae: bool },
    /// A VAE of its own, or a model's.
    Vae,
}

/// Makes the files of `id` present and returns the folder of their commit.
///
/// # Errors
/// [`FormatError::Hub`] saying whether it was offline, unreachable or not a diffusers model.
pub(crate) fn fetch(
    id: &str,
    wanted: Wanted,
    variant: Option<&str>,
    options: &HubOptions,
    notes: &mut Vec<String>,
) -> Result<PathBuf, FormatError> {
    let cached = cached_snapshot(id, options);
    if options.offline {
        return cached.ok_or_else(|| {
            hub_error(
                id,
                format!(
                    "`HF_HUB_OFFLINE` is set and it is not in the cache: `{}`",
                    options.cache_dir.display()
                ),
                "unset `HF_HUB_OFFLINE` once to download it, or give a local path",
            )
        });
    }
    let _lock = lock_repo(id, options);
    let repo = open_repo(id, options)?;
    let info = match repo.info() {
        Ok(info) => info,
        Err(error) => {
            // As Hugging Face's tools: a hub out of reach does not stop who has the model.
            let Some(folder) = cached else {
                return Err(hub_error(
                    id,
                    format!("`{}` answered: {error}", options.endpoint),
                    "check the name, the network and `HF_ENDPOINT`; a private model needs a token \
                     in the `token` file beside the cache (`hf auth login`); or give a local path",
                ));
            };
            notes.push(format!("the hub is out of reach, the cached `{id}` is used: {error}"));
            return Ok(folder);
        }
    };
    let files: Vec<String> = info.siblings.into_iter().map(|file| file.rfilename).collect();
    let snapshot = snapshot_dir(id, &info.sha, options);
    let fetcher = Fetcher { id, repo, snapshot };
    for place in places(wanted, &files) {
        fetcher.fetch_weights(place, &files, variant)?;
    }
    for name in EXTRAS.iter().copied().chain(["config.json"]) {
        if files.iter().any(|file| file == name) {
            fetcher.fetch(name)?;
        }
    }
    Ok(fetcher.snapshot)
}

fn places(wanted: Wanted, files: &[String]) -> Vec<Place> {
    let Wanted::Model { with_vae } = wanted else {
        return vec![diffusers_dir::vae_place(files)];
    };
    let mut places = vec![UNET, TEXT_ENCODER];
    if files.iter().any(|file| file.starts_with("text_encoder_2/")) {
        places.push(TEXT_ENCODER_2);
    }
    if with_vae {
        places.push(VAE);
    }
    places
}

fn open_repo(id: &str, options: &HubOptions) -> Result<ApiRepo, FormatError> {
    // The cache knows where the token lies.
    let api = ApiBuilder::from_cache(Cache::new(options.cache_dir.clone()))
        .with_endpoint(options.endpoint.clone())
        .with_progress(options.progress)
        .with_retries(3)
        .build();
    let api = api.map_err(|error| {
        hub_error(id, format!("the client cannot start: {error}"), "give a local path")
    })?;
    Ok(api.repo(Repo::model(id.to_owned())))
}

/// Waits until no other process of ours downloads this model: of several ranks one fetches, the
/// others find everything there. (`hf-hub` itself gives up after five seconds.)
///
/// Not having the lock costs duplicate work at most, so failing to get it is no error; the kernel
/// frees it when its holder dies.
fn lock_repo(id: &str, options: &HubOptions) -> Option<File> {
    let folder = options.cache_dir.join(".locks");
    std::fs::create_dir_all(&folder).ok()?;
    let name = format!("lorarun--{}.lock", Repo::model(id.to_owned()).folder_name());
    let file = File::create(folder.join(name)).ok()?;
    file.lock().ok()?;
    Some(file)
}

/// The folder of the commit that `main` pointed to last.
fn cached_snapshot(id: &str, options: &HubOptions) -> Option<PathBuf> {
    let reference = repo_dir(id, options).join("refs/main");
    let commit = std::fs::read_to_string(reference).ok()?;
    Some(snapshot_dir(id, commit.trim(), options)).filter(|folder| folder.is_dir())
}

fn repo_dir(id: &str, options: &HubOptions) -> PathBuf {
    options.cache_dir.join(Repo::model(id.to_owned()).folder_name())
}

fn snapshot_dir(id: &str, commit: &str, options: &HubOptions) -> PathBuf {
    repo_dir(id, options).join("snapshots").join(commit)
}

struct Fetcher<'a> {
    id: &'a str,
    repo: ApiRepo,
    snapshot: PathBuf,
}

impl Fetcher<'_> {
    fn fetch_weights(
        &self,
        place: Place,
        files: &[String],
        variant: Option<&str>,
    ) -> Result<(), FormatError> {
        let Some((name, _)) = place.choose(files, variant) else {
            return Err(hub_error(
                self.id,
                format!("it has no weights in `{}/`", place.folder),
                "only models in the diffusers layout can be used by id; download a single-file \
                 checkpoint and give its path",
            ));
        };
        self.fetch(&name)?;
        if name.ends_with(".json") {
            let shards = diffusers_dir::shards_of(&self.snapshot.join(&name))?;
            let unique: std::collections::BTreeSet<_> = shards.into_values().collect();
            for shard in unique {
                self.fetch(&place.join(&shard))?;
            }
        }
        Ok(())
    }

    /// Downloads one file unless this commit has it already.
    fn fetch(&self, name: &str) -> Result<(), FormatError> {
        if self.snapshot.join(name).exists() {
            return Ok(());
        }
        let path = self.repo.download(name).map_err(|error| {
            hub_error(
                self.id,
                format!("`{name}` could not be downloaded: {error}"),
                "check the network and the free space of the cache, then run again: finished \
                 files are kept",
            )
        })?;
        if path == self.snapshot.join(name) || same_file(&path, &self.snapshot.join(name)) {
            return Ok(());
        }
        Err(hub_error(
            self.id,
            "it was changed while it was downloaded".to_owned(),
            "run again to get one consistent version",
        ))
    }
}

fn same_file(a: &Path, b: &Path) -> bool {
    matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b)
}

fn hub_error(id: &str, reason: String, hint: &str) -> FormatError {
    FormatError::Hub { id: id.to_owned(), reason, hint: hint.to_owned() }
}
