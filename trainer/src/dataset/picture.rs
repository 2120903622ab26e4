//! One image made ready for one use: decoded, resized to cover its bucket, cropped, varied.
//!
//! Without variation (`Variation::None`, for the latent cache) the result depends on the file and
//! the options alone.

use super::buckets::{Size, crop_in_bucket};
use super::config::SubsetOptions;
use super::group::{Dataset, ImageEntry};
use super::mask::attach;
use crate::rng::{Purpose, Rng, stream};
use pictures::{Pixels, image_file, resize};
use std::path::Path;

/// Pixels of an image to pixels of its latents, on each side.
pub const LATENT_SCALE: usize = 8;

/// What may vary between two uses of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Variation {
    /// Centre crop, no flip, no colour changes.
    None,
    /// All that the subset asks for, drawn for this sample.
    Sample {
        /// Seed of the run.
        seed: u64,
        /// Global index of the sample.
        global_index: u64,
    },
}

/// An image ready for the VAE.
#[derive(Debug, Clone, PartialEq)]
pub struct Picture {
    /// Width and height in pixels: those of the bucket.
    pub size: Size,
    /// RGB in [-1,1], `[height, width, 3]`.
    pub rgb: Vec<f32>,
    /// Alpha or mask in [0,1] averaged over the pixels of each latent, `[height / 8, width / 8]`;
    /// for subsets with `alpha_mask` or masks.
    pub alpha: Option<Vec<f32>>,
    /// Width and height of the file.
    pub original_size: Size,
    /// Left, top, right, bottom of the image in its bucket (see `crop_in_bucket`), not flipped.
    pub crop: [f64; 4],
    /// Mirrored left to right.
    pub flipped: bool,
}

/// Whether a sample is mirrored; also asked for cached latents, which keep both.
pub fn is_flipped(options: &SubsetOptions, seed: u64, global_index: u64) -> bool {
    options.flip_aug && stream(seed, Purpose::Flip, global_index, 0).uniform_f64() < 0.5
}

/// Makes an image ready.
///
/// # Errors
/// A sentence about the file: damaged, gone, or changed since it was found.
pub fn prepare(
    dataset: &Dataset,
    image: &ImageEntry,
    variation: Variation,
) -> Result<Picture, String> {
    let options = &dataset.plan.subsets[image.subset].options;
    let with_alpha = options.alpha_mask && image.mask.is_none();
    let mut pixels = image_file::decode(&image.path, with_alpha)?;
    let found = (pixels.width as u32, pixels.height as u32);
    if found != image.size {
        return Err(format!(
            "its size was {}x{} when the run began and is {}x{} now",
            image.size.0, image.size.1, found.0, found.1
        ));
    }
    if let Some(mask) = &image.mask {
        pixels = attach(pixels, mask)?;
    }
    let mut pixels = match variation {
        Variation::None => cover_and_crop(pixels, image, options, None),
        Variation::Sample { seed, global_index } => {
            let mut rng = stream(seed, Purpose::Crop, global_index, 0);
            vary_crop(pixels, dataset, image, &mut rng)
        }
    };
    let mut flipped = false;
    if let Variation::Sample { seed, global_index } = variation {
        if options.color_aug {
            vary_color(&mut pixels, &mut stream(seed, Purpose::Color, global_index, 0));
        }
        flipped = is_flipped(options, seed, global_index);
        if flipped {
            pixels.mirror();
        }
    }
    Ok(Picture {
        size: image.bucket,
        rgb: normalize(&pixels),
        alpha: (options.alpha_mask || image.mask.is_some()).then(|| latent_alpha(&pixels)),
        original_size: image.size,
        crop: crop_in_bucket(image.bucket, image.size),
        flipped,
    })
}

/// Resizes to cover the bucket and crops: in the middle, or at random with `rng`.
fn cover_and_crop(
    pixels: Pixels,
    image: &ImageEntry,
    options: &SubsetOptions,
    rng: Option<&mut Rng>,
) -> Pixels {
    let (width, height) = (image.resized.0 as usize, image.resized.1 as usize);
    let pixels = resize(&pixels, width, height, options.resize_interpolation);
    crop_to(pixels, image.bucket, rng)
}

