//! What the noise is like, and what it depends on. Its values are compared with sd-scripts' in
//! `objective/tests.rs`.

use super::*;

const SHAPE: [usize; 3] = [16, 24, 4];
const LEN: usize = 16 * 24 * 4;

fn shape(change: impl FnOnce(&mut Options)) -> NoiseShape {
    let mut options = Options::default();
    change(&mut options);
    NoiseShape::from_options(&options)
}

fn everything() -> NoiseShape {
    shape(|o| {
        o.noise_offset = Some(0.1);
        o.noise_offset_random_strength = true;
        o.multires_noise_iterations = Some(8);
        o.ip_noise_gamma = Some(0.2);
        o.ip_noise_gamma_random_strength = true;
    })
}

#[test]
fn random_strengths_are_uniform_up_to_the_value() {
    let noise = everything();
    let mut counts = [[0u32; 10]; 2];
    let mut product = 0.;
    for index in 0..5000 {
        let draw = noise.draw(1, index, [1, 1, 4], 0);
        for (which, strength) in
            [draw.offset_strength, draw.perturbation_strength].into_iter().enumerate()
        {
            assert!((0. ..1.).contains(&strength));
            counts[which][(strength * 10.) as usize] += 1;
        }
        product += f64::from(draw.offset_strength * draw.perturbation_strength) / 5000.;
    }
    // 500 each; four standard deviations are 85.
    assert!(counts.iter().flatten().all(|count| (415..585).contains(count)), "{counts:?}");
    // The two are unrelated: the mean of the product is that of independent ones, 1/4.
    assert!((product - 0.25).abs() < 0.01, "{product}");
    let fixed = shape(|o| o.noise_offset = Some(0.1)).draw(1, 0, SHAPE, 0);
    assert_eq!((fixed.offset_strength, fixed.perturbation_strength), (1., 1.));
}

#[test]
fn an_offset_shifts_channels_by_its_strength() {
    let noise = shape(|o| o.noise_offset = Some(0.5));
    let latents = vec![0.; LEN];
    let squares: f64 = (0..400)
        .map(|index| {
            let draw = noise.draw(2, index, SHAPE, 0);
            let shifted = noise.noise(&latents, SHAPE, &draw);
            let of = |c: usize| shifted[c] - draw.noise[c];
            assert!((of(2) - 0.5 * draw.offset[2]).abs() < 1e-6);
            f64::from(of(0)).powi(2)
        })
        .sum();
    let deviation = (squares / 400.).sqrt();
    assert!((deviation - 0.5).abs() < 0.07, "{deviation}");
}

/// Mean product of horizontal neighbours, relative to the variance.
fn neighbour_correlation(noise: &[f32]) -> f64 {
    let [height, width, channels] = SHAPE;
    let at = |y: usize, x: usize, c: usize| f64::from(noise[(y * width + x) * channels + c]);
    let mut sum = 0.;
    for y in 0..height {
        for x in 0..width - 1 {
            sum += (0..channels).map(|c| at(y, x, c) * at(y, x + 1, c)).sum::<f64>();
        }
    }
    sum / (height * (width - 1) * channels) as f64
}

#[test]
fn multires_noise_is_coarser_and_of_unit_deviation() {
    let latents = vec![0.; LEN];
    let of = |discount: f64, index: u64| {
        let noise = shape(|o| {
            o.multires_noise_iterations = Some(6);
            o.multires_noise_discount = discount;
        });
        let draw = noise.draw(3, index, SHAPE, 0);
        (noise.noise(&latents, SHAPE, &draw), draw)
    };
    let mean = |discount: f64| {
        (0..50).map(|index| neighbour_correlation(&of(discount, index).0)).sum::<f64>() / 50.
    };
    for index in 0..20 {
        let (noise, draw) = of(0.5, index);
        assert!((standard_deviation(&noise) - 1.).abs() < 1e-5);
        assert_eq!(draw.octaves[0].size, [16, 24]);
        for pair in draw.octaves.windows(2) {
            assert!(pair[1].size[0] < pair[0].size[0], "{:?}", draw.octaves.len());
        }
        // Each octave is at most half as large: four of them reach a single row.
        assert!((3..=5).contains(&draw.octaves.len()), "{}", draw.octaves.len());
        let last = draw.octaves.last().unwrap();
        assert!(last.size.contains(&1));
    }
    let (white, weak, strong) = (mean(0.), mean(0.3), mean(0.9));
    assert!(white.abs() < 0.02, "{white}");
    assert!(weak > white + 0.01 && strong > weak + 0.2, "{white} {weak} {strong}");
}

#[test]
fn a_disturbance_is_in_the_latents_but_not_in_the_target() {
    let noise = shape(|o| o.ip_noise_gamma = Some(0.1));
    let draw = noise.draw(4, 0, SHAPE, 0);
    let target = noise.noise(&vec![0.; LEN], SHAPE, &draw);
    assert_eq!(target, draw.noise);
    let mixed = noise.disturbed(&target, &draw).unwrap();
    let difference: Vec<f32> = mixed.iter().zip(&target).map(|(a, b)| a - b).collect();
    assert!((standard_deviation(&difference) - 0.1).abs() < 0.01);
    assert_eq!(shape(|_| {}).disturbed(&target, &draw), None);
}

#[test]
fn a_draw_depends_on_its_key_alone() {
    let noise = everything();
    let draw = |seed, index| noise.draw(seed, index, SHAPE, 7);
    let reference = draw(1, 5);
    // Between and after other draws, as in another batch or on another rank.
    for other in [0, 9, 4] {
        let _ = draw(1, other);
        assert_eq!(draw(1, 5), reference);
    }
    assert!(noise.fits(&reference, SHAPE));
    for (seed, index) in [(1, 6), (2, 5)] {
        let other = draw(seed, index);
        assert_ne!(other.noise, reference.noise);
        assert_ne!(other.octaves[0].noise, reference.octaves[0].noise);
        assert_ne!(other.perturbation, reference.perturbation);
        assert_ne!(other.offset_strength, reference.offset_strength);
        assert_ne!(other.perturbation_strength, reference.perturbation_strength);
    }
    // The streams of one sample are unrelated, and options leave each other's streams alone.
    assert_ne!(reference.noise, reference.perturbation);
    assert_ne!(reference.noise, reference.octaves[0].noise);
    assert_eq!(shape(|_| {}).draw(1, 5, SHAPE, 7).noise, reference.noise);
}
