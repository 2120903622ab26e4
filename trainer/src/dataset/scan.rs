//! Finds the images of a subset with their captions and sizes, in an order that depends on names
//! alone, so that every rank sees the same dataset.

use super::config::{SubsetPlan, SubsetSource};
use super::error::DatasetError;
use super::mask::{Mask, find_masks};
use pictures::image_file::{self, EXTENSIONS};
use rayon::prelude::*;
use std::path::{Path, PathBuf};

/// An image as found on disk.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct FoundImage {
    pub(crate) path: PathBuf,
    /// Width and height in pixels, upright.
    pub(crate) size: (u32, u32),
    pub(crate) caption: String,
    /// What counts for the tag frequency: the caption, or the tags of a metadata file.
    pub(crate) tags: Option<String>,
    /// Index of the subset in its dataset.
    pub(crate) subset: usize,
    /// Picture that weighs its loss.
    pub(crate) mask: Option<Mask>,
}

/// What a scan found, beside what it left out.
#[derive(Debug, Default)]
pub(crate) struct Found {
    pub(crate) images: Vec<FoundImage>,
    /// Images that cannot be used, as errors naming them.
    pub(crate) unusable: Vec<DatasetError>,
    pub(crate) warnings: Vec<String>,
}

/// Finds the images of one subset.
///
/// # Errors
/// A folder or metadata file that cannot be read or holds no image, an image without a caption or
/// mask, and caption files that are empty or no UTF-8.
pub(crate) fn scan_subset(subset: &SubsetPlan, index: usize) -> Result<Found, DatasetError> {
    let mut found = Found::default();
    let named = match &subset.source {
        SubsetSource::DreamBooth { image_dir, .. } => {
            let paths = list_images(image_dir, &mut found.warnings)?;
            let captions: Result<Vec<String>, DatasetError> =
                paths.par_iter().map(|path| dreambooth_caption(path, subset)).collect();
            paths
                .into_iter()
                .zip(captions?)
                .map(|(path, caption)| (path, Some(caption.clone()), caption))
                .collect()
        }
        SubsetSource::FineTuning { metadata_file, image_dir } => {
            metadata_images(metadata_file, image_dir.as_deref(), subset)?
        }
    };
    let sizes: Vec<Result<(u32, u32), String>> =
        named.par_iter().map(|(path, _, _)| image_file::read_size(path)).collect();
    for ((path, tags, caption), size) in named.into_iter().zip(sizes) {
        match size {
            Ok(size) => {
                let mask = None;
                found.images.push(FoundImage { path, size, caption, tags, subset: index, mask });
            }
            Err(problem) => found.unusable.push(DatasetError::Image { path, problem }),
        }
    }
    if let Some(folder) = &subset.options.conditioning_data_dir {
        let images: Vec<_> = found.images.iter().map(|i| (i.path.as_path(), i.size)).collect();
        let masks = find_masks(folder, &images)?;
        found.images.iter_mut().zip(masks).for_each(|(image, mask)| image.mask = Some(mask));
    }
    Ok(found)
}

/// Whether the name is that of an image.
pub(crate) fn is_image(path: &Path) -> bool {
    has_extension(path, &EXTENSIONS)
}

fn has_extension(path: &Path, extensions: &[&str]) -> bool {
    let extension = path.extension().map(|extension| extension.to_string_lossy().to_lowercase());
    extension.is_some_and(|extension| extensions.contains(&extension.as_str()))
}

