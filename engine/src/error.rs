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
    /// A shape error with a formatted detail.
    pub fn shape(op: &'static str, detail: impl Into<String>) -> Self {
        Self::Shape { op, detail: detail.into() }
    }
}
