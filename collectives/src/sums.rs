//! Sums whose order of additions is fixed: the same bits whatever the timing.

/// Floats summed at a time: 16 kB stay in the first-level cache while all ranks are added.
pub(crate) const BLOCK: usize = 4096;

/// In which order the ranks' values are added.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    /// Rank 0 + rank 1 + rank 2 + ...
    Ranks,
    /// (0 + 1) + (2 + 3), then these in pairs, and so on: what halving the ranks gives. Two groups
    /// whose sizes are powers of two then add in the same order what is contiguous in both.
    Pairs,
}

/// Partial sums of one block; ranks are added from 0 on.
#[derive(Debug)]
pub(crate) struct Sums {
    order: Order,
    /// The first `depth` are in use.
    blocks: Vec<[f32; BLOCK]>,
    depth: usize,
}

impl Sums {
    pub fn new(order: Order) -> Self {
        Self { order, blocks: Vec::new(), depth: 0 }
    }

    /// Adds the part of the next rank.
    pub fn add(&mut self, rank: usize, part: &[f32]) {
        // In pairs a rank ends as many pairs as its number ends in ones: 1 ends (0 1), 3 ends (2 3)
        // and ((0 1) (2 3)).
        let merges = match self.order {
            Order::Ranks => u32::from(rank > 0),
            Order::Pairs => rank.trailing_ones(),
        };
        if merges == 0 {
            if self.blocks.len() == self.depth {
                self.blocks.push([0.0; BLOCK]);
            }
            self.blocks[self.depth][..part.len()].copy_from_slice(part);
            self.depth += 1;
            return;
        }
        add(&mut self.blocks[self.depth - 1], part);
        (1..merges).for_each(|_| self.merge());
    }

    /// Adds the last block to the one before.
    fn merge(&mut self) {
        self.depth -= 1;
        let (before, last) = self.blocks.split_at_mut(self.depth);
        add(&mut before[self.depth - 1], &last[0]);
    }

    /// The sum; the next block begins anew.
    pub fn finish(&mut self) -> &[f32] {
        while self.depth > 1 {
            self.merge();
        }
        self.depth = 0;
        &self.blocks[0]
    }
}

/// Adds the part of the other of two ranks to the own one: no copies, and either order of additions
/// gives the same sum.
pub(crate) fn add_two(own: &mut [f32], other: &[f32]) {
    add(own, other);
}

fn add(sum: &mut [f32], part: &[f32]) {
    for (total, value) in sum.iter_mut().zip(part) {
        *total += value;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_added_one_by_one_or_in_pairs() {
        let parts: Vec<f32> = (0..8).map(|rank| 1.1_f32.powi(rank * 7)).collect();
        let sum = |order, world_size: usize| {
            let mut sums = Sums::new(order);
            for (rank, part) in parts[..world_size].iter().enumerate() {
                sums.add(rank, &[*part]);
            }
            sums.finish()[0].to_bits()
        };
        fn tree(parts: &[f32]) -> f32 {
            match parts {
                [one] => *one,
                _ => {
                    let (left, right) = parts.split_at(parts.len() / 2);
                    tree(left) + tree(right)
                }
            }
        }
        for world_size in [1, 2, 4, 8] {
            let one_by_one: f32 = parts[1..world_size].iter().fold(parts[0], |sum, x| sum + x);
            assert_eq!(sum(Order::Ranks, world_size), one_by_one.to_bits());
            assert_eq!(sum(Order::Pairs, world_size), tree(&parts[..world_size]).to_bits());
        }
        assert_ne!(sum(Order::Ranks, 8), sum(Order::Pairs, 8), "the orders cannot be told apart");
        let odd = (parts[0] + parts[1]) + parts[2];
        assert_eq!(sum(Order::Pairs, 3), odd.to_bits());
    }
}
