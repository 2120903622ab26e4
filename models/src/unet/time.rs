//! Sinusoidal embedding of a timestep (Vaswani et al., arXiv:1706.03762, as diffusers has it).

/// `[cos(t·f0), cos(t·f1), ..., sin(t·f0), ...]` with `f_i = 10000^(-i/half)`, f32
/// `[timesteps.len(), width]` row-major; an odd `width` ends in a zero.
pub fn timestep_embedding(timesteps: &[f32], width: usize) -> Vec<f32> {
    let half = width / 2;
    let frequencies: Vec<f32> =
        (0..half).map(|i| (-(10000f32.ln()) * i as f32 / half as f32).exp()).collect();
    let mut out = Vec::with_capacity(timesteps.len() * width);
    for t in timesteps {
        out.extend(frequencies.iter().map(|f| (t * f).cos()));
        out.extend(frequencies.iter().map(|f| (t * f).sin()));
        out.extend(std::iter::repeat_n(0., width % 2));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `diffusers.models.embeddings.get_timestep_embedding(t, width, flip_sin_to_cos=True,
    /// downscale_freq_shift=0)`, diffusers 0.39 on PyTorch 2.11.
    #[test]
    fn waves_are_those_of_diffusers() {
        let got = timestep_embedding(&[0., 37., 999.], 8);
        let want = [
            [1., 1., 1., 1., 0., 0., 0., 0.],
            [
                0.765_414_06,
                -0.848_100_1,
                0.932_327_3,
                0.999_315_56,
                -0.643_538_1,
                -0.529_836,
                0.361_615_45,
                0.036_991_555,
            ],
            [
                0.999_649_8,
                0.807_455_06,
                -0.844_469_8,
                0.541_143_54,
                -0.026_460_752,
                -0.589_929_1,
                -0.535_603_17,
                0.840_930_2,
            ],
        ];
        for (a, b) in got.iter().zip(want.as_flattened()) {
            assert!((a - b).abs() < 1e-4, "{a} and {b}");
        }

        let wide = timestep_embedding(&[981.], 320);
        let want = [
            (0, 0.679_957_2),
            (1, -0.798_429_2),
            (80, -0.926_715_2),
            (159, 0.994_605_9),
            (160, 0.733_251_8),
            (161, 0.602_088_7),
            (240, -0.375_764_43),
            (319, 0.103_725_88),
        ];
        for (i, want) in want {
            assert!((wide[i] - want).abs() < 1e-4, "{i}: {} and {want}", wide[i]);
        }
        assert_eq!(timestep_embedding(&[5.], 3)[2], 0.);
    }
}
