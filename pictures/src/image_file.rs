//! Reads pictures: their size from the header alone, or their pixels, with EXIF orientation applied.
//!
//! png, jpg, jpeg, webp and bmp, told apart by their content. Nothing is believed: a header that
//! claims more than [`MAX_PIXELS`] is refused before memory is taken, and every fault comes back as
//! a sentence about the image.

use crate::Pixels;
use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits};
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::Path;

/// Extensions of images, in lower case; file names may have them in upper case too.
pub const EXTENSIONS: [&str; 5] = ["png", "jpg", "jpeg", "webp", "bmp"];

/// Largest picture that is decoded, in pixels (as Pillow's limit against decompression bombs).
pub const MAX_PIXELS: u64 = 178_956_970;

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
    cut_sixteen_bits(&mut image);
    let (width, height) = (image.width() as usize, image.height() as usize);
    Ok(if with_alpha {
        Pixels { width, height, channels: 4, data: image.into_rgba8().into_raw() }
    } else {
        Pixels { width, height, channels: 3, data: image.into_rgb8().into_raw() }
    })
}

/// Makes the low byte of 16-bit values one that rounding to eight bits drops: Pillow, and so the
/// reference, takes the high byte as it is. (Its grey pictures of 16 bits come out white: not here.)
fn cut_sixteen_bits(image: &mut DynamicImage) {
    let values: &mut [u16] = match image {
        DynamicImage::ImageLuma16(image) => image,
        DynamicImage::ImageLumaA16(image) => image,
        DynamicImage::ImageRgb16(image) => image,
        DynamicImage::ImageRgba16(image) => image,
        _ => return,
    };
    for value in values {
        *value = (*value >> 8) * 257;
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use image::{ImageBuffer, Rgb, RgbImage};

    fn gradient(width: u32, height: u32) -> RgbImage {
        ImageBuffer::from_fn(width, height, |x, y| Rgb([(x % 256) as u8, (y % 256) as u8, 77]))
    }

    #[test]
    fn exif_orientation_turns_size_and_pixels() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.jpg");
        let mut jpeg = Vec::new();
        image::codecs::jpeg::JpegEncoder::new_with_quality(&mut jpeg, 100)
            .encode_image(&ImageBuffer::from_fn(64, 32, |x, _| {
                Rgb([if x < 32 { 250u8 } else { 5 }; 3])
            }))
            .unwrap();
        // Orientation 6: the picture must be turned clockwise to be upright.
        let exif = [
            &b"\xFF\xE1\x00\x22Exif\0\0"[..],
            b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0",
        ]
        .concat();
        let turned = [&jpeg[..2], &exif, &jpeg[2..]].concat();
        std::fs::write(&path, &turned).unwrap();
        assert_eq!(read_size(&path), Ok((32, 64)));
        let pixels = decode(&path, false).unwrap();
        assert_eq!((pixels.width, pixels.height), (32, 64));
        assert!(pixels.data[0] > 200 && pixels.data[pixels.data.len() - 1] < 50);
        for end in [3, 40, turned.len() / 2, turned.len() - 20] {
            std::fs::write(&path, &turned[..end]).unwrap();
            assert!(decode(&path, false).is_err(), "{end}");
        }
    }

    #[test]
    fn bad_files_are_errors_and_bounded() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.png");
        let mut png = Vec::new();
        gradient(16, 16)
            .write_to(&mut std::io::Cursor::new(&mut png), image::ImageFormat::Png)
            .unwrap();
        for end in 0..png.len() - 12 {
            assert!(decode_bytes(&png[..end], true).is_err(), "{end}");
        }
        // A header that claims 60000 x 60000 pixels, with a right checksum.
        let mut claim = png.clone();
        claim[16..24].copy_from_slice(&[0, 0, 0xEA, 0x60, 0, 0, 0xEA, 0x60]);
        let crc = crc32fast::hash(&claim[12..29]);
        claim[29..33].copy_from_slice(&crc.to_be_bytes());
        std::fs::write(&path, &claim).unwrap();
        assert!(read_size(&path).unwrap_err().contains("60000x60000"));
        assert!(decode(&path, false).unwrap_err().contains("60000x60000"));
        for seed in 0..200u64 {
            let mut damaged = png.clone();
            let mut state = seed;
            for _ in 0..3 {
                // Knuth's linear congruential generator; its high bits are good enough to aim with.
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                damaged[(state >> 33) as usize % png.len()] = (state >> 56) as u8;
            }
            let _ = decode_bytes(&damaged, false);
        }
    }
}
