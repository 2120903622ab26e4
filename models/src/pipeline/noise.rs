//! Noise that PyTorch's CPU generator gives for a seed.
//!
//! `torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))` is what diffusers and
//! ComfyUI start a picture from, so that the same seed is the same picture here. The generator is
//! [`Mt19937`]; sixteen or more numbers come from pairs of uniform ones eight apart, by Box and Muller.

use crate::Mt19937;

/// Numbers that are made together.
const BLOCK: usize = 16;

/// One picture's source of normal numbers.
#[derive(Clone)]
pub struct TorchNoise {
    words: Mt19937,
}

impl TorchNoise {
    /// The generator of a seed; like PyTorch's it takes its lower 32 bits.
    pub fn new(seed: u64) -> Self {
        Self { words: Mt19937::new(seed as u32) }
    }

    /// Uniform in 0..1, 24 bits.
    fn uniform(&mut self) -> f32 {
        (self.words.word() & 0x00ff_ffff) as f32 / 16_777_216.
    }

    /// As many normal numbers as `torch.randn` gives in one call, in its order. Fewer than
    /// sixteen are made in another way there; latents are never that small.
    pub fn fill(&mut self, out: &mut [f32]) {
        out.iter_mut().for_each(|value| *value = self.uniform());
        let whole = out.len() - out.len() % BLOCK;
        out[..whole].chunks_mut(BLOCK).for_each(to_normal);
        if whole < out.len() && out.len() >= BLOCK {
            // The last sixteen are drawn anew, over what stands there.
            let last = out.len() - BLOCK;
            out[last..].iter_mut().for_each(|value| *value = self.uniform());
            to_normal(&mut out[last..]);
        }
    }
}

fn to_normal(block: &mut [f32]) {
    let (left, right) = block.split_at_mut(BLOCK / 2);
    for (a, b) in left.iter_mut().zip(right) {
        let radius = (-2. * (1. - *a).ln()).sqrt();
        let (sine, cosine) = (std::f32::consts::TAU * *b).sin_cos();
        (*a, *b) = (radius * cosine, radius * sine);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `torch.randn(n, generator=torch.Generator().manual_seed(seed))` of PyTorch 2.11, every eighth
    /// number; its vector code rounds sine and cosine otherwise.
    #[test]
    fn noise_is_that_of_torch() {
        let golden: serde_json::Value =
            serde_json::from_str(include_str!("../../../tests/data/generate/torch_randn.json"))
                .expect("JSON");
        for case in golden.as_array().expect("cases") {
            let seed = case["seed"].as_u64().expect("a seed");
            let mut source = TorchNoise::new(seed);
            for call in case["calls"].as_array().expect("calls") {
                let mut noise = vec![0.; call["len"].as_u64().expect("a length") as usize];
                source.fill(&mut noise);
                let expected = call["values"].as_array().expect("values");
                let ours = noise.iter().step_by(8).zip(expected);
                for (i, (x, y)) in ours.enumerate() {
                    let y = y.as_f64().expect("a number");
                    assert!((f64::from(*x) - y).abs() < 2e-6, "seed {seed}, {i}: {x} not {y}");
                }
            }
        }
    }
}
