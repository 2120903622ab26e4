//! Buckets: which picture size each image is trained at, chosen as sd-scripts chooses.
//!
//! Sizes are (width, height) in pixels. An image is resized so that it covers its bucket and then
//! cropped to it.

use super::config::DatasetPlan;

/// Width and height in pixels.
pub type Size = (u32, u32);

/// The bucket sizes for an area of `resolution`, sorted: every width from `min` to `max` in `steps`
/// with the largest height that keeps the area, both ways round, and the square.
pub fn make_bucket_resolutions(resolution: Size, min: u32, max: u32, steps: u32) -> Vec<Size> {
    let area = u64::from(resolution.0) * u64::from(resolution.1);
    let steps = u64::from(steps.max(1));
    let (min, max) = (u64::from(min), u64::from(max));
    let square = area.isqrt() / steps * steps;
    let mut sizes = vec![(square as u32, square as u32)];
    let mut width = min.max(1);
    while width <= max {
        let height = max.min(area / width / steps * steps);
        if height >= min {
            sizes.push((width as u32, height as u32));
            sizes.push((height as u32, width as u32));
        }
        width += steps;
    }
    sizes.sort_unstable();
    sizes.dedup();
    sizes
}

/// How one image is fitted into its bucket.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Fit {
    /// The size it is trained at.
    pub bucket: Size,
    /// The size it is resized to before cropping; covers the bucket.
    pub resized: Size,
    /// Aspect ratio of the bucket minus that of the image.
    pub aspect_error: f64,
}

/// Chooses the bucket of an image.
#[derive(Debug, Clone)]
pub enum BucketChooser {
    /// One of a list of sizes, by the nearest aspect ratio.
    Listed(Vec<Size>),
    /// A size of its own, never larger than the image (`bucket_no_upscale`).
    NoUpscale {
        /// Largest area in pixels.
        max_area: f64,
        /// Sides are multiples of this.
        steps: u32,
    },
}

impl BucketChooser {
    /// The chooser that the options of a dataset ask for. Without buckets there is one size.
    pub fn new(plan: &DatasetPlan) -> Self {
        let options = &plan.options;
        if !options.enable_bucket {
            return Self::Listed(vec![plan.resolution]);
        }
        if options.bucket_no_upscale {
            let max_area = f64::from(plan.resolution.0) * f64::from(plan.resolution.1);
            return Self::NoUpscale { max_area, steps: options.bucket_reso_steps };
        }
        Self::Listed(make_bucket_resolutions(
            plan.resolution,
            options.min_bucket_reso,
            options.max_bucket_reso,
            options.bucket_reso_steps,
        ))
    }

    /// The bucket of an image of `size`, or why it has none.
    pub fn fit(&self, size: Size) -> Result<Fit, String> {
        let (width, height) = (f64::from(size.0), f64::from(size.1));
        let aspect = width / height;
        let (bucket, resized) = match self {
            Self::Listed(sizes) => {
                let bucket = nearest_aspect(sizes, size, aspect)
                    .ok_or("there is no bucket size to choose from")?;
                let (bucket_width, bucket_height) = (f64::from(bucket.0), f64::from(bucket.1));
                let scale = if aspect > bucket_width / bucket_height {
                    bucket_height / height
                } else {
                    bucket_width / width
                };
                (bucket, (round(width * scale), round(height * scale)))
            }
            Self::NoUpscale { max_area, steps } => {
                let resized = shrink_to_area(size, aspect, *max_area, *steps);
                let down = |side: u32| side - side % steps;
                ((down(resized.0), down(resized.1)), resized)
            }
        };
        if bucket.0 == 0 || bucket.1 == 0 {
            return Err(format!(
                "it is too small or too narrow for a bucket ({}x{} pixels)",
                size.0, size.1
            ));
        }
        // Rounding can leave the resized image one pixel short of a bucket only for absurd aspect
        // ratios; covering it is what the crop after it relies on.
        let resized = (resized.0.max(bucket.0), resized.1.max(bucket.1));
        if u64::from(resized.0) * u64::from(resized.1) > pictures::image_file::MAX_PIXELS {
            return Err(format!("its aspect ratio is too extreme ({}x{})", size.0, size.1));
        }
        let aspect_error = f64::from(bucket.0) / f64::from(bucket.1) - aspect;
        Ok(Fit { bucket, resized, aspect_error })
    }
}

fn round(value: f64) -> u32 {
    (value + 0.5) as u32
}

/// The listed size that equals the image, or the first one of the nearest aspect ratio.
fn nearest_aspect(sizes: &[Size], image: Size, aspect: f64) -> Option<Size> {
    if sizes.contains(&image) {
        return Some(image);
    }
    let error = |size: &Size| (f64::from(size.0) / f64::from(size.1) - aspect).abs();
    // `min_by` keeps the first of equals, as numpy's argmin does.
    sizes.iter().copied().min_by(|left, right| error(left).total_cmp(&error(right)))
}

