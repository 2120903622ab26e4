//! NVIDIA's libraries: found at run time, opened once, never closed.
//!
//! Each is opened by its full path with its symbols visible to libraries that are opened later:
//! those ask for each other by name, and get the ones opened here. A toolkit is used only if the
//! driver knows its major version of CUDA.

use std::ffi::{c_int, c_void};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use libloading::os::unix::{Library as Handle, RTLD_GLOBAL, RTLD_NOW};

use super::folders::{LIBRARIES_VARIABLE, Place, places};
use crate::EngineError;

/// A library of NVIDIA's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Library {
    /// `libcuda`, part of the driver.
    Driver,
    /// Compiles kernels.
    Nvrtc,
    /// Multiplies matrices.
    CublasLt,
    /// Convolves.
    Cudnn,
    /// Sums between cards.
    Nccl,
}

impl Library {
    /// All of them, in the order in which they are opened.
    pub const ALL: [Self; 5] = [Self::Driver, Self::Nvrtc, Self::CublasLt, Self::Cudnn, Self::Nccl];

    /// Name for people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Driver => "driver",
            Self::Nvrtc => "NVRTC",
            Self::CublasLt => "cublasLt",
            Self::Cudnn => "cuDNN",
            Self::Nccl => "NCCL",
        }
    }

    /// What does not work without it.
    pub fn purpose(self) -> &'static str {
        match self {
            Self::Driver => "no GPU can be used",
            Self::Nvrtc => "kernels that are not in the cache cannot be compiled",
            Self::CublasLt => "no GPU can be used",
            Self::Cudnn => "convolutions take a slower way",
            Self::Nccl => "ranks sum gradients through the host",
        }
    }

    /// File names, the newest first, with the major version of CUDA that each belongs to.
    fn files(self) -> &'static [(&'static str, Option<u32>)] {
        match self {
            Self::Driver => &[("libcuda.so.1", None)],
            Self::Nvrtc => &[("libnvrtc.so.13", Some(13)), ("libnvrtc.so.12", Some(12))],
            Self::CublasLt => &[("libcublasLt.so.13", Some(13)), ("libcublasLt.so.12", Some(12))],
            Self::Cudnn => &[("libcudnn.so.9", None)],
            Self::Nccl => &[("libnccl.so.2", None)],
        }
    }

    /// Files beside it that it opens by name, without saying where they lie.
    fn companions(self) -> &'static [&'static str] {
        match self {
            Self::Nvrtc => &["libnvrtc-builtins.so"],
            // In the order of their dependencies.
            Self::Cudnn => &[
                "libcudnn_graph.so.9",
                "libcudnn_ops.so.9",
                "libcudnn_cnn.so.9",
                "libcudnn_heuristic.so.9",
                "libcudnn_engines_precompiled.so.9",
                "libcudnn_engines_runtime_compiled.so.9",
            ],
            Self::Driver | Self::CublasLt | Self::Nccl => &[],
        }
    }

    /// What to install, for a driver that knows CUDA up to `major`.
    fn how_to_get(self, major: Option<u32>) -> String {
        let thirteen = major.is_none_or(|major| major >= 13);
        let package = match (self, thirteen) {
            (Self::Driver, _) => {
                return "install NVIDIA's driver, version 525 or newer".to_owned();
            }
            (Self::Nvrtc, true) => "nvidia-cuda-nvrtc",
            (Self::Nvrtc, false) => "nvidia-cuda-nvrtc-cu12",
            (Self::CublasLt, true) => "nvidia-cublas",
            (Self::CublasLt, false) => "nvidia-cublas-cu12",
            (Self::Cudnn, true) => "nvidia-cudnn-cu13",
            (Self::Cudnn, false) => "nvidia-cudnn-cu12",
            (Self::Nccl, true) => "nvidia-nccl-cu13",
            (Self::Nccl, false) => "nvidia-nccl-cu12",
        };
        format!(
            "`pip install {package}` in the active Python environment, or name the folder of the \
             library in `{LIBRARIES_VARIABLE}`"
        )
    }
}

/// A library that is open.
#[derive(Debug)]
pub struct Found {
    /// Which.
    pub library: Library,
    /// The file, if the loader tells.
    pub path: PathBuf,
    /// What the library says: `13.0`, `9.19.0`.
    pub version: Option<String>,
    pub(super) handle: Handle,
}

/// A library that could not be opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing {
    /// Which.
    pub library: Library,
    /// Places that were looked at, and why each did not do.
    pub tried: Vec<String>,
    /// Advice.
    pub how_to_get: String,
}

impl From<&Missing> for EngineError {
    fn from(missing: &Missing) -> Self {
        let file = missing.library.files()[0].0;
        EngineError::Unsupported(format!(
            "NVIDIA's {} is not on this machine: `{file}`\nhint: {}; `lorarun doctor` says what was tried",
            missing.library.name(),
            missing.how_to_get
        ))
    }
}

