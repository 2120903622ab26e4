//! Turns the tensors of a file into layers, one tensor at a time.
//!
//! Every tensor is asked for with the shape that the model expects; another shape is an error that
//! names it. Matrices are stored in the compute type, or on a card in 8 bits where that was asked
//! for; norms are f32, biases too but on a card, where products take them in the compute type.
//! Convolutions are turned from OIHW to OHWI. With [`Reader::listing`] nothing is read: the reader
//! writes down what the model would ask for, so that names and shapes of a model have one source.
//! For a card that only records, tensors have no data and no byte of the file is touched.

use std::cell::{Cell, RefCell};
use std::ops::Range;

use engine::{
    Adapter, Conv2d, ConvGeometry, DType, Device, Embedding, GroupNorm, LayerNorm, Linear, Tensor,
};
use formats::{TensorView, Weights, extend_f32};

use crate::{ModelError, Result};

/// Called with the diffusers name of each layer that can carry an adapter, and its place.
pub type SlotVisitor<'a> = &'a mut dyn FnMut(&str, &mut Option<Adapter>);

/// A layer that can carry an adapter.
pub(crate) enum Layer<'m> {
    Linear(&'m mut Linear),
    Conv(&'m mut Conv2d),
}

/// As [`SlotVisitor`], with the whole layer.
pub(crate) type LayerVisitor<'a> = &'a mut dyn FnMut(&str, Layer<'_>);

impl<'m> From<&'m mut Linear> for Layer<'m> {
    fn from(layer: &'m mut Linear) -> Self {
        Self::Linear(layer)
    }
}

impl<'m> From<&'m mut Conv2d> for Layer<'m> {
    fn from(layer: &'m mut Conv2d) -> Self {
        Self::Conv(layer)
    }
}

impl<'m> Layer<'m> {
    pub(crate) fn slot(self) -> &'m mut Option<Adapter> {
        match self {
            Layer::Linear(layer) => &mut layer.adapter,
            Layer::Conv(layer) => &mut layer.adapter,
        }
    }
}

/// Name and shape of a tensor of a model, as in a diffusers file.
pub type TensorShape = (String, Vec<usize>);

enum Source<'w> {
    Weights(&'w dyn Weights),
    Listing(RefCell<Vec<TensorShape>>),
}

/// A tensor of the source, or how large it is.
enum Found<'w> {
    Data(TensorView<'w>),
    Shape(Vec<usize>),
}

impl Found<'_> {
    fn shape(&self) -> &[usize] {
        match self {
            Found::Data(view) => &view.shape,
            Found::Shape(shape) => shape,
        }
    }
}

/// Reads one component of a model.
pub(crate) struct Reader<'w> {
    source: Source<'w>,
    device: Device,
    dtype: DType,
    /// What the weights of linear layers and convolutions are kept in.
    stored: Cell<DType>,
}

/// Channels and window of a convolution to be read.
#[derive(Clone, Copy)]
pub(crate) struct ConvShape {
    pub out: usize,
    pub input: usize,
    pub geometry: ConvGeometry,
}

impl ConvShape {
    /// A 3x3 convolution that keeps height and width.
    pub(crate) fn same3(out: usize, input: usize) -> Self {
        Self { out, input, geometry: ConvGeometry::square(3, 1, 1) }
    }
}

impl<'w> Reader<'w> {
    pub(crate) fn new(weights: &'w dyn Weights, device: Device, dtype: DType) -> Self {
        Self::from_source(Source::Weights(weights), device, dtype)
    }

    /// A reader that only writes down what it is asked for.
    pub(crate) fn listing() -> Self {
        Self::from_source(Source::Listing(RefCell::default()), Device::Cpu, DType::F32)
    }

    fn from_source(source: Source<'w>, device: Device, dtype: DType) -> Self {
        Self { source, device, dtype, stored: Cell::new(dtype) }
    }

    /// Where the weights go.
    pub(crate) fn device(&self) -> Device {
        self.device
    }

    /// Keeps the weights of linear layers and convolutions as `stored`.
    pub(crate) fn storing(self, stored: DType) -> Self {
        self.stored.set(stored);
        self
    }

    /// Runs `read` with weights kept in the compute type.
    pub(crate) fn in_compute_type<T>(&self, read: impl FnOnce(&Self) -> Result<T>) -> Result<T> {
        let stored = self.stored.replace(self.dtype);
        let result = read(self);
        self.stored.set(stored);
        result
    }