/// The size of an image brought to at most `max_area`, one side a multiple of `steps`: the side
/// whose rounding keeps the aspect ratio better.
fn shrink_to_area(size: Size, aspect: f64, max_area: f64, steps: u32) -> Size {
    if f64::from(size.0) * f64::from(size.1) <= max_area {
        return size;
    }
    let to_steps = |side: f64| {
        let side = round(side);
        f64::from(side - side % steps)
    };
    let ideal_width = (max_area * aspect).sqrt();
    let ideal_height = max_area / ideal_width;
    let width = to_steps(ideal_width);
    let aspect_by_width = width / to_steps(width / aspect);
    let height = to_steps(ideal_height);
    let aspect_by_height = to_steps(height * aspect) / height;
    // Not-a-number (0/0) compares false, so a degenerate width falls to the height and the other
    // way round; a size of 0 is refused by the caller.
    if (aspect_by_width - aspect).abs() < (aspect_by_height - aspect).abs() || height == 0.0 {
        (width as u32, round(width / aspect))
    } else {
        (round(height * aspect), height as u32)
    }
}

/// Left, top, right, bottom of the bucket inside the image, in the scale of the bucket: negative
/// where the image was cropped. The numbers that SDXL is conditioned on.
pub fn crop_in_bucket(bucket: Size, image: Size) -> [f64; 4] {
    let (width, height) = (f64::from(bucket.0), f64::from(bucket.1));
    let image_aspect = f64::from(image.0) / f64::from(image.1);
    let (resized_width, resized_height) = if width / height > image_aspect {
        (height * image_aspect, height)
    } else {
        (width, width / image_aspect)
    };
    let left = ((width - resized_width) / 2.0).floor();
    let top = ((height - resized_height) / 2.0).floor();
    [left, top, left + resized_width, top + resized_height]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataset::config::{DatasetDefaults, DatasetInput, plan_datasets};

    /// Made by the reference's algorithm in Python: `tests/data/dataset/make_buckets.py`.
    const GOLDEN: &str = include_str!("../../../tests/data/dataset/buckets.json");

    #[derive(serde::Deserialize)]
    struct Golden {
        resolutions: Vec<Listed>,
        choices: Vec<Choice>,
    }

    #[derive(serde::Deserialize)]
    struct Listed {
        resolution: Size,
        min: u32,
        max: u32,
        steps: u32,
        sizes: Vec<Size>,
    }

    #[derive(Debug, serde::Deserialize)]
    struct Choice {
        resolution: Size,
        steps: u32,
        no_upscale: bool,
        image: Size,
        bucket: Size,
        resized: Size,
        aspect_error: f64,
        crop: [f64; 4],
    }

    fn chooser(choice: &Choice) -> BucketChooser {
        let text = format!(
            "[[datasets]]\nresolution = [{}, {}]\nenable_bucket = true\nbucket_reso_steps = {}\n\
             bucket_no_upscale = {}\n[[datasets.subsets]]\nimage_dir = \"a\"",
            choice.resolution.0, choice.resolution.1, choice.steps, choice.no_upscale
        );
        let defaults = DatasetDefaults { size_multiple: 32, ..DatasetDefaults::default() };
        let input =
            DatasetInput::Inline { table: text.parse().unwrap(), origin: "test.toml".into() };
        BucketChooser::new(&plan_datasets(&input, &defaults).unwrap().datasets[0])
    }

    #[test]
    fn sizes_and_choices_equal_the_reference() {
        let golden: Golden = serde_json::from_str(GOLDEN).unwrap();
        assert!(golden.resolutions.len() >= 6 && golden.choices.len() >= 100);
        for listed in &golden.resolutions {
            let sizes =
                make_bucket_resolutions(listed.resolution, listed.min, listed.max, listed.steps);
            assert_eq!(sizes, listed.sizes, "{:?}", listed.resolution);
        }
        for choice in &golden.choices {
            let fit = chooser(choice).fit(choice.image).unwrap();
            assert_eq!((fit.bucket, fit.resized), (choice.bucket, choice.resized));
            assert!((fit.aspect_error - choice.aspect_error).abs() < 1e-12);
            for (got, want) in crop_in_bucket(fit.bucket, choice.image).iter().zip(choice.crop) {
                assert!((got - want).abs() < 1e-9, "{choice:?}");
            }
        }
    }

    #[test]
    fn tiny_images_have_no_bucket_without_upscaling() {
        let chooser = BucketChooser::NoUpscale { max_area: 512.0 * 512.0, steps: 64 };
        assert!(chooser.fit((63, 500)).unwrap_err().contains("too small"));
        assert!(chooser.fit((1_000_000, 20)).is_err());
        assert!(BucketChooser::Listed(vec![(512, 512)]).fit((1, 1_000_000)).is_err());
    }
}