/// The images directly in a folder, sorted by name; hidden files are left out.
fn list_images(folder: &Path, warnings: &mut Vec<String>) -> Result<Vec<PathBuf>, DatasetError> {
    if !folder.is_dir() {
        return Err(DatasetError::NoImages {
            place: folder.to_owned(),
            advice: "`image_dir` is not a folder; relative paths count from where the command is \
                     run"
            .into(),
        });
    }
    let read_error = |error| DatasetError::file("read the folder", folder, error);
    let (mut images, mut folders, mut unreadable) = (Vec::new(), 0usize, 0usize);
    for entry in std::fs::read_dir(folder).map_err(read_error)? {
        let path = entry.map_err(read_error)?.path();
        let hidden = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
        if hidden {
            continue;
        }
        if path.is_dir() {
            folders += 1;
        } else if is_image(&path) {
            // A pipe or device would be waited for; a link that leads nowhere is named when read.
            let special = path.metadata().is_ok_and(|found| !found.is_file());
            if special {
                warnings.push(format!("not a regular file, it is left out: {}", path.display()));
            } else {
                images.push(path);
            }
        } else if has_extension(&path, &["avif", "jxl", "gif", "tif", "tiff", "heic"]) {
            unreadable += 1;
        }
    }
    if unreadable > 0 {
        warnings.push(format!(
            "{unreadable} files are left out, only {} are read: {}",
            EXTENSIONS.join(", "),
            folder.display()
        ));
    }
    if images.is_empty() {
        let advice = if folders > 0 {
            "the images should lie directly in `image_dir`; folders named `repeats_class` are for \
             `train_data_dir`"
        } else {
            "png, jpg, jpeg, webp and bmp files are read"
        };
        return Err(DatasetError::NoImages { place: folder.to_owned(), advice: advice.into() });
    }
    images.sort();
    Ok(images)
}

/// The caption file of an image, or its class tokens.
fn dreambooth_caption(image: &Path, subset: &SubsetPlan) -> Result<String, DatasetError> {
    let options = &subset.options;
    for path in caption_files(image, &options.caption_extension) {
        if path.is_file() {
            return read_caption(&path, options.enable_wildcard);
        }
    }
    if let Some(tokens) = &options.class_tokens {
        return Ok(tokens.clone());
    }
    let other = [".txt", ".caption"]
        .into_iter()
        .find(|other| caption_files(image, other).iter().any(|path| path.is_file()));
    let advice = match other {
        Some(other) => format!(
            "there is a `{other}` file beside it: set `caption_extension = \"{other}\"`, not `{}`",
            options.caption_extension
        ),
        None => format!(
            "write the caption into a `{}` file beside it, or give the subset `class_tokens`",
            options.caption_extension
        ),
    };
    Err(DatasetError::NoCaption { image: image.to_owned(), advice })
}

/// `a.png` has its caption in `a.txt`; `a_10_20_30_40.png` (a face position) also in `a.txt`.
fn caption_files(image: &Path, extension: &str) -> Vec<PathBuf> {
    let stem = image.file_stem().unwrap_or_default().to_string_lossy();
    let mut files = vec![image.with_file_name(format!("{stem}{extension}"))];
    let parts: Vec<&str> = stem.split('_').collect();
    if parts.len() >= 5 {
        let name = parts[..parts.len() - 4].join("_");
        files.push(image.with_file_name(format!("{name}{extension}")));
    }
    files
}

fn read_text(path: &Path) -> Result<String, DatasetError> {
    let bytes = std::fs::read(path).map_err(|error| DatasetError::file("read", path, error))?;
    match String::from_utf8(bytes) {
        Ok(text) => Ok(text.strip_prefix('\u{feff}').map(str::to_owned).unwrap_or(text)),
        Err(error) => Err(DatasetError::Caption {
            path: path.to_owned(),
            problem: format!("byte {} is not UTF-8", error.utf8_error().valid_up_to() + 1),
            advice: "save the file as UTF-8".into(),
        }),
    }
}

/// The first line, or with `wildcard` every line that is not blank.
fn read_caption(path: &Path, wildcard: bool) -> Result<String, DatasetError> {
    let text = read_text(path)?;
    if text.is_empty() {
        return Err(DatasetError::Caption {
            path: path.to_owned(),
            problem: "the file is empty".into(),
            advice: "write a caption; one blank line stands for an empty caption".into(),
        });
    }
    let mut lines = text.lines().map(str::trim);
    Ok(if wildcard {
        lines.filter(|line| !line.is_empty()).collect::<Vec<_>>().join("\n")
    } else {
        lines.next().unwrap_or_default().to_owned()
    })
}

/// Path, tags and caption of an image.
type Named = (PathBuf, Option<String>, String);

/// One entry of a metadata file; other keys (sizes, scores) are not needed here.
#[derive(serde::Deserialize)]
struct Entry {
    image_path: Option<String>,
    caption: Option<String>,
    tags: Option<String>,
}

