//! DoRA: the lengths of the weight's rows are trained beside its direction (arXiv:2402.09353).
//!
//! `dora_scale` as LyCORIS writes it with `wd_on_output`, its default, and as ComfyUI and the WebUI
//! read it: one length per output. The norm is differentiated, as in LyCORIS and unlike the paper's
//! cheaper variant.

use std::collections::BTreeMap;

use formats::{Weights, extend_f32};

use super::composed::Sizes;
use super::network::LoraNetwork;
use super::target::{Part, Target};
use super::{Init, TensorPlan};
use crate::Result;

/// The lengths, one per output.
pub(super) fn tensor(sizes: Sizes) -> TensorPlan {
    let file = match sizes.conv {
        true => vec![sizes.out, 1, 1, 1],
        false => vec![sizes.out, 1],
    };
    TensorPlan::whole("dora_scale", vec![sizes.out], file, Init::RowNorms)
}

/// Norms of the rows of a layer's frozen weight.
fn row_norms(weights: &dyn Weights, target: &Target) -> Result<Vec<f32>> {
    let view = weights.get(&format!("{}.weight", target.path))?;
    let mut numbers = Vec::new();
    extend_f32(view.dtype, &view.data, &mut numbers);
    let length = (numbers.len() / target.out.max(1)).max(1);
    let norm = |row: &[f32]| row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt() as f32;
    Ok(numbers.chunks(length).map(norm).collect())
}

impl LoraNetwork {
    /// Puts the lengths of the rows of the frozen weights `parts` in the places of `values` that start
    /// from these; other networks than DoRA have none.
    pub fn set_magnitudes(
        &self,
        values: &mut [Vec<f32>],
        parts: &BTreeMap<Part, &dyn Weights>,
    ) -> Result<()> {
        for module in &self.modules {
            for (plan, ids) in module.parts() {
                if plan.init != Init::RowNorms {
                    continue;
                }
                if let (Some(value), Some(weights)) =
                    (values.get_mut(ids.start), parts.get(&module.target.part))
                {
                    *value = row_norms(*weights, &module.target)?;
                }
            }
        }
        Ok(())
    }
}
