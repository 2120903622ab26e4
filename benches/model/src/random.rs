//! Random values keyed by seed, tensor name and position, in exact arithmetic: the same bytes on every machine.

/// A stream of near-normal values for one tensor.
#[derive(Debug, Clone)]
pub struct Stream {
    state: u64,
}

const STRIDE: u64 = 0x9e37_79b9_7f4a_7c15;

impl Stream {
    /// The stream of one name under one seed.
    pub fn new(seed: u64, name: &str) -> Self {
        // FNV-1a, then mixed: names that differ in one digit give unrelated streams.
        let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| {
            (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3)
        });
        Self { state: mix(hash ^ mix(seed)) }
    }

    /// 64 random bits (SplitMix64).
    pub fn bits(&mut self) -> u64 {
        self.state = self.state.wrapping_add(STRIDE);
        mix(self.state)
    }

    /// Mean 0, deviation 1, between -3.5 and 3.5: the sum of four uniform numbers. Unlike a true normal it needs no
    /// logarithm, whose last bit depends on the machine, and costs one draw.
    pub fn near_normal(&mut self) -> f32 {
        let bits = self.bits();
        let sum = (bits & 0xffff) + (bits >> 16 & 0xffff) + (bits >> 32 & 0xffff) + (bits >> 48);
        // Four uniform 16-bit numbers: mean 2 * 65535, deviation sqrt(4 / 12) * 65536.
        (sum as f32 - 131_070.0) * (1.0 / 37_837.227)
    }
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_have_mean_zero_and_deviation_one() {
        let mut stream = Stream::new(1, "a");
        let values: Vec<f64> = (0..100_000).map(|_| f64::from(stream.near_normal())).collect();
        let mean = values.iter().sum::<f64>() / 1e5;
        let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / 1e5;
        assert!(mean.abs() < 0.02, "mean {mean}");
        assert!((variance - 1.0).abs() < 0.02, "variance {variance}");
    }

    #[test]
    fn streams_depend_on_seed_and_name() {
        let first = Stream::new(1, "a").bits();
        assert_eq!(first, Stream::new(1, "a").bits());
        assert_ne!(first, Stream::new(2, "a").bits());
        assert_ne!(first, Stream::new(1, "b").bits());
    }
}
