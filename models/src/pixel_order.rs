//! Between the channel order of files (NCHW) and that of the engine (NHWC).

use crate::reader::{inner_axis_last, inner_axis_second};

/// `[B,C,H·W]` to `[B,H·W,C]`, row-major.
pub fn nhwc_from_nchw(data: &[f32], channels: usize, pixels: usize) -> Vec<f32> {
    inner_axis_last(data, channels, pixels)
}

/// `[B,H·W,C]` to `[B,C,H·W]`, row-major.
pub fn nchw_from_nhwc(data: &[f32], channels: usize, pixels: usize) -> Vec<f32> {
    inner_axis_second(data, channels, pixels)
}
