//! A picture in memory.

/// Eight-bit pixels, rows from top to bottom, channels interleaved: `[height, width, channels]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pixels {
    /// Width in pixels.
    pub width: usize,
    /// Height in pixels.
    pub height: usize,
    /// 3 (RGB) or 4 (RGBA, not premultiplied).
    pub channels: usize,
    /// `height * width * channels` values.
    pub data: Vec<u8>,
}

impl Pixels {
    /// The part of `width` x `height` whose top left corner is (`left`, `top`); must lie inside.
    pub fn crop(&self, left: usize, top: usize, width: usize, height: usize) -> Pixels {
        let (row, part) = (self.width * self.channels, width * self.channels);
        let mut data = Vec::with_capacity(part * height);
        for y in top..top + height {
            let start = y * row + left * self.channels;
            data.extend_from_slice(&self.data[start..start + part]);
        }
        Pixels { width, height, channels: self.channels, data }
    }

    /// Mirrored left to right.
    pub fn mirror(&mut self) {
        for row in self.data.chunks_exact_mut(self.width * self.channels) {
            for left in 0..self.width / 2 {
                for channel in 0..self.channels {
                    let right = self.width - 1 - left;
                    row.swap(left * self.channels + channel, right * self.channels + channel);
                }
            }
        }
    }
}
