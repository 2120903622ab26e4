//! The optimizer's end of a step that is captured: [`clip_factor`] unscales and clips the flat
//! gradient, [`FlatAdamW`] moves all its tensors, with full moments or 8-bit ones.
//!
//! What differs from step to step lies in the card's memory, so that a graph can be replayed: learning
//! rates and step counts ([`FlatAdamW::set_step`]), which tensors a gradient reached, the loss scale.
//! The arithmetic is that of the CPU's optimizers, bit for bit.

use std::ops::Range;

use super::card::{Card, CardBuffer};
pub use super::clip::clip_factor;
use super::driver::Arg;
use super::elements::{int, singles, start_blocks};
use super::optimizer::changing;
use crate::blockwise::{BLOCK, Code, Signs};
use crate::cpu::Factors;
use crate::{DType, Device, EngineError, Result, Tensor};

/// `CHUNK` of the kernel: elements of a block with full moments.
const CHUNK: usize = 1024;
/// Blocks that walk over the pieces in 8 bits at most: each reads the codes first.
const WALKERS: usize = 2048;
const OP: &str = "flat_adamw";

/// A tensor within the flat buffers.
#[derive(Clone, Debug, PartialEq)]
pub struct FlatTensor {
    /// Its elements.
    pub range: Range<usize>,
    /// Input channels of a convolution kernel, whose file order is `[out, inner, window]` and which
    /// lies here as `[out, window, inner]`; 1 for everything else.
    pub inner: usize,
    /// Height by width of such a kernel; 1 for everything else.
    pub window: usize,
}

/// How moments are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moments {
    /// f32, and PyTorch's order of operations.
    Full,
    /// 8 bits in blocks of 256 values in the order of files, and bitsandbytes' order of operations.
    Eight {
        /// Tensors of less values keep f32.
        min_size: usize,
    },
}

/// Settings of AdamW.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWRule {
    /// Decay rates of the first and second moment.
    pub betas: (f64, f64),
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// How moments are kept.
    pub moments: Moments,
}

/// A moment of one tensor, on the host.
#[derive(Clone, Debug, PartialEq)]
pub enum HostMoment {
    /// f32: in the order of the flat buffer with [`Moments::Full`], in that of files otherwise.
    Full(Vec<f32>),
    /// Codes in the order of files, and the scale of each block.
    Blocks {
        /// Numbers of values of the code.
        codes: Vec<u8>,
        /// Largest magnitude of each block.
        scales: Vec<f32>,
    },
}

/// First and second moment of one tensor.
pub type MomentPair = (HostMoment, HostMoment);

/// Where the moments of a tensor lie.
struct Slot {
    tensor: FlatTensor,
    eight: bool,
    /// First element among the full moments, or among the codes.
    state: usize,
    /// First scale.
    scales: usize,
}

/// Moments of one kind: both buffers, and the pieces that blocks work on.
struct Group {
    first: CardBuffer,
    second: CardBuffer,
    pieces: CardBuffer,
    count: usize,
}

/// What 8-bit moments need besides.
struct EightBit {
    codes: Group,
    first_scales: CardBuffer,
    second_scales: CardBuffer,
    /// Values and middles of both codes.
    code: CardBuffer,
}

/// AdamW over the tensors of a flat buffer on a card.
pub struct FlatAdamW {
    card: &'static Card,
    rule: AdamWRule,
    slots: Vec<Slot>,
    full: Group,
    eight: EightBit,
    tensors: CardBuffer,
    /// Decay, step size and root of the second correction of each tensor.
    rates: CardBuffer,
}

