//! The engine's kernels, from source to what a card runs.
//!
//! Compiled by NVRTC for the card at hand on first use, without any header of a toolkit, and kept on
//! disk under a name that stands for everything that went into them. The cache is a convenience: a
//! folder that cannot be written and a file that is damaged cost the compilation, nothing else.

use std::ffi::{CString, c_char, c_int};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use cudarc::nvrtc::sys::nvrtcProgram;
use sha2::{Digest, Sha256};

use super::libraries::{Found, Library, find};
use super::symbols::{NvrtcApi, error_words};
use crate::{EngineError, Result};

mod sources {
    include!(concat!(env!("OUT_DIR"), "/kernels.rs"));
}
use sources::{HEADERS, SOURCES};

/// Names the folder of the kernel cache.
pub const CACHE_VARIABLE: &str = "LORARUN_KERNEL_CACHE";

/// Options that every kernel is compiled with; f32 stays exact, no `--use_fast_math`.
const OPTIONS: [&str; 1] = ["--std=c++17"];

/// Lines of the compiler's log that an error shows.
const LOG_LINES: usize = 12;

/// Compute capability, major and minor: (8, 6).
pub type Capability = (u32, u32);

/// Names of all modules.
pub fn modules() -> impl Iterator<Item = &'static str> {
    SOURCES.iter().map(|(name, _)| *name)
}

/// What the driver loads of `module` for a card of `capability`: from the cache, or compiled and
/// put there. Needs no GPU.
pub fn image(module: &str, capability: Capability) -> Result<Vec<u8>> {
    image_in(cache_folder().as_deref(), module, capability)
}

/// As [`image`], with the cache in `folder`, or without one.
pub fn image_in(folder: Option<&Path>, module: &str, capability: Capability) -> Result<Vec<u8>> {
    let compiler = Compiler::get()?;
    let target = compiler.target(capability);
    let source = source(module)?;
    let file = folder.map(|folder| folder.join(compiler.file_name(module, source, &target)));
    if let Some(image) = file.as_deref().and_then(read) {
        return Ok(image);
    }
    let image = compiler.compile(module, source, &target)?;
    if let Some(file) = &file {
        // Whoever cannot keep it compiles again.
        drop(write(file, &image));
    }
    Ok(image)
}

/// Whether the cache holds every module for a card of `capability`: opening one then takes no
/// compiler's time.
pub fn all_cached(capability: Capability) -> bool {
    let (Some(folder), Ok(compiler)) = (cache_folder(), Compiler::get()) else { return false };
    let target = compiler.target(capability);
    let file = |(name, source): &(&str, &str)| compiler.file_name(name, source, &target);
    SOURCES.iter().all(|module| folder.join(file(module)).is_file())
}

/// Compiles `module` for a card of `capability`, without the cache. Needs no GPU.
pub fn compile(module: &str, capability: Capability) -> Result<Vec<u8>> {
    image_in(None, module, capability)
}

fn source(module: &str) -> Result<&'static str> {
    let found = SOURCES.iter().find(|(name, _)| *name == module);
    found.map(|(_, source)| *source).ok_or_else(|| {
        EngineError::Unsupported(format!("there is no module of kernels of this name: {module}"))
    })
}

/// Where compiled kernels are kept; `None` if no folder is known.
pub fn cache_folder() -> Option<PathBuf> {
    folder_from(&|name| std::env::var_os(name).filter(|value| !value.is_empty()))
}

fn folder_from(variable: &dyn Fn(&str) -> Option<std::ffi::OsString>) -> Option<PathBuf> {
    let parent = variable(CACHE_VARIABLE)
        .or_else(|| variable("XDG_CACHE_HOME"))
        .map(PathBuf::from)
        .or_else(|| variable("HOME").map(|home| Path::new(&home).join(".cache")))?;
    Some(parent.join("lorarun").join("kernels"))
}

/// A file of the cache: a digest, then what it stands for.
pub(super) fn read(file: &Path) -> Option<Vec<u8>> {
    let bytes = std::fs::read(file).ok()?;
    let (digest, image) = bytes.split_at_checked(32)?;
    (Sha256::digest(image).as_slice() == digest).then(|| image.to_vec())
}

/// Complete or not there at all, whoever else writes it at the same time.
pub(super) fn write(file: &Path, image: &[u8]) -> std::io::Result<()> {
    let folder = file.parent().ok_or(std::io::ErrorKind::NotFound)?;
    std::fs::create_dir_all(folder)?;
    let mut temporary = tempfile::NamedTempFile::new_in(folder)?;
    temporary.write_all(Sha256::digest(image).as_slice())?;
    temporary.write_all(image)?;
    temporary.persist(file)?;
    Ok(())
}

