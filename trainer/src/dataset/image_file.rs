//! Reads pictures: their size from the header alone, or their pixels, with EXIF orientation applied.
//!
//! png, jpg, jpeg, webp and bmp, told apart by their content. Nothing is believed: a header that
//! claims more than [`MAX_PIXELS`] is refused before memory is taken, and every fault comes back as
//! a sentence about the image.

use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits};
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::Path;

/// Extensions of images, in lower case; file names may have them in upper case too.
pub const EXTENSIONS: [&str; 5] = ["png", "jpg", "jpeg", "webp", "bmp"];

/// Largest picture that is decoded, in pixels (as Pillow's limit against decompression bombs).
pub const MAX_PIXELS: u64 = 178_956_970;

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

/// Width and height of a picture as it is shown (after EXIF orientation), from its header.
///
/// # Errors
/// A sentence that says what is wrong with the file.
pub fn read_size(path: &Path) -> Result<(u32, u32), String> {
    let file = File::open(path).map_err(|error| format!("it cannot be opened: {error}"))?;
    let mut reader = BufReader::with_capacity(16 * 1024, file);
    let head = reader.fill_buf().map_err(|error| format!("it cannot be read: {error}"))?;
    if head.is_empty() {
        return Err("the file is empty".into());
    }
    let (size, orientation) = if head.starts_with(&[0xFF, 0xD8]) {
        // The decoder of the image crate reads a JPEG whole before it tells the size.
        jpeg_header(&mut reader)?
    } else {
        let mut decoder = decoder(reader)?;
        (decoder.dimensions(), decoder.orientation().unwrap_or(Orientation::NoTransforms))
    };
    check_pixels(size)?;
    Ok(if swaps_sides(orientation) { (size.1, size.0) } else { size })
}

/// The pixels of a picture, upright, with an alpha channel if `with_alpha`; without it an alpha
/// channel of the file is dropped, not blended (as the reference does).
///
/// # Errors
/// A sentence that says what is wrong with the file.
pub fn decode(path: &Path, with_alpha: bool) -> Result<Pixels, String> {
    let bytes = std::fs::read(path).map_err(|error| format!("it cannot be read: {error}"))?;
    decode_bytes(&bytes, with_alpha)
}

/// As [`decode`], from the bytes of the file.
pub fn decode_bytes(bytes: &[u8], with_alpha: bool) -> Result<Pixels, String> {
    if bytes.is_empty() {
        return Err("the file is empty".into());
    }
    if bytes.starts_with(&[0xFF, 0xD8]) && !ends_like_a_jpeg(bytes) {
        return Err("the file is truncated".into());
    }
    let mut decoder = decoder(std::io::Cursor::new(bytes))?;
    check_pixels(decoder.dimensions())?;
    let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    let mut image = DynamicImage::from_decoder(decoder)
        .map_err(|error| format!("it cannot be decoded: {error}"))?;
    image.apply_orientation(orientation);
    let (width, height) = (image.width() as usize, image.height() as usize);
    Ok(if with_alpha {
        Pixels { width, height, channels: 4, data: image.into_rgba8().into_raw() }
    } else {
        Pixels { width, height, channels: 3, data: image.into_rgb8().into_raw() }
    })
}

fn decoder<'a, R: BufRead + Seek + 'a>(reader: R) -> Result<Box<dyn ImageDecoder + 'a>, String> {
    let mut reader = ImageReader::new(reader)
        .with_guessed_format()
        .map_err(|error| format!("it cannot be read: {error}"))?;
    const KNOWN: [ImageFormat; 4] =
        [ImageFormat::Png, ImageFormat::Jpeg, ImageFormat::WebP, ImageFormat::Bmp];
    if !reader.format().is_some_and(|format| KNOWN.contains(&format)) {
        return Err("it is not a png, jpeg, webp or bmp picture".into());
    }
    let mut limits = Limits::default();
    // Eight bytes a pixel (16-bit RGBA) is the most that any of the formats decodes to.
    limits.max_alloc = Some(MAX_PIXELS * 8);
    reader.limits(limits);
    let decoder =
        reader.into_decoder().map_err(|error| format!("its header cannot be read: {error}"))?;
    Ok(Box::new(decoder))
}

