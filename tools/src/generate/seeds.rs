//! Seeds for pictures that were given none: those that the reference would draw.
//!
//! sd-scripts draws them with Python's `random.Random(seed).randint(0, 2**32 - 1)`, so the same
//! `--seed` gives the same pictures here.

use std::time::{SystemTime, UNIX_EPOCH};

/// Words of the generator's state.
const WORDS: usize = 624;
/// How far apart the words are that are mixed.
const SHIFT: usize = 397;

/// MT19937 as Python seeds it.
#[derive(Clone, Debug)]
pub(super) struct Seeds {
    state: [u32; WORDS],
    next: usize,
}

impl Seeds {
    /// Python's `random.Random(seed)`; without a seed one from the clock.
    pub fn new(seed: Option<u64>) -> Self {
        let seed = seed.unwrap_or_else(|| {
            let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            since.as_nanos() as u64 ^ u64::from(std::process::id())
        });
        let key = match seed >> 32 {
            0 => vec![seed as u32],
            high => vec![seed as u32, high as u32],
        };
        let mut state = [0_u32; WORDS];
        state[0] = 19_650_218;
        for i in 1..WORDS {
            let last = state[i - 1];
            state[i] = 1_812_433_253_u32.wrapping_mul(last ^ (last >> 30)).wrapping_add(i as u32);
        }
        let (mut i, mut j) = (1, 0);
        for _ in 0..WORDS.max(key.len()) {
            let last = state[i - 1];
            state[i] = (state[i] ^ (last ^ (last >> 30)).wrapping_mul(1_664_525))
                .wrapping_add(key[j])
                .wrapping_add(j as u32);
            (i, j) = (i + 1, (j + 1) % key.len());
            if i == WORDS {
                state[0] = state[WORDS - 1];
                i = 1;
            }
        }
        for _ in 1..WORDS {
            let last = state[i - 1];
            state[i] = (state[i] ^ (last ^ (last >> 30)).wrapping_mul(1_566_083_941))
                .wrapping_sub(i as u32);
            i += 1;
            if i == WORDS {
                state[0] = state[WORDS - 1];
                i = 1;
            }
        }
        state[0] = 0x8000_0000;
        Self { state, next: WORDS }
    }

    fn word(&mut self) -> u32 {
        if self.next == WORDS {
            for i in 0..WORDS {
                let next = self.state[(i + 1) % WORDS];
                let both = (self.state[i] & 0x8000_0000) | (next & 0x7fff_ffff);
                let odd = if both & 1 == 1 { 0x9908_b0df } else { 0 };
                self.state[i] = self.state[(i + SHIFT) % WORDS] ^ (both >> 1) ^ odd;
            }
            self.next = 0;
        }
        let mut word = self.state[self.next];
        self.next += 1;
        word ^= word >> 11;
        word ^= (word << 7) & 0x9d2c_5680;
        word ^= (word << 15) & 0xefc6_0000;
        word ^ (word >> 18)
    }

    /// `randint(0, 2**32 - 1)`: Python takes 33 bits and draws again while they are too large.
    pub fn draw(&mut self) -> u64 {
        loop {
            let low = self.word();
            if self.word() >> 31 == 0 {
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
