//! Trainable parameters: one flat f32 tensor and the places of its parts.

use crate::cuda::Working;
use crate::{DType, Device, EngineError, Result, Tensor};

/// Names one trainable tensor of a [`ParamStore`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ParamId(pub usize);

/// Where a parameter lies in the flat tensor.
#[derive(Clone, Debug)]
struct Place {
    offset: usize,
    shape: Vec<usize>,
}

/// All trainable tensors, in the order of registration, in one flat f32 tensor.
pub struct ParamStore {
    flat: Tensor,
    places: Vec<Place>,
    /// On a card: what adapters read, and the factor of each parameter there.
    working: Option<(Working, Vec<Option<f32>>)>,
}

impl ParamStore {
    /// Lays out tensors given as `(shape, row-major data)`.
    pub fn new(device: Device, tensors: &[(Vec<usize>, Vec<f32>)]) -> Result<Self> {
        let mut data = Vec::with_capacity(tensors.iter().map(|(_, d)| d.len()).sum());
        let mut places = Vec::with_capacity(tensors.len());
        for (shape, values) in tensors {
            if shape.iter().product::<usize>() != values.len() {
                let detail = format!("{} elements for the shape {shape:?}", values.len());
                return Err(EngineError::shape("parameter", detail));
            }
            places.push(Place { offset: data.len(), shape: shape.clone() });
            data.extend_from_slice(values);
        }
        let flat = Tensor::from_f32(device, &[data.len()], &data, DType::F32)?;
        Ok(Self { flat, places, working: None })
    }

    /// Number of parameters (tensors).
    pub fn count(&self) -> usize {
        self.places.len()
    }

    /// Number of elements of all parameters.
    pub fn len(&self) -> usize {
        self.flat.len()
    }

    /// Whether there are no parameters.
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// Device of the flat tensor.
    pub fn device(&self) -> Device {
        self.flat.device()
    }

    /// Elements of one parameter within the flat tensor.
    pub fn range(&self, id: ParamId) -> std::ops::Range<usize> {
        let place = &self.places[id.0];
        place.offset..place.offset + place.shape.iter().product::<usize>()
    }

    /// Shape of one parameter.
    pub fn shape(&self, id: ParamId) -> &[usize] {
        &self.places[id.0].shape
    }

    /// A view of one parameter. Drop it before [`ParamStore::flat_mut`] is used.
    pub fn tensor(&self, id: ParamId) -> Result<Tensor> {
        let place = &self.places[id.0];
        self.flat.view(place.offset, &place.shape)
    }

    /// Keeps, on a card, a copy of the given parameters in the compute type, each times its factor,
    /// so that adapters need not make one layer by layer. [`ParamStore::refresh`] brings it up to
    /// date. On the CPU nothing is kept.
    pub fn keep_working(&mut self, dtype: DType, parts: &[(ParamId, f32)]) -> Result<()> {
        let mut factors = vec![None; self.count()];
        for (id, factor) in parts {
            factors[id.0] = Some(*factor);
        }
        self.keep_factors(dtype, factors)
    }

    fn keep_factors(&mut self, dtype: DType, factors: Vec<Option<f32>>) -> Result<()> {
        let Some(card) = self.device().card() else { return Ok(()) };
        let part = |(id, factor): (usize, &Option<f32>)| {
            factor.map(|factor| (self.range(ParamId(id)), factor))
        };
        let parts: Vec<_> = factors.iter().enumerate().filter_map(part).collect();
        let working = Working::new(card, self.len(), dtype, &parts)?;
        working.refresh(card, &self.flat)?;
        self.working = Some((working, factors));
        Ok(())
    }

    /// Brings what adapters read up to date with the values: before a forward pass.
    pub fn refresh(&self) -> Result<()> {
        match (&self.working, self.device().card()) {
            (Some((working, _)), Some(card)) => working.refresh(card, &self.flat),
            _ => Ok(()),
        }
    }

    /// A parameter times `factor` in type `dtype`, as a product reads it.
    pub(crate) fn scaled(&self, id: ParamId, factor: f32, dtype: DType) -> Result<Tensor> {
        let place = &self.places[id.0];
        if let Some((working, factors)) = &self.working
            && factors[id.0] == Some(factor)
            && working.dtype() == dtype
        {
            return working.view(place.offset, &place.shape);
        }
        let value = self.tensor(id)?;
        match factor {
            1. => value.to_dtype(dtype),
            _ => value.device().backend().scale(&value, factor)?.to_dtype(dtype),
        }
    }

    /// `count` parameters from `first` on as one, joined along the first axis; they must be alike in
    /// the other axes. Drop it before [`ParamStore::flat_mut`] is used.
    pub fn joined(&self, first: ParamId, count: usize) -> Result<Tensor> {
        let places = self.places.get(first.0..first.0 + count).unwrap_or_default();
        let alike = |place: &Place| place.shape.get(1..) == places[0].shape.get(1..);
        if places.is_empty() || !places.iter().all(alike) {
            let detail = format!("{count} parameters from {} cannot be joined", first.0);
            return Err(EngineError::shape("parameter", detail));
        }
        let mut shape = places[0].shape.clone();
        shape[0] = places.iter().map(|place| place.shape[0]).sum();
        self.flat.view(places[0].offset, &shape)
    }

    /// The flat tensor, to read.
    pub fn flat(&self) -> &Tensor {
        &self.flat
    }

    /// Changes the values in place, in the order of the flat tensor. Those on a card go to the host
    /// and back.
    pub fn update<R>(&mut self, run: impl FnOnce(&mut [f32]) -> R) -> Result<R> {
        if self.device() == Device::Cpu {
            return self.flat.with_mut::<f32, _>("update of parameters", run);
        }
        let mut values = self.flat.to_vec_f32()?;
        let result = run(&mut values);
        self.flat.refill(&values)?;
        Ok(result)
    }

    /// The same parameters on another device.
    pub fn to_device(&self, device: Device) -> Result<Self> {
        let flat = Tensor::from_f32(device, &[self.len()], &self.flat.to_vec_f32()?, DType::F32)?;
        Ok(Self { flat, places: self.places.clone(), working: None })
    }

    /// Parameters of the same shapes with other values.
    pub fn with_values(&self, values: &[f32]) -> Result<Self> {
        let flat = Tensor::from_f32(self.device(), &[self.len()], values, DType::F32)?;
        let mut other = Self { flat, places: self.places.clone(), working: None };
        if let Some((working, factors)) = &self.working {
            other.keep_factors(working.dtype(), factors.clone())?;
        }
        Ok(other)
    }

    /// The flat tensor, for the optimizer.
    pub fn flat_mut(&mut self) -> &mut Tensor {
        &mut self.flat
    }
}
