//! The closed sets of words that options accept, one enum each.

use super::value::{Kind, Mismatch, OptionValue, describe};

/// Declares an enum, the word of each variant, and how it is read from and written to TOML.
macro_rules! choice {
    ($(#[$doc:meta])* $name:ident { $($variant:ident = $word:literal),+ $(,)? }) => {
        choice! { @read str::trim; $(#[$doc])* $name { $($variant = $word),+ } }
    };
    // With what makes a word of the text that was written.
    (@read $read:path; $(#[$doc:meta])* $name:ident { $($variant:ident = $word:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $name { $(#[doc = concat!("`", $word, "`")] $variant),+ }

        impl $name {
            /// Every word, in the order of the declaration.
            pub const WORDS: &'static [&'static str] = &[$($word),+];

            /// The word that stands for this value in a config.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word),+ }
            }
        }

        impl OptionValue for $name {
            const KIND: Kind = Kind::Choice(Self::WORDS);

            fn from_toml(value: &toml::Value) -> Result<Self, Mismatch> {
                match value.as_str().map($read) {
                    $(Some(word) if word.eq_ignore_ascii_case($word) => Ok(Self::$variant),)+
                    _ => Err(Mismatch::new(format!("one of {}", Self::WORDS.join(", ")), describe(value))),
                }
            }

            fn to_toml(&self) -> Option<toml::Value> {
                Some(toml::Value::String(self.as_str().to_owned()))
            }
        }
    };
}

choice! {
    /// Where the arithmetic is done.
    Device { Auto = "auto", Cpu = "cpu", Cuda = "cuda" }
}
choice! {
    /// Precision of the frozen model's arithmetic.
    MixedPrecision { No = "no", Fp16 = "fp16", Bf16 = "bf16" }
}
choice! {
    /// Number type of saved files.
    SavePrecision { Float = "float", Fp16 = "fp16", Bf16 = "bf16" }
}
choice! {
    /// Format of saved files.
    SaveModelAs { Ckpt = "ckpt", Pt = "pt", Safetensors = "safetensors" }
}
choice! {
    /// Filter for resizing images.
    ResizeInterpolation {
        Lanczos = "lanczos", Nearest = "nearest", Bilinear = "bilinear", Linear = "linear",
        Bicubic = "bicubic", Cubic = "cubic", Area = "area",
    }
}
choice! {
    /// Error between prediction and target.
    LossType { L1 = "l1", L2 = "l2", Huber = "huber", SmoothL1 = "smooth_l1" }
}
choice! {
    /// How the huber threshold depends on the timestep.
    HuberSchedule { Constant = "constant", Exponential = "exponential", Snr = "snr" }
}
choice! {
    @read without_initial_rate;
    /// Names of learning-rate schedules.
    LrScheduler {
        Constant = "constant", ConstantWithWarmup = "constant_with_warmup", Linear = "linear",
        Cosine = "cosine", CosineWithRestarts = "cosine_with_restarts", Polynomial = "polynomial",
        InverseSqrt = "inverse_sqrt", CosineWithMinLr = "cosine_with_min_lr",
        WarmupStableDecay = "warmup_stable_decay", PiecewiseConstant = "piecewise_constant",
        Adafactor = "adafactor",
    }
}

/// `adafactor:0.0001` is `adafactor`: the number, which the reference shows before the first step,
/// is replaced by `learning_rate` there too.
fn without_initial_rate(text: &str) -> &str {
    match text.split_once(':') {
        Some(("adafactor", rate)) if rate.trim().parse::<f64>().is_ok() => "adafactor",
        _ => text,
    }
}

choice! {
    /// Tools that a run can log to.
    LogWith { Tensorboard = "tensorboard", Wandb = "wandb", All = "all" }
}
choice! {
    /// How much is printed.
    LogLevel {
        Debug = "DEBUG", Info = "INFO", Warning = "WARNING", Error = "ERROR", Critical = "CRITICAL",
    }
}
choice! {
    /// Samplers for sample images.
    SampleSampler {
        Ddim = "ddim", Pndm = "pndm", Lms = "lms", Euler = "euler", EulerA = "euler_a",
        Heun = "heun", Dpm2 = "dpm_2", Dpm2A = "dpm_2_a", Dpmsolver = "dpmsolver",
        DpmsolverPlusPlus = "dpmsolver++", Dpmsingle = "dpmsingle", KLms = "k_lms",
        KEuler = "k_euler", KEulerA = "k_euler_a", KDpm2 = "k_dpm_2", KDpm2A = "k_dpm_2_a",
    }
}
choice! {
    /// Compilers of `torch.compile`, accepted without effect.
    DynamoBackend {
        No = "no", Eager = "eager", AotEager = "aot_eager", Inductor = "inductor",
        AotTsNvfuser = "aot_ts_nvfuser", NvprimsNvfuser = "nvprims_nvfuser",
        Cudagraphs = "cudagraphs", Ofi = "ofi", Fx2trt = "fx2trt", Onnxrt = "onnxrt",
        Tensort = "tensort", Ipex = "ipex", Tvm = "tvm",
    }
}
choice! {
    /// Where DeepSpeed would put tensors.
    OffloadDevice { Cpu = "cpu", Nvme = "nvme" }
}