/// What to compile for.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Target {
    /// `sm_86`, or `compute_90` for cards that the compiler does not know.
    name: String,
    /// Machine code; otherwise the driver translates it when it loads it.
    machine_code: bool,
}

/// The best that a compiler of these architectures (80, 86...) can do for a card.
fn target(known: &[u32], (major, minor): Capability) -> Target {
    let card = major * 10 + minor;
    // Machine code runs on cards of its own major version from its minor version on.
    let same_major = known.iter().filter(|arch| **arch / 10 == major && **arch <= card).max();
    if let Some(arch) = same_major {
        return Target { name: format!("sm_{arch}"), machine_code: true };
    }
    let older = known.iter().filter(|arch| **arch <= card).max().copied().unwrap_or(card);
    Target { name: format!("compute_{older}"), machine_code: false }
}

/// NVRTC, opened.
struct Compiler {
    found: &'static Found,
    api: NvrtcApi,
    architectures: Vec<u32>,
}

impl Compiler {
    fn get() -> Result<&'static Self> {
        static COMPILER: OnceLock<std::result::Result<Compiler, String>> = OnceLock::new();
        let found = find(Library::Nvrtc)?;
        let compiler = COMPILER.get_or_init(|| {
            let api = NvrtcApi::load(&found.handle)
                .map_err(|name| format!("{} has no function `{name}`", found.path.display()))?;
            let architectures = architectures(&api).unwrap_or_default();
            Ok(Self { found, api, architectures })
        });
        compiler.as_ref().map_err(|why| EngineError::Unsupported(why.clone()))
    }

    fn target(&self, capability: Capability) -> Target {
        target(&self.architectures, capability)
    }

    /// Everything that decides what comes out.
    fn file_name(&self, module: &str, source: &str, target: &Target) -> String {
        let mut digest = Sha256::new();
        let version = self.found.version.as_deref().unwrap_or("");
        let texts = [source, &target.name, version].into_iter().chain(OPTIONS);
        let headers = HEADERS.iter().flat_map(|(name, text)| [*name, *text]);
        for text in texts.chain(headers) {
            digest.update((text.len() as u64).to_le_bytes());
            digest.update(text);
        }
        let hex: String = digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        format!("{module}-{hex}.cubin")
    }

    fn check(&self, what: &str, status: u32) -> Result<()> {
        if status == 0 {
            return Ok(());
        }
        let why = error_words(&self.found.handle, "nvrtcGetErrorString\0", status);
        Err(EngineError::Card { what: what.to_owned(), why })
    }

    fn compile(&self, module: &str, source: &str, target: &Target) -> Result<Vec<u8>> {
        let text = |text: &str| {
            CString::new(text)
                .map_err(|_| EngineError::Unsupported(format!("`{module}.cu` holds a zero byte")))
        };
        let (name, source) = (text(&format!("{module}.cu"))?, text(source)?);
        let names = HEADERS.iter().map(|(name, _)| text(name)).collect::<Result<Vec<_>>>()?;
        let headers = HEADERS.iter().map(|(_, body)| text(body)).collect::<Result<Vec<_>>>()?;
        let architecture = format!("--gpu-architecture={}", target.name);
        let options = OPTIONS.into_iter().chain([architecture.as_str()]).map(text);
        let options = options.collect::<Result<Vec<_>>>()?;
        let pointers = |texts: &[CString]| texts.iter().map(|t| t.as_ptr()).collect::<Vec<_>>();
        let (names, headers) = (pointers(&names), pointers(&headers));
        let mut program: nvrtcProgram = std::ptr::null_mut();
        // SAFETY: all texts end with a zero and live until the call returns; it copies them.
        let status = unsafe {
            (self.api.nvrtcCreateProgram)(
                &raw mut program,
                source.as_ptr(),
                name.as_ptr(),
                headers.len() as c_int,
                headers.as_ptr(),
                names.as_ptr(),
            )
        };
        self.check("nvrtcCreateProgram", status)?;
        let result = self.build(module, program, &pointers(&options), target);
        // SAFETY: the program was made above and is not used after.
        unsafe { (self.api.nvrtcDestroyProgram)(&raw mut program) };
        result
    }

    fn build(
        &self,
        module: &str,
        program: nvrtcProgram,
        options: &[*const c_char],
        target: &Target,
    ) -> Result<Vec<u8>> {
        // SAFETY: the caller's program; options live as long as the call.
        let status = unsafe {
            (self.api.nvrtcCompileProgram)(program, options.len() as c_int, options.as_ptr())
        };
        if status != 0 {
            let why = error_words(&self.found.handle, "nvrtcGetErrorString\0", status);
            let log = self.log(program);
            let shown: Vec<&str> = log.lines().take(LOG_LINES).collect();
            let what = format!("compiling `kernels/{module}.cu` for {}", target.name);
            return Err(EngineError::Card { what, why: format!("{why}\n{}", shown.join("\n")) });
        }
        let (size_of, get) = if target.machine_code {
            (self.api.nvrtcGetCUBINSize, self.api.nvrtcGetCUBIN)
        } else {
            (self.api.nvrtcGetPTXSize, self.api.nvrtcGetPTX)
        };
        let mut size = 0;
        // SAFETY: the program is compiled; the size goes where it is told.
        self.check("asking for the size of a kernel", unsafe { size_of(program, &raw mut size) })?;
        let mut image = vec![0_u8; size];
        // SAFETY: the buffer has the size that was asked for.
        let status = unsafe { get(program, image.as_mut_ptr().cast()) };
        self.check("taking a kernel from the compiler", status)?;
        Ok(image)
    }

    fn log(&self, program: nvrtcProgram) -> String {
        let mut size = 0;
        // SAFETY: the size goes where it is told.
        let status = unsafe { (self.api.nvrtcGetProgramLogSize)(program, &raw mut size) };
        let mut log = vec![0_u8; if status == 0 { size } else { 0 }];
        if log.is_empty() {
            return String::new();
        }
        // SAFETY: the buffer has the size that was asked for.
        let status = unsafe { (self.api.nvrtcGetProgramLog)(program, log.as_mut_ptr().cast()) };
        if status != 0 {
            return String::new();
        }
        String::from_utf8_lossy(&log).trim_end_matches('\0').to_owned()
    }
}

