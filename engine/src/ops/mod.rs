//! The closed set of differentiable operations, each a forward that says what it saves and a
//! backward written by hand.

mod adapter;
mod attention;
mod conv;
mod linear;
mod norm;
mod pointwise;
mod shape;

pub use adapter::{
    Adapter, ComposedAdapter, Drawn, Draws, Dropouts, Factor, LowRankAdapter, Magnitude,
    NestedAdapter, Update,
};
pub use attention::{AttentionShape, Embedding};
pub use conv::Conv2d;
pub use linear::Linear;
pub use norm::{GroupNorm, LayerNorm};
