//! The contact sheet: pictures side by side, with what tells them apart.

use std::collections::BTreeMap;

use pictures::{Interpolation, Pixels, resize};

use super::lettering::{Lettering, wrap};
use super::plan::Row;

/// Pictures narrower than this are enlarged by a whole number, so that labels have room.
const NARROW: usize = 256;
/// Letters of a row's label with a prompt in it.
const PROMPT_LETTERS: usize = 22;
/// Lines of a column's label and of the title.
const MOST_LINES: usize = 3;

/// A sheet that is being filled.
pub(super) struct Sheet {
    columns: Vec<String>,
    /// Row and column to picture.
    cells: BTreeMap<[usize; 2], Pixels>,
}

/// Where things stand.
struct Measures {
    gap: usize,
    /// Of the labels of rows.
    gutter: usize,
    title: Vec<String>,
    /// Lines of each column's label.
    heads: Vec<Vec<String>>,
    /// Lines of each row's label.
    sides: Vec<Vec<String>>,
}

impl Sheet {
    /// An empty sheet with these labels over its columns.
    pub fn new(columns: Vec<String>) -> Self {
        Self { columns, cells: BTreeMap::new() }
    }

    /// Puts a picture into its places.
    pub fn put(&mut self, cells: &[[usize; 2]], picture: &Pixels) {
        for cell in cells {
            self.cells.insert(*cell, picture.clone());
        }
    }

    /// Draws the sheet.
    ///
    /// # Errors
    /// None with the built-in fonts.
    pub fn draw(&self, rows: &[Row]) -> anyhow::Result<Pixels> {
        let side = |of: fn(&Pixels) -> usize| self.cells.values().map(of).max().unwrap_or(1);
        let largest = [side(|picture| picture.width), side(|picture| picture.height)];
        let factor = NARROW.div_ceil(largest[0]);
        let cell = largest.map(|side| side * factor);
        let mut letters = Lettering::new()?;
        let measures = self.measure(rows, cell, &letters);
        let Measures { gap, gutter, .. } = measures;
        let line = letters.height;
        let head_lines = measures.heads.iter().map(Vec::len).max().unwrap_or(0);
        let block = |lines: usize| if lines == 0 { 0 } else { lines * line + gap };
        let top = gap + block(measures.title.len()) + block(head_lines);
        let left = if gutter == 0 { gap } else { gutter + 2 * gap };
        let width = left + self.columns.len() * (cell[0] + gap);
        let height = top + rows.len() * (cell[1] + gap);
        let mut sheet = Pixels { width, height, channels: 3, data: vec![255; width * height * 3] };
        for (index, text) in measures.title.iter().enumerate() {
            letters.write(&mut sheet, [gap, gap + index * line], text);
        }
        for (column, head) in measures.heads.iter().enumerate() {
            let x = left + column * (cell[0] + gap);
            // Labels stand on the pictures.
            let y = top - gap / 2 - head.len() * line;
            for (index, text) in head.iter().enumerate() {
                letters.write(&mut sheet, [x, y + index * line], text);
            }
        }
        for (row, side) in measures.sides.iter().enumerate() {
            let y = top + row * (cell[1] + gap);
            for (index, text) in side.iter().enumerate() {
                letters.write(&mut sheet, [gap, y + index * line], text);
            }
        }
        for ([row, column], picture) in &self.cells {
            let size = [picture.width * factor, picture.height * factor];
            let picture = resize(picture, size[0], size[1], Some(Interpolation::NearestCentre));
            let x = left + column * (cell[0] + gap) + (cell[0] - size[0]) / 2;
            let y = top + row * (cell[1] + gap) + (cell[1] - size[1]) / 2;
            paste(&mut sheet, &picture, [x, y]);
        }
        Ok(sheet)
    }

    fn measure(&self, rows: &[Row], cell: [usize; 2], letters: &Lettering) -> Measures {
        let gap = letters.height / 2;
        let is_one_prompt = rows.iter().all(|row| row.prompt == rows[0].prompt);
        let short = |row: &Row| -> Vec<String> {
            let seed = (rows.len() > 1 || !is_one_prompt).then(|| format!("seed {}", row.seed));
            seed.into_iter().chain((!row.band.is_empty()).then(|| row.band.clone())).collect()
        };
        let longest = rows.iter().flat_map(short).map(|text| text.chars().count()).max();
        let columns = match is_one_prompt {
            true => longest.unwrap_or(0),
            false => PROMPT_LETTERS.max(longest.unwrap_or(0)),
        };
        let room = (cell[1] / letters.height).max(1);
        let side = |row: &Row| {
            let mut lines = short(row);
            if !is_one_prompt {
                let most = room.saturating_sub(lines.len()).max(1);
                lines.splice(0..0, wrap(&row.prompt, columns, most));
            }
            lines.truncate(room);
            lines
        };
        let gutter = columns * letters.width;
        let left = if gutter == 0 { gap } else { gutter + 2 * gap };
        let whole = left + self.columns.len() * (cell[0] + gap) - 2 * gap;
        let mut title = Vec::new();
        if let Some(row) = rows.first().filter(|_| is_one_prompt) {
            title = wrap(&row.prompt, whole / letters.width, MOST_LINES);
            if rows.len() == 1 {
                title.push(format!("seed {}", row.seed));
            }
        }
        let head = |text: &String| wrap(text, cell[0] / letters.width, MOST_LINES);
        Measures {
            gap,
            gutter,
            title,
            heads: self.columns.iter().map(head).collect(),
            sides: rows.iter().map(side).collect(),
        }
    }
}

fn paste(on: &mut Pixels, picture: &Pixels, [x, y]: [usize; 2]) {
    let length = picture.width * 3;
    for (row, line) in picture.data.chunks_exact(length).enumerate() {
        let at = ((y + row) * on.width + x) * 3;
        on.data[at..at + length].copy_from_slice(line);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(prompt: &str, seed: u64) -> Row {
        Row { prompt: prompt.to_owned(), seed, band: String::new() }
    }

    fn plain(width: usize, height: usize, value: u8) -> Pixels {
        Pixels { width, height, channels: 3, data: vec![value; width * height * 3] }
    }

    /// Pixels of exactly this value.
    fn count(of: &Pixels, value: u8) -> usize {
        of.data.chunks(3).filter(|rgb| **rgb == [value; 3]).count()
    }

    #[test]
    fn every_picture_is_whole_and_labels_lie_beside() {
        let mut sheet = Sheet::new(vec!["no LoRA".to_owned(), "ring".to_owned()]);
        sheet.put(&[[0, 0]], &plain(256, 64, 100));
        sheet.put(&[[0, 1]], &plain(64, 128, 110));
        sheet.put(&[[1, 0], [1, 1]], &plain(64, 64, 120));
        for rows in [[row("a", 1), row("a", 2)], [row("a ring", 1), row("a long prompt", 1)]] {
            let drawn = sheet.draw(&rows).expect("a sheet");
            assert_eq!(count(&drawn, 100), 256 * 64);
            assert_eq!(count(&drawn, 110), 64 * 128);
            assert_eq!(count(&drawn, 120), 2 * 64 * 64);
            assert!(count(&drawn, 24) > 300, "there are labels");
        }
    }

    #[test]
    fn small_pictures_are_enlarged() {
        let mut sheet = Sheet::new(vec![String::new()]);
        sheet.put(&[[0, 0]], &plain(64, 64, 100));
        let drawn = sheet.draw(&[row("a", 1)]).expect("a sheet");
        assert_eq!(count(&drawn, 100), 256 * 256);
        assert_eq!(drawn.width, 12 + 256 + 12);
    }
}
