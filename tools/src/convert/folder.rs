//! Writes a model as a diffusers folder that appears whole.
//!
//! What the source folder has beside the weights is taken over; the rest is made.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, bail};
use formats::atomic_folder::write_folder_atomic;
use formats::model_files::{ComponentKind, Container, ModelFiles};
use formats::{Component, FormatError, SaveAs, TensorSpec, Weights};
use serde_json::{Value, json};

use super::copy::{self, Casting, Target};
use super::pipeline::{self, Noise};
use super::shapes;
use crate::precision::Precision;
use crate::progress::tell;

const INDEX: &str = "model_index.json";

/// Writes the folder `path`.
///
/// # Errors
/// A component that the model lacks, what cannot be read or written; nothing is left then.
pub(super) fn write(
    model: &ModelFiles,
    path: &Path,
    casting: Casting,
    noise: Noise,
) -> anyhow::Result<()> {
    let mut kinds = vec![ComponentKind::Unet, ComponentKind::TextEncoder, ComponentKind::Vae];
    if model.container == Container::SingleFile && model.component(ComponentKind::Vae).is_none() {
        bail!(
            "`{}` holds no VAE, which a diffusers folder needs\nhint: take the full checkpoint, or \
             convert to a single file",
            model.path.display()
        );
    }
    if model.component(ComponentKind::TextEncoder2).is_some() {
        kinds.push(ComponentKind::TextEncoder2);
    }
    if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        fs::create_dir_all(parent).with_context(|| {
            format!("cannot make the folder of `save_to`: {}", parent.display())
        })?;
    }
    write_folder_atomic(path, |folder| -> anyhow::Result<()> {
        let writing = Writing { model, folder, casting };
        for kind in &kinds {
            writing.component(*kind)?;
        }
        writing.json("scheduler/scheduler_config.json", || {
            Ok(pipeline::scheduler(model.family, noise))
        })?;
        for (kind, name) in [
            (ComponentKind::TextEncoder, "tokenizer"),
            (ComponentKind::TextEncoder2, "tokenizer_2"),
        ] {
            if kinds.contains(&kind) {
                writing.tokenizer(name, kind == ComponentKind::TextEncoder2)?;
            }
        }
        writing.index()
    })
}

struct Writing<'a> {
    model: &'a ModelFiles,
    /// Where it is written.
    folder: &'a Path,
    casting: Casting,
}

