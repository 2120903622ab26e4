//! A contiguous, immutable array on one device, cheap to clone.
//!
//! On the CPU the storage is a candle tensor that never leaves this file, is never tracked, and
//! whose buffer goes back to the pool when the last view is dropped. On a card it is a block of the
//! card's memory.

use std::cell::Cell;
use std::ops::{Deref, Range};
use std::sync::Arc;

use candle_core::{CpuStorage, InplaceOp1, Layout, Storage as CandleStorage, StorageRef};
use half::bf16;

use crate::cpu::round;
use crate::cuda::{Address, Card, CardBuffer, transfer};
use crate::pool::{self, Pooled};
use crate::{Device, EngineError, Result};

/// Element type of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE single precision.
    F32,
    /// bfloat16: storage only, sums are kept in f32.
    BF16,
    /// IEEE half precision, on cards alone: storage only.
    F16,
    /// 8 bits with 4 of exponent (OCP E4M3) and one scale for each row (index of the outermost
    /// axis), on cards alone: storage of frozen weights.
    F8,
    /// Row numbers, on cards alone.
    U32,
}

impl DType {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            DType::F32 | DType::U32 => 4,
            DType::BF16 | DType::F16 => 2,
            DType::F8 => 1,
        }
    }

    /// What the names of kernels for this type end in.
    pub(crate) fn suffix(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::BF16 => "bf16",
            DType::F16 => "f16",
            DType::F8 => "f8",
            DType::U32 => "u32",
        }
    }
}

/// Rust types that a tensor can hold.
pub(crate) trait Element: Pooled + Sync {
    const DTYPE: DType;
    fn slice(storage: &CpuStorage) -> Option<&[Self]>;
    fn vec_mut(storage: &mut CpuStorage) -> Option<&mut Vec<Self>>;
    fn wrap(data: Vec<Self>) -> CpuStorage;
}

macro_rules! element {
    ($t:ty, $v:ident) => {
        impl Element for $t {
            const DTYPE: DType = DType::$v;
            fn slice(storage: &CpuStorage) -> Option<&[Self]> {
                match storage {
                    CpuStorage::$v(data) => Some(data),
                    _ => None,
                }
            }
            fn vec_mut(storage: &mut CpuStorage) -> Option<&mut Vec<Self>> {
                match storage {
                    CpuStorage::$v(data) => Some(data),
                    _ => None,
                }
            }
            fn wrap(data: Vec<Self>) -> CpuStorage {
                CpuStorage::$v(data)
            }
        }
    };
}
element!(f32, F32);
element!(bf16, BF16);

/// A flat buffer on the host.
struct HostBuffer {
    tensor: candle_core::Tensor,
    dtype: DType,
}

/// Runs a closure over the mutable candle storage.
struct WithStorage<F>(Cell<Option<F>>);

impl<F: FnOnce(&mut CpuStorage)> InplaceOp1 for WithStorage<F> {
    fn name(&self) -> &'static str {
        "with-storage"
    }
    fn cpu_fwd(&self, storage: &mut CpuStorage, _: &Layout) -> candle_core::Result<()> {
        if let Some(run) = self.0.take() {
            run(storage);
        }
        Ok(())
    }
}

impl HostBuffer {
    fn new<T: Element>(data: Vec<T>) -> Self {
        let len = data.len();
        let op = candle_core::op::BackpropOp::none();
        let storage = CandleStorage::Cpu(T::wrap(data));
        let tensor = candle_core::Tensor::from_storage(storage, len, op, false);
        Self { tensor, dtype: T::DTYPE }
    }

    fn with_mut<R>(&self, run: impl FnOnce(&mut CpuStorage) -> R) -> Result<R> {
        let mut result = None;
        let op = WithStorage(Cell::new(Some(|storage: &mut CpuStorage| {
            result = Some(run(storage));
        })));
        self.tensor.inplace_op1(&op)?;
        drop(op);
        result.ok_or_else(|| EngineError::Unsupported("the host buffer is not on the CPU".into()))
    }
}