    /// What a listing reader was asked for, in that order.
    pub(crate) fn into_list(self) -> Vec<TensorShape> {
        match self.source {
            Source::Weights(_) => Vec::new(),
            Source::Listing(list) => list.into_inner(),
        }
    }

    pub(crate) fn contains(&self, name: &str) -> bool {
        match &self.source {
            Source::Weights(weights) => weights.contains(name),
            Source::Listing(_) => false,
        }
    }

    /// Reads `name` if it has one of `shapes` (the first is the usual one) into a tensor.
    fn read(&self, name: &str, shapes: &[&[usize]], dtype: DType) -> Result<Tensor> {
        // Matrices may be stored as 1x1 kernels.
        let view = match self.view(name, shapes)? {
            Found::Data(view) => view,
            Found::Shape(shape) => {
                let shape = &shape[..shape.len().min(2)];
                return Ok(Tensor::zeros(self.device, shape, dtype)?);
            }
        };
        let shape = &view.shape[..view.shape.len().min(2)];
        let tensor = Tensor::from_rows(self.device, shape, dtype, |rows, room, out| {
            read_rows(&view, rows, room);
            out.copy_from_slice(room);
        })?;
        self.release(name);
        Ok(tensor)
    }

    /// Says that a tensor was read.
    fn release(&self, name: &str) {
        if let Source::Weights(weights) = &self.source {
            weights.release(name);
        }
    }

    /// Reads a kernel `[out,in,height,width]` into `[out,height,width,in]`.
    fn read_kernel(&self, name: &str, shape: [usize; 4]) -> Result<Tensor> {
        let dtype = self.stored.get();
        let [out, input, height, width] = shape;
        let view = match self.view(name, &[&shape])? {
            Found::Data(view) => view,
            Found::Shape(shape) if shape.len() < 4 => {
                return Ok(Tensor::zeros(self.device, &shape, dtype)?);
            }
            Found::Shape(_) => {
                return Ok(Tensor::zeros(self.device, &[out, height, width, input], dtype)?);
            }
        };
        let shape = [out, height, width, input];
        let tensor = Tensor::from_rows(self.device, &shape, dtype, |rows, room, out| {
            read_rows(&view, rows, room);
            move_inner_axis_last(room, out, input, height * width);
        })?;
        self.release(name);
        Ok(tensor)
    }

