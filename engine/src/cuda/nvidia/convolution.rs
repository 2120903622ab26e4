//! Convolutions by cuDNN, in the layout that the engine has anyway (NHWC, kernels KRSC).
//!
//! Only algorithms that compute the sum as written are used, in f32 and with a fixed order: no
//! Fourier or Winograd transforms, whose rounding differs, no atomic additions, no TF32. Where cuDNN
//! has none, or is not there, the caller goes another way.

use std::collections::HashMap;
use std::ffi::{c_int, c_void};
use std::sync::{Mutex, PoisonError};

use cudarc::cudnn::sys as dnn;

use super::context::{Context, Queue};
use super::libraries::{Found, Library, find};
use super::symbols::{CudnnApi, error_words};
use super::tuning::Scratch;
use crate::cuda::driver::{Convolution, Direction, WORKSPACE};
use crate::{DType, EngineError, Result};

/// Algorithms that are asked for.
const GUESSES: usize = 8;

/// Everything that the choice of an algorithm depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Shape {
    forward: bool,
    dtype: DType,
    /// `[B,H,W,Ci]`.
    input: [c_int; 4],
    /// `[B,OH,OW,Co]`.
    output: [c_int; 4],
    kernel: [c_int; 2],
    stride: c_int,
    pad: c_int,
}

impl Shape {
    /// `None` for what the library cannot be asked: other padding before than after, odd types.
    fn of(p: &Convolution) -> Option<Self> {
        let size = |n: usize| c_int::try_from(n).ok().filter(|n| *n > 0);
        let four = |[a, b, c, d]: [usize; 4]| Some([size(a)?, size(b)?, size(c)?, size(d)?]);
        data_type(p.dtype)?;
        // The library makes the output's size from the padding; it must be the one wanted.
        let fits = |input: usize, kernel: usize, output: usize| {
            let room = (input + 2 * p.pad_before).checked_sub(kernel);
            p.stride > 0 && room.is_some_and(|room| room / p.stride + 1 == output)
        };
        let [_, height, width, _] = p.input;
        let same = p.pad_before == p.pad_after
            && fits(height, p.kernel.0, p.output[1])
            && fits(width, p.kernel.1, p.output[2]);
        same.then_some(())?;
        Some(Self {
            forward: p.direction == Direction::Forward,
            dtype: p.dtype,
            input: four(p.input)?,
            output: four(p.output)?,
            kernel: [size(p.kernel.0)?, size(p.kernel.1)?],
            stride: size(p.stride)?,
            pad: c_int::try_from(p.pad_before).ok()?,
        })
    }
}

fn data_type(dtype: DType) -> Option<dnn::cudnnDataType_t> {
    match dtype {
        DType::F32 => Some(dnn::cudnnDataType_t::CUDNN_DATA_FLOAT),
        DType::BF16 => Some(dnn::cudnnDataType_t::CUDNN_DATA_BFLOAT16),
        DType::F16 => Some(dnn::cudnnDataType_t::CUDNN_DATA_HALF),
        DType::F8 | DType::U32 => None,
    }
}

/// As the library writes it, with numbers for its enums: a newer one may know more.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Answer {
    algorithm: u32,
    status: u32,
    time: f32,
    memory: usize,
    determinism: u32,
    math: u32,
    reserved: [c_int; 3],
}
const _: () = assert!(size_of::<Answer>() == size_of::<dnn::cudnnConvolutionFwdAlgoPerf_t>());
const _: () = assert!(size_of::<Answer>() == size_of::<dnn::cudnnConvolutionBwdDataAlgoPerf_t>());

/// One way to compute a shape.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    Forward(dnn::cudnnConvolutionFwdAlgo_t, dnn::cudnnMathType_t),
    Backward(dnn::cudnnConvolutionBwdDataAlgo_t, dnn::cudnnMathType_t),
}

