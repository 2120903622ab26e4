//! Masks for the loss from pictures of their own (`masked_loss` with `conditioning_data_dir`): white
//! is learned, black is not. The mask of `images/a.png` is `masks/a.png` (or `a.jpg`, ...), of the
//! same size; its red channel counts, as in sd-scripts.
//!
//! A mask takes the place of the image's alpha channel, so that it is resized, cropped and mirrored
//! with it.

use super::error::DatasetError;
use pictures::Pixels;
use pictures::image_file::{self, EXTENSIONS};
use rayon::prelude::*;
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::path::{Path, PathBuf};

/// The mask of one image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mask {
    /// The file.
    pub path: PathBuf,
    /// Start of the hash of its bytes: latents that are cached with another mask are made again.
    pub hash: String,
}

/// Masks for `images` (with their sizes), in their order, from the folder `masks`.
///
/// # Errors
/// Images without a mask, masks that cannot be read, and masks of another size than their image.
pub(crate) fn find_masks(
    masks: &Path,
    images: &[(&Path, (u32, u32))],
) -> Result<Vec<Mask>, DatasetError> {
    let files = list_by_stem(masks)?;
    let stem = |path: &Path| path.file_stem().unwrap_or_default().to_owned();
    let missing: Vec<&Path> = images
        .iter()
        .map(|(path, _)| *path)
        .filter(|path| !files.contains_key(&stem(path)))
        .collect();
    if let Some(first) = missing.first() {
        return Err(DatasetError::Mask {
            path: first.to_path_buf(),
            problem: format!(
                "{} of {} images have no mask in {}, the first is this",
                missing.len(),
                images.len(),
                masks.display()
            ),
            advice: "a mask is a picture with the name of its image; all white learns all of it"
                .into(),
        });
    }
    images.par_iter().map(|(image, size)| open_mask(&files[&stem(image)], image, *size)).collect()
}

/// Names masks in `folders` that are not among the `used` ones. Subsets may share a folder.
pub(crate) fn warn_of_unused(
    folders: &BTreeSet<&PathBuf>,
    used: &HashSet<&PathBuf>,
    warnings: &mut Vec<String>,
) -> Result<(), DatasetError> {
    for folder in folders {
        let files = list_by_stem(folder)?;
        let over: Vec<&PathBuf> = files.values().filter(|path| !used.contains(path)).collect();
        if let Some(first) = over.first() {
            let (count, first) = (over.len(), first.display());
            warnings.push(format!("{count} masks belong to no image, the first: {first}"));
        }
    }
    Ok(())
}

/// The pictures of a folder by their name without extension.
fn list_by_stem(folder: &Path) -> Result<BTreeMap<std::ffi::OsString, PathBuf>, DatasetError> {
    let failed = |error| DatasetError::file("read the folder of masks", folder, error);
    let mut files = BTreeMap::new();
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        paths.push(entry.map_err(failed)?.path());
    }
    paths.sort();
    for path in paths {
        let extension = path.extension().map(|e| e.to_string_lossy().to_lowercase());
        let is_picture = extension.is_some_and(|e| EXTENSIONS.contains(&e.as_str()));
        if let (true, true, Some(stem)) = (is_picture, path.is_file(), path.file_stem()) {
            files.entry(stem.to_owned()).or_insert(path);
        }
    }
    Ok(files)
}

fn open_mask(path: &Path, image: &Path, size: (u32, u32)) -> Result<Mask, DatasetError> {
    let unusable = |problem: String| DatasetError::Mask {
        path: path.to_owned(),
        problem,
        advice: format!("it is the mask of {}", image.display()),
    };
    let found = image_file::read_size(path).map_err(unusable)?;
    if found != size {
        return Err(unusable(format!(
            "the mask is {}x{} and its image {}x{}",
            found.0, found.1, size.0, size.1
        )));
    }
    let bytes = std::fs::read(path).map_err(|error| DatasetError::file("read", path, error))?;
    let digest = Sha256::digest(&bytes);
    let hash = digest[..8].iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(Mask { path: path.to_owned(), hash })
}

