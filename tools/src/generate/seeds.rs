//! Seeds for pictures that were given none: those that the reference would draw.
//!
//! sd-scripts draws them with Python's `random.Random(seed).randint(0, 2**32 - 1)`, so the same
//! `--seed` gives the same pictures here.

use std::time::{SystemTime, UNIX_EPOCH};

use models::Mt19937;

/// Python's generator.
#[derive(Clone, Debug)]
pub(super) struct Seeds {
    words: Mt19937,
}

impl Seeds {
    /// Python's `random.Random(seed)`; without a seed one from the clock.
    pub fn new(seed: Option<u64>) -> Self {
        let seed = seed.unwrap_or_else(|| {
            let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            since.as_nanos() as u64 ^ u64::from(std::process::id())
        });
        let words = match seed >> 32 {
            0 => Mt19937::by_key(&[seed as u32]),
            high => Mt19937::by_key(&[seed as u32, high as u32]),
        };
        Self { words }
    }

    /// `randint(0, 2**32 - 1)`: Python takes 33 bits and draws again while they are too large.
    pub fn draw(&mut self) -> u64 {
        loop {
            let low = self.words.word();
            if self.words.word() >> 31 == 0 {
                return u64::from(low);
            }
        }
    }

    /// Puts `values` in another order.
    pub fn shuffle<T>(&mut self, values: &mut [T]) {
        for last in (1..values.len()).rev() {
            values.swap(last, (self.draw() % (last as u64 + 1)) as usize);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_are_those_of_python() {
        // python3 -c "import random; r = random.Random(S); print([r.randint(0, 2**32-1) for _ in range(4)])"
        for (seed, expected) in PYTHON {
            let mut seeds = Seeds::new(Some(seed));
            assert_eq!([0; 4].map(|_| seeds.draw()), expected, "{seed}");
        }
    }

    #[test]
    fn a_shuffle_keeps_everything() {
        let mut values: Vec<usize> = (0..50).collect();
        Seeds::new(Some(3)).shuffle(&mut values);
        assert_ne!(values, (0..50).collect::<Vec<_>>());
        values.sort_unstable();
        assert_eq!(values, (0..50).collect::<Vec<_>>());
    }

    const PYTHON: [(u64, [u64; 4]); 4] = [
        (0, [3626764237, 1806341205, 2195908194, 2046968324]),
        (1, [3280387012, 1095513148, 1930549411, 2798570523]),
        (42, [2746317213, 1181241943, 958682846, 3163119785]),
        (1099511627783, [2044078442, 3091373771, 1688693473, 3852568308]),
    ];
}