impl FlatAdamW {
    /// With moments of zero.
    pub fn new(device: Device, tensors: &[FlatTensor], rule: AdamWRule) -> Result<Self> {
        let Some(card) = device.card() else {
            return Err(EngineError::Device { op: OP, got: device });
        };
        let plan = Plan::new(tensors, rule.moments)?;
        let numbers = |data: &[u32]| filled(card, DType::U32, bytemuck::cast_slice(data));
        let zeros = |len: usize| {
            let buffer = CardBuffer::new(card, len, DType::F32)?;
            buffer.zero()?;
            Ok::<_, EngineError>(buffer)
        };
        let group = |first, second, pieces: &[u32]| {
            Ok::<_, EngineError>(Group {
                first,
                second,
                pieces: numbers(pieces)?,
                count: pieces.len() / 2,
            })
        };
        let codes = |signs| {
            let zero = Code::of(signs).nearest(0.);
            filled(card, DType::F8, &vec![zero; plan.codes])
        };
        let full = group(zeros(plan.full)?, zeros(plan.full)?, &plan.full_pieces)?;
        let eight = EightBit {
            codes: group(codes(Signs::Both)?, codes(Signs::Positive)?, &plan.eight_pieces)?,
            first_scales: zeros(plan.scales)?,
            second_scales: zeros(plan.scales)?,
            code: filled(card, DType::F32, bytemuck::cast_slice(&code_table()))?,
        };
        let (tensors, rates) = (numbers(&plan.table())?, zeros(plan.slots.len() * 3)?);
        Ok(Self { card, rule, slots: plan.slots, full, eight, tensors, rates })
    }

    /// Gives this step's learning rate and number (from 1 on) of each tensor; those that the step will
    /// not touch may have any. Not within a capture.
    pub fn set_step(&mut self, tensors: &[(f32, u32)]) -> Result<()> {
        if tensors.len() != self.slots.len() {
            let detail = format!("{} learning rates for {}", tensors.len(), self.slots.len());
            return Err(EngineError::shape(OP, detail));
        }
        let decay = match self.rule.moments {
            // As the CPU's kernel takes it.
            Moments::Full => f64::from(self.rule.weight_decay as f32),
            Moments::Eight { .. } => self.rule.weight_decay,
        };
        let rates: Vec<f32> = tensors
            .iter()
            .flat_map(|(lr, step)| {
                let f = Factors::new((*lr, decay), self.rule.betas, 0., (*step).max(1));
                [f.decay, f.step_size, f.root_correction2]
            })
            .collect();
        fill(&self.rates, bytemuck::cast_slice(&rates))
    }

    /// Moves the tensors whose `touched` (f32, one for each) is above 0 against `gradient` times the
    /// first number of `clip`; if that is NaN, nothing moves.
    pub fn step(
        &mut self,
        params: &mut Tensor,
        gradient: &Tensor,
        touched: &Tensor,
        clip: &Tensor,
    ) -> Result<()> {
        let end = self.slots.iter().map(|slot| slot.tensor.range.end).max().unwrap_or(0);
        let fits = params.len() == gradient.len() && end <= params.len();
        if !fits || touched.len() != self.slots.len() || clip.is_empty() {
            let detail = format!(
                "parameters {params:?}, gradient {gradient:?}, {touched:?} for {} tensors",
                self.slots.len()
            );
            return Err(EngineError::shape(OP, detail));
        }
        let moved =
            [changing(OP, self.card, params)?, singles(self.card, OP, gradient)?].map(Arg::Address);
        let inputs = [
            singles(self.card, OP, touched)?,
            singles(self.card, OP, clip)?,
            self.rates.address(),
            self.tensors.address(),
        ]
        .map(Arg::Address);
        let f = Factors::new((0., 0.), self.rule.betas, self.rule.eps as f32, 1);
        let factors = [f.keep1, f.take1, f.keep2, f.take2, f.eps].map(Arg::F32);
        self.step_full(&moved, &inputs, &factors)?;
        self.step_eight(&moved, &inputs, &factors)
    }

    fn step_full(&self, moved: &[Arg; 2], inputs: &[Arg], factors: &[Arg]) -> Result<()> {
        let Group { first, second, pieces, count } = &self.full;
        let aligned = |arg: &Arg| matches!(arg, Arg::Address(a) if a.is_multiple_of(16));
        let mut args = moved.to_vec();
        args.extend([first, second].map(|buffer| Arg::Address(buffer.address())));
        args.extend_from_slice(inputs);
        args.push(Arg::Address(pieces.address()));
        args.extend_from_slice(factors);
        args.push(Arg::I32(i32::from(self.rule.moments != Moments::Full)));
        args.push(Arg::I32(i32::from(moved.iter().all(aligned))));
        start_blocks(self.card, ("optimizer", "adamw_full_f32"), *count, &args)
    }

