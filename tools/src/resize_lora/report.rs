//! What each module keeps, in the words of sd-scripts' report.

use crate::progress::print;

/// One module of the report.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Line {
    /// Its name in the file.
    pub module: String,
    /// Share of the sum of singular values.
    pub sum: f64,
    /// Share of the Frobenius norm.
    pub norm: f64,
    /// Largest singular value beside the smallest kept.
    pub ratio: f64,
    /// New rank.
    pub rank: usize,
    /// New alpha.
    pub alpha: f32,
}

impl Line {
    fn text(&self, dynamic: bool) -> String {
        let (sum, norm) = (100.0 * self.sum, 100.0 * self.norm);
        let mut text = format!(
            "{:75} | sum(S) retained: {sum:.1}%, fro retained: {norm:.1}%, max(S) ratio: {:.1}",
            self.module, self.ratio
        );
        if dynamic {
            text += &format!(", dynamic | dim: {}, alpha: {:?}", self.rank, self.alpha);
        }
        text
    }
}

/// Prints the lines and the mean of the norms kept. Modules of nothing but zeros have no share.
pub(super) fn print_lines(lines: &[Line], dynamic: bool) {
    for line in lines {
        print(&line.text(dynamic));
    }
    let norms: Vec<f64> =
        lines.iter().map(|line| line.norm).filter(|norm| !norm.is_nan()).collect();
    let (mean, deviation) = mean_and_deviation(&norms);
    print(&format!("Average Frobenius norm retention: {:.2}% | std: {deviation:.3}", 100.0 * mean));
}

fn mean_and_deviation(values: &[f64]) -> (f64, f64) {
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    let square = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / count;
    (mean, square.sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_those_of_the_reference() {
        let line = Line {
            module: "lora_unet_x".to_owned(),
            sum: 0.5,
            norm: 0.98765,
            ratio: 12.34,
            rank: 3,
            alpha: 1.5,
        };
        let start = format!("lora_unet_x{} | ", " ".repeat(64));
        let kept = "sum(S) retained: 50.0%, fro retained: 98.8%, max(S) ratio: 12.3";
        assert_eq!(line.text(false), format!("{start}{kept}"));
        assert_eq!(line.text(true), format!("{start}{kept}, dynamic | dim: 3, alpha: 1.5"));
        assert_eq!(mean_and_deviation(&[0.5, 1.0]), (0.75, 0.25));
    }
}
