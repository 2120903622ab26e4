//! Folders in which NVIDIA's libraries may lie, in the order in which they are looked into.
//!
//! Nothing is run to find them: a Python environment is known by its folder, the one whose `python3`
//! is first on `PATH` by where that file lies.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// Names folders with libraries of its own choice, separated by colons; looked into first.
pub const LIBRARIES_VARIABLE: &str = "LORARUN_CUDA_LIBS";
/// Names a Python environment whose `nvidia` packages are to be used.
pub const PYTHON_VARIABLE: &str = "LORARUN_PYTHON_ENV";

/// Where to look next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Ask the loader: its cache, `LD_LIBRARY_PATH`.
    Loader,
    /// Look into a folder.
    Folder(PathBuf),
}

/// The places of this process.
pub(super) fn places() -> Vec<Place> {
    places_from(&|name| std::env::var_os(name), Path::new("/"))
}

/// The places that environment variables and the file system below `root` say.
pub(super) fn places_from(variable: &dyn Fn(&str) -> Option<OsString>, root: &Path) -> Vec<Place> {
    let set = |name: &str| variable(name).filter(|value| !value.is_empty());
    let mut found = Ordered::default();
    for folder in set(LIBRARIES_VARIABLE).iter().flat_map(std::env::split_paths) {
        // Named by hand: kept even where there is nothing, so that a mistake is seen.
        found.push(folder);
    }
    let named_by_hand = found.list.len();
    for name in ["CUDA_HOME", "CUDA_PATH"] {
        if let Some(toolkit) = set(name) {
            found.toolkit(Path::new(&toolkit));
        }
    }
    for name in [PYTHON_VARIABLE, "VIRTUAL_ENV", "CONDA_PREFIX"] {
        if let Some(prefix) = set(name) {
            found.python(Path::new(&prefix));
        }
    }
    for prefix in set("PATH").iter().flat_map(python_on_path) {
        found.python(&prefix);
    }
    if let Some(home) = set("HOME") {
        found.python(&Path::new(&home).join(".local"));
    }
    for toolkit in sorted(&root.join("usr/local"), "cuda").into_iter().rev() {
        found.toolkit(&toolkit);
    }
    for folder in ["usr/lib/x86_64-linux-gnu", "usr/lib64", "usr/lib/wsl/lib"] {
        found.existing(root.join(folder));
    }
    found.existing(root.join("run/opengl-driver/lib"));
    let mut places: Vec<Place> = found.list.into_iter().map(Place::Folder).collect();
    places.insert(named_by_hand, Place::Loader);
    places
}

/// Folders in order, each once.
#[derive(Default)]
struct Ordered {
    list: Vec<PathBuf>,
    seen: BTreeSet<PathBuf>,
}

impl Ordered {
    fn push(&mut self, folder: PathBuf) {
        if !folder.as_os_str().is_empty() && self.seen.insert(folder.clone()) {
            self.list.push(folder);
        }
    }

    fn existing(&mut self, folder: PathBuf) {
        if folder.is_dir() {
            self.push(folder);
        }
    }

    /// Folders of a CUDA toolkit.
    fn toolkit(&mut self, prefix: &Path) {
        for folder in ["lib64", "targets/x86_64-linux/lib", "lib"] {
            self.existing(prefix.join(folder));
        }
    }

    /// Folders of the `nvidia-*` packages of a Python environment, and the environment's own.
    fn python(&mut self, prefix: &Path) {
        for lib in ["lib", "lib64", "local/lib"] {
            for version in sorted(&prefix.join(lib), "python3") {
                for packages in ["site-packages", "dist-packages"] {
                    for package in sorted(&version.join(packages).join("nvidia"), "") {
                        self.existing(package.join("lib"));
                    }
                }
            }
        }
        // What `pip install --target` makes: packages right below the folder.
        for package in sorted(&prefix.join("nvidia"), "") {
            self.existing(package.join("lib"));
        }
        // Conda's packages.
        if prefix.join("conda-meta").is_dir() {
            self.existing(prefix.join("lib"));
        }
    }
}

