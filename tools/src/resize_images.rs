//! `resize-images`: a folder of pictures brought down to one or more resolutions.
//!
//! sd-scripts' `resize_images_to_resolution.py`, whose faults are mended: there width and height are
//! swapped, each resolution is made from the one before it, and a side is not always divisible.
//! Here every resolution comes from the original, upright picture. Everything is looked at before
//! the first file is written; what is written appears whole or not at all.

mod encode;
mod folder;
mod room;
mod target;

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};
use pictures::{Interpolation, image_file};
use rayon::prelude::*;

use crate::Usage;
use crate::progress::{Progress, tell};
use encode::Encoding;
use folder::{Listing, Source};
use room::Room;
use target::{Resolution, Target};

/// Pixels of the pictures that are in work at the same time. Measured: 4 bytes for
/// each, 7 with an alpha channel.
const PIXELS_IN_WORK: u64 = 400_000_000;

/// Options of `resize-images`.
#[derive(Debug, Args)]
pub struct Options {
    /// Folder of the pictures: png, jpg, jpeg, webp, bmp; its own folders are not entered
    #[arg(value_name = "SRC")]
    src_img_folder: PathBuf,
    /// Folder to write to, made if it is missing; not inside SRC
    #[arg(value_name = "DST")]
    dst_img_folder: PathBuf,
    /// Resolutions, separated by commas. Each is an area: a picture of more pixels than 512x512 is
    /// shrunk to about as many, keeping its shape; a smaller one keeps its size. Writes
    /// `NAME+512x512.jpg`
    #[arg(
        long = "max_resolution",
        value_name = "WxH,WxH",
        default_value = "512x512,384x384,256x256,128x128"
    )]
    max_resolution: String,
    /// Crop the sides, in the middle, to multiples of so many pixels (64 or 8 for training)
    #[arg(long = "divisible_by", value_name = "PIXELS", default_value_t = 1)]
    divisible_by: usize,
    /// Filter; by default area, which is best for shrinking
    #[arg(long = "interpolation", value_name = "FILTER")]
    interpolation: Option<Filter>,
    /// Write png, which loses nothing, in place of jpeg of quality 100
    #[arg(long = "save_as_png")]
    save_as_png: bool,
    /// Copy captions and other files of a picture's name to every resolution: `NAME+512x512.txt`
    #[arg(long = "copy_associated_files")]
    copy_associated_files: bool,
}

/// The filters, by the reference's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Filter {
    /// OpenCV's mean over the area that a pixel covers
    Area,
    /// OpenCV's bicubic, without antialiasing
    Cubic,
    /// What the reference does under this name: Pillow's antialiased bicubic
    Lanczos4,
    /// Pillow's antialiased Lanczos
    Lanczos,
    /// The pixel in the middle
    Nearest,
    /// OpenCV's bilinear, without antialiasing
    Linear,
    /// Pillow's box
    Box,
}

impl Filter {
    fn interpolation(self) -> Interpolation {
        match self {
            Self::Area => Interpolation::Area,
            Self::Cubic => Interpolation::Bicubic,
            Self::Lanczos4 => Interpolation::AntialiasedBicubic,
            Self::Lanczos => Interpolation::Lanczos,
            Self::Nearest => Interpolation::NearestCentre,
            Self::Linear => Interpolation::Bilinear,
            Self::Box => Interpolation::Box,
        }
    }
}

/// What is done to every picture.
struct Job<'a> {
    destination: &'a Path,
    resolutions: Vec<Resolution>,
    divisible_by: usize,
    interpolation: Option<Interpolation>,
    encoding: Encoding,
    with_associated: bool,
}

/// A picture that can be read, with what becomes of it at each resolution.
struct Planned<'a> {
    source: &'a Source,
    size: (usize, usize),
    targets: Vec<Target>,
}

/// Does the work.
///
/// # Errors
/// Options that cannot be meant; two pictures that would be written under one name; a folder
/// without pictures; a file that cannot be written. A file that is no picture, though its name says
/// so, does not stop the others: all of them are named at the end.
pub fn run(options: &Options) -> anyhow::Result<()> {
    if options.divisible_by == 0 {
        return Err(Usage("`divisible_by` should be 1 or more, it is: 0".to_owned()).into());
    }
    let job = Job {
        destination: &options.dst_img_folder,
        resolutions: target::parse(&options.max_resolution)?,
        divisible_by: options.divisible_by,
        interpolation: options.interpolation.map(Filter::interpolation),
        encoding: if options.save_as_png { Encoding::Png } else { Encoding::Jpeg },
        with_associated: options.copy_associated_files,
    };
    folder::refuse_inside(&options.src_img_folder, &options.dst_img_folder)?;
    let listing = folder::list(&options.src_img_folder)?;
    job.refuse_collisions(&listing)?;
    if options.interpolation == Some(Filter::Lanczos4) {
        tell(
            "`lanczos4` means Pillow's bicubic filter, as in the reference, which knows no other \
             by this name; `lanczos` is Lanczos",
        );
    }
    let mut failures = Vec::new();
    let planned = job.plan(&listing.pictures, &mut failures)?;
    std::fs::create_dir_all(job.destination)
        .with_context(|| format!("cannot make the folder: {}", job.destination.display()))?;
    for name in &listing.others {
        folder::copy(&listing.folder.join(name), &job.destination.join(name))?;
    }
    let resized = job.do_all(&planned, &mut failures)?;
    report(&job, &listing, &resized, failures)
}

