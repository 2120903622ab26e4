//! The filters that pictures are resized with, and their names.

/// How a picture is resized.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interpolation {
    /// Pillow's antialiased Lanczos filter.
    Lanczos,
    /// The nearest pixel as OpenCV 4 finds it.
    Nearest,
    /// The nearest pixel as OpenCV 5 finds it. Has no name for `resize_interpolation`.
    NearestCentre,
    /// OpenCV's bilinear filter (no antialiasing).
    Bilinear,
    /// OpenCV's bicubic filter (no antialiasing).
    Bicubic,
    /// Pillow's antialiased bicubic filter, which it takes when no filter is named. Has no name for
    /// `resize_interpolation`.
    AntialiasedBicubic,
    /// OpenCV's pixel area relation.
    Area,
    /// Pillow's box filter.
    Box,
}

impl Interpolation {
    /// The names of the reference's option `resize_interpolation`.
    pub const NAMES: [&'static str; 8] =
        ["lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box"];

    /// The interpolation of a name of [`Self::NAMES`].
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "lanczos" => Self::Lanczos,
            "nearest" => Self::Nearest,
            "bilinear" | "linear" => Self::Bilinear,
            "bicubic" | "cubic" => Self::Bicubic,
            "area" => Self::Area,
            "box" => Self::Box,
            _ => return None,
        })
    }
}