/// Entries of a folder that begin with `start`, in order of name; none if it cannot be read.
fn sorted(folder: &Path, start: &str) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut paths: Vec<PathBuf> = entries
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(start))
        .map(|entry| entry.path())
        .collect();
    paths.sort();
    paths
}

/// The environment of the first `python3` on `PATH`: as it is called, and where its link leads.
fn python_on_path(path: &OsString) -> Vec<PathBuf> {
    let Some(python) = std::env::split_paths(path)
        .map(|folder| folder.join("python3"))
        .find(|file| file.is_file())
    else {
        return Vec::new();
    };
    let prefix = |file: &Path| file.parent().and_then(Path::parent).map(Path::to_owned);
    let real = python.canonicalize().ok();
    [prefix(&python), real.as_deref().and_then(prefix)].into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(root: &Path, path: &str) -> PathBuf {
        let folder = root.join(path);
        std::fs::create_dir_all(&folder).unwrap();
        folder
    }

    fn places_with(root: &Path, variables: &[(&str, String)]) -> Vec<Place> {
        let variable = |name: &str| {
            let found = variables.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| OsString::from(value))
        };
        places_from(&variable, root)
    }

    #[test]
    fn what_is_named_comes_first_then_the_loader_then_the_system() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        let toolkit = folder(root, "opt/cuda/lib64");
        let local = folder(root, "usr/local/cuda-13.0/lib64");
        let older = folder(root, "usr/local/cuda-12.8/targets/x86_64-linux/lib");
        let system = folder(root, "usr/lib/x86_64-linux-gnu");
        let variables = [
            (LIBRARIES_VARIABLE, "/nowhere/a:/nowhere/b".to_owned()),
            ("CUDA_HOME", root.join("opt/cuda").display().to_string()),
            // The same again, and one that does not exist.
            ("CUDA_PATH", root.join("opt/cuda").display().to_string()),
            ("CONDA_PREFIX", "/nowhere/conda".to_owned()),
        ];
        let want = [
            Place::Folder("/nowhere/a".into()),
            Place::Folder("/nowhere/b".into()),
            Place::Loader,
            Place::Folder(toolkit),
            Place::Folder(local),
            Place::Folder(older),
            Place::Folder(system),
        ];
        assert_eq!(places_with(root, &variables), want);
    }

    #[test]
    fn both_layouts_of_the_packages_are_found_in_every_environment() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        let packages = "lib/python3.11/site-packages/nvidia";
        let old = folder(root, &format!("venv/{packages}/cublas/lib"));
        let old_nvrtc = folder(root, &format!("venv/{packages}/cuda_nvrtc/lib"));
        let new = folder(root, &format!("conda/{packages}/cu13/lib"));
        let conda = root.join("conda/lib");
        folder(root, "conda/conda-meta");
        let named = folder(root, "named/nvidia/cudnn/lib");
        folder(root, &format!("venv/{packages}/empty"));
        let at = |name: &str| root.join(name).display().to_string();
        let variables = [
            ("VIRTUAL_ENV", at("venv")),
            ("CONDA_PREFIX", at("conda")),
            (PYTHON_VARIABLE, at("named")),
        ];
        let want: Vec<Place> =
            [named, old, old_nvrtc, new, conda].map(Place::Folder).into_iter().collect();
        assert_eq!(places_with(root, &variables)[1..], want);
    }

    #[test]
    fn python_on_path_is_known_by_its_folder() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        let (linked, real) = (folder(root, "env/bin"), folder(root, "base/bin"));
        std::fs::write(real.join("python3.12"), "").unwrap();
        std::os::unix::fs::symlink(real.join("python3.12"), linked.join("python3")).unwrap();
        let first = folder(root, "env/lib/python3.12/site-packages/nvidia/nccl/lib");
        let second = folder(root, "base/lib/python3.12/site-packages/nvidia/nccl/lib");
        let variables = [("PATH", format!("/nowhere:{}", linked.display()))];
        let want = [Place::Loader, Place::Folder(first), Place::Folder(second)];
        assert_eq!(places_with(root, &variables), want);
    }
}