impl Job<'_> {
    fn file_name(&self, base: &str, resolution: Resolution) -> String {
        format!("{base}+{resolution}.{}", self.encoding.ending())
    }

    /// Two files that would be written under one name are an error while nothing is written yet.
    fn refuse_collisions(&self, listing: &Listing) -> anyhow::Result<()> {
        let mut written: Vec<(String, &str)> =
            listing.others.iter().map(|name| (name.clone(), name.as_str())).collect();
        for source in &listing.pictures {
            for resolution in &self.resolutions {
                written.push((self.file_name(&source.base, *resolution), &source.name));
                if self.with_associated {
                    written.extend(source.associated.iter().map(|tail| {
                        (format!("{}+{resolution}{tail}", source.base), &*source.name)
                    }));
                }
            }
        }
        written.sort();
        for pair in written.windows(2) {
            if pair[0].0 == pair[1].0 {
                bail!(
                    "two files would be written as `{}`: `{}` and `{}`\nhint: rename one of them; \
                     nothing was written",
                    pair[0].0,
                    pair[0].1,
                    pair[1].1
                );
            }
        }
        Ok(())
    }

    /// Reads the headers. Those that cannot be read go to `failures`.
    fn plan<'a>(
        &self,
        sources: &'a [Source],
        failures: &mut Vec<(String, String)>,
    ) -> anyhow::Result<Vec<Planned<'a>>> {
        let sizes: Vec<_> =
            sources.par_iter().map(|source| image_file::read_size(&source.path)).collect();
        let mut planned = Vec::with_capacity(sources.len());
        for (source, size) in sources.iter().zip(sizes) {
            let size = match size {
                Ok((width, height)) => (width as usize, height as usize),
                Err(problem) => {
                    failures.push((source.name.clone(), problem));
                    continue;
                }
            };
            let targets = self
                .resolutions
                .iter()
                .map(|resolution| Target::of(size, *resolution, self.divisible_by, &source.name))
                .collect::<Result<_, Usage>>()?;
            planned.push(Planned { source, size, targets });
        }
        // The largest first, so that the last to end is a small one.
        planned.sort_by_key(|picture| std::cmp::Reverse(picture.size.0 * picture.size.1));
        Ok(planned)
    }

    /// Returns, for every picture that was written, how many resolutions it was shrunk to.
    fn do_all(
        &self,
        planned: &[Planned],
        failures: &mut Vec<(String, String)>,
    ) -> anyhow::Result<Vec<usize>> {
        let progress = Progress::of_pieces("pictures", planned.len());
        let room = Room::of(PIXELS_IN_WORK);
        let one = |picture: &Planned| -> anyhow::Result<Result<usize, (String, String)>> {
            let (width, height) = picture.size;
            let _held = room.take(width as u64 * height as u64);
            let done = self.do_one(picture)?;
            progress.advance(1);
            Ok(done.map_err(|problem| (picture.source.name.clone(), problem)))
        };
        let results: anyhow::Result<Vec<_>> = planned.par_iter().with_max_len(1).map(one).collect();
        let mut resized = Vec::with_capacity(planned.len());
        for result in results? {
            match result {
                Ok(count) => resized.push(count),
                Err(failure) => failures.push(failure),
            }
        }
        Ok(resized)
    }

    /// Outer errors end the run, inner ones are a sentence about this picture.
    fn do_one(&self, picture: &Planned) -> anyhow::Result<Result<usize, String>> {
        let source = picture.source;
        let pixels = match image_file::decode(&source.path, false) {
            Ok(pixels) => pixels,
            Err(problem) => return Ok(Err(problem)),
        };
        if (pixels.width, pixels.height) != picture.size {
            return Ok(Err("its header and its pixels disagree about its size".to_owned()));
        }
        let mut shrunk = 0;
        for (resolution, target) in self.resolutions.iter().zip(&picture.targets) {
            let result = target.apply(&pixels, self.interpolation);
            shrunk += usize::from(target.shrinks(picture.size));
            let name = self.file_name(&source.base, *resolution);
            encode::write(&self.destination.join(name), &result, self.encoding)?;
            if self.with_associated {
                for tail in &source.associated {
                    let from = source.path.with_file_name(format!("{}{tail}", source.base));
                    let to = format!("{}+{resolution}{tail}", source.base);
                    folder::copy(&from, &self.destination.join(to))?;
                }
            }
        }
        Ok(Ok(shrunk))
    }
}

/// The summary, then the failures as one error.
fn report(
    job: &Job,
    listing: &Listing,
    resized: &[usize],
    mut failures: Vec<(String, String)>,
) -> anyhow::Result<()> {
    let written = resized.len() * job.resolutions.len();
    let shrunk: usize = resized.iter().sum();
    let others = match listing.others.len() {
        0 => String::new(),
        1 => "; 1 other file copied".to_owned(),
        count => format!("; {count} other files copied"),
    };
    tell(&format!(
        "{} of {} pictures, {written} files written: {shrunk} resized, {} of the size they had\
         {others}; they are in: {}",
        resized.len(),
        listing.pictures.len(),
        written - shrunk,
        job.destination.display()
    ));
    if failures.is_empty() {
        return Ok(());
    }
    failures.sort();
    let lines: Vec<String> =
        failures.iter().map(|(name, problem)| format!("\n  `{name}`: {problem}")).collect();
    bail!(
        "{} of {} pictures could not be read and were left out:{}",
        failures.len(),
        listing.pictures.len(),
        lines.concat()
    )
}

#[cfg(test)]
mod tests;
