//! Two files of tensors beside each other, for runs that should have learned the same.

use std::path::Path;

use anyhow::{Context, Result, bail};
use formats::open_tensor_file;

use super::Report;
use crate::console;

/// Compares every tensor of two files: the largest difference of two numbers must be at most
/// `tolerance` times the largest number of the tensor in `second`. Prints the worst tensor.
pub fn compare_files(first: &Path, second: &Path, tolerance: f64) -> Result<Report> {
    let (a, b) = (open_tensor_file(first)?, open_tensor_file(second)?);
    if a.names() != b.names() {
        let (a, b) = (a.names(), b.names());
        let only = a.iter().find(|name| !b.contains(name));
        let only = only.or_else(|| b.iter().find(|name| !a.contains(name)));
        bail!("the files hold different tensors, such as: {}", only.unwrap_or(&""));
    }
    let mut report = Report::default();
    let mut worst = (0., String::new());
    for name in a.names() {
        let (x, y) = (a.view(name)?, b.view(name)?);
        if x.shape != y.shape {
            bail!("shapes of `{name}` differ: {:?} and {:?}", x.shape, y.shape);
        }
        let (x, y) = (x.to_f32(), y.to_f32());
        let error = largest_error(&x, &y);
        report.compared += 1;
        if error.is_nan() || error > tolerance {
            report.failed.push(format!("{name}: {error:.1e}"));
        }
        if error.is_nan() || error > worst.0 {
            worst = (error, name.to_owned());
        }
    }
    if report.compared == 0 {
        bail!("there is no tensor in: {}", first.display());
    }
    console::data(&format!("largest difference {:.1e} in {}", worst.0, worst.1));
    Ok(report)
}

fn largest_error(x: &[f32], y: &[f32]) -> f64 {
    let mut largest = 0f64;
    let mut difference = 0f64;
    for (x, y) in x.iter().zip(y) {
        if !x.is_finite() || !y.is_finite() {
            return f64::NAN;
        }
        largest = largest.max(f64::from(y.abs()));
        difference = difference.max((f64::from(*x) - f64::from(*y)).abs());
    }
    if difference == 0. { 0. } else { difference / largest }
}

/// `--compare` of the command line.
pub fn compare_pair(files: &[std::path::PathBuf], tolerance: f64) -> Result<Report> {
    let [first, second] = files else {
        bail!("`--compare` takes two files, got: {}", files.len());
    };
    compare_files(first, second, tolerance)
        .with_context(|| format!("compare {} with {}", first.display(), second.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_measured_against_the_largest_number() {
        assert_eq!(largest_error(&[1., -4.], &[1., -4.]), 0.);
        assert_eq!(largest_error(&[1.5, -4.], &[1., -4.]), 0.125);
        assert_eq!(largest_error(&[0.; 2], &[0.; 2]), 0.);
        assert_eq!(largest_error(&[1., 0.], &[0.; 2]), f64::INFINITY);
        assert!(largest_error(&[f32::NAN], &[f32::NAN]).is_nan());
    }

    #[test]
    fn files_are_compared_tensor_by_tensor() {
        let lora = Path::new(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../examples/tiny-sd/unet/diffusion_pytorch_model.safetensors"
        ));
        let report = compare_files(lora, lora, 0.).unwrap();
        assert!(report.compared > 100 && report.failed.is_empty(), "{report:?}");
        let missing = compare_pair(&[lora.into(), "nowhere.safetensors".into()], 0.);
        assert!(format!("{:#}", missing.unwrap_err()).contains("nowhere.safetensors"));
        assert!(compare_pair(&[lora.into()], 0.).is_err());
    }
}