impl Drop for HostBuffer {
    fn drop(&mut self) {
        fn recycle<T: Element>(storage: &mut CpuStorage) {
            if let Some(data) = T::vec_mut(storage) {
                pool::give(std::mem::take(data));
            }
        }
        // A failure here only means that the buffer is freed instead of kept.
        let _ = match self.dtype {
            DType::BF16 => self.with_mut(recycle::<bf16>),
            _ => self.with_mut(recycle::<f32>),
        };
    }
}

/// Where the elements are.
enum Storage {
    Host(HostBuffer),
    Card(CardBuffer),
}

impl Storage {
    fn dtype(&self) -> DType {
        match self {
            Storage::Host(buffer) => buffer.dtype,
            Storage::Card(buffer) => buffer.dtype(),
        }
    }

    fn len(&self) -> usize {
        match self {
            Storage::Host(buffer) => buffer.tensor.elem_count(),
            Storage::Card(buffer) => buffer.len(),
        }
    }
}

/// A contiguous row-major array: shape, element type, device, and a view of shared storage.
#[derive(Clone)]
pub struct Tensor {
    storage: Arc<Storage>,
    offset: usize,
    shape: Arc<[usize]>,
    device: Device,
}

/// Read access to the elements of a CPU tensor.
pub(crate) struct Elements<'a, T> {
    guard: StorageRef<'a>,
    range: Range<usize>,
    of: std::marker::PhantomData<T>,
}

impl<T: Element> Deref for Elements<'_, T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        match &*self.guard {
            CandleStorage::Cpu(storage) => match T::slice(storage) {
                Some(data) => &data[self.range.clone()],
                None => &[],
            },
            _ => &[],
        }
    }
}

impl Tensor {
    pub(crate) fn from_pooled<T: Element>(shape: &[usize], data: Vec<T>) -> Self {
        debug_assert_eq!(shape.iter().product::<usize>(), data.len());
        let storage = Arc::new(Storage::Host(HostBuffer::new(data)));
        Self { storage, offset: 0, shape: shape.into(), device: Device::Cpu }
    }

    /// Copies `data` (row-major, f32) to `device`, stored as `dtype`.
    pub fn from_f32(device: Device, shape: &[usize], data: &[f32], dtype: DType) -> Result<Self> {
        if shape.iter().product::<usize>() != data.len() {
            let detail = format!("{} elements cannot have the shape {shape:?}", data.len());
            return Err(EngineError::shape("from_f32", detail));
        }
        let card = match device {
            Device::Cpu => return Self::host_from_f32(shape, data, dtype),
            Device::Card(index) => Card::of(index),
        };
        let buffer = CardBuffer::of_shape(card, shape, dtype)?;
        match dtype {
            DType::F8 => buffer.fill(&transfer::packed_bytes(data, shape))?,
            _ => buffer.fill(&transfer::bytes_of(data, dtype)?)?,
        }
        Ok(Self::on_card(buffer, shape))
    }

    fn host_from_f32(shape: &[usize], data: &[f32], dtype: DType) -> Result<Self> {
        match dtype {
            DType::F32 => {
                let mut out = pool::take::<f32>(data.len());
                out.copy_from_slice(data);
                Ok(Self::from_pooled(shape, out))
            }
            DType::BF16 => {
                let mut out = pool::take::<bf16>(data.len());
                round(&mut out, data);
                Ok(Self::from_pooled(shape, out))
            }
            other => Err(EngineError::not_on_cpu("from_f32", other)),
        }
    }

    /// Row numbers on a card, for [`crate::Ids`].
    pub(crate) fn from_u32(card: &'static Card, data: &[u32]) -> Result<Self> {
        let buffer = CardBuffer::new(card, data.len(), DType::U32)?;
        buffer.fill(bytemuck::cast_slice(data))?;
        Ok(Self::on_card(buffer, &[data.len()]))
    }

