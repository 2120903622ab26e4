//! One cached image on disk: a safetensors file that says what it was made of.
//!
//! Tensors: `moments` and, for `flip_aug`, `moments_flipped` `[h, w, 8]` f32 (mean, then
//! log-variance, of the VAE's posterior), and, for `alpha_mask`, `alpha` `[h, w]` f32. Metadata: the
//! settings, the source's length, time and SHA-256, and a CRC-32 of the tensors. The moments are kept
//! rather than a sample, so that a cached run draws each sample anew as an uncached run does.

use super::buckets::Size;
use super::error::DatasetError;
use super::picture::LATENT_SCALE;
use formats::safetensors_file::{SafetensorsFile, write_safetensors};
use formats::{Dtype, FormatError, OwnedTensor, TensorFile};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

/// Channels of the moments: mean and log-variance of four latents.
pub const MOMENT_CHANNELS: usize = 8;

const FORMAT: &str = "lorarun latents 1";

/// What the VAE makes of one image.
#[derive(Debug, Clone, PartialEq)]
pub struct CachedLatents {
    /// Width and height of the latents.
    pub latent_size: (usize, usize),
    /// `[h, w, 8]`: mean and log-variance of each latent pixel.
    pub moments: Vec<f32>,
    /// The same of the mirrored image.
    pub moments_flipped: Option<Vec<f32>>,
    /// Alpha of each latent pixel in [0,1], `[h, w]`, not mirrored.
    pub alpha: Option<Vec<f32>>,
}

impl CachedLatents {
    /// The moments of the image or of its mirror image.
    pub fn moments_of(&self, flipped: bool) -> &[f32] {
        match (&self.moments_flipped, flipped) {
            (Some(moments), true) => moments,
            _ => &self.moments,
        }
    }

    /// The alpha mask of the image or of its mirror image.
    pub fn alpha_of(&self, flipped: bool) -> Option<Vec<f32>> {
        let mut alpha = self.alpha.clone()?;
        if flipped {
            alpha.chunks_exact_mut(self.latent_size.0).for_each(<[f32]>::reverse);
        }
        Some(alpha)
    }
}

/// What weighs the pixels of an image in its loss.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Alpha {
    /// Nothing.
    None,
    /// Its alpha channel.
    Channel,
    /// A picture of its own, known by its hash.
    Mask(String),
}

impl std::fmt::Display for Alpha {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Alpha::None => f.write_str("false"),
            Alpha::Channel => f.write_str("true"),
            Alpha::Mask(hash) => write!(f, "mask {hash}"),
        }
    }
}

/// Everything beside the image's content that the latents depend on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LatentSettings {
    pub(crate) bucket: Size,
    pub(crate) resized: Size,
    pub(crate) interpolation: String,
    pub(crate) alpha: Alpha,
    pub(crate) flip: bool,
    /// Identity of the VAE and its precision.
    pub(crate) vae: String,
}

impl LatentSettings {
    fn text(&self) -> String {
        format!(
            "bucket {}x{}, resized {}x{} by {}, center crop, alpha {}, flip {}, vae {}",
            self.bucket.0,
            self.bucket.1,
            self.resized.0,
            self.resized.1,
            self.interpolation,
            self.alpha,
            self.flip,
            self.vae
        )
    }

    fn latent_size(&self) -> (usize, usize) {
        (self.bucket.0 as usize / LATENT_SCALE, self.bucket.1 as usize / LATENT_SCALE)
    }

    /// Name of the cache file of an image; other settings and other folders give other names.
    pub(crate) fn file_name(&self, image: &Path, with_folder: bool) -> PathBuf {
        let mut hasher = Sha256::new();
        hasher.update(self.text());
        if with_folder {
            hasher.update(image.parent().unwrap_or(Path::new("")).as_os_str().as_encoded_bytes());
        }
        let key = hex(&hasher.finalize()[..6]);
        let mut name = image.file_name().unwrap_or_default().to_owned();
        name.push(format!(".{key}.safetensors"));
        PathBuf::from(name)
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Length and time of a file: enough to tell that it was not touched.
fn stamp(path: &Path) -> Result<(String, String), DatasetError> {
    let error = |error| DatasetError::file("read", path, error);
    let metadata = std::fs::metadata(path).map_err(error)?;
    let modified = metadata.modified().map_err(error)?;
    let time = modified.duration_since(UNIX_EPOCH).map(|since| since.as_nanos()).unwrap_or(0);
    Ok((metadata.len().to_string(), time.to_string()))
}

fn sha256_of(path: &Path) -> Result<String, DatasetError> {
    let error = |error| DatasetError::file("read", path, error);
    let mut file = std::fs::File::open(path).map_err(error)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0u8; 1 << 18];
    loop {
        let count = file.read(&mut buffer).map_err(error)?;
        if count == 0 {
            return Ok(hex(&hasher.finalize()));
        }
        hasher.update(&buffer[..count]);
    }
}

fn checksum<'a>(tensors: impl Iterator<Item = &'a [u8]>) -> String {
    let mut crc = crc32fast::Hasher::new();
    tensors.for_each(|bytes| crc.update(bytes));
    format!("{:08x}", crc.finalize())
}