impl Answer {
    /// What of the answer can be used for a shape.
    fn way(&self, shape: &Shape) -> Option<Way> {
        use dnn::cudnnConvolutionBwdDataAlgo_t as B;
        use dnn::cudnnConvolutionFwdAlgo_t as F;
        use dnn::cudnnMathType_t as M;
        let math = match (shape.dtype, self.math) {
            // Anything else may round f32 to TF32.
            (DType::F32, 3) => M::CUDNN_FMA_MATH,
            (DType::F32, _) => return None,
            (_, 1) => M::CUDNN_TENSOR_OP_MATH,
            (_, 3) => M::CUDNN_FMA_MATH,
            (_, 0) => M::CUDNN_DEFAULT_MATH,
            _ => return None,
        };
        if self.status != 0 || self.memory > WORKSPACE || self.determinism != 1 {
            return None;
        }
        match (shape.forward, self.algorithm) {
            (true, 0) => Some(Way::Forward(F::CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_GEMM, math)),
            (true, 1) => {
                Some(Way::Forward(F::CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_PRECOMP_GEMM, math))
            }
            (true, 2) => Some(Way::Forward(F::CUDNN_CONVOLUTION_FWD_ALGO_GEMM, math)),
            (false, 1) => Some(Way::Backward(B::CUDNN_CONVOLUTION_BWD_DATA_ALGO_1, math)),
            _ => None,
        }
    }
}

/// What the library needs for one shape, kept for the life of the process.
#[derive(Clone)]
struct Plan {
    x: dnn::cudnnTensorDescriptor_t,
    w: dnn::cudnnFilterDescriptor_t,
    y: dnn::cudnnTensorDescriptor_t,
    convolution: dnn::cudnnConvolutionDescriptor_t,
    /// Empty if the library has none.
    ways: Vec<Way>,
    chosen: Option<usize>,
}

struct State {
    handle: dnn::cudnnHandle_t,
    plans: HashMap<Shape, Plan>,
}
// SAFETY: the handle and descriptors may be used from any thread, one at a time.
unsafe impl Send for State {}

struct Open {
    found: &'static Found,
    api: CudnnApi,
    state: Mutex<State>,
}

/// The library for one card, if it is there.
pub(super) struct Convolutions(Option<Open>);

impl Convolutions {
    /// Opens the library; without it every convolution is answered with "not here".
    pub(super) fn open(context: &Context, stream: Queue) -> Self {
        Self(Open::new(context, stream))
    }

    /// Starts a convolution; `false` if the library cannot, and nothing was done.
    pub(super) fn convolve(&self, scratch: &Scratch, p: &Convolution) -> Result<bool> {
        match (&self.0, Shape::of(p)) {
            (Some(open), Some(shape)) => open.convolve(scratch, p, shape),
            _ => Ok(false),
        }
    }
}

impl Open {
    /// `None` if the library, one of its functions or its own libraries are missing.
    fn new(context: &Context, stream: Queue) -> Option<Self> {
        let found = find(Library::Cudnn).ok()?;
        let api = CudnnApi::load(&found.handle).ok()?;
        context.bind().ok()?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: the handle goes where it is told; the stream lives as long as the process.
        let status = unsafe {
            match (api.cudnnCreate)(&raw mut handle) {
                0 => (api.cudnnSetStream)(handle, stream.0.cast()),
                status => status,
            }
        };
        let state = Mutex::new(State { handle, plans: HashMap::new() });
        (status == 0).then_some(Self { found, api, state })
    }

    fn check(&self, what: &str, status: u32) -> Result<()> {
        if status == 0 {
            return Ok(());
        }
        let why = error_words(&self.found.handle, "cudnnGetErrorString\0", status);
        Err(EngineError::Card { what: what.to_owned(), why })
    }