    /// A tensor of zeros.
    pub fn zeros(device: Device, shape: &[usize], dtype: DType) -> Result<Self> {
        let len = shape.iter().product();
        match (device, dtype) {
            (Device::Cpu, DType::F32) => Ok(Self::from_pooled(shape, zeroed::<f32>(len))),
            (Device::Cpu, DType::BF16) => Ok(Self::from_pooled(shape, zeroed::<bf16>(len))),
            (Device::Cpu, other) => Err(EngineError::not_on_cpu("zeros", other)),
            (Device::Card(index), _) => {
                let buffer = CardBuffer::of_shape(Card::of(index), shape, dtype)?;
                buffer.zero()?;
                Ok(Self::on_card(buffer, shape))
            }
        }
    }

    /// The elements as f32 on the host, row-major; waits for a card's work.
    pub fn to_vec_f32(&self) -> Result<Vec<f32>> {
        match (&*self.storage, self.dtype()) {
            (Storage::Card(buffer), dtype) => {
                let mut bytes = vec![0; self.len() * dtype.size()];
                buffer.read(self.offset * dtype.size(), &mut bytes)?;
                let mut values = transfer::values_of(&bytes, dtype);
                if dtype == DType::F8 {
                    let scales = buffer.scales_of(self.offset..self.offset + self.len())?;
                    values.iter_mut().zip(scales).for_each(|(x, scale)| *x *= scale);
                }
                Ok(values)
            }
            (Storage::Host(_), DType::BF16) => {
                Ok(self.elements::<bf16>("to_vec_f32")?.iter().map(|x| x.to_f32()).collect())
            }
            (Storage::Host(_), _) => Ok(self.elements::<f32>("to_vec_f32")?.to_vec()),
        }
    }

    /// The same numbers on another device; no copy when they are there.
    pub fn to_device(&self, device: Device) -> Result<Self> {
        if device == self.device {
            return Ok(self.clone());
        }
        Self::from_f32(device, &self.shape, &self.to_vec_f32()?, self.dtype())
    }

    pub(crate) fn on_card(buffer: CardBuffer, shape: &[usize]) -> Self {
        debug_assert_eq!(shape.iter().product::<usize>(), buffer.len());
        let device = buffer.device();
        Self { storage: Arc::new(Storage::Card(buffer)), offset: 0, shape: shape.into(), device }
    }

    /// Where the first element lies in the card's memory.
    pub fn address(&self, op: &'static str) -> Result<Address> {
        match &*self.storage {
            Storage::Card(buffer) => {
                Ok(buffer.address() + (self.offset * self.dtype().size()) as Address)
            }
            Storage::Host(_) => Err(EngineError::Device { op, got: self.device }),
        }
    }

    /// Of a tensor in 8 bits: where its scales lie, how many numbers share one, and how many numbers
    /// lie before this view.
    pub(crate) fn scales(&self, op: &'static str) -> Result<(Address, usize, usize)> {
        match &*self.storage {
            Storage::Card(buffer) if self.dtype() == DType::F8 => {
                let (address, count) = buffer.scales();
                Ok((address, buffer.len().checked_div(count).unwrap_or(1), self.offset))
            }
            _ => Err(EngineError::Device { op, got: self.device }),
        }
    }

    /// Shape, outermost axis first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Size of axis `axis`.
    pub fn dim(&self, axis: usize) -> usize {
        self.shape[axis]
    }

