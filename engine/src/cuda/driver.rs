//! What a card is asked for, whoever answers: NVIDIA's driver, an emulation, or a recorder.
//!
//! Everything above this trait (operations, memory, graphs) is the same code on all three, so that
//! it is tested where there is no card. Calls on one stream run in order; all but downloads and
//! [`Driver::synchronize`] return before the work is done. Matrices are row-major.

use crate::{DType, Result};

/// A place in a card's memory.
pub type Address = u64;

/// Bytes of scratch that a driver's libraries may use between one call and the next.
pub const WORKSPACE: usize = 64 << 20;

/// The queues of a card.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stream {
    /// Arithmetic.
    Compute,
    /// The next batch on its way to the card.
    Copy,
    /// Gradients on their way between cards.
    Reduce,
}

/// What a card is.
#[derive(Clone, Debug, PartialEq)]
pub struct CardFacts {
    /// Name for people: `NVIDIA H100 80GB HBM3`.
    pub name: String,
    /// As options name it: `cuda:0`.
    pub label: String,
    /// Major and minor compute capability: (8, 6).
    pub capability: (u32, u32),
    /// Multiprocessors.
    pub processors: u32,
    /// Bytes of memory.
    pub memory: usize,
    /// Largest shared memory of a block, in bytes.
    pub shared_memory: usize,
    /// Whether results mean anything: a recorder computes nothing and downloads zeros.
    pub computes: bool,
}

/// An argument of a kernel, of the width that its signature has.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Arg {
    /// A pointer; 0 for none.
    Address(Address),
    /// `int`.
    I32(i32),
    /// `long long`.
    I64(i64),
    /// `float`.
    F32(f32),
}

/// One start of one of the engine's kernels.
#[derive(Clone, Copy, Debug)]
pub struct Launch<'a> {
    /// File in `engine/kernels` without `.cu`.
    pub module: &'static str,
    /// Name of the `extern "C"` function.
    pub kernel: &'a str,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: u32,
    /// Dynamic shared memory of a block in bytes.
    pub shared: u32,
    /// In the order of the signature.
    pub args: &'a [Arg],
}

/// A matrix operand.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Matrix {
    /// First element.
    pub address: Address,
    /// Element type: F32, BF16 or F16.
    pub dtype: DType,
    /// Read transposed.
    pub transposed: bool,
}

/// `d[m,n] = alpha · op(a)·op(b) + c + bias`, all matrices dense and row-major; sums in f32.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Matmul {
    /// Rows of the result.
    pub m: usize,
    /// Columns of the result.
    pub n: usize,
    /// Inner size.
    pub k: usize,
    /// `[m,k]`, stored `[k,m]` if transposed.
    pub a: Matrix,
    /// `[k,n]`, stored `[n,k]` if transposed; type of `a`.
    pub b: Matrix,
    /// Factor of the product.
    pub alpha: f32,
    /// `[m,n]` of the type of `d`, added; may be `d` itself.
    pub c: Option<Address>,
    /// `[n]` of the type of `d`, added to every row.
    pub bias: Option<Address>,
    /// `[m,n]`.
    pub d: Address,
    /// Type of the result: that of `a`, or F32.
    pub d_dtype: DType,
}

/// Which way through a convolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// `y = conv(x, w)`.
    Forward,
    /// `x += conv'(y, w)` if `accumulate`, else `x = `: the gradient of the input.
    BackwardInput {
        /// Add to what is there.
        accumulate: bool,
    },
}

/// A convolution `x` `[B,H,W,Ci]`, `w` `[Co,kh,kw,Ci]`, `y` `[B,OH,OW,Co]`, one element type.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Convolution {
    /// Which way.
    pub direction: Direction,
    /// Input, or its gradient.
    pub x: Address,
    /// Kernel.
    pub w: Address,
    /// Output, or its gradient.
    pub y: Address,
    /// Type of all three.
    pub dtype: DType,
    /// `[B,H,W,Ci]`.
    pub input: [usize; 4],
    /// `[B,OH,OW,Co]`.
    pub output: [usize; 4],
    /// Kernel height and width.
    pub kernel: (usize, usize),
    /// Step in both directions.
    pub stride: usize,
    /// Zeros before the first row and column.
    pub pad_before: usize,
    /// Zeros after the last row and column.
    pub pad_after: usize,
}

/// A captured sequence of work, to be started as one. Dropped by [`Driver::drop_graph`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Graph(pub u64);

/// A card.
pub trait Driver: Send + Sync {
    /// What it is.
    fn facts(&self) -> &CardFacts;
    /// A name that no other card has, whatever process sees it and under which number: its UUID. `None`
    /// for what is no card of NVIDIA's.
    fn identity(&self) -> Option<String> {
        None
    }
    /// Bytes of memory that nobody uses now, other processes included.
    fn free_memory(&self) -> Result<usize>;
    /// What [`Driver::allocate`] takes of the card is a multiple of this: many small buffers share
    /// one block of it. With 256 every buffer has a block of its own.
    fn granularity(&self) -> usize {
        2 << 20
    }
    /// `bytes` of memory, aligned to 256, contents unspecified.
    fn allocate(&self, bytes: usize) -> Result<Address>;
    /// Gives memory of [`Driver::allocate`] back; waits for work that may use it.
    fn free(&self, address: Address);
    /// Says that `bytes` from `address` on, within what was allocated, are a tensor from now on, and
    /// what they held is lost; for drivers that look after what is read and written.
    fn begin_tensor(&self, address: Address, bytes: usize) -> Result<()> {
        let _ = (address, bytes);
        Ok(())
    }
    /// Says that they are nobody's from now on.
    fn end_tensor(&self, address: Address, bytes: usize) {
        let _ = (address, bytes);
    }
    /// Copies host bytes to the card; `from` may be changed as soon as this returns. Within a capture
    /// the bytes are kept and copied again by each replay.
    fn upload(&self, stream: Stream, to: Address, from: &[u8]) -> Result<()>;
    /// Waits for the stream and copies to the host.
    fn download(&self, stream: Stream, to: &mut [u8], from: Address) -> Result<()>;
    /// Copies within the card.
    fn copy(&self, stream: Stream, to: Address, from: Address, bytes: usize) -> Result<()>;
    /// Sets bytes to zero.
    fn zero(&self, stream: Stream, to: Address, bytes: usize) -> Result<()>;
    /// Starts a kernel on the compute stream.
    fn launch(&self, launch: &Launch) -> Result<()>;
    /// Multiplies matrices on the compute stream.
    fn matmul(&self, matmul: &Matmul) -> Result<()>;
    /// Convolves on the compute stream; `false` if this driver has no convolution for it, and
    /// nothing was done.
    fn convolve(&self, convolution: &Convolution) -> Result<bool>;
    /// Makes work given to `before_this` from now on wait for all work given to `after` so far.
    fn order(&self, after: Stream, before_this: Stream) -> Result<()>;
    /// Waits until all work of a stream is done.
    fn synchronize(&self, stream: Stream) -> Result<()>;
    /// From now on work is noted instead of done: that of the compute stream, and that of streams
    /// made to wait for it.
    fn begin_capture(&self) -> Result<()>;
    /// Ends the capture; an error if something in it cannot be captured. Nothing was done yet.
    fn end_capture(&self) -> Result<Graph>;
    /// Starts a captured sequence on the compute stream.
    fn replay(&self, graph: Graph) -> Result<()>;
    /// Forgets a captured sequence.
    fn drop_graph(&self, graph: Graph);
    /// The stream as the vendor's libraries take it (a `CUstream`), for collectives.
    fn raw_stream(&self, stream: Stream) -> u64;
}
