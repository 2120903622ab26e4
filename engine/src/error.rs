//! What can go wrong in the engine, with the operation and the shapes in the message.

/// Result of every fallible engine call.
pub type Result<T> = std::result::Result<T, EngineError>;

/// Errors of the engine.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// Operand shapes do not fit each other.
    #[error("`{op}` got operands that do not fit: {detail}")]
    Shape {
        /// Operation name.
        op: &'static str,
        /// Shapes and the rule they break.
        detail: String,
    },
    /// An operand has a type that the operation does not take.
    #[error("`{op}` expected {expected}, got: {got}")]
    DType {
        /// Operation name.
        op: &'static str,
        /// Accepted types.
        expected: &'static str,
        /// Type found.
        got: String,
    },
    /// An operand is on another device than the operation.
    #[error("`{op}` got an operand on another device: {got}")]
    Device {
        /// Operation name.
        op: &'static str,
        /// Where the operand is.
        got: crate::Device,
    },
    /// A card's memory, or the part of it that may be used, is full.
    #[error(
        "the card's memory is full: {wanted} more bytes wanted, {live} of {limit} in use\nhint: lower \
         `train_batch_size` or the resolution, or set `gradient_checkpointing`"
    )]
    OutOfMemory {
        /// Bytes asked for.
        wanted: usize,
        /// Bytes that tensors use.
        live: usize,
        /// Bytes that may be used.
        limit: usize,
    },
    /// The card or a library of it failed.
    #[error("{what} failed: {why}")]
    Card {
        /// The call.
        what: String,
        /// Name or words of the library's error code.
        why: String,
    },
    /// Something within a captured sequence would not be the same in each replay.
    #[error("not capturable: {0}")]
    NotCapturable(String),
    /// A run asked for other memory than the one that was traced.
    #[error("not the run that was laid out: {0}")]
    PlanMismatch(String),
    /// The requested device or feature does not exist here.
    #[error("{0}")]
    Unsupported(String),
    /// The tape was used in a way that cannot give a gradient.
    #[error("tape: {0}")]
    Tape(String),
    /// An error of the storage library.
    #[error("storage: {0}")]
    Storage(#[from] candle_core::Error),
}

impl EngineError {
    /// A type that only cards have.
    pub(crate) fn not_on_cpu(op: &'static str, got: crate::DType) -> Self {
        Self::DType { op, expected: "f32 or bf16 on the CPU", got: format!("{got:?}") }
    }

    /// A shape error with a formatted detail.
    pub fn shape(op: &'static str, detail: impl Into<String>) -> Self {
        Self::Shape { op, detail: detail.into() }
    }
}