    fn step_eight(&self, moved: &[Arg; 2], inputs: &[Arg], factors: &[Arg]) -> Result<()> {
        let EightBit { codes, first_scales, second_scales, code } = &self.eight;
        let mut args = moved.to_vec();
        let state = [&codes.first, &codes.second, first_scales, second_scales, code];
        args.extend(state.map(|buffer| Arg::Address(buffer.address())));
        args.extend_from_slice(inputs);
        args.push(Arg::Address(codes.pieces.address()));
        args.push(int(OP, codes.count)?);
        args.extend_from_slice(factors);
        let blocks = codes.count.min(WALKERS);
        start_blocks(self.card, ("optimizer", "adamw_eight_f32"), blocks, &args)
    }

    /// The moments of each tensor, to be saved; waits for the card.
    pub fn moments(&self) -> Result<Vec<MomentPair>> {
        let full = [floats(&self.full.first)?, floats(&self.full.second)?];
        let codes = [bytes(&self.eight.codes.first)?, bytes(&self.eight.codes.second)?];
        let scales = [floats(&self.eight.first_scales)?, floats(&self.eight.second_scales)?];
        let moment = |slot: &Slot, which: usize| {
            let range = slot.state..slot.state + slot.tensor.range.len();
            if !slot.eight {
                return HostMoment::Full(self.ordered(slot, &full[which][range], true));
            }
            let of_scales = slot.scales..slot.scales + range.len().div_ceil(BLOCK);
            let scales = scales[which][of_scales].to_vec();
            HostMoment::Blocks { codes: codes[which][range].to_vec(), scales }
        };
        Ok(self.slots.iter().map(|slot| (moment(slot, 0), moment(slot, 1))).collect())
    }

    /// Goes on from the moments of [`FlatAdamW::moments`].
    pub fn set_moments(&mut self, moments: &[MomentPair]) -> Result<()> {
        if moments.len() != self.slots.len() {
            let detail = format!("{} moments for {} tensors", moments.len(), self.slots.len());
            return Err(EngineError::shape(OP, detail));
        }
        let zeros = |buffer: &CardBuffer| [vec![0_f32; buffer.len()], vec![0_f32; buffer.len()]];
        let mut full = zeros(&self.full.first);
        let mut scales = zeros(&self.eight.first_scales);
        let codes = self.eight.codes.first.len();
        let mut codes = [vec![0_u8; codes], vec![0_u8; codes]];
        for (index, (slot, (first, second))) in self.slots.iter().zip(moments).enumerate() {
            for (which, moment) in [first, second].into_iter().enumerate() {
                let range = slot.state..slot.state + slot.tensor.range.len();
                let blocks = slot.scales..slot.scales + range.len().div_ceil(BLOCK);
                match moment {
                    HostMoment::Full(values) if !slot.eight && values.len() == range.len() => {
                        full[which][range].copy_from_slice(&self.ordered(slot, values, false));
                    }
                    HostMoment::Blocks { codes: from, scales: of }
                        if slot.eight && from.len() == range.len() && of.len() == blocks.len() =>
                    {
                        codes[which][range].copy_from_slice(from);
                        scales[which][blocks].copy_from_slice(of);
                    }
                    _ => {
                        let detail = format!("moments of tensor {index}: {:?}", slot.tensor);
                        return Err(EngineError::shape(OP, detail));
                    }
                }
            }
        }
        let of_codes = [&self.eight.codes.first, &self.eight.codes.second];
        let of_full = [&self.full.first, &self.full.second];
        let of_scales = [&self.eight.first_scales, &self.eight.second_scales];
        for which in 0..2 {
            fill(of_codes[which], &codes[which])?;
            fill(of_full[which], bytemuck::cast_slice(&full[which]))?;
            fill(of_scales[which], bytemuck::cast_slice(&scales[which]))?;
        }
        Ok(())
    }