/// Opens a library, or says why it cannot be; the answer stays for the life of the process.
pub fn find(library: Library) -> Result<&'static Found, &'static Missing> {
    static ANSWERS: [OnceLock<Result<Found, Missing>>; 5] = [const { OnceLock::new() }; 5];
    let answer = ANSWERS[library as usize].get_or_init(|| {
        let major = match library {
            Library::Driver => None,
            _ => driver_version().map(|(major, _)| major),
        };
        search(library, major, &places())
    });
    answer.as_ref()
}

/// The newest CUDA that the driver knows, major and minor; `None` without a driver.
pub fn driver_version() -> Option<(u32, u32)> {
    let found = find(Library::Driver).ok()?;
    let number = number(&found.handle, b"cuDriverGetVersion\0")?;
    Some((number / 1000, number % 1000 / 10))
}

/// Looks for a library that a driver of CUDA `major` can use.
fn search(library: Library, major: Option<u32>, places: &[Place]) -> Result<Found, Missing> {
    let mut tried = Vec::new();
    for place in places {
        for (file, needs) in library.files() {
            if let (Some(needs), Some(major)) = (needs, major)
                && *needs > major
            {
                continue;
            }
            match open_at(library, place, file, major) {
                Ok(Some(found)) => return Ok(found),
                Ok(None) => {}
                Err(why) => tried.push(why),
            }
        }
        if let Place::Folder(folder) = place {
            tried.push(format!("{}: not there", folder.display()));
        }
    }
    tried.dedup();
    Err(Missing { library, tried, how_to_get: library.how_to_get(major) })
}

/// Opens `file` at a place; `None` if it is not there, an error if it is there and of no use.
fn open_at(
    library: Library,
    place: &Place,
    file: &str,
    major: Option<u32>,
) -> Result<Option<Found>, String> {
    let path = match place {
        Place::Loader => PathBuf::from(file),
        Place::Folder(folder) => {
            let path = folder.join(file);
            if !path.exists() {
                return Ok(None);
            }
            open_companions(library, folder);
            path
        }
    };
    let handle = match open(&path) {
        Ok(handle) => handle,
        Err(why) => return Err(format!("{}: {why}", path.display())),
    };
    let path = if path.is_absolute() { path } else { mapped_path(file).unwrap_or(path) };
    if *place == Place::Loader
        && let Some(folder) = path.parent().filter(|folder| folder.is_absolute())
    {
        open_companions(library, folder);
    }
    if let (Library::Cudnn, Some(made_for), Some(major)) = (library, runtime_of(&handle), major)
        && made_for > major
    {
        let path = path.display();
        return Err(format!("{path}: made for CUDA {made_for}, the driver knows {major}"));
    }
    let version = version(library, &handle);
    Ok(Some(Found { library, path, version, handle }))
}

fn open(path: &Path) -> Result<Handle, String> {
    // SAFETY: NVIDIA's libraries run nothing but their own initialisers when opened; the file is
    // one that the user, the loader or a package manager put where they belong.
    unsafe { Handle::open(Some(path), RTLD_NOW | RTLD_GLOBAL) }.map_err(|error| error.to_string())
}

/// Opens what lies beside a library and is asked for by name later. What is missing or broken shows
/// when the library itself needs it.
fn open_companions(library: Library, folder: &Path) {
    for start in library.companions() {
        let Ok(entries) = std::fs::read_dir(folder) else { return };
        for entry in entries.flatten() {
            let name = entry.file_name();
            if name.to_string_lossy().starts_with(start)
                && let Ok(handle) = open(&entry.path())
            {
                // Never closed.
                std::mem::forget(handle);
            }
        }
    }
}

/// Where a library that the loader chose came from, by this process's list of mapped files.
fn mapped_path(file: &str) -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    // The name that was asked for may be a link: its file's name goes on with the version.
    maps.lines()
        .filter_map(|line| line.find('/').map(|at| Path::new(&line[at..])))
        .find(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(file)))
        .or_else(|| {
            let stem = file.split(".so").next()?;
            let is_it = |path: &&Path| {
                let name = path.file_name().map(|name| name.to_string_lossy());
                name.is_some_and(|name| name.starts_with(&format!("{stem}.so")))
            };
            maps.lines()
                .filter_map(|line| line.find('/').map(|at| Path::new(&line[at..])))
                .find(is_it)
        })
        .map(Path::to_owned)
}

/// Calls a function that puts one number where it is told.
fn number(handle: &Handle, function: &[u8]) -> Option<u32> {
    type Function = unsafe extern "C" fn(*mut c_int) -> u32;
    let mut number: c_int = 0;
    // SAFETY: callers name `cuDriverGetVersion` and `ncclGetVersion`, which are of this type.
    let status = unsafe { handle.get::<Function>(function).ok()?(&raw mut number) };
    if status == 0 { u32::try_from(number).ok() } else { None }
}

