//! Letters on pictures: the Spleen font of 12x24 pixels, in one colour.

use anyhow::anyhow;
use pictures::Pixels;
use spleen_font::{FONT_12X24, PSF2Font};

/// The letters' colour.
const INK: [u8; 3] = [24, 24, 24];
/// In place of letters that the font does not have.
const UNKNOWN: &[u8] = b"?";

/// A font.
pub(super) struct Lettering {
    font: PSF2Font<'static>,
    /// Of a letter, in pixels.
    pub width: usize,
    /// Of a line.
    pub height: usize,
}

impl Lettering {
    /// The font that is built in.
    ///
    /// # Errors
    /// None with that font.
    pub fn new() -> anyhow::Result<Self> {
        let font =
            PSF2Font::new(FONT_12X24).map_err(|error| anyhow!("the font of labels: {error}"))?;
        Ok(Self { font, width: 12, height: 24 })
    }

    /// Writes a line, its upper left corner at `x`, `y`. What lies outside is cut off.
    pub fn write(&mut self, on: &mut Pixels, [x, y]: [usize; 2], line: &str) {
        for (index, letter) in line.chars().enumerate() {
            let mut bytes = [0; 4];
            let bytes = letter.encode_utf8(&mut bytes).as_bytes();
            let known = self.font.glyph_for_utf8(bytes);
            let Some(glyph) = known.or_else(|| self.font.glyph_for_utf8(UNKNOWN)) else { continue };
            for (down, row) in glyph.enumerate() {
                for (right, is_ink) in row.enumerate() {
                    let (column, line) = (x + index * self.width + right, y + down);
                    if is_ink && column < on.width && line < on.height {
                        let at = (line * on.width + column) * 3;
                        on.data[at..at + 3].copy_from_slice(&INK);
                    }
                }
            }
        }
    }
}

/// A text in lines of at most `columns` letters, broken between words where it can be; `...` ends what
/// does not fit in `most` lines.
pub(super) fn wrap(text: &str, columns: usize, most: usize) -> Vec<String> {
    let columns = columns.max(4);
    let mut lines: Vec<String> = Vec::new();
    let mut line = String::new();
    for word in text.split_whitespace() {
        let mut word: Vec<char> = word.chars().collect();
        loop {
            let used = line.chars().count();
            let gap = usize::from(used > 0);
            if used + gap + word.len() <= columns {
                line.extend((gap == 1).then_some(' '));
                line.extend(&word);
                break;
            }
            if used > 0 {
                lines.push(std::mem::take(&mut line));
                continue;
            }
            // A word longer than a line.
            line.extend(word.drain(..columns));
        }
    }
    if !line.is_empty() {
        lines.push(line);
    }
    if lines.len() > most {
        lines.truncate(most);
        if let Some(last) = lines.last_mut() {
            let kept: String = last.chars().take(columns - 3).collect();
            *last = format!("{kept}...");
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_broken_between_words() {
        assert_eq!(wrap("a red ring on a table", 10, 9), ["a red ring", "on a table"]);
        assert_eq!(wrap("abcdefghijkl m", 5, 9), ["abcde", "fghij", "kl m"]);
        assert_eq!(wrap("a red ring on a table", 10, 1), ["a red r..."]);
        assert_eq!(wrap("  ", 10, 1), [""; 0]);
        assert_eq!(wrap("é日本", 10, 1), ["é日本"]);
    }

    #[test]
    fn letters_leave_ink_within_their_place() {
        let mut letters = Lettering::new().expect("a font");
        let (width, height) = (5 * letters.width, 2 * letters.height);
        let white = Pixels { width, height, channels: 3, data: vec![255; width * height * 3] };
        let mut on = white.clone();
        letters.write(&mut on, [letters.width, 0], "A\u{e9}\u{65e5}");
        let cell = letters.width;
        let ink = |on: &Pixels, index: usize, line: usize| {
            let inked = on.data.chunks(3).enumerate().filter(|(_, rgb)| *rgb == INK);
            let place = |at: usize| (at % width / cell, at / width / letters.height);
            inked.filter(|(at, _)| place(*at) == (index, line)).count()
        };
        assert_eq!((ink(&on, 0, 0), ink(&on, 4, 0)), (0, 0));
        let counts = [1, 2, 3].map(|index| ink(&on, index, 0));
        assert!(counts.iter().all(|count| *count > 20), "{counts:?}");
        assert_eq!((0..5).map(|index| ink(&on, index, 1)).sum::<usize>(), 0);
        letters.write(&mut on, [4 * cell, height - 3], "WWWW");
    }
}