fn check_pixels((width, height): (u32, u32)) -> Result<(), String> {
    if width == 0 || height == 0 {
        return Err(format!("its size is {width}x{height}"));
    }
    if u64::from(width) * u64::from(height) > MAX_PIXELS {
        return Err(format!("it claims {width}x{height} pixels, more than {MAX_PIXELS}"));
    }
    Ok(())
}

fn swaps_sides(orientation: Orientation) -> bool {
    matches!(
        orientation,
        Orientation::Rotate90
            | Orientation::Rotate270
            | Orientation::Rotate90FlipH
            | Orientation::Rotate270FlipH
    )
}

/// Size and orientation of a JPEG, from the segments before its first scan.
fn jpeg_header(reader: &mut BufReader<File>) -> Result<((u32, u32), Orientation), String> {
    let cut = |_| "its header is truncated".to_string();
    let mut orientation = Orientation::NoTransforms;
    reader.seek(SeekFrom::Start(2)).map_err(cut)?;
    loop {
        let mut marker = [0u8; 1];
        reader.read_exact(&mut marker).map_err(cut)?;
        if marker[0] != 0xFF {
            return Err("its header is damaged".into());
        }
        while marker[0] == 0xFF {
            reader.read_exact(&mut marker).map_err(cut)?;
        }
        if matches!(marker[0], 0x01 | 0xD0..=0xD7) {
            continue;
        }
        if matches!(marker[0], 0xD9 | 0xDA) {
            return Err("its header has no size".into());
        }
        let mut length = [0u8; 2];
        reader.read_exact(&mut length).map_err(cut)?;
        let length = i64::from(u16::from_be_bytes(length)) - 2;
        if length < 0 {
            return Err("its header is damaged".into());
        }
        match marker[0] {
            // Start of frame; C4, C8 and CC lie in the range but mean tables and extensions.
            0xC0..=0xCF if !matches!(marker[0], 0xC4 | 0xC8 | 0xCC) => {
                let mut frame = [0u8; 5];
                reader.read_exact(&mut frame).map_err(cut)?;
                let side = |at: usize| u32::from(u16::from_be_bytes([frame[at], frame[at + 1]]));
                return Ok(((side(3), side(1)), orientation));
            }
            0xE1 => {
                let mut segment = vec![0u8; length as usize];
                reader.read_exact(&mut segment).map_err(cut)?;
                if let Some(exif) = segment.strip_prefix(b"Exif\0\0") {
                    orientation = Orientation::from_exif_chunk(exif).unwrap_or(orientation);
                }
            }
            _ => reader.seek_relative(length).map_err(cut)?,
        }
    }
}

/// True if the segments and scans of a JPEG run to its end marker. Decoders fill what is missing
/// with grey instead of complaining, so a half-copied picture would go unnoticed.
fn ends_like_a_jpeg(bytes: &[u8]) -> bool {
    let mut at = 2;
    loop {
        while bytes.get(at) == Some(&0xFF) && bytes.get(at + 1) == Some(&0xFF) {
            at += 1;
        }
        let (Some(first), Some(marker)) = (bytes.get(at), bytes.get(at + 1)) else { return false };
        if *first != 0xFF {
            // No marker where one should be: the decoder knows better what to make of it.
            return true;
        }
        at += 2;
        match marker {
            0xD9 => return true,
            0x01 | 0xD0..=0xD7 => continue,
            _ => {}
        }
        let (Some(high), Some(low)) = (bytes.get(at), bytes.get(at + 1)) else { return false };
        at += usize::from(u16::from_be_bytes([*high, *low])).max(2);
        if *marker == 0xDA {
            // Entropy-coded data: FF stands only before 00 or a restart marker.
            let Some(rest) = bytes.get(at..) else { return false };
            let next = rest
                .windows(2)
                .position(|pair| pair[0] == 0xFF && !matches!(pair[1], 0x00 | 0xD0..=0xD7));
            let Some(next) = next else { return false };
            at += next;
        }
    }
}
