//! Random numbers that depend on nothing but their key: (seed, purpose, a, b).
//!
//! The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
//! SC 2011): a counter goes through ten rounds of a keyed bijection, so a stream can be opened
//! anywhere without running through what comes before it. That is what makes a run independent of
//! the number of ranks: every draw is keyed by what it is for (the global sample index, the epoch,
//! the step), never by who draws it or when.

/// What a stream is drawn for. Streams of different purposes are unrelated.
///
/// The numbers are part of the reproducibility of a run: append, never renumber.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Purpose {
    /// Order of the samples inside the buckets of one epoch.
    BucketOrder = 1,
    /// Order of the batches of one epoch.
    BatchOrder = 2,
    /// Shuffling, dropout and wildcards of one sample's caption.
    Caption = 3,
    /// Crop position of one sample.
    Crop = 4,
    /// Horizontal flip of one sample.
    Flip = 5,
    /// Colour augmentation of one sample.
    Color = 6,
    /// The draw from the VAE posterior of one sample.
    LatentSample = 7,
    /// The noise added to one sample's latents.
    Noise = 8,
    /// The timestep of one sample.
    Timestep = 9,
    /// The per-channel draw of `noise_offset` of one sample.
    NoiseOffset = 10,
    /// Initial values of the LoRA, keyed by module index.
    LoraInit = 11,
    /// Elements of a module that one sample sees.
    Dropout = 12,
    /// The input perturbation (`ip_noise_gamma`) of one sample.
    InputPerturbation = 13,
    /// Multi-resolution noise of one sample.
    MultiresNoise = 14,
    /// The random strength of noise options of one sample or step.
    NoiseStrength = 15,
    /// Which rank of DyLoRA is trained in a step.
    DyLoraRank = 16,
    /// Initial noise of a preview picture.
    Preview = 17,
    /// Seeds given out when the user gave none.
    SeedChoice = 18,
    /// Ranks of a module that one sample sees.
    RankDropout = 50,
    /// Modules that a batch leaves out.
    ModuleDropout = 51,
    /// Which images are held out for validation, keyed by image.
    ValidationChoice = 40,
    /// Order of the images of a validation, keyed by image.
    ValidationOrder = 41,
}

const MULTIPLIER: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// One block of Philox4x32-10: four words from a 128-bit counter and a 64-bit key.
fn philox_block(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for round in 0..10 {
        if round > 0 {
            key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
        }
        let product0 = u64::from(MULTIPLIER[0]) * u64::from(counter[0]);
        let product1 = u64::from(MULTIPLIER[1]) * u64::from(counter[2]);
        counter = [
            (product1 >> 32) as u32 ^ counter[1] ^ key[0],
            product1 as u32,
            (product0 >> 32) as u32 ^ counter[3] ^ key[1],
            product0 as u32,
        ];
    }
    counter
}

/// Spreads a 64-bit value over all its bits (the finaliser of SplitMix64).
fn mix(mut value: u64) -> u64 {
    value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ (value >> 31)
}

fn halves(value: u64) -> [u32; 2] {
    [value as u32, (value >> 32) as u32]
}

/// Opens the stream of `(seed, purpose, a, b)`.
///
/// `a` and `b` say which item of the purpose is meant, for example the global sample index and 0.
/// Equal arguments give equal streams on every rank, machine and version of this program.
pub fn stream(seed: u64, purpose: Purpose, a: u64, b: u64) -> Rng {
    // One block turns the name of the stream into its key and the upper half of its counter, which
    // leaves the lower half to count the blocks of the stream.
    let name_key = mix(seed.wrapping_add(0x9E37_79B9_7F4A_7C15)) ^ mix(u64::from(purpose as u32));
    let [a0, a1] = halves(a);
    let [b0, b1] = halves(b);
    let [key0, key1, high0, high1] = philox_block([a0, a1, b0, b1], halves(name_key));
    Rng { key: [key0, key1], high: [high0, high1], block: 0, words: [0; 4], left: 0, spare: None }
}

/// A stream of random numbers made by [`stream`].
#[derive(Debug, Clone)]
pub struct Rng {
    key: [u32; 2],
    high: [u32; 2],
    block: u64,
    words: [u32; 4],
    left: usize,
    spare: Option<f32>,
}

impl Rng {
    /// The next 32 random bits.
    pub fn next_u32(&mut self) -> u32 {
        if self.left == 0 {
            let [low0, low1] = halves(self.block);
            self.words = philox_block([low0, low1, self.high[0], self.high[1]], self.key);
            self.block += 1;
            self.left = 4;
        }
        self.left -= 1;
        self.words[3 - self.left]
    }

