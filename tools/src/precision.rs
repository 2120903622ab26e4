//! `--precision` and `--save_precision`: number types by sd-scripts' names.

use clap::ValueEnum;
use formats::{Dtype, SavePrecision};

/// A float type by its name in options.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Precision {
    /// 32 bits
    Float,
    /// 16 bits, IEEE
    Fp16,
    /// 16 bits, bfloat16
    Bf16,
}

impl Precision {
    /// The type in files.
    pub fn dtype(self) -> Dtype {
        let precision = match self {
            Self::Float => SavePrecision::Float,
            Self::Fp16 => SavePrecision::Fp16,
            Self::Bf16 => SavePrecision::Bf16,
        };
        precision.dtype()
    }
}
