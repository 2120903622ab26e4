//! Lists the kernels: every `kernels/*.cu` is a module, every `kernels/*.cuh` a header for them.

use std::path::{Path, PathBuf};
use std::{env, fs, io};

fn main() -> io::Result<()> {
    let root = env::var("CARGO_MANIFEST_DIR").map_err(io::Error::other)?;
    let out = env::var("OUT_DIR").map_err(io::Error::other)?;
    let folder = Path::new(&root).join("kernels");
    println!("cargo::rerun-if-changed={}", folder.display());
    let mut files: Vec<PathBuf> = Vec::new();
    if folder.is_dir() {
        for entry in fs::read_dir(&folder)? {
            files.push(entry?.path());
        }
    }
    files.sort();
    let list = |extension: &str, whole: bool| -> String {
        let of_kind = files.iter().filter(|file| file.extension().is_some_and(|e| e == extension));
        let line = |file: &PathBuf| {
            let name = if whole { file.file_name() } else { file.file_stem() };
            let name = name.unwrap_or_default().to_string_lossy();
            format!("    ({name:?}, include_str!({:?})),\n", file.display().to_string())
        };
        of_kind.map(line).collect()
    };
    let text = format!(
        "/// Modules: name and source.\npub(super) static SOURCES: &[(&str, &str)] = &[\n{}];\n\
         /// Headers: name as included, and text.\npub(super) static HEADERS: &[(&str, &str)] = &[\n{}];\n",
        list("cu", false),
        list("cuh", true)
    );
    fs::write(Path::new(&out).join("kernels.rs"), text)
}