    fn convolve(&self, scratch: &Scratch, p: &Convolution, shape: Shape) -> Result<bool> {
        scratch.context.bind()?;
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let handle = state.handle;
        let plan = match state.plans.entry(shape) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => {
                entry.insert(self.plan(handle, &shape)?)
            }
        };
        if plan.ways.is_empty() {
            return Ok(false);
        }
        let target = if shape.forward { p.y } else { p.x };
        let chosen = match plan.chosen {
            Some(chosen) => Some(chosen),
            None => {
                // A sum in place must not be made twice.
                let adds = p.direction == Direction::BackwardInput { accumulate: true };
                let spare = p.input.iter().product::<usize>() * p.dtype.size();
                let queue = (scratch.context, scratch.stream);
                let (name, count) = (format!("convolution {shape:?}"), plan.ways.len());
                let spare = if adds { spare } else { 0 };
                scratch.tuning.choose(queue, &name, count, spare, &|candidate, place| {
                    let to = place.unwrap_or(target);
                    self.run(scratch, (handle, plan), plan.ways[candidate], p, to)
                })?
            }
        };
        let way = plan.ways[chosen.unwrap_or(0)];
        self.run(scratch, (handle, plan), way, p, target)?;
        plan.chosen = chosen;
        Ok(true)
    }

    /// Starts one of the ways, with the result at `to`.
    fn run(
        &self,
        scratch: &Scratch,
        (handle, plan): (dnn::cudnnHandle_t, &Plan),
        way: Way,
        p: &Convolution,
        to: u64,
    ) -> Result<()> {
        let (one, zero): (f32, f32) = (1., 0.);
        let adds = p.direction == Direction::BackwardInput { accumulate: true };
        let alpha: *const c_void = (&raw const one).cast();
        let beta: *const c_void = if adds { alpha } else { (&raw const zero).cast() };
        let place = |address: u64| address as *const c_void;
        let workspace = scratch.workspace as *mut c_void;
        let (Way::Forward(_, math) | Way::Backward(_, math)) = way;
        // SAFETY: descriptors are those of this shape, addresses those of the caller's tensors; the
        // factors are read before the calls return. The workspace is used by one call after the
        // other on this stream.
        let status = unsafe {
            let set = (self.api.cudnnSetConvolutionMathType)(plan.convolution, math);
            match way {
                _ if set != 0 => set,
                Way::Forward(algorithm, _) => (self.api.cudnnConvolutionForward)(
                    handle,
                    alpha,
                    plan.x,
                    place(p.x),
                    plan.w,
                    place(p.w),
                    plan.convolution,
                    algorithm,
                    workspace,
                    WORKSPACE,
                    beta,
                    plan.y,
                    to as *mut c_void,
                ),
                Way::Backward(algorithm, _) => (self.api.cudnnConvolutionBackwardData)(
                    handle,
                    alpha,
                    plan.w,
                    place(p.w),
                    plan.y,
                    place(p.y),
                    plan.convolution,
                    algorithm,
                    workspace,
                    WORKSPACE,
                    beta,
                    plan.x,
                    to as *mut c_void,
                ),
            }
        };
        if status == 0 {
            scratch.context.note_kernel("a convolution of cuDNN");
        }
        self.check(&format!("the convolution {p:?}"), status)
    }

    /// Describes a shape to the library and asks for algorithms.
    fn plan(&self, handle: dnn::cudnnHandle_t, shape: &Shape) -> Result<Plan> {
        let mut plan = Plan {
            x: std::ptr::null_mut(),
            w: std::ptr::null_mut(),
            y: std::ptr::null_mut(),
            convolution: std::ptr::null_mut(),
            ways: Vec::new(),
            chosen: None,
        };
        // SAFETY: descriptors go where they are told.
        let made = unsafe {
            [
                (self.api.cudnnCreateTensorDescriptor)(&raw mut plan.x),
                (self.api.cudnnCreateTensorDescriptor)(&raw mut plan.y),
                (self.api.cudnnCreateFilterDescriptor)(&raw mut plan.w),
                (self.api.cudnnCreateConvolutionDescriptor)(&raw mut plan.convolution),
            ]
        };
        for status in made {
            self.check("describing a convolution", status)?;
        }
        // A description that the library refuses is a shape that it cannot do.
        if self.describe(&plan, shape) {
            plan.ways = self.ways(handle, &plan, shape);
        }
        Ok(plan)
    }

    fn describe(&self, plan: &Plan, shape: &Shape) -> bool {
        use dnn::cudnnTensorFormat_t::CUDNN_TENSOR_NHWC as NHWC;
        let Some(dtype) = data_type(shape.dtype) else { return false };
        let math = match shape.dtype {
            DType::F32 => dnn::cudnnMathType_t::CUDNN_FMA_MATH,
            _ => dnn::cudnnMathType_t::CUDNN_TENSOR_OP_MATH,
        };
        let [batch, height, width, channels] = shape.input;
        let [_, out_height, out_width, out_channels] = shape.output;
        let ([kh, kw], stride, pad) = (shape.kernel, shape.stride, shape.pad);
        let mode = dnn::cudnnConvolutionMode_t::CUDNN_CROSS_CORRELATION;
        let float = dnn::cudnnDataType_t::CUDNN_DATA_FLOAT;
        // SAFETY: the descriptors were made by the caller. The order of sizes is NCHW whatever the
        // order in memory is.
        let set = unsafe {
            [
                (self.api.cudnnSetTensor4dDescriptor)(
                    plan.x, NHWC, dtype, batch, channels, height, width,
                ),
                (self.api.cudnnSetTensor4dDescriptor)(
                    plan.y,
                    NHWC,
                    dtype,
                    batch,
                    out_channels,
                    out_height,
                    out_width,
                ),
                (self.api.cudnnSetFilter4dDescriptor)(
                    plan.w,
                    dtype,
                    NHWC,
                    out_channels,
                    channels,
                    kh,
                    kw,
                ),
                (self.api.cudnnSetConvolution2dDescriptor)(
                    plan.convolution,
                    pad,
                    pad,
                    stride,
                    stride,
                    1,
                    1,
                    mode,
                    float,
                ),
                (self.api.cudnnSetConvolutionMathType)(plan.convolution, math),
            ]
        };
        set.iter().all(|status| *status == 0)
    }

    /// The library's guesses that can be used, the best first.
    fn ways(&self, handle: dnn::cudnnHandle_t, plan: &Plan, shape: &Shape) -> Vec<Way> {
        let mut answers = [Answer::default(); GUESSES];
        let (to, asked) = (answers.as_mut_ptr(), GUESSES as c_int);
        let mut count: c_int = 0;
        // SAFETY: `Answer` has the layout of both of the library's structures, and there is room for
        // as many as are asked for.
        let status = unsafe {
            if shape.forward {
                (self.api.cudnnGetConvolutionForwardAlgorithm_v7)(
                    handle,
                    plan.x,
                    plan.w,
                    plan.convolution,
                    plan.y,
                    asked,
                    &raw mut count,
                    to.cast(),
                )
            } else {
                (self.api.cudnnGetConvolutionBackwardDataAlgorithm_v7)(
                    handle,
                    plan.w,
                    plan.y,
                    plan.convolution,
                    plan.x,
                    asked,
                    &raw mut count,
                    to.cast(),
                )
            }
        };
        let count = if status == 0 { usize::try_from(count).unwrap_or(0) } else { 0 };
        let mut ways = Vec::new();
        for way in answers.iter().take(count).filter_map(|answer| answer.way(shape)) {
            if !ways.contains(&way) {
                ways.push(way);
            }
        }
        ways
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn convolution() -> Convolution {
        Convolution {
            direction: Direction::Forward,
            x: 256,
            w: 512,
            y: 1024,
            dtype: DType::BF16,
            input: [2, 9, 8, 4],
            output: [2, 5, 4, 6],
            kernel: (3, 3),
            stride: 2,
            pad_before: 1,
            pad_after: 1,
        }
    }

    #[test]
    fn what_the_library_cannot_be_asked_goes_another_way() {
        let p = convolution();
        assert!(Shape::of(&p).is_some());
        assert_eq!(Shape::of(&Convolution { pad_before: 0, ..p }), None);
        assert_eq!(Shape::of(&Convolution { output: [2, 4, 4, 6], ..p }), None);
        assert_eq!(Shape::of(&Convolution { dtype: DType::F8, ..p }), None);
        assert_eq!(Shape::of(&Convolution { input: [0, 9, 8, 4], ..p }), None);
        assert_eq!(Shape::of(&Convolution { stride: 0, ..p }), None);
        // One plan serves with and without accumulation.
        let backward = |accumulate| {
            let direction = Direction::BackwardInput { accumulate };
            Shape::of(&Convolution { direction, ..p })
        };
        assert_eq!(backward(true), backward(false));
        assert_ne!(backward(true), Shape::of(&p));
    }

    #[test]
    fn only_exact_and_repeatable_algorithms_are_used() {
        let half = Shape::of(&convolution()).unwrap();
        let float = Shape { dtype: DType::F32, ..half };
        let backward = Shape { forward: false, ..half };
        let answer = Answer { algorithm: 1, math: 1, determinism: 1, ..Answer::default() };
        assert!(answer.way(&half).is_some());
        assert!(answer.way(&backward).is_some());
        assert_eq!(answer.way(&float), None);
        assert!(Answer { math: 3, ..answer }.way(&float).is_some());
        assert_eq!(Answer { math: 0, ..answer }.way(&float), None);
        // Winograd; a failure; atomics; too much workspace; a code of the future.
        assert_eq!(Answer { algorithm: 6, ..answer }.way(&half), None);
        assert_eq!(Answer { status: 3000, ..answer }.way(&half), None);
        assert_eq!(Answer { determinism: 0, ..answer }.way(&half), None);
        assert_eq!(Answer { memory: WORKSPACE + 1, ..answer }.way(&half), None);
        assert_eq!(Answer { math: 9, ..answer }.way(&half), None);
        assert_eq!(Answer { algorithm: 0, ..answer }.way(&backward), None);
    }
}