fn crop_to(pixels: Pixels, bucket: Size, rng: Option<&mut Rng>) -> Pixels {
    let (width, height) = (bucket.0 as usize, bucket.1 as usize);
    let (free_x, free_y) = (pixels.width - width, pixels.height - height);
    if free_x == 0 && free_y == 0 {
        return pixels;
    }
    let (left, top) = match rng {
        None => (free_x / 2, free_y / 2),
        Some(rng) => (rng.below(free_x as u64 + 1) as usize, rng.below(free_y as u64 + 1) as usize),
    };
    pixels.crop(left, top, width, height)
}

/// The crop of one use. Without buckets, a face position in the file name or `random_crop` cuts out
/// of the unscaled image, as in the reference; where that is impossible (the image is smaller) it is
/// resized like everything else.
fn vary_crop(pixels: Pixels, dataset: &Dataset, image: &ImageEntry, rng: &mut Rng) -> Pixels {
    let options = &dataset.plan.subsets[image.subset].options;
    if !dataset.plan.options.enable_bucket {
        let (width, height) = (image.bucket.0 as usize, image.bucket.1 as usize);
        let is_larger = pixels.width >= width && pixels.height >= height;
        if let (Some(range), Some(face), true) =
            (options.face_crop_aug_range, face_in_name(&image.path), is_larger)
        {
            return crop_face(pixels, image.bucket, (face, range), options, rng);
        }
        if options.random_crop && is_larger {
            return crop_to(pixels, image.bucket, Some(rng));
        }
    }
    cover_and_crop(pixels, image, options, options.random_crop.then_some(rng))
}

/// A face by its centre and size in pixels.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Face {
    center: [i64; 2],
    size: i64,
}

/// The face that `..._cx_cy_w_h` in a file name describes.
fn face_in_name(path: &Path) -> Option<Face> {
    let stem = path.file_stem()?.to_str()?;
    let parts: Vec<&str> = stem.split('_').collect();
    if parts.len() < 5 {
        return None;
    }
    let number = |back: usize| -> Option<i64> {
        parts[parts.len() - back].parse().ok().filter(|value| (0..=1_000_000).contains(value))
    };
    let face = Face { center: [number(4)?, number(3)?], size: number(2)?.max(number(1)?) };
    (face.center[0] > 0 && face.size > 0).then_some(face)
}

/// Scales so that the face has a size within the range, and cuts around it, a little off centre.
fn crop_face(
    pixels: Pixels,
    bucket: Size,
    (face, range): (Face, (f64, f64)),
    options: &SubsetOptions,
    rng: &mut Rng,
) -> Pixels {
    let (target_width, target_height) = (f64::from(bucket.0), f64::from(bucket.1));
    let (width, height) = (pixels.width as f64, pixels.height as f64);
    if (width, height) == (target_width, target_height) {
        return pixels;
    }
    let size = target_width.min(target_height);
    let covering = (target_height / height).max(target_width / width);
    let at_range = |multiple: f64| size / (face.size as f64 * multiple);
    let least = covering.max(at_range(range.1)).min(1.0);
    let most = least.max(at_range(range.0)).min(1.0);
    let scale = if least >= most { least } else { least + (most - least) * rng.uniform_f64() };
    let scaled = |value: f64| (value * scale + 0.5) as i64;
    let (new_width, new_height) = (
        scaled(width).max(i64::from(bucket.0)) as usize,
        scaled(height).max(i64::from(bucket.1)) as usize,
    );
    let pixels = resize(&pixels, new_width, new_height, options.resize_interpolation);
    let mut start = |axis: usize, length: i64, target: i64| -> usize {
        let center = scaled(face.center[axis] as f64);
        let mut at = center - target / 2;
        if options.random_crop {
            // The sum of two draws keeps the face near the middle most of the time.
            let reach = (length - center).max(center).max(0) as u64 + 1;
            at += (rng.below(reach) + rng.below(reach)) as i64 - (reach as i64 - 1);
        } else if range.0 != range.1 && face.size > size as i64 / 10 && face.size >= 40 {
            let reach = face.size / 20;
            at += rng.below(2 * reach as u64 + 1) as i64 - reach;
        }
        at.clamp(0, length - target) as usize
    };
    let top = start(1, new_height as i64, i64::from(bucket.1));
    let left = start(0, new_width as i64, i64::from(bucket.0));
    pixels.crop(left, top, bucket.0 as usize, bucket.1 as usize)
}

