//! A diffusers folder written beside the one it was read from: weights merged, everything else that
//! belongs to the model copied.

use std::fs::File;
use std::path::{Component, Path, PathBuf};

use anyhow::Context;
use formats::SaveAs;
use formats::atomic_folder::write_folder_atomic;
use formats::model_files::ModelFiles;

use super::into_model::Merge;
use super::metadata;
use crate::Usage;

/// Endings of weights; those that the merge did not read would be the model before it.
const WEIGHTS: [&str; 9] =
    ["safetensors", "bin", "ckpt", "pt", "pth", "msgpack", "h5", "onnx", "onnx_data"];

/// Folders whose weights are merged.
const COMPONENTS: [&str; 4] = ["unet", "text_encoder", "text_encoder_2", "vae"];

/// Checks where a folder is to be written before the work begins.
///
/// # Errors
/// A [`Usage`]: a place within the model or around an input, a folder that is no model.
pub(super) fn check_target(save_to: &Path, model: &Path, inputs: &[&Path]) -> anyhow::Result<()> {
    if SaveAs::of_path(save_to).is_ok() {
        return Err(Usage(format!(
            "the model is a folder, so `save_to` should name a folder: `{}`\nhint: `lorarun \
             convert` makes one file of a folder, before or after the merge",
            save_to.display()
        ))
        .into());
    }
    let place = |path: &Path| -> PathBuf {
        // The folder itself may not exist yet.
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        let parent = parent.unwrap_or(Path::new(".")).canonicalize();
        let joined = parent.ok().zip(path.file_name()).map(|(parent, name)| parent.join(name));
        path.canonicalize().ok().or(joined).unwrap_or_else(|| path.to_path_buf())
    };
    let target = place(save_to);
    if target.starts_with(place(model)) {
        return Err(Usage(format!(
            "`save_to` lies within the model that is read: `{}`\nhint: choose another folder; \
             nothing was written",
            save_to.display()
        ))
        .into());
    }
    if let Some(input) = inputs.iter().find(|input| place(input).starts_with(&target)) {
        return Err(Usage(format!(
            "`save_to` would be replaced, and it holds a file that is read: `{}`\nhint: choose \
             another folder; nothing was written",
            input.display()
        ))
        .into());
    }
    let is_empty = || std::fs::read_dir(save_to).is_ok_and(|mut entries| entries.next().is_none());
    if save_to.exists() && !save_to.join("model_index.json").is_file() && !is_empty() {
        return Err(Usage(format!(
            "`save_to` would be replaced, and it is no model: `{}`\nhint: choose a new folder; \
             nothing was written",
            save_to.display()
        ))
        .into());
    }
    Ok(())
}

/// Writes the folder.
///
/// # Errors
/// What cannot be read or written; an earlier folder is then untouched.
pub(super) fn write(merge: &Merge<'_>, save_to: &Path) -> anyhow::Result<()> {
    if let Some(parent) = save_to.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        std::fs::create_dir_all(parent).with_context(|| {
            format!("cannot make the folder of `save_to`: {}", parent.display())
        })?;
    }
    write_folder_atomic(save_to, |folder| {
        copy_rest(merge.model, &merge.model.path, folder)?;
        for (index, stored) in merge.model.files.iter().enumerate() {
            let path = folder.join(plain_name(&stored.relative));
            make_parent(&path)?;
            let save_as = SaveAs::of_path(&path)?;
            let metadata = metadata::of_component(stored.file.as_ref());
            merge.write_file(index, &path, save_as, Some(&metadata))?;
        }
        Ok(())
    })
}

/// `unet/diffusion_pytorch_model.fp16.safetensors` without the variant, which loaders ask for by
/// name; shards keep theirs, their index names them.
fn plain_name(relative: &Path) -> PathBuf {
    let name = relative.file_name().unwrap_or_default().to_string_lossy();
    relative.with_file_name(name.replacen(".fp16.", ".", 1))
}