/// Puts the mask in the place of the alpha channel of `pixels`.
///
/// # Errors
/// A sentence: the mask is damaged, gone, or of another size by now.
pub(crate) fn attach(pixels: Pixels, mask: &Mask) -> Result<Pixels, String> {
    let about = |problem: String| format!("its mask {}: {problem}", mask.path.display());
    let red = image_file::decode(&mask.path, false).map_err(about)?;
    if (red.width, red.height) != (pixels.width, pixels.height) {
        return Err(about(format!("its size is {}x{} now", red.width, red.height)));
    }
    let mut data = Vec::with_capacity(pixels.width * pixels.height * 4);
    let colors = pixels.data.chunks_exact(pixels.channels);
    for (color, mask) in colors.zip(red.data.chunks_exact(red.channels)) {
        data.extend_from_slice(&[color[0], color[1], color[2], mask[0]]);
    }
    Ok(Pixels { channels: 4, data, ..pixels })
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::{GrayImage, Luma, Rgb, RgbImage};

    fn save(path: &Path, size: u32, value: u8) {
        RgbImage::from_pixel(size, size, Rgb([value, 0, 255])).save(path).unwrap();
    }

    #[test]
    fn masks_are_found_by_name_whatever_their_extension() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        save(&at("a.bmp"), 8, 3);
        save(&at("b.png"), 8, 3);
        save(&at("z.png"), 8, 3);
        std::fs::write(at("b.txt"), "no picture").unwrap();
        let images = [Path::new("i/b.jpg"), Path::new("i/a.png")].map(|path| (path, (8, 8)));
        let masks = find_masks(folder.path(), &images).unwrap();
        assert_eq!((masks[0].path.clone(), masks[1].path.clone()), (at("b.png"), at("a.bmp")));
        assert_ne!(masks[0].hash, masks[1].hash);
        let mut warnings = Vec::new();
        let used = masks.iter().map(|mask| &mask.path).collect();
        let own = folder.path().to_owned();
        warn_of_unused(&BTreeSet::from([&own]), &used, &mut warnings).unwrap();
        assert_eq!(warnings.len(), 1);
        assert!(
            warnings[0].contains("1 masks belong to no image") && warnings[0].contains("z.png")
        );
    }

    #[test]
    fn masks_that_do_not_fit_are_named_with_their_image() {
        let folder = tempfile::tempdir().unwrap();
        save(&folder.path().join("a.png"), 8, 3);
        let fault = |images: &[(&Path, (u32, u32))]| {
            find_masks(folder.path(), images).unwrap_err().to_string()
        };
        let text = fault(&[(Path::new("a.png"), (8, 8)), (Path::new("c.png"), (8, 8))]);
        assert!(text.contains("`c.png`") && text.contains("1 of 2 images have no mask"), "{text}");
        let text = fault(&[(Path::new("i/a.png"), (8, 9))]);
        assert!(text.contains("the mask is 8x8 and its image 8x9") && text.contains("i/a.png"));
        std::fs::write(folder.path().join("a.png"), "").unwrap();
        assert!(fault(&[(Path::new("a.png"), (8, 8))]).contains("the file is empty"));
        let nowhere = folder.path().join("none");
        assert!(find_masks(&nowhere, &[]).is_err());
    }

    #[test]
    fn the_red_channel_takes_the_place_of_alpha() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.png");
        let mask = |path: &Path| Mask { path: path.to_owned(), hash: String::new() };
        let pixels = |channels: usize| Pixels {
            width: 2,
            height: 1,
            channels,
            data: (1..=2 * channels as u8).collect(),
        };
        RgbImage::from_raw(2, 1, vec![100, 0, 0, 200, 9, 9]).unwrap().save(&path).unwrap();
        let attached = attach(pixels(3), &mask(&path)).unwrap();
        assert_eq!((attached.channels, attached.data), (4, vec![1, 2, 3, 100, 4, 5, 6, 200]));
        assert_eq!(attach(pixels(4), &mask(&path)).unwrap().data, [1, 2, 3, 100, 5, 6, 7, 200]);
        GrayImage::from_pixel(2, 1, Luma([50])).save(&path).unwrap();
        assert_eq!(attach(pixels(3), &mask(&path)).unwrap().data[7], 50);
        GrayImage::from_pixel(1, 2, Luma([50])).save(&path).unwrap();
        assert!(attach(pixels(3), &mask(&path)).unwrap_err().contains("its size is 1x2 now"));
    }
}