    /// The next 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        let low = self.next_u32();
        u64::from(low) | (u64::from(self.next_u32()) << 32)
    }

    /// Uniform in `[0, 1)`, 24 bits.
    pub fn uniform_f32(&mut self) -> f32 {
        (self.next_u32() >> 8) as f32 * (1.0 / 16_777_216.0)
    }

    /// Uniform in `[0, 1)`, 53 bits.
    pub fn uniform_f64(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 * (1.0 / 9_007_199_254_740_992.0)
    }

    /// Uniform in `0..bound` without bias. A `bound` of 0 gives 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        if bound <= 1 {
            return 0;
        }
        // Lemire's method: the high word of the product is the draw, unless the low word falls into
        // the part that would make some values one draw in 2^64 more likely.
        let reject_below = bound.wrapping_neg() % bound;
        loop {
            let product = u128::from(self.next_u64()) * u128::from(bound);
            if product as u64 >= reject_below {
                return (product >> 64) as u64;
            }
        }
    }

    /// Standard normal, by Box-Muller in f64 (so that the tails are those of f32 rounding only).
    pub fn normal(&mut self) -> f32 {
        if let Some(value) = self.spare.take() {
            return value;
        }
        // 1 - u lies in (0, 1], so the logarithm is finite.
        let radius = (-2.0 * (1.0 - self.uniform_f64()).ln()).sqrt();
        let (sine, cosine) = (std::f64::consts::TAU * self.uniform_f64()).sin_cos();
        self.spare = Some((radius * sine) as f32);
        (radius * cosine) as f32
    }

    /// Fills `out` with standard normal draws.
    pub fn fill_normal(&mut self, out: &mut [f32]) {
        out.iter_mut().for_each(|value| *value = self.normal());
    }

    /// Puts `items` into a uniformly random order (Fisher-Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            let other = self.below(last as u64 + 1) as usize;
            items.swap(last, other);
        }
    }

    /// A uniformly chosen item, or `None` of an empty slice.
    pub fn choose<'a, T>(&mut self, items: &'a [T]) -> Option<&'a T> {
        items.get(self.below(items.len() as u64) as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known-answer vectors published with Random123 (kat_vectors, philox4x32 10 rounds).
    #[test]
    fn philox_known_answers() {
        let all = u32::MAX;
        assert_eq!(
            philox_block([0; 4], [0; 2]),
            [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]
        );
        assert_eq!(
            philox_block([all; 4], [all; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        assert_eq!(
            philox_block(
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0]
            ),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn streams_are_their_key() {
        let first = |seed, purpose, a, b| stream(seed, purpose, a, b).next_u64();
        let reference = first(1, Purpose::Noise, 2, 3);
        assert_eq!(reference, first(1, Purpose::Noise, 2, 3));
        assert_ne!(reference, first(2, Purpose::Noise, 2, 3));
        assert_ne!(reference, first(1, Purpose::Timestep, 2, 3));
        assert_ne!(reference, first(1, Purpose::Noise, 3, 3));
        assert_ne!(reference, first(1, Purpose::Noise, 2, 2));
        assert_ne!(reference, first(1, Purpose::Noise, 3, 2));
    }

    #[test]
    fn normal_has_the_moments_of_a_normal() {
        let mut rng = stream(7, Purpose::Noise, 0, 0);
        let draws: Vec<f64> = (0..200_000).map(|_| f64::from(rng.normal())).collect();
        let moment = |power: i32| draws.iter().map(|x| x.powi(power)).sum::<f64>() / 2e5;
        assert!(moment(1).abs() < 0.01, "mean {}", moment(1));
        assert!((moment(2) - 1.0).abs() < 0.02, "variance {}", moment(2));
        assert!((moment(4) - 3.0).abs() < 0.15, "kurtosis {}", moment(4));
        assert!(draws.iter().all(|x| x.is_finite()));
    }

    #[test]
    fn below_is_even_and_shuffle_permutes() {
        let mut rng = stream(3, Purpose::BatchOrder, 0, 0);
        let mut counts = [0u32; 7];
        (0..70_000).for_each(|_| counts[rng.below(7) as usize] += 1);
        assert!(counts.iter().all(|&count| (9_500..10_500).contains(&count)), "{counts:?}");
        assert_eq!(rng.below(0), 0);
        let mut items: Vec<u32> = (0..100).collect();
        rng.shuffle(&mut items);
        assert_ne!(items, (0..100).collect::<Vec<_>>());
        items.sort_unstable();
        assert_eq!(items, (0..100).collect::<Vec<_>>());
    }
}
