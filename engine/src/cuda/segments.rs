//! Memory taken from the driver in segments and handed out in pieces: best fit, neighbours merged.
//!
//! A driver hands memory out in units of megabytes: blocks of their own for hundreds of weights would
//! waste a good part of a small card, unseen by the limit.

use std::collections::{BTreeMap, BTreeSet};

use super::driver::{Address, Driver};

/// A piece of a segment, in use or free.
struct Piece {
    size: usize,
    used: bool,
    segment: Address,
}

/// Segments for pieces of one class of sizes.
#[derive(Default)]
pub(super) struct Segments {
    /// Start and bytes of each.
    segments: BTreeMap<Address, usize>,
    /// Every segment is covered by pieces without gaps.
    pieces: BTreeMap<Address, Piece>,
    /// Size and start of the free ones.
    free: BTreeSet<(usize, Address)>,
}

impl Segments {
    /// Adds memory of the driver.
    pub(super) fn add(&mut self, segment: Address, size: usize) {
        self.segments.insert(segment, size);
        self.pieces.insert(segment, Piece { size, used: false, segment });
        self.free.insert((size, segment));
    }

    /// The smallest free piece of at least `size` bytes. With `cut`, what is left of it stays free;
    /// without, only pieces are taken that are hardly larger. Gives start and bytes.
    pub(super) fn take(&mut self, size: usize, cut: bool) -> Option<(Address, usize)> {
        let (found, address) = self.free.range((size, 0)..).next().copied()?;
        if !cut && found > size + size / 8 {
            return None;
        }
        self.free.remove(&(found, address));
        let piece = self.pieces.get_mut(&address)?;
        piece.used = true;
        if !cut || found == size {
            return Some((address, found));
        }
        piece.size = size;
        let (rest, segment) = (address + size as Address, piece.segment);
        self.pieces.insert(rest, Piece { size: found - size, used: false, segment });
        self.free.insert((found - size, rest));
        Some((address, size))
    }

    /// Takes a piece back and joins it with free neighbours of its segment.
    pub(super) fn give(&mut self, address: Address) {
        let Some(piece) = self.pieces.get_mut(&address) else { return };
        piece.used = false;
        let (mut start, mut size, segment) = (address, piece.size, piece.segment);
        let joins = |piece: &Piece| !piece.used && piece.segment == segment;
        let after = address + size as Address;
        if let Some(next) = self.pieces.get(&after).filter(|piece| joins(piece)) {
            self.free.remove(&(next.size, after));
            size += next.size;
            self.pieces.remove(&after);
        }
        let before = self.pieces.range(..address).next_back().filter(|(_, piece)| joins(piece));
        if let Some((before, piece)) = before.map(|(before, piece)| (*before, piece.size)) {
            self.free.remove(&(piece, before));
            self.pieces.remove(&start);
            (start, size) = (before, size + piece);
        }
        self.pieces.insert(start, Piece { size, used: false, segment });
        self.free.insert((size, start));
    }

    /// Gives segments of which nothing is used back to the driver; their bytes.
    pub(super) fn release(&mut self, driver: &dyn Driver) -> usize {
        let mut released = 0;
        let whole: Vec<(usize, Address)> = self
            .free
            .iter()
            .filter(|(size, start)| self.segments.get(start) == Some(size))
            .copied()
            .collect();
        for (size, start) in whole {
            driver.free(start);
            self.free.remove(&(size, start));
            self.pieces.remove(&start);
            self.segments.remove(&start);
            released += size;
        }
        released
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_never_overlap_and_join_again() {
        let mut segments = Segments::default();
        for (start, size) in [(1 << 20, 64 << 10), (4 << 20, 32 << 10), (5 << 20, 96 << 10)] {
            segments.add(start, size);
        }
        let mut state = 88_172_645_463_325_252_u64;
        let mut below = |bound: usize| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 11) as usize % bound
        };
        let mut live: Vec<(Address, usize)> = Vec::new();
        let mut refused = 0;
        for _ in 0..4000 {
            if live.len() > 40 || (!live.is_empty() && below(2) == 0) {
                let (address, _) = live.swap_remove(below(live.len()));
                segments.give(address);
                continue;
            }
            let size = (1 + below(40)) * 256;
            let Some((address, got)) = segments.take(size, true) else {
                refused += 1;
                continue;
            };
            assert_eq!(got, size);
            let end = address + size as Address;
            let inside = |(start, size): (&Address, &usize)| {
                *start <= address && end <= start + *size as Address
            };
            assert!(segments.segments.iter().any(inside), "{address} lies outside");
            for (other, bytes) in &live {
                assert!(end <= *other || other + *bytes as Address <= address);
            }
            live.push((address, size));
        }
        // Some wishes were too large for what was free, or nothing was tested.
        assert!(refused > 0 && refused < 2000, "{refused}");
        live.drain(..).for_each(|(address, _)| segments.give(address));
        assert_eq!((segments.free.len(), segments.pieces.len()), (3, 3));
        assert_eq!(segments.take(96 << 10, true), Some((5 << 20, 96 << 10)));
    }

    #[test]
    fn without_cutting_a_piece_goes_to_a_buffer_of_its_size() {
        let mut segments = Segments::default();
        segments.add(1 << 20, 2048);
        assert_eq!(segments.take(256, false), None);
        assert_eq!(segments.take(1920, false), Some((1 << 20, 2048)));
        segments.give(1 << 20);
        assert_eq!(segments.take(2048, false), Some((1 << 20, 2048)));
    }
}