/// Writes the latents of `image` to `file`, complete or not at all.
///
/// # Errors
/// A full disk, a folder without write permission, an image that has gone.
pub(crate) fn write(
    file: &Path,
    image: &Path,
    settings: &LatentSettings,
    latents: &CachedLatents,
) -> Result<(), DatasetError> {
    let unusable = |error: FormatError| DatasetError::CacheFile {
        path: file.into(),
        problem: error.to_string(),
    };
    let (width, height) = latents.latent_size;
    let mut tensors = BTreeMap::new();
    let mut add = |name: &str, shape: &[usize], values: &[f32]| -> Result<(), DatasetError> {
        let tensor = OwnedTensor::from_f32(shape, values, Dtype::F32).map_err(unusable)?;
        tensors.insert(name.to_owned(), tensor);
        Ok(())
    };
    let shape = [height, width, MOMENT_CHANNELS];
    add("moments", &shape, &latents.moments)?;
    if let Some(flipped) = &latents.moments_flipped {
        add("moments_flipped", &shape, flipped)?;
    }
    if let Some(alpha) = &latents.alpha {
        add("alpha", &shape[..2], alpha)?;
    }
    let (length, modified) = stamp(image)?;
    let crc = checksum(tensors.values().map(|tensor| tensor.data.as_slice()));
    let entries = [
        ("format", FORMAT.to_owned()),
        ("settings", settings.text()),
        ("source_length", length),
        ("source_modified", modified),
        ("source_sha256", sha256_of(image)?),
        ("crc32", crc),
    ];
    let metadata = entries.map(|(key, value)| (key.to_owned(), value)).into();
    formats::atomic::write_atomic(file, |writer| {
        write_safetensors(writer, &tensors, Some(&metadata))
    })
    .map_err(unusable)
}

/// Reads a cache file and checks that it is whole and made with `settings`.
///
/// # Errors
/// A sentence: missing, damaged, or for something else.
pub(crate) fn read(file: &Path, settings: &LatentSettings) -> Result<CachedLatents, String> {
    let opened = SafetensorsFile::open(file).map_err(|error| error.to_string())?;
    let value = |key: &str| opened.metadata().get(key).map(String::as_str).unwrap_or_default();
    if value("format") != FORMAT || value("settings") != settings.text() {
        return Err("it was made with other settings".into());
    }
    let (width, height) = settings.latent_size();
    let tensor = |name: &str, shape: &[usize]| -> Result<Vec<f32>, String> {
        let view = opened.view(name).map_err(|error| error.to_string())?;
        if view.shape != shape || view.dtype != Dtype::F32 {
            return Err(format!("`{name}` has the shape {:?}, not {shape:?}", view.shape));
        }
        Ok(view.to_f32())
    };
    let views = opened.names().into_iter().filter_map(|name| opened.view(name).ok());
    let views: Vec<_> = views.collect();
    if checksum(views.iter().map(|view| view.data.as_ref())) != value("crc32") {
        return Err("its checksum is wrong".into());
    }
    let shape = [height, width, MOMENT_CHANNELS];
    Ok(CachedLatents {
        latent_size: (width, height),
        moments: tensor("moments", &shape)?,
        moments_flipped: settings.flip.then(|| tensor("moments_flipped", &shape)).transpose()?,
        alpha: (settings.alpha != Alpha::None).then(|| tensor("alpha", &shape[..2])).transpose()?,
    })
}

/// Whether `file` holds the latents of `image` as it is now.
///
/// # Errors
/// A sentence that says why the image must be encoded again; empty if there is no file.
pub(crate) fn check(file: &Path, image: &Path, settings: &LatentSettings) -> Result<(), String> {
    if !file.exists() {
        return Err(String::new());
    }
    read(file, settings)?;
    let opened = SafetensorsFile::open(file).map_err(|error| error.to_string())?;
    let value = |key: &str| opened.metadata().get(key).map(String::as_str).unwrap_or_default();
    let (length, modified) = stamp(image).map_err(|error| error.to_string())?;
    if value("source_length") == length && value("source_modified") == modified {
        return Ok(());
    }
    // Copied or touched: the content decides.
    let content = sha256_of(image).map_err(|error| error.to_string())?;
    if value("source_sha256") == content { Ok(()) } else { Err("the image has changed".into()) }
}