/// Copies what is no weight of a merged component, with its folders. Hidden names stay out: they
/// are a download's or a repository's own.
fn copy_rest(model: &ModelFiles, from: &Path, to: &Path) -> anyhow::Result<()> {
    let entries = std::fs::read_dir(from);
    for entry in entries.with_context(|| format!("cannot list `{}`", from.display()))? {
        let path = entry.with_context(|| format!("cannot list `{}`", from.display()))?.path();
        let relative = path.strip_prefix(&model.path).unwrap_or(&path);
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with('.') {
            continue;
        }
        let target = to.join(name.as_ref());
        if path.is_dir() {
            std::fs::create_dir_all(&target)
                .with_context(|| format!("cannot make `{}`", target.display()))?;
            copy_rest(model, &path, &target)?;
        } else if path.is_file() && is_copied(model, relative) {
            copy_file(&path, &target)?;
        }
    }
    Ok(())
}

fn is_copied(model: &ModelFiles, relative: &Path) -> bool {
    let extension = relative.extension().and_then(|e| e.to_str()).unwrap_or_default();
    let name = relative.file_name().unwrap_or_default().to_string_lossy();
    let mut parts = relative.components();
    let first = parts.next().and_then(|part| match part {
        Component::Normal(part) => part.to_str(),
        _ => None,
    });
    let in_component = parts.next().is_some() && first.is_some_and(|f| COMPONENTS.contains(&f));
    let at_root = relative.components().count() == 1;
    if !in_component && !at_root {
        return true;
    }
    if name.contains(".index.") && extension == "json" {
        // An index is for shards: those that the merge read.
        let sharded = |file: &formats::model_files::StoredFile| {
            let shard = file.relative.to_string_lossy().contains("-of-");
            shard && file.relative.parent() == relative.parent()
        };
        return model.files.iter().any(sharded);
    }
    !WEIGHTS.contains(&extension)
}

fn copy_file(from: &Path, to: &Path) -> anyhow::Result<()> {
    let copied = std::fs::copy(from, to).and_then(|_| File::open(to)?.sync_all());
    copied.with_context(|| format!("cannot copy `{}`", from.display()))
}

fn make_parent(path: &Path) -> anyhow::Result<()> {
    let Some(parent) = path.parent() else { return Ok(()) };
    std::fs::create_dir_all(parent).with_context(|| format!("cannot make `{}`", parent.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_variant_is_no_part_of_the_new_name() {
        let of = |name: &str| plain_name(Path::new(name)).display().to_string();
        assert_eq!(of("unet/model.fp16.safetensors"), "unet/model.safetensors");
        assert_eq!(of("unet/model.safetensors"), "unet/model.safetensors");
        assert_eq!(
            of("unet/model.fp16-00001-of-00002.safetensors"),
            "unet/model.fp16-00001-of-00002.safetensors"
        );
    }

    #[test]
    fn no_folder_is_replaced_but_a_model() {
        let scene = tempfile::tempdir().unwrap();
        let folder = |name: &str| {
            let path = scene.path().join(name);
            std::fs::create_dir_all(&path).unwrap();
            path
        };
        let (model, other, earlier) = (folder("model"), folder("other"), folder("earlier"));
        std::fs::write(other.join("letter.txt"), "").unwrap();
        std::fs::write(earlier.join("model_index.json"), "").unwrap();
        let lora = earlier.join("lora.safetensors");
        let refused = |save_to: &Path, inputs: &[&Path], words: &str| {
            let error = check_target(save_to, &model, inputs).unwrap_err();
            assert!(error.downcast_ref::<Usage>().is_some());
            assert!(error.to_string().contains(words), "{error}");
        };
        refused(&scene.path().join("x.safetensors"), &[], "should name a folder");
        refused(&model, &[], "within the model");
        refused(&model.join("merged"), &[], "within the model");
        refused(&other, &[], "is no model");
        std::fs::write(&lora, "").unwrap();
        refused(&earlier, &[&lora], "holds a file that is read");
        check_target(&earlier, &model, &[]).unwrap();
        check_target(&folder("empty"), &model, &[]).unwrap();
        check_target(&scene.path().join("new/deep"), &model, &[]).unwrap();
    }
}
