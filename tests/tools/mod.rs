//! The tools as commands: the reference's cases with its arguments, bad input, memory.
//!
//! - `cases`: sd-scripts' results on the small model, argument for argument
//! - `generate`: pictures as a command
//! - `hostile`: every kind of bad input gives one clear error and no file
//! - `merge`: what merged models predict, folders, metadata, what fits no model
//! - `resize_images`: the reference's pictures, exit codes, what is left behind

mod cases;
mod generate;
mod hostile;
mod merge;
mod resize_images;

use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::OnceLock;

use formats::lora_file::{self, SaveAs, Tensors};
use formats::{Dtype, OwnedTensor};
use sha2::{Digest, Sha256};

use crate::harness::{data, lorarun, text};

/// The reference's inputs under the names that its arguments use. The models are made from the
/// parity model: converted to one file, and the same with the tensors that its tuned copy changed.
fn inputs() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        // Kept until the process ends; it is in the folder of temporary files.
        let folder = tempfile::tempdir().expect("a temporary folder").keep();
        for name in ["dylora_r16", "lierla_r4b", "lierla_r8"] {
            let name = format!("{name}.safetensors");
            std::fs::copy(data("tools/in").join(&name), folder.join(&name)).expect("a copy");
        }
        let lora = "lierla_r4.safetensors";
        std::fs::copy(data("lora").join(lora), folder.join(lora)).expect("a copy");
        let model = data("parity/model");
        run_in(
            &folder,
            &format!("convert --model {} --save_to tiny_ldm.safetensors", model.display()),
        );
        let mut tensors = read(&folder.join("tiny_ldm.safetensors"));
        tensors.extend(read(&data("tools/in/perturbed_tensors.safetensors")));
        write(&folder.join("tiny_ldm_perturbed.safetensors"), &tensors);
        folder
    })
}

/// A folder in which `in/` holds the inputs; removed when dropped.
fn scene() -> tempfile::TempDir {
    let scene = tempfile::tempdir().expect("a temporary folder");
    std::os::unix::fs::symlink(inputs(), scene.path().join("in")).expect("a link");
    scene
}

/// Runs `lorarun` in a folder.
fn attempt_in(folder: &Path, arguments: &str) -> Output {
    let arguments = arguments.split_whitespace();
    lorarun().current_dir(folder).args(arguments).output().expect("lorarun runs")
}

/// Runs `lorarun` in a folder and asserts success.
fn run_in(folder: &Path, arguments: &str) -> Output {
    let output = attempt_in(folder, arguments);
    assert!(output.status.success(), "lorarun {arguments}\n{}", text(&output));
    output
}

fn read(path: &Path) -> Tensors {
    lora_file::read(path).unwrap_or_else(|error| panic!("{error}")).tensors
}

fn write(path: &Path, tensors: &Tensors) {
    lora_file::write(path, tensors, &Default::default(), SaveAs::Safetensors).expect("a file");
}

/// One number for all that a file holds, in the order of the names.
fn digest(tensors: &Tensors) -> String {
    let mut hash = Sha256::new();
    for (name, tensor) in tensors {
        let dtype = match tensor.dtype {
            Dtype::F32 => "float32",
            Dtype::F16 => "float16",
            other => panic!("no name for {other}"),
        };
        hash.update(format!("{name} {dtype} {:?}\n", tensor.shape));
        hash.update(&tensor.data);
    }
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A copy whose tensor `name` has the value `value` in its third place.
fn with_value(tensors: &Tensors, name: &str, value: f32) -> Tensors {
    let mut tensors = tensors.clone();
    let tensor = &tensors[name];
    let mut values = tensor.to_f32();
    values[2] = value;
    let changed = OwnedTensor::from_f32(&tensor.shape, &values, tensor.dtype).expect("floats");
    tensors.insert(name.to_owned(), changed);
    tensors
}