    /// A tensor of one of `shapes`; its shape alone where nothing is computed with it. A listing
    /// notes the first and finds nothing.
    fn view(&self, name: &str, shapes: &[&[usize]]) -> Result<Found<'w>> {
        let weights = match self.source {
            Source::Weights(weights) => weights,
            Source::Listing(ref list) => {
                list.borrow_mut().push((name.to_owned(), shapes[0].to_vec()));
                return Ok(Found::Shape(vec![0]));
            }
        };
        let records = self.device.card().is_some_and(|card| !card.facts().computes);
        let found = match weights.shape(name).filter(|_| records) {
            Some(shape) => Found::Shape(shape),
            None => Found::Data(weights.get(name)?),
        };
        let shape = found.shape();
        if !shapes.contains(&shape) {
            let (name, expected) = (name.to_owned(), shapes[0].to_vec());
            return Err(ModelError::Shape { name, expected, got: shape.to_vec() });
        }
        Ok(found)
    }

    /// A vector kept in f32.
    fn vector(&self, name: &str, len: usize) -> Result<Tensor> {
        self.read(name, &[&[len]], DType::F32)
    }

    fn bias(&self, name: &str, len: usize, has_bias: bool) -> Result<Option<Tensor>> {
        let dtype = if self.device.card().is_some() { self.dtype } else { DType::F32 };
        has_bias.then(|| self.read(&format!("{name}.bias"), &[&[len]], dtype)).transpose()
    }

    /// A linear layer `[out,in]`.
    pub(crate) fn linear(&self, name: &str, out: usize, input: usize) -> Result<Linear> {
        self.matrix(name, &[&[out, input]], true)
    }

    /// A linear layer without bias.
    pub(crate) fn linear_without_bias(
        &self,
        name: &str,
        out: usize,
        input: usize,
    ) -> Result<Linear> {
        self.matrix(name, &[&[out, input]], false)
    }

    /// A projection of channels that files keep as a linear layer or as a 1x1 convolution; in NHWC
    /// both are the same product.
    pub(crate) fn projection(
        &self,
        name: &str,
        (out, input): (usize, usize),
        as_conv: bool,
    ) -> Result<Linear> {
        let (flat, window): (&[usize], &[usize]) = (&[out, input], &[out, input, 1, 1]);
        let shapes = if as_conv { [window, flat] } else { [flat, window] };
        self.matrix(name, &shapes, true)
    }

    fn matrix(&self, name: &str, shapes: &[&[usize]], has_bias: bool) -> Result<Linear> {
        Ok(Linear {
            weight: self.read(&format!("{name}.weight"), shapes, self.stored.get())?,
            bias: self.bias(name, shapes[0][0], has_bias)?,
            adapter: None,
        })
    }

    /// A convolution.
    pub(crate) fn conv(&self, name: &str, shape: ConvShape) -> Result<Conv2d> {
        let ConvShape { out, input, geometry } = shape;
        let (kh, kw) = geometry.kernel;
        Ok(Conv2d {
            weight: self.read_kernel(&format!("{name}.weight"), [out, input, kh, kw])?,
            bias: self.bias(name, out, true)?,
            geometry,
            adapter: None,
        })
    }

    /// Reads weight and bias of a layer again, from what may be another source.
    pub(crate) fn renew(&self, name: &str, layer: Layer<'_>) -> Result<()> {
        match layer {
            Layer::Linear(layer) => {
                let (out, input) = (layer.weight.dim(0), layer.weight.dim(1));
                let shapes: [&[usize]; 2] = [&[out, input], &[out, input, 1, 1]];
                let new = self.matrix(name, &shapes, layer.bias.is_some())?;
                (layer.weight, layer.bias) = (new.weight, new.bias);
            }
            Layer::Conv(layer) => {
                let (out, input) = (layer.weight.dim(0), layer.weight.last_dim());
                let new = self.conv(name, ConvShape { out, input, geometry: layer.geometry })?;
                (layer.weight, layer.bias) = (new.weight, new.bias);
            }
        }
        Ok(())
    }

    pub(crate) fn group_norm(
        &self,
        name: &str,
        channels: usize,
        groups: usize,
        eps: f32,
    ) -> Result<GroupNorm> {
        let gamma = self.vector(&format!("{name}.weight"), channels)?;
        let beta = self.vector(&format!("{name}.bias"), channels)?;
        Ok(GroupNorm { gamma, beta, groups, eps })
    }

    pub(crate) fn layer_norm(&self, name: &str, width: usize, eps: f32) -> Result<LayerNorm> {
        let gamma = self.vector(&format!("{name}.weight"), width)?;
        let beta = self.vector(&format!("{name}.bias"), width)?;
        Ok(LayerNorm { gamma, beta, eps })
    }

    pub(crate) fn embedding(&self, name: &str, rows: usize, width: usize) -> Result<Embedding> {
        let table = self.read(&format!("{name}.weight"), &[&[rows, width]], self.dtype)?;
        Ok(Embedding { table })
    }
}

/// Some rows of a file's tensor as f32.
fn read_rows(view: &TensorView, rows: Range<usize>, out: &mut Vec<f32>) {
    let row = view.data.len() / view.shape.first().copied().unwrap_or(1).max(1);
    out.clear();
    extend_f32(view.dtype, &view.data[rows.start * row..rows.end * row], out);
}

/// `[rows,inner,window]` to `[rows,window,inner]`: OIHW to OHWI.
pub(crate) fn inner_axis_last(data: &[f32], inner: usize, window: usize) -> Vec<f32> {
    let mut out = vec![0.; data.len()];
    move_inner_axis_last(data, &mut out, inner, window);
    out
}

fn move_inner_axis_last(data: &[f32], out: &mut [f32], inner: usize, window: usize) {
    if inner * window == 0 {
        return;
    }
    for (to, from) in out.chunks_mut(inner * window).zip(data.chunks(inner * window)) {
        for (pixel, to) in to.chunks_mut(inner).enumerate() {
            for (channel, to) in to.iter_mut().enumerate() {
                *to = from[channel * window + pixel];
            }
        }
    }
}

/// `[rows,window,inner]` to `[rows,inner,window]`: OHWI to OIHW.
pub(crate) fn inner_axis_second(data: &[f32], inner: usize, window: usize) -> Vec<f32> {
    inner_axis_last(data, window, inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_move_and_move_back() {
        // Two rows of 3 channels by 2 pixels.
        let oihw: Vec<f32> = (0..12).map(|x| x as f32).collect();
        let ohwi = inner_axis_last(&oihw, 3, 2);
        assert_eq!(ohwi, [0., 2., 4., 1., 3., 5., 6., 8., 10., 7., 9., 11.]);
        assert_eq!(inner_axis_second(&ohwi, 3, 2), oihw);
    }
}
