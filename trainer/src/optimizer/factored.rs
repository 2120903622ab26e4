//! A second moment kept as its row and column means (Shazeer & Stern, arXiv:1804.04235), over the
//! last two axes of a tensor's shape in files; tensors with one axis keep it whole.

use super::TensorForm;
use super::state::{Reader, Writer};
use super::tensors::Field;

/// Running means of squares of one tensor.
pub(super) struct Factored {
    /// Sizes of the last two axes, `None` for one axis.
    matrix: Option<(usize, usize)>,
    /// Means over each row, or all values where there are no rows.
    rows: Vec<f32>,
    /// Means over each column; empty where there are none.
    columns: Vec<f32>,
}

impl Factored {
    /// Zeros for a tensor of this form.
    pub(super) fn zeros(form: &TensorForm) -> Self {
        match form.file_shape[..] {
            [.., rows, columns] => {
                let matrices = form.len() / (rows * columns).max(1);
                Self {
                    matrix: Some((rows, columns)),
                    rows: vec![0.; matrices * rows],
                    columns: vec![0.; matrices * columns],
                }
            }
            _ => Self { matrix: None, rows: vec![0.; form.len()], columns: Vec::new() },
        }
    }

    /// Whether there are rows and columns.
    pub(super) fn is_factored(&self) -> bool {
        self.matrix.is_some()
    }

    /// Moves the means towards `squares` by `1 - decay`.
    pub(super) fn add(&mut self, squares: &[f32], decay: f64) {
        let (keep, take) = (decay as f32, (1. - decay) as f32);
        let Some((rows, columns)) = self.matrix else {
            for (mean, square) in self.rows.iter_mut().zip(squares) {
                *mean = *mean * keep + take * square;
            }
            return;
        };
        for (mean, row) in self.rows.iter_mut().zip(squares.chunks_exact(columns)) {
            *mean = *mean * keep + take * mean_of(row.iter().copied());
        }
        let matrices = squares.chunks_exact(rows * columns);
        for (means, matrix) in self.columns.chunks_exact_mut(columns).zip(matrices) {
            for (column, mean) in means.iter_mut().enumerate() {
                let values = matrix[column..].iter().step_by(columns).copied();
                *mean = *mean * keep + take * mean_of(values);
            }
        }
    }

    /// Multiplies `values` by the reciprocal root of the estimated mean of squares.
    pub(super) fn divide_root(&self, values: &mut [f32]) {
        let Some((rows, columns)) = self.matrix else {
            for (value, mean) in values.iter_mut().zip(&self.rows) {
                *value *= 1. / mean.sqrt();
            }
            return;
        };
        let matrices = values.chunks_exact_mut(rows * columns);
        let means = self.rows.chunks_exact(rows).zip(self.columns.chunks_exact(columns));
        for (matrix, (row_means, column_means)) in matrices.zip(means) {
            let middle = mean_of(row_means.iter().copied());
            for (row, row_mean) in matrix.chunks_exact_mut(columns).zip(row_means) {
                let row_factor = 1. / (row_mean / middle).sqrt();
                for (value, column_mean) in row.iter_mut().zip(column_means) {
                    *value *= row_factor * (1. / column_mean.sqrt());
                }
            }
        }
    }
}

fn mean_of(values: impl ExactSizeIterator<Item = f32>) -> f32 {
    let count = values.len() as f64;
    (values.map(f64::from).sum::<f64>() / count) as f32
}

/// Root of the mean square.
pub(super) fn rms(values: &[f32]) -> f64 {
    let sum: f64 = values.iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
    (sum / values.len().max(1) as f64).sqrt()
}

impl Field for Factored {
    fn save(&self, field: &str, name: &str, writer: &mut Writer) -> anyhow::Result<()> {
        self.rows.save(&self.row_field(field), name, writer)?;
        self.columns.save(&format!("{field}_col"), name, writer)
    }

    fn load(&mut self, field: &str, name: &str, reader: &mut Reader) -> anyhow::Result<()> {
        let rows = self.row_field(field);
        self.rows.load(&rows, name, reader)?;
        self.columns.load(&format!("{field}_col"), name, reader)
    }
}

impl Factored {
    fn row_field(&self, field: &str) -> String {
        if self.is_factored() { format!("{field}_row") } else { field.to_owned() }
    }
}