    /// f32 moments in the order of files, or back from it, where they are saved so.
    fn ordered(&self, slot: &Slot, values: &[f32], to_file: bool) -> Vec<f32> {
        let FlatTensor { inner, window, .. } = slot.tensor;
        if self.rule.moments == Moments::Full || window == 1 {
            return values.to_vec();
        }
        let (rows, columns) = if to_file { (window, inner) } else { (inner, window) };
        let mut out = Vec::with_capacity(values.len());
        for matrix in values.chunks_exact(rows * columns) {
            for column in 0..columns {
                out.extend((0..rows).map(|row| matrix[row * columns + column]));
            }
        }
        out
    }
}

/// Where everything lies.
#[derive(Default)]
struct Plan {
    slots: Vec<Slot>,
    /// Elements of a full moment, of the codes, and of the scales.
    full: usize,
    codes: usize,
    scales: usize,
    /// Tensor and number of each piece.
    full_pieces: Vec<u32>,
    eight_pieces: Vec<u32>,
}

impl Plan {
    fn new(tensors: &[FlatTensor], moments: Moments) -> Result<Self> {
        let mut plan = Self::default();
        for (index, tensor) in tensors.iter().enumerate() {
            let len = tensor.range.len();
            let matrix = tensor.inner * tensor.window;
            // Places are 32 bits wide.
            if matrix == 0 || len % matrix != 0 || u32::try_from(tensor.range.end).is_err() {
                return Err(EngineError::shape(OP, format!("tensor {index}: {tensor:?}")));
            }
            let eight = matches!(moments, Moments::Eight { min_size } if len >= min_size);
            let state = if eight { plan.codes } else { plan.full };
            let scales = if eight { plan.scales } else { 0 };
            let (pieces, piece) = match eight {
                true => (&mut plan.eight_pieces, BLOCK),
                false => (&mut plan.full_pieces, CHUNK),
            };
            pieces.extend((0..len.div_ceil(piece)).flat_map(|n| [index as u32, n as u32]));
            if eight {
                plan.codes += len;
                plan.scales += len.div_ceil(BLOCK);
            } else {
                // The kernel reads four at once.
                plan.full += len.next_multiple_of(4);
            }
            plan.slots.push(Slot { tensor: tensor.clone(), eight, state, scales });
        }
        if u32::try_from(plan.full.max(plan.codes)).is_err() {
            return Err(EngineError::shape(OP, "more than 2^32 elements"));
        }
        Ok(plan)
    }

    /// The kernel's `Tensor` for each; all fit, as `new` has checked.
    fn table(&self) -> Vec<u32> {
        let row = |slot: &Slot| {
            let FlatTensor { range, inner, window } = &slot.tensor;
            [range.start, range.len(), *inner, *window, slot.state, slot.scales].map(|x| x as u32)
        };
        self.slots.iter().flat_map(row).collect()
    }
}

/// 256 values and 255 middles of the code with signs, then of the one without.
fn code_table() -> Vec<f32> {
    let mut table = Vec::with_capacity(4 * 256);
    for signs in [Signs::Both, Signs::Positive] {
        let code = Code::of(signs);
        table.extend(code.values());
        table.extend(code.middles());
        // Fills the row up; not read.
        table.push(f32::INFINITY);
    }
    table
}

/// Replaces a whole buffer.
fn fill(buffer: &CardBuffer, bytes: &[u8]) -> Result<()> {
    if bytes.is_empty() { Ok(()) } else { buffer.fill(bytes) }
}

fn filled(card: &'static Card, dtype: DType, bytes: &[u8]) -> Result<CardBuffer> {
    let buffer = CardBuffer::new(card, bytes.len() / dtype.size(), dtype)?;
    fill(&buffer, bytes)?;
    Ok(buffer)
}

fn bytes(buffer: &CardBuffer) -> Result<Vec<u8>> {
    let mut bytes = vec![0; buffer.len() * buffer.dtype().size()];
    if !bytes.is_empty() {
        buffer.read(0, &mut bytes)?;
    }
    Ok(bytes)
}

fn floats(buffer: &CardBuffer) -> Result<Vec<f32>> {
    Ok(super::transfer::values_of(&bytes(buffer)?, DType::F32))
}