/// Calls a function that returns one number.
fn size(handle: &Handle, function: &[u8]) -> Option<usize> {
    type Function = unsafe extern "C" fn() -> usize;
    // SAFETY: callers name `cublasLtGetVersion`, `cudnnGetVersion` and `cudnnGetCudartVersion`,
    // which are of this type.
    unsafe { Some(handle.get::<Function>(function).ok()?()) }
}

/// Major version of the CUDA that a cuDNN was made for.
fn runtime_of(handle: &Handle) -> Option<u32> {
    let version = size(handle, b"cudnnGetCudartVersion\0")?;
    u32::try_from(version / 1000).ok().filter(|major| *major > 0)
}

/// What a library says its version is.
fn version(library: Library, handle: &Handle) -> Option<String> {
    match library {
        Library::Driver => number(handle, b"cuDriverGetVersion\0")
            .map(|number| format!("CUDA {}.{}", number / 1000, number % 1000 / 10)),
        Library::Nvrtc => {
            type Function = unsafe extern "C" fn(*mut c_int, *mut c_int) -> u32;
            let (mut major, mut minor) = (0, 0);
            // SAFETY: `nvrtcVersion` puts two numbers where it is told.
            let status = unsafe {
                handle.get::<Function>(b"nvrtcVersion\0").ok()?(&raw mut major, &raw mut minor)
            };
            (status == 0).then(|| format!("{major}.{minor}"))
        }
        Library::CublasLt => {
            let number = size(handle, b"cublasLtGetVersion\0")?;
            Some(dotted(number, 10_000, 100))
        }
        Library::Cudnn => {
            let number = size(handle, b"cudnnGetVersion\0")?;
            let text = dotted(number, 10_000, 100);
            Some(match runtime_of(handle) {
                Some(major) => format!("{text} for CUDA {major}"),
                None => text,
            })
        }
        Library::Nccl => {
            let number = number(handle, b"ncclGetVersion\0")? as usize;
            Some(dotted(number, 10_000, 100))
        }
    }
}

/// `major.minor.patch` of a number that holds them in decimal places.
fn dotted(number: usize, major: usize, minor: usize) -> String {
    format!("{}.{}.{}", number / major, number % major / minor, number % minor)
}

/// The address of a function; for libraries that others call ([`Library::Nccl`]).
impl Found {
    /// Looks a function up; `None` if the library has none of this name.
    pub fn symbol(&self, name: &str) -> Option<*mut c_void> {
        // SAFETY: only the address is taken here; who calls it vouches for its type.
        let symbol = unsafe { self.handle.get::<*mut c_void>(name.as_bytes()).ok()? };
        Some(symbol.as_raw_ptr())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_no_library_is_named_and_the_search_goes_on() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("libnccl.so.2");
        std::fs::write(&file, "no library").unwrap();
        let empty = tempfile::tempdir().unwrap();
        let places = [folder.path(), empty.path()].map(|path| Place::Folder(path.to_owned()));
        let missing = search(Library::Nccl, Some(12), &places).unwrap_err();
        assert!(missing.tried[0].starts_with(&file.display().to_string()), "{missing:?}");
        assert!(missing.tried.iter().any(|line| line.ends_with("not there")), "{missing:?}");
        assert!(missing.how_to_get.contains("nvidia-nccl-cu12"), "{missing:?}");
        let error = EngineError::from(&missing).to_string();
        assert!(error.contains("\nhint: `pip install nvidia-nccl-cu12`"), "{error}");
    }

    #[test]
    fn a_toolkit_newer_than_the_driver_is_not_opened() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("libnvrtc.so.13"), "of CUDA 13").unwrap();
        let places = [Place::Folder(folder.path().to_owned())];
        let old = search(Library::Nvrtc, Some(12), &places).unwrap_err();
        assert!(!old.tried.iter().any(|line| line.contains("libnvrtc.so.13:")), "{old:?}");
        assert!(old.how_to_get.contains("nvidia-cuda-nvrtc-cu12"), "{old:?}");
        // With a driver of CUDA 13 it is tried.
        let new = search(Library::Nvrtc, Some(13), &places).unwrap_err();
        assert!(new.tried.iter().any(|line| line.contains("libnvrtc.so.13:")), "{new:?}");
    }

    #[test]
    fn what_is_on_this_machine_says_its_version_and_lies_where_it_says() {
        for library in Library::ALL {
            match find(library) {
                Ok(found) => {
                    assert!(found.path.is_file(), "{found:?}");
                    let version = found.version.as_deref().unwrap_or("");
                    assert!(version.contains('.'), "{found:?}");
                    eprintln!("{}: {version} at {}", library.name(), found.path.display());
                }
                Err(missing) => {
                    assert!(!missing.how_to_get.is_empty());
                    eprintln!("{}: not on this machine, not tested", library.name());
                }
            }
        }
    }
}