impl Writing<'_> {
    fn component(&self, kind: ComponentKind) -> anyhow::Result<()> {
        let component: &Component = self.model.component(kind).with_context(|| {
            format!("`{}` lacks the component `{}`", self.model.path.display(), kind.folder())
        })?;
        let specs = component.names().into_iter().filter_map(|name| {
            let (dtype, shape) = (component.dtype(&name)?, component.shape(&name)?);
            Some(self.casting.spec(TensorSpec { name, dtype, shape }))
        });
        let specs: Vec<TensorSpec> = specs.collect();
        let stem = match kind {
            ComponentKind::Unet | ComponentKind::Vae => "diffusion_pytorch_model",
            ComponentKind::TextEncoder | ComponentKind::TextEncoder2 => "model",
        };
        let config = format!("{}/config.json", kind.folder());
        self.json(&config, || shapes::config(self.model, kind))?;
        let path = self.folder.join(kind.folder()).join(format!("{stem}.safetensors"));
        // transformers asks for it.
        let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
        let target = Target {
            path: &path,
            save_as: SaveAs::Safetensors,
            metadata: Some(&metadata),
            source: component.path(),
        };
        copy::write(&target, &specs, self.casting.finite, |index| {
            Ok(vec![component.get(&specs[index].name)?])
        })
    }

    /// A JSON file: the source folder's, else the one that `make` gives.
    fn json(
        &self,
        relative: &str,
        make: impl FnOnce() -> anyhow::Result<Value>,
    ) -> anyhow::Result<()> {
        let source = self.model.path.join(relative);
        let mut value = if self.model.container == Container::Folder && source.is_file() {
            let bytes = fs::read(&source).map_err(|e| FormatError::io("read", &source, e))?;
            serde_json::from_slice(&bytes)
                .with_context(|| format!("`{}` is not valid JSON", source.display()))?
        } else {
            make()?
        };
        if let Some(precision) = self.casting.precision {
            // Its name before and since version 5 of transformers.
            for key in ["torch_dtype", "dtype"] {
                if let Some(stored) = value.get_mut(key) {
                    *stored = json!(torch_name(precision));
                }
            }
        }
        self.text(relative, &format!("{value:#}\n"))
    }

    fn text(&self, relative: &str, text: &str) -> anyhow::Result<()> {
        let path = self.folder.join(relative);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(|e| FormatError::io("create", parent, e))?;
        }
        fs::write(&path, text).map_err(|e| FormatError::io("write", &path, e))?;
        Ok(())
    }

    /// A tokenizer's folder: the source's, else CLIP's.
    fn tokenizer(&self, name: &str, second: bool) -> anyhow::Result<()> {
        if self.copy_folder(name)? {
            return Ok(());
        }
        for (file, text) in pipeline::tokenizer(self.model.family, second) {
            self.text(&format!("{name}/{file}"), &text)?;
        }
        Ok(())
    }

    /// Copies the files of a folder of the source, if it has such a folder.
    fn copy_folder(&self, name: &str) -> anyhow::Result<bool> {
        let source = self.model.path.join(name);
        if self.model.container != Container::Folder || !source.is_dir() {
            return Ok(false);
        }
        let to = self.folder.join(name);
        fs::create_dir_all(&to).map_err(|e| FormatError::io("create", &to, e))?;
        for entry in fs::read_dir(&source).map_err(|e| FormatError::io("list", &source, e))? {
            let path = entry.map_err(|e| FormatError::io("list", &source, e))?.path();
            if let (true, Some(file)) = (path.is_file(), path.file_name()) {
                fs::copy(&path, to.join(file)).map_err(|e| FormatError::io("copy", &path, e))?;
            }
        }
        Ok(true)
    }

    /// `model_index.json`, without the parts that are not written.
    fn index(&self) -> anyhow::Result<()> {
        const WRITTEN: [&str; 8] = [
            "unet",
            "vae",
            "text_encoder",
            "text_encoder_2",
            "scheduler",
            "tokenizer",
            "tokenizer_2",
            "feature_extractor",
        ];
        self.json(INDEX, || Ok(pipeline::index(self.model.family)))?;
        let path = self.folder.join(INDEX);
        let bytes = fs::read(&path).map_err(|e| FormatError::io("read", &path, e))?;
        let mut index: Value = serde_json::from_slice(&bytes)?;
        let made = pipeline::index(self.model.family);
        let Some(entries) = index.as_object_mut() else {
            bail!("`{INDEX}` of `{}` is no object", self.model.path.display());
        };
        for (key, value) in entries.iter_mut() {
            let is_part = value.as_array().is_some_and(|pair| pair.len() == 2);
            let is_absent = value == &json!([null, null]);
            if key.starts_with("tokenizer") && is_absent && made.get(key).is_some() {
                value.clone_from(&made[key]);
            } else if is_part && !is_absent && !WRITTEN.contains(&key.as_str()) {
                tell(&format!("left out of the folder, as it is no part of the model: `{key}`"));
                *value = json!([null, null]);
            } else if key == "feature_extractor" && !is_absent && !self.copy_folder(key)? {
                *value = json!([null, null]);
            }
        }
        let text = format!("{index:#}\n");
        self.text(INDEX, &text)
    }
}

fn torch_name(precision: Precision) -> &'static str {
    match precision {
        Precision::Float => "float32",
        Precision::Fp16 => "float16",
        Precision::Bf16 => "bfloat16",
    }
}