/// With probability 0.33 a small change: of the hue (up to 8 of 180 steps) or of the gamma (0.95 to
/// 1.05, applied to the values 0..255 themselves, as the reference does).
fn vary_color(pixels: &mut Pixels, rng: &mut Rng) {
    if rng.uniform_f64() > 0.33 {
        return;
    }
    let by_hue = rng.uniform_f64() > 0.5;
    if by_hue {
        let shift = (rng.uniform_f64() * 16.0 - 8.0) as f32 * 2.0;
        for pixel in pixels.data.chunks_exact_mut(pixels.channels) {
            let rgb = shift_hue([pixel[0], pixel[1], pixel[2]], shift);
            pixel[..3].copy_from_slice(&rgb);
        }
    } else {
        let gamma = (0.95 + 0.1 * rng.uniform_f64()) as f32;
        let table: Vec<u8> =
            (0..256u32).map(|value| (value as f32).powf(gamma).clamp(0.0, 255.0) as u8).collect();
        for pixel in pixels.data.chunks_exact_mut(pixels.channels) {
            pixel[..3].iter_mut().for_each(|value| *value = table[usize::from(*value)]);
        }
    }
}

/// Turns the hue by `degrees`, keeping saturation and value.
fn shift_hue(rgb: [u8; 3], degrees: f32) -> [u8; 3] {
    let [red, green, blue] = rgb.map(f32::from);
    let value = red.max(green).max(blue);
    let range = value - red.min(green).min(blue);
    if range == 0.0 {
        return rgb;
    }
    let hue = if value == red {
        60.0 * (green - blue) / range
    } else if value == green {
        120.0 + 60.0 * (blue - red) / range
    } else {
        240.0 + 60.0 * (red - green) / range
    };
    let sector = (hue + degrees).rem_euclid(360.0) / 60.0;
    [5.0f32, 3.0, 1.0].map(|offset| {
        let k = (offset + sector) % 6.0;
        (value - range * k.min(4.0 - k).clamp(0.0, 1.0)).round().clamp(0.0, 255.0) as u8
    })
}

fn normalize(pixels: &Pixels) -> Vec<f32> {
    let table: Vec<f32> = (0..256u32).map(|value| (value as f32 / 255.0 - 0.5) / 0.5).collect();
    let mut rgb = Vec::with_capacity(pixels.width * pixels.height * 3);
    for pixel in pixels.data.chunks_exact(pixels.channels) {
        rgb.extend(pixel[..3].iter().map(|value| table[usize::from(*value)]));
    }
    rgb
}

/// Mean alpha of the pixels of each latent, in [0,1]; what is over at the right and bottom is left out.
pub(crate) fn latent_alpha(pixels: &Pixels) -> Vec<f32> {
    let (width, height) = (pixels.width / LATENT_SCALE, pixels.height / LATENT_SCALE);
    let mut sums = vec![0u32; width * height];
    for y in 0..height * LATENT_SCALE {
        for x in 0..width * LATENT_SCALE {
            let at = (y * pixels.width + x) * pixels.channels;
            let alpha = if pixels.channels == 4 { pixels.data[at + 3] } else { 255 };
            sums[(y / LATENT_SCALE) * width + x / LATENT_SCALE] += u32::from(alpha);
        }
    }
    let full = (LATENT_SCALE * LATENT_SCALE * 255) as f32;
    sums.into_iter().map(|sum| sum as f32 / full).collect()
}

/// The same picture mirrored, with its mask.
pub fn mirrored(picture: &Picture) -> Picture {
    let mut out = picture.clone();
    let width = picture.size.0 as usize;
    for row in out.rgb.chunks_exact_mut(width * 3) {
        let pixels: Vec<[f32; 3]> = row.chunks_exact(3).map(|p| [p[0], p[1], p[2]]).collect();
        for (target, source) in row.chunks_exact_mut(3).zip(pixels.iter().rev()) {
            target.copy_from_slice(source);
        }
    }
    if let Some(alpha) = &mut out.alpha {
        alpha.chunks_exact_mut(width / LATENT_SCALE).for_each(<[f32]>::reverse);
    }
    out.flipped = !picture.flipped;
    out
}

#[cfg(test)]
mod tests;
