//! Which pieces of the gradient can leave for the sum over the ranks while the backward pass goes on.
//!
//! Pieces leave in one order, the last of the flat tensor first, as the backward pass reaches them; so
//! every rank makes the same calls whatever it has computed.

use std::ops::Range;

use engine::ParamId;

use crate::gradients::bucket_ranges;

/// The pieces of a gradient on their way.
pub struct Departure {
    /// Piece of each parameter.
    piece_of: Vec<usize>,
    /// Ascending over the flat tensor.
    pieces: Vec<Range<usize>>,
    /// Parameters that each piece still waits for.
    waiting: Vec<usize>,
    /// `pieces[..left]` have not left.
    left: usize,
}

impl Departure {
    /// For parameters that lie at `ranges`, ascending.
    pub fn new(ranges: &[Range<usize>]) -> Self {
        let pieces = bucket_ranges(ranges);
        let piece_of = |range: &Range<usize>| pieces.partition_point(|p| p.end < range.end);
        let piece_of = ranges.iter().map(piece_of).collect();
        Self { piece_of, pieces, waiting: Vec::new(), left: 0 }
    }

    /// Before the first gradient of a step.
    pub fn begin(&mut self) {
        self.waiting = vec![0; self.pieces.len()];
        for piece in &self.piece_of {
            self.waiting[*piece] += 1;
        }
        self.left = self.pieces.len();
    }

    /// The gradient of `id` is final: the pieces that leave now.
    pub fn arrived(&mut self, id: ParamId) -> Vec<Range<usize>> {
        let waiting = &mut self.waiting[self.piece_of[id.0]];
        *waiting = waiting.saturating_sub(1);
        let mut leaving = Vec::new();
        while self.left > 0 && self.waiting[self.left - 1] == 0 {
            self.left -= 1;
            leaving.push(self.pieces[self.left].clone());
        }
        leaving
    }

    /// No gradient will come any more: all that is left.
    pub fn rest(&mut self) -> Vec<Range<usize>> {
        let left = std::mem::take(&mut self.left);
        self.pieces[..left].iter().rev().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_leave_from_the_end_whatever_arrives_first() {
        // Three pieces: parameters 0 and 1, 2, 3 and 4.
        let ranges =
            [0..10, 10..1 << 20, 1 << 20..3 << 20, 3 << 20..4 << 20, 4 << 20..(4 << 20) + 5];
        let mut departure = Departure::new(&ranges);
        assert_eq!(departure.pieces.len(), 4);
        let order: Vec<_> = departure.pieces.iter().rev().cloned().collect();
        for arrivals in [vec![4, 3, 2, 1, 0], vec![0, 1, 2, 3, 4], vec![3, 0], vec![]] {
            departure.begin();
            let mut left: Vec<Range<usize>> = Vec::new();
            for id in &arrivals {
                left.extend(departure.arrived(ParamId(*id)));
            }
            if arrivals.len() == 5 {
                assert_eq!(left, order);
            }
            left.extend(departure.rest());
            assert_eq!(left, order, "{arrivals:?}");
        }
        departure.begin();
        assert_eq!(departure.arrived(ParamId(4)), [order[0].clone()]);
        assert!(departure.arrived(ParamId(2)).is_empty());
    }
}
