//! How large a picture becomes: the area of a resolution, the shape of the picture, sides cut to
//! multiples.

use std::fmt;

use pictures::{Interpolation, Pixels, resize};

use crate::Usage;

/// An area, given as a rectangle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Resolution {
    width: u32,
    height: u32,
}

impl Resolution {
    fn pixels(self) -> u64 {
        u64::from(self.width) * u64::from(self.height)
    }
}

impl fmt::Display for Resolution {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}", self.width, self.height)
    }
}

/// Reads `512x512,384x384`.
///
/// # Errors
/// What is no resolution, or stands there twice.
pub(super) fn parse(text: &str) -> Result<Vec<Resolution>, Usage> {
    let mut resolutions = Vec::new();
    for part in text.split(',').map(str::trim) {
        let side = |text: &str| text.parse::<u32>().ok().filter(|side| (1..=65_536).contains(side));
        let sides =
            part.split_once('x').and_then(|(w, h)| Some((side(w.trim())?, side(h.trim())?)));
        let Some((width, height)) = sides else {
            return Err(Usage(format!(
                "`max_resolution` holds what is no resolution: `{part}`\n\
                 hint: width and height with an `x` between, several separated by commas: \
                 `512x512,384x384`"
            )));
        };
        let resolution = Resolution { width, height };
        if resolutions.contains(&resolution) {
            return Err(Usage(format!("`max_resolution` names one twice: {resolution}")));
        }
        resolutions.push(resolution);
    }
    Ok(resolutions)
}

/// What becomes of one picture at one resolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Target {
    /// Width and height after resizing.
    resized: (usize, usize),
    /// Width and height after cropping.
    cropped: (usize, usize),
}

impl Target {
    /// For a picture of `size` (width, height), called `name` in errors.
    ///
    /// # Errors
    /// `divisible_by` that leaves nothing of a side.
    pub(super) fn of(
        size: (usize, usize),
        resolution: Resolution,
        divisible_by: usize,
        name: &str,
    ) -> Result<Self, Usage> {
        let (most, pixels) = (resolution.pixels(), (size.0 * size.1) as u64);
        let resized = if pixels > most {
            // The order of the operations decides which way the last bit falls.
            let scale = (most as f64 / pixels as f64).sqrt();
            let shrunk = |side: usize| ((side as f64 * scale) as usize).max(1);
            (shrunk(size.0), shrunk(size.1))
        } else {
            size
        };
        let cropped = (resized.0 - resized.0 % divisible_by, resized.1 - resized.1 % divisible_by);
        if cropped.0 == 0 || cropped.1 == 0 {
            return Err(Usage(format!(
                "`divisible_by` leaves nothing of `{name}`, which becomes {}x{} at {resolution}: \
                 {divisible_by}\nhint: choose a smaller one or larger resolutions, or take the \
                 picture away; nothing was written",
                resized.0, resized.1
            )));
        }
        Ok(Self { resized, cropped })
    }

    /// Whether a picture of `size` is resized.
    pub(super) fn shrinks(self, size: (usize, usize)) -> bool {
        self.resized != size
    }

    /// Resizes and crops in the middle.
    pub(super) fn apply(self, source: &Pixels, interpolation: Option<Interpolation>) -> Pixels {
        let resized;
        let picture = if self.shrinks((source.width, source.height)) {
            resized = resize(source, self.resized.0, self.resized.1, interpolation);
            &resized
        } else {
            source
        };
        let (left, top) =
            ((picture.width - self.cropped.0) / 2, (picture.height - self.cropped.1) / 2);
        picture.crop(left, top, self.cropped.0, self.cropped.1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolution(text: &str) -> Resolution {
        parse(text).unwrap()[0]
    }

    #[test]
    fn resolutions_are_read_or_named() {
        let both = parse(" 512x512, 384x256").unwrap();
        assert_eq!(
            both.iter().map(ToString::to_string).collect::<Vec<_>>(),
            ["512x512", "384x256"]
        );
        for bad in ["", "512", "512x", "x512", "512x-1", "0x512", "512x512,", "9999999x1", "axb"] {
            assert!(parse(bad).unwrap_err().0.contains("no resolution"), "{bad}");
        }
        assert!(parse("512x512,512 x 512").unwrap_err().0.contains("twice: 512x512"));
    }

    #[test]
    fn sides_keep_their_shape_and_are_cut_to_multiples() {
        let target = Target::of((640, 480), resolution("512x512"), 8, "a").unwrap();
        assert_eq!(target, Target { resized: (591, 443), cropped: (584, 440) });
        let kept = Target::of((257, 391), resolution("384x384"), 1, "a").unwrap();
        assert_eq!(kept, Target { resized: (257, 391), cropped: (257, 391) });
        assert!(!kept.shrinks((257, 391)));
        // As many pixels as the resolution are not too many.
        assert!(!Target::of((256, 64), resolution("128x128"), 1, "a").unwrap().shrinks((256, 64)));
        // A side never vanishes by shrinking alone, but it may by cropping.
        let line = Target::of((40_000, 1), resolution("128x128"), 1, "a").unwrap();
        assert_eq!(line.resized.1, 1);
        let problem = Target::of((300, 20), resolution("512x512"), 64, "thin.png").unwrap_err().0;
        assert!(problem.contains("`thin.png`") && problem.contains("300x20"), "{problem}");
    }
}