fn metadata_images(
    file: &Path,
    image_dir: Option<&Path>,
    subset: &SubsetPlan,
) -> Result<Vec<Named>, DatasetError> {
    let text = read_text(file)?;
    let unusable = |problem: String, advice: &str| DatasetError::Caption {
        path: file.to_owned(),
        problem,
        advice: advice.to_owned(),
    };
    let mut entries: Vec<(String, Entry)> = Vec::new();
    if has_extension(file, &["jsonl"]) {
        for (number, line) in text.lines().enumerate() {
            if line.trim().is_empty() {
                continue;
            }
            let at = format!("line {}", number + 1);
            let mut entry: Entry = serde_json::from_str(line)
                .map_err(|error| unusable(format!("{at}: {error}"), ""))?;
            let path = entry.image_path.take().ok_or_else(|| {
                unusable(format!("{at} has no `image_path`"), "each line names its image")
            })?;
            entries.push((path, entry));
        }
    } else {
        let advice = "it should hold one object: image path to `{\"caption\": ..., \"tags\": ...}`";
        let map: std::collections::BTreeMap<String, Entry> =
            serde_json::from_str(&text).map_err(|error| unusable(error.to_string(), advice))?;
        entries.extend(map);
    }
    if entries.is_empty() {
        return Err(DatasetError::NoImages {
            place: file.to_owned(),
            advice: "the metadata file has no entries".into(),
        });
    }
    entries.sort_by(|left, right| left.0.cmp(&right.0));
    entries.dedup_by(|right, left| right.0 == left.0);
    let mut named = Vec::with_capacity(entries.len());
    for (key, entry) in entries {
        let path = match (Path::new(&key).is_absolute(), image_dir) {
            (true, _) => PathBuf::from(&key),
            (false, Some(folder)) => folder.join(&key),
            (false, None) => {
                return Err(unusable(
                    format!("the image path is relative: {key}"),
                    "give `image_dir`, the folder it counts from",
                ));
            }
        };
        let caption = metadata_caption(&entry, subset);
        let tags = entry.tags.filter(|tags| !tags.is_empty());
        named.push((with_extension_found(path), tags, caption));
    }
    Ok(named)
}

/// Caption and tags of a metadata entry as one caption; with wildcards the tags go to every line.
fn metadata_caption(entry: &Entry, subset: &SubsetPlan) -> String {
    let separator = &subset.options.caption_separator;
    let caption = entry.caption.clone().unwrap_or_default();
    let Some(tags) = entry.tags.as_ref().filter(|tags| !tags.is_empty()) else { return caption };
    if !subset.options.enable_wildcard {
        return if caption.is_empty() {
            tags.clone()
        } else {
            format!("{caption}{separator}{tags}")
        };
    }
    let tags = tags.replace('\n', separator);
    let lines = caption.split('\n').filter(|line| !line.trim().is_empty());
    let joined: Vec<String> = lines.map(|line| format!("{line}{separator}{tags}")).collect();
    if joined.is_empty() { tags } else { joined.join("\n") }
}