    /// Size of the last axis (1 for a scalar).
    pub fn last_dim(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Product of all axes but the last.
    pub fn rows(&self) -> usize {
        self.shape.split_last().map_or(1, |(_, head)| head.iter().product())
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.storage.dtype()
    }

    /// Device.
    pub fn device(&self) -> Device {
        self.device
    }

    /// The same elements under another shape; no copy.
    pub fn reshape(&self, shape: &[usize]) -> Result<Self> {
        if shape.iter().product::<usize>() != self.len() {
            let detail = format!("{:?} cannot become {shape:?}", self.shape);
            return Err(EngineError::shape("reshape", detail));
        }
        Ok(Self { shape: shape.into(), ..self.clone() })
    }

    /// A view of `shape` elements that starts `offset` elements in; no copy.
    pub fn view(&self, offset: usize, shape: &[usize]) -> Result<Self> {
        let end = offset + shape.iter().product::<usize>();
        if end > self.len() {
            let detail = format!("{offset} + {shape:?} lies outside {:?}", self.shape);
            return Err(EngineError::shape("view", detail));
        }
        Ok(Self { shape: shape.into(), offset: self.offset + offset, ..self.clone() })
    }

    /// The tensor with elements of type `dtype`; no copy when it already has it.
    pub fn to_dtype(&self, dtype: DType) -> Result<Self> {
        if dtype == self.dtype() {
            Ok(self.clone())
        } else {
            self.device.backend().cast(self, dtype)
        }
    }

    pub(crate) fn elements<T: Element>(&self, op: &'static str) -> Result<Elements<'_, T>> {
        if self.dtype() != T::DTYPE {
            let expected = match T::DTYPE {
                DType::F32 => "f32 elements",
                _ => "bf16 elements",
            };
            return Err(EngineError::DType { op, expected, got: format!("{:?}", self.dtype()) });
        }
        let Storage::Host(buffer) = &*self.storage else {
            return Err(EngineError::Device { op, got: self.device });
        };
        let (guard, _) = buffer.tensor.storage_and_layout();
        let range = self.offset..self.offset + self.len();
        Ok(Elements { guard, range, of: std::marker::PhantomData })
    }

    /// Whether no other tensor shares the storage and the view covers it whole.
    pub(crate) fn is_unique(&mut self) -> bool {
        let whole = self.len() == self.storage.len();
        whole && Arc::get_mut(&mut self.storage).is_some()
    }

    /// Changes the elements in place; fails unless [`Tensor::is_unique`].
    pub(crate) fn with_mut<T: Element, R>(
        &mut self,
        op: &'static str,
        run: impl FnOnce(&mut [T]) -> R,
    ) -> Result<R> {
        if self.dtype() != T::DTYPE || !self.is_unique() {
            let detail =
                format!("{:?} {:?} is shared or of another type", self.dtype(), self.shape);
            return Err(EngineError::shape(op, detail));
        }
        let Storage::Host(buffer) = &*self.storage else {
            return Err(EngineError::Device { op, got: self.device });
        };
        let result = buffer.with_mut(|storage| T::vec_mut(storage).map(|data| run(data)))?;
        result.ok_or_else(|| EngineError::shape(op, "storage and element type disagree"))
    }
}

fn zeroed<T: Element>(len: usize) -> Vec<T> {
    let mut out = pool::take::<T>(len);
    out.fill(T::default());
    out
}

impl std::fmt::Debug for Tensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tensor{:?} {:?} on {}", self.shape, self.dtype(), self.device)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn views_share_storage_and_block_mutation() {
        let mut t =
            Tensor::from_f32(Device::Cpu, &[2, 3], &[0., 1., 2., 3., 4., 5.], DType::F32).unwrap();
        let row = t.view(3, &[3]).unwrap();
        assert_eq!(row.to_vec_f32().unwrap(), [3., 4., 5.]);
        assert!(t.with_mut::<f32, _>("test", |_| ()).is_err());
        drop(row);
        t.with_mut::<f32, _>("test", |data| data[0] = 7.).unwrap();
        assert_eq!(t.to_vec_f32().unwrap()[0], 7.);
    }

    #[test]
    fn wrong_shapes_are_errors() {
        assert!(Tensor::from_f32(Device::Cpu, &[2, 2], &[0.; 3], DType::F32).is_err());
        let t = Tensor::zeros(Device::Cpu, &[4], DType::BF16).unwrap();
        assert!(t.reshape(&[3]).is_err());
        assert!(t.view(2, &[3]).is_err());
    }
}
