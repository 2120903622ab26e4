//! An adapter's tensors under the names of sd-scripts and LyCORIS, whatever the file calls them.

use super::{AdapterFile, AdapterKind, AdapterModule, KronFactor};
use crate::lora_file::Tensors;
use crate::{Dtype, FormatError, OwnedTensor};

impl AdapterFile {
    /// Whether every module already stands under its name in sd-scripts.
    pub fn is_kohya(&self) -> bool {
        self.modules.iter().all(|module| module.stored == module.name)
    }

    /// Its tensors under sd-scripts' and LyCORIS' names, an alpha for each module that has a rank.
    /// Numbers are copied as they lie.
    ///
    /// # Errors
    /// Those of [`Self::view`].
    pub fn kohya_tensors(&self) -> Result<Tensors, FormatError> {
        let mut tensors = Tensors::new();
        for module in &self.modules {
            let name = &module.name;
            for (ending, key) in kohya_endings(&module.kind) {
                tensors.insert(format!("{name}.{ending}"), self.owned(key)?);
            }
            if let Some((ending, scalar)) = self.strength(module)? {
                tensors.insert(format!("{name}.{ending}"), scalar);
            }
            if let Some(key) = &module.dora_scale {
                let magnitudes = match self.magnitudes_of_outputs(module, key)? {
                    None => self.owned(key)?,
                    Some(magnitudes) => {
                        let mut shape = vec![1; module.layer_shape(self).len().max(2)];
                        shape[0] = magnitudes.shape[0];
                        OwnedTensor { shape, ..magnitudes }
                    }
                };
                tensors.insert(format!("{name}.dora_scale"), magnitudes);
            }
            if let Some(key) = &module.bias {
                tensors.insert(format!("{name}.diff_b"), self.owned(key)?);
            }
        }
        Ok(tensors)
    }

    fn owned(&self, key: &str) -> Result<OwnedTensor, FormatError> {
        Ok(self.view(key)?.to_owned_tensor())
    }

    /// The tensor that holds a module's strength: its alpha, or the scaled first factor of a pair
    /// that has no rank.
    fn strength(
        &self,
        module: &AdapterModule,
    ) -> Result<Option<(&'static str, OwnedTensor)>, FormatError> {
        let rank = module.rank(self);
        if rank > 0 {
            // In the type of the weights, as sd-scripts writes it, unless that would round it.
            let alpha = module.scale(self) * rank as f32;
            let key = module.keys().into_iter().next().unwrap_or_default();
            let dtype = self.file.describe(key).map_or(Dtype::F32, |(dtype, _)| dtype);
            let narrow = OwnedTensor::scalar(alpha, dtype).ok();
            return Ok(Some(match narrow.filter(|tensor| tensor.to_f32() == [alpha]) {
                Some(alpha) => ("alpha", alpha),
                None => ("alpha", OwnedTensor::scalar(alpha, Dtype::F32)?),
            }));
        }
        let AdapterKind::Kronecker { w1: KronFactor::Whole(key), .. } = &module.kind else {
            return Ok(None);
        };
        // LyCORIS scales no pair of whole factors; PEFT does.
        let (stored, scale) = (self.owned(key)?, module.scale(self));
        if scale == 1.0 {
            return Ok(None);
        }
        let values: Vec<f32> = stored.to_f32().iter().map(|value| value * scale).collect();
        Ok(Some(("lokr_w1", OwnedTensor::from_f32(&stored.shape, &values, stored.dtype)?)))
    }

    /// DoRA's magnitudes in `key` as `[out]`, `None` when they are those of the inputs.
    ///
    /// # Errors
    /// Those of [`Self::view`].
    pub fn magnitudes_of_outputs(
        &self,
        module: &AdapterModule,
        key: &str,
    ) -> Result<Option<OwnedTensor>, FormatError> {
        let stored = self.owned(key)?;
        let out = module.layer_shape(self).first().copied().unwrap_or_default();
        let of_inputs = stored.shape.len() > 1 && stored.shape[0] == 1 && {
            // PEFT's convolutions have `[1, out, 1, 1]`, LyCORIS' inputs `[1, in, 1, 1]`.
            key.ends_with(".dora_scale") && out != 1
        };
        let count: usize = stored.shape.iter().product();
        if of_inputs || count != out {
            return Ok(None);
        }
        Ok(Some(OwnedTensor { shape: vec![out], ..stored }))
    }
}

/// Endings of LyCORIS' keys and the keys in the file.
fn kohya_endings(kind: &AdapterKind) -> Vec<(&'static str, &str)> {
    fn some<'k>(list: &[(&'static str, Option<&'k String>)]) -> Vec<(&'static str, &'k str)> {
        list.iter().filter_map(|(ending, key)| Some((*ending, key.as_ref()?.as_str()))).collect()
    }
    match kind {
        AdapterKind::LowRank { down, up, mid } => some(&[
            ("lora_down.weight", Some(down)),
            ("lora_up.weight", Some(up)),
            ("lora_mid.weight", mid.as_ref()),
        ]),
        AdapterKind::Hadamard { w1_a, w1_b, w2_a, w2_b, t1, t2 } => some(&[
            ("hada_w1_a", Some(w1_a)),
            ("hada_w1_b", Some(w1_b)),
            ("hada_w2_a", Some(w2_a)),
            ("hada_w2_b", Some(w2_b)),
            ("hada_t1", t1.as_ref()),
            ("hada_t2", t2.as_ref()),
        ]),
        AdapterKind::Kronecker { w1, w2, t2 } => {
            let mut list = match w1 {
                KronFactor::Whole(key) => some(&[("lokr_w1", Some(key))]),
                KronFactor::Product(a, b) => {
                    some(&[("lokr_w1_a", Some(a)), ("lokr_w1_b", Some(b))])
                }
            };
            list.extend(match w2 {
                KronFactor::Whole(key) => some(&[("lokr_w2", Some(key))]),
                KronFactor::Product(a, b) => {
                    some(&[("lokr_w2_a", Some(a)), ("lokr_w2_b", Some(b))])
                }
            });
            list.extend(some(&[("lokr_t2", t2.as_ref())]));
            list
        }
        AdapterKind::Full { diff } => vec![("diff", diff)],
        AdapterKind::Norm { w_norm, b_norm } => {
            some(&[("w_norm", w_norm.as_ref()), ("b_norm", b_norm.as_ref())])
        }
    }
}