/// Old metadata files name images without an extension.
fn with_extension_found(path: PathBuf) -> PathBuf {
    if path.is_file() || is_image(&path) {
        return path;
    }
    for extension in EXTENSIONS {
        for extension in [extension.to_owned(), extension.to_uppercase()] {
            let mut name = path.clone().into_os_string();
            name.push(".");
            name.push(&extension);
            let candidate = PathBuf::from(name);
            if candidate.is_file() {
                return candidate;
            }
        }
    }
    path
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataset::config::SubsetOptions;
    use std::fs;

    fn png(path: &Path) {
        image::RgbImage::new(8, 6).save_with_format(path, image::ImageFormat::Png).unwrap();
    }

    fn dreambooth(folder: &Path, options: SubsetOptions) -> SubsetPlan {
        let source = SubsetSource::DreamBooth { image_dir: folder.to_owned(), is_reg: false };
        SubsetPlan { source, options }
    }

    #[test]
    fn captions_of_every_kind_in_name_order() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        for name in ["b.PNG", "a.jpeg", "c_1_2_3_4.webp", "d.bmp", ".hidden.png", "e.gif"] {
            png(&at(name));
        }
        fs::write(at("a.txt"), "\u{feff}first, line \r\n\nsecond\n").unwrap();
        fs::write(at("b.txt"), "\n").unwrap();
        fs::write(at("c.txt"), "face").unwrap();
        let mut options =
            SubsetOptions { caption_extension: ".txt".into(), ..SubsetOptions::default() };
        options.class_tokens = Some("sks dog".into());
        let found = scan_subset(&dreambooth(folder.path(), options.clone()), 3).unwrap();
        let captions: Vec<&str> = found.images.iter().map(|i| i.caption.as_str()).collect();
        assert_eq!(captions, ["first, line", "", "face", "sks dog"]);
        assert!(found.images.iter().all(|image| image.size == (8, 6) && image.subset == 3));
        assert_eq!((found.unusable.len(), found.warnings.len()), (0, 1));
        options.enable_wildcard = true;
        let found = scan_subset(&dreambooth(folder.path(), options), 0).unwrap();
        assert_eq!(found.images[0].caption, "first, line\nsecond");
    }

    #[test]
    fn missing_captions_and_images_say_what_to_do() {
        let folder = tempfile::tempdir().unwrap();
        let plan = dreambooth(folder.path(), SubsetOptions::default());
        let text = scan_subset(&plan, 0).unwrap_err().to_string();
        assert!(text.contains("no images found"), "{text}");
        png(&folder.path().join("a.png"));
        let text = scan_subset(&plan, 0).unwrap_err().to_string();
        assert!(text.contains("a.png") && text.contains("class_tokens"), "{text}");
        fs::write(folder.path().join("a.txt"), "x").unwrap();
        let text = scan_subset(&plan, 0).unwrap_err().to_string();
        assert!(text.contains("set `caption_extension = \".txt\"`"), "{text}");
        fs::write(folder.path().join("a.caption"), "").unwrap();
        assert!(scan_subset(&plan, 0).unwrap_err().to_string().contains("is empty"));
        fs::write(folder.path().join("a.caption"), b"ok \xff").unwrap();
        assert!(scan_subset(&plan, 0).unwrap_err().to_string().contains("byte 4 is not UTF-8"));
        let plan = dreambooth(&folder.path().join("none"), SubsetOptions::default());
        assert!(scan_subset(&plan, 0).unwrap_err().to_string().contains("not a folder"));
    }

    #[test]
    fn metadata_files() {
        let folder = tempfile::tempdir().unwrap();
        let (first, second) = (folder.path().join("x.png"), folder.path().join("y.png"));
        png(&first);
        png(&second);
        let json = folder.path().join("meta.json");
        let content = serde_json::json!({
            "y": {"caption": "a dog\ntwo", "tags": "t1,t2", "train_resolution": [8, 8]},
            first.to_str().unwrap(): {"tags": "solo"},
            "gone.png": {"caption": "lost"},
        });
        fs::write(&json, content.to_string()).unwrap();
        let mut plan = SubsetPlan {
            source: SubsetSource::FineTuning {
                metadata_file: json.clone(),
                image_dir: Some(folder.path().to_owned()),
            },
            options: SubsetOptions::default(),
        };
        let found = scan_subset(&plan, 0).unwrap();
        let captions: Vec<&str> = found.images.iter().map(|i| i.caption.as_str()).collect();
        assert_eq!(captions, ["solo", "a dog\ntwo,t1,t2"]);
        assert_eq!(found.images[1].tags.as_deref(), Some("t1,t2"));
        assert_eq!(found.unusable.len(), 1);
        plan.options.enable_wildcard = true;
        let found = scan_subset(&plan, 0).unwrap();
        assert_eq!(found.images[1].caption, "a dog,t1,t2\ntwo,t1,t2");

        let lines = folder.path().join("meta.jsonl");
        fs::write(&lines, "{\"image_path\": \"x.png\", \"caption\": \"c\"}\n\n").unwrap();
        let source = SubsetSource::FineTuning { metadata_file: lines.clone(), image_dir: None };
        let plan = SubsetPlan { source, options: SubsetOptions::default() };
        let text = scan_subset(&plan, 0).unwrap_err().to_string();
        assert!(text.contains("give `image_dir`"), "{text}");
        fs::write(&lines, "{\"caption\": \"c\"}").unwrap();
        assert!(scan_subset(&plan, 0).unwrap_err().to_string().contains("line 1 has no"));
        fs::write(&lines, "{\"caption\"").unwrap();
        assert!(scan_subset(&plan, 0).unwrap_err().to_string().contains("line 1"));
    }
}
