//! Makes small runs: a folder of drawn pictures, a config, and the `lorarun` binary run on them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use formats::lora_file::LoraFile;

/// Root of the repository.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the package has a parent").to_owned()
}

/// A file or folder of `tests/data`.
pub fn data(path: &str) -> PathBuf {
    root().join("tests/data").join(path)
}

/// A folder with eight pictures and a config, removed when dropped.
pub struct Scene {
    pub folder: tempfile::TempDir,
    options: BTreeMap<String, String>,
}

impl Scene {
    /// Eight captioned 128x128 pictures and options for ten steps of batch 4 on the small model.
    ///
    /// At 128 pixels the lowest level of the U-Net still has 2x2 pixels: with one, its
    /// self-attention has a zero gradient, and AdamW would make weights of the rounding.
    pub fn new() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let images = folder.path().join("images");
        std::fs::create_dir(&images).expect("a new folder");
        for index in 0..8_u32 {
            let picture = image::RgbImage::from_fn(128, 128, |x, y| {
                let inside =
                    x.abs_diff(64).pow(2) + y.abs_diff(64).pow(2) < (16 + 5 * index).pow(2);
                let shade = (x * 3 + index * 20) as u8;
                if inside {
                    image::Rgb([200, 30 * index as u8, 40])
                } else {
                    image::Rgb([shade, (y * 2) as u8, 90])
                }
            });
            picture.save(images.join(format!("{index}.png"))).expect("a saved picture");
            std::fs::write(
                images.join(format!("{index}.txt")),
                format!("sks circle, size {index}"),
            )
            .expect("a saved caption");
        }
        let mut scene = Self { folder, options: BTreeMap::new() };
        let model = data("parity/model");
        scene.set("pretrained_model_name_or_path", quoted(&model.display().to_string()));
        let output = scene.output_dir();
        scene.set("output_dir", quoted(&output.display().to_string()));
        scene.set("output_name", quoted("small"));
        for (key, value) in [
            ("network_module", "'networks.lora'"),
            ("network_dim", "4"),
            ("learning_rate", "1e-3"),
            ("max_train_steps", "10"),
            ("train_batch_size", "4"),
            ("resolution", "'128,128'"),
            ("seed", "42"),
            ("cache_latents", "true"),
            ("save_model_as", "'safetensors'"),
        ] {
            scene.set(key, value);
        }
        scene
    }

    /// Folder that the run writes to.
    pub fn output_dir(&self) -> PathBuf {
        self.folder.path().join("out")
    }

    /// Folder of the pictures.
    pub fn images(&self) -> PathBuf {
        self.folder.path().join("images")
    }

    /// Sets an option, written as TOML.
    pub fn set(&mut self, key: &str, value: impl Into<String>) -> &mut Self {
        self.options.insert(key.to_owned(), value.into());
        self
    }

    /// Writes the config with an inline dataset of the pictures.
    pub fn write_config(&self) -> PathBuf {
        let mut text = String::new();
        for (key, value) in &self.options {
            text.push_str(&format!("{key} = {value}\n"));
        }
        text.push_str("\n[[datasets]]\n[[datasets.subsets]]\n");
        text.push_str(&format!("image_dir = {}\n", quoted(&self.images().display().to_string())));
        text.push_str("caption_extension = '.txt'\nnum_repeats = 2\n");
        let path = self.folder.path().join("config.toml");
        std::fs::write(&path, text).expect("a written config");
        path
    }

    /// Runs `lorarun` with launcher flags, `train`, the config and more arguments.
    pub fn train(&self, launcher: &[&str], more: &[&str]) -> Output {
        let config = self.write_config();
        lorarun().args(launcher).arg("train").arg(config).args(more).output().expect("lorarun runs")
    }

    /// Runs and asserts success; gives the trained file.
    pub fn trained(&self, launcher: &[&str]) -> LoraFile {
        let output = self.train(launcher, &[]);
        assert!(output.status.success(), "{}", text(&output));
        formats::lora_file::read(&self.output_dir().join("small.safetensors")).expect("a LoRA file")
    }
}

/// A TOML literal string.
pub fn quoted(text: &str) -> String {
    format!("'{text}'")
}

/// The binary under test, run from the root of the repository.
pub fn lorarun() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lorarun"));
    command.current_dir(root());
    command
}

/// Standard output and error of a process, for messages.
pub fn text(output: &Output) -> String {
    format!(
        "status: {}\n--- stdout\n{}\n--- stderr\n{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}
