//! Arithmetic on one device: tensors, a tape over a closed set of operations, kernels.
//!
//! The engine knows no networks and no ranks. Frozen weights never receive a gradient: the tape
//! records an operation only when one of its inputs is tracked, and a backward closure keeps just
//! what it needs. Feature maps are NHWC `[B,H,W,C]`, tokens are `[B,T,C]`, attention keeps its heads
//! interleaved in the last axis, linear weights are `[out,in]`, convolution weights `[out,kh,kw,in]`.

pub mod backend;
pub mod blockwise;
pub mod cpu;
pub mod cuda;
mod device;
mod error;
mod ids;
mod operands;
mod ops;
mod params;
mod pool;
mod rows;
pub mod selfcheck;
mod shapes;
mod tape;
mod tensor;

pub use backend::{Activation, ConvGeometry, ElementLoss, LossSpec};
pub use device::Device;
pub use error::{EngineError, Result};
pub use ids::{Ids, RowChoice};
pub use ops::{
    Adapter, AttentionShape, ComposedAdapter, Conv2d, Drawn, Draws, Dropouts, Embedding, Factor,
    GroupNorm, LayerNorm, Linear, LowRankAdapter, Magnitude, NestedAdapter, Update,
};
pub use params::{ParamId, ParamStore};
pub use pool::{PoolStats, pool_stats, release_pool, reset_pool_peak, return_freed_buffers};
pub use tape::{Checkpointing, Tape, Value};
pub use tensor::{DType, Tensor};
