//! PNG files, made in memory: pixels and texts beside them.

use std::fmt;

use png::{BitDepth, ColorType, Compression, Encoder};

use crate::Pixels;

/// A picture that cannot be a PNG.
#[derive(Debug)]
pub struct PngError(png::EncodingError);

impl fmt::Display for PngError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the picture cannot be a PNG: {}", self.0)
    }
}

impl std::error::Error for PngError {}

impl From<png::EncodingError> for PngError {
    fn from(error: png::EncodingError) -> Self {
        Self(error)
    }
}

/// The bytes of a PNG file with `texts` (keyword, text) before its pixels. A text is a `tEXt` chunk
/// where Latin-1 suffices, else UTF-8 in `iTXt`, as Pillow writes them.
///
/// # Errors
/// [`PngError`] for pixels that are not as many as width, height and channels say, and for keywords
/// that are empty or longer than 79 bytes.
pub fn encode_png(pixels: &Pixels, texts: &[(&str, &str)]) -> Result<Vec<u8>, PngError> {
    let mut file = Vec::new();
    let side = |length: usize| u32::try_from(length).unwrap_or(u32::MAX);
    let mut encoder = Encoder::new(&mut file, side(pixels.width), side(pixels.height));
    encoder.set_color(if pixels.channels == 4 { ColorType::Rgba } else { ColorType::Rgb });
    encoder.set_depth(BitDepth::Eight);
    encoder.set_compression(Compression::Balanced);
    for (keyword, text) in texts {
        let (keyword, text) = ((*keyword).to_owned(), (*text).to_owned());
        match text.chars().all(|c| u32::from(c) < 256) {
            true => encoder.add_text_chunk(keyword, text)?,
            false => encoder.add_itxt_chunk(keyword, text)?,
        }
    }
    let mut writer = encoder.write_header()?;
    writer.write_image_data(&pixels.data)?;
    writer.finish()?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pixels() -> Pixels {
        let data = (0..5 * 3 * 3).map(|i| i as u8 * 5).collect();
        Pixels { width: 5, height: 3, channels: 3, data }
    }

    #[test]
    fn pixels_and_texts_come_back() {
        let texts = [("parameters", "a caf\u{e9}\nSteps: 3"), ("Comment", "\u{732b}")];
        let file = encode_png(&pixels(), &texts).unwrap();
        let mut reader = png::Decoder::new(std::io::Cursor::new(&file)).read_info().unwrap();
        let mut data = vec![0; reader.output_buffer_size().unwrap()];
        reader.next_frame(&mut data).unwrap();
        assert_eq!(data, pixels().data);
        let info = reader.info();
        assert_eq!(info.uncompressed_latin1_text[0].keyword, "parameters");
        assert_eq!(info.uncompressed_latin1_text[0].text, texts[0].1);
        assert_eq!(info.utf8_text[0].keyword, "Comment");
        assert_eq!(info.utf8_text[0].get_text().unwrap(), texts[1].1);
        // Latin-1: one byte for the accented letter.
        assert!(file.windows(6).any(|part| part == b"caf\xe9\nS"));
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        let mut short = pixels();
        short.data.pop();
        let said = encode_png(&short, &[]).unwrap_err().to_string();
        assert!(said.starts_with("the picture cannot be a PNG: "), "{said}");
        assert!(encode_png(&pixels(), &[("", "x")]).is_err());
        assert!(encode_png(&pixels(), &[(&"k".repeat(80), "x")]).is_err());
    }
}