fn architectures(api: &NvrtcApi) -> Option<Vec<u32>> {
    let mut count: c_int = 0;
    // SAFETY: the number goes where it is told.
    let status = unsafe { (api.nvrtcGetNumSupportedArchs)(&raw mut count) };
    let mut list = vec![0 as c_int; usize::try_from(count).ok().filter(|_| status == 0)?];
    // SAFETY: the list has the length that was asked for.
    let status = unsafe { (api.nvrtcGetSupportedArchs)(list.as_mut_ptr()) };
    (status == 0).then(|| list.into_iter().filter_map(|arch| u32::try_from(arch).ok()).collect())
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    use super::*;

    #[test]
    fn the_folder_is_the_users_choice_then_the_systems() {
        let with = |set: &[(&str, &str)]| {
            let set: Vec<(String, OsString)> =
                set.iter().map(|(key, value)| ((*key).to_owned(), value.into())).collect();
            folder_from(&|name| set.iter().find(|(key, _)| key == name).map(|(_, v)| v.clone()))
        };
        let all = [(CACHE_VARIABLE, "/a"), ("XDG_CACHE_HOME", "/b"), ("HOME", "/c")];
        assert_eq!(with(&all), Some("/a/lorarun/kernels".into()));
        assert_eq!(with(&all[1..]), Some("/b/lorarun/kernels".into()));
        assert_eq!(with(&all[2..]), Some("/c/.cache/lorarun/kernels".into()));
        assert_eq!(with(&[]), None);
    }

    #[test]
    fn cards_that_the_compiler_does_not_know_get_the_nearest_below() {
        let known = [75, 80, 86, 89, 90, 100, 120];
        let of = |capability| target(&known, capability);
        let code = |name: &str| Target { name: name.to_owned(), machine_code: true };
        assert_eq!(of((8, 6)), code("sm_86"));
        assert_eq!(of((8, 7)), code("sm_86"));
        assert_eq!(of((12, 1)), code("sm_120"));
        assert_eq!(of((13, 0)), Target { name: "compute_120".into(), machine_code: false });
    }

    #[test]
    fn a_damaged_file_is_not_used_and_a_missing_folder_is_made() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("deep/down/name.cubin");
        assert_eq!(read(&file), None);
        write(&file, b"machine code").unwrap();
        assert_eq!(read(&file).as_deref(), Some(&b"machine code"[..]));
        let mut bytes = std::fs::read(&file).unwrap();
        bytes[40] ^= 1;
        std::fs::write(&file, &bytes).unwrap();
        assert_eq!(read(&file), None);
        std::fs::write(&file, &bytes[..20]).unwrap();
        assert_eq!(read(&file), None);
        assert!(write(Path::new("/proc/nowhere/name.cubin"), b"").is_err());
    }

    #[test]
    fn a_module_that_is_not_there_is_named() {
        let error = source("nonsense").unwrap_err().to_string();
        assert!(error.contains("nonsense"), "{error}");
    }
}
