//! Resizing with the arithmetic of the libraries that the reference uses, so that the same picture
//! gives the same training data: OpenCV for area, bilinear, bicubic and nearest, Pillow for Lanczos,
//! its own bicubic and box (columns first, as Pillow up to 11 does; later ones may take the rows
//! first). All work on eight-bit channels, on the thread that calls.
//!
//! Golden pictures of both libraries hold each filter in the tests.

mod area;
mod cubic;
mod opencv;
mod pillow;

use crate::{Interpolation, Pixels};

/// Resizes to `width` x `height`; without `interpolation` by area when neither side grows and by
/// Lanczos otherwise. Both sides must be at least 1. A copy where the size is the same.
pub fn resize(
    source: &Pixels,
    width: usize,
    height: usize,
    interpolation: Option<Interpolation>,
) -> Pixels {
    if (source.width, source.height) == (width, height) {
        return source.clone();
    }
    let shrinks = source.width >= width && source.height >= height;
    let default = if shrinks { Interpolation::Area } else { Interpolation::Lanczos };
    match interpolation.unwrap_or(default) {
        Interpolation::Area if shrinks => area::area(source, width, height),
        Interpolation::Area => opencv::area_growing(source, width, height),
        Interpolation::Bilinear => opencv::bilinear(source, width, height),
        Interpolation::Bicubic => cubic::bicubic(source, width, height),
        Interpolation::Nearest => opencv::nearest(source, width, height),
        Interpolation::NearestCentre => opencv::nearest_centre(source, width, height),
        Interpolation::Lanczos => pillow::antialiased(source, width, height, pillow::LANCZOS),
        Interpolation::AntialiasedBicubic => {
            pillow::antialiased(source, width, height, pillow::BICUBIC)
        }
        Interpolation::Box => pillow::antialiased(source, width, height, pillow::BOX),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pictures resized by OpenCV and Pillow: `tests/data/dataset/make_resize.py`.
    const GOLDEN: &str = include_str!("../../tests/data/dataset/resize.json");

    #[derive(serde::Deserialize)]
    struct Golden {
        sources: Vec<Picture>,
        cases: Vec<Case>,
    }

    #[derive(serde::Deserialize, Clone)]
    struct Picture {
        width: usize,
        height: usize,
        channels: usize,
        data: Vec<u8>,
    }

    #[derive(serde::Deserialize)]
    struct Case {
        source: usize,
        filter: String,
        result: Picture,
    }

    fn pixels(picture: &Picture) -> Pixels {
        let Picture { width, height, channels, data } = picture.clone();
        Pixels { width, height, channels, data }
    }

    #[test]
    fn filters_equal_opencv_and_pillow() {
        let golden: Golden = serde_json::from_str(GOLDEN).unwrap();
        assert!(golden.cases.len() >= 40, "{}", golden.cases.len());
        for case in &golden.cases {
            let filter = Interpolation::from_name(&case.filter);
            let want = pixels(&case.result);
            let source = pixels(&golden.sources[case.source]);
            let got = resize(&source, want.width, want.height, filter);
            let worst = got
                .data
                .iter()
                .zip(&want.data)
                .map(|(left, right)| left.abs_diff(*right))
                .max()
                .unwrap();
            // Pillow's integers and OpenCV's nearest are exact; OpenCV's other filters have vector
            // code that adds and rounds in other orders.
            let exact = matches!(case.filter.as_str(), "lanczos" | "box" | "nearest");
            let allowed = u8::from(!exact);
            let name = format!("{} {}x{}", case.filter, want.width, want.height);
            assert_eq!(got.data.len(), want.data.len(), "{name}");
            assert!(worst <= allowed, "{name} from source {}: off by {worst}", case.source);
        }
    }
}
