//! What can go wrong with a sampler: its name, its options, and calls out of turn.

use super::kind::SamplerKind;

/// Errors of samplers.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum SamplerError {
    /// No sampler has this name.
    #[error("unknown sampler: `{name}`\nhint: {hint}")]
    Unknown {
        /// Name that was asked for.
        name: String,
        /// The nearest name, or all of them.
        hint: String,
    },
    /// A number of steps for which there are no timesteps.
    #[error("the number of sampling steps should lie between 1 and 998, it is: {0}")]
    Steps(usize),
    /// A strength that is no share, or that leaves nothing to do.
    #[error(
        "`strength` should be at most 1 and leave at least one of {steps} steps, it is: {strength}"
    )]
    Strength {
        /// Value given.
        strength: f64,
        /// Number of steps of the whole schedule.
        steps: usize,
    },
    /// Karras spacing where the sampler has none.
    #[error(
        "this sampler has no Karras spacing: `{kind}`\nhint: these have it: {}",
        names(SamplerKind::offers_karras)
    )]
    Karras {
        /// Sampler asked for.
        kind: SamplerKind,
    },
    /// Zero terminal SNR where the sampler cannot start at pure noise.
    #[error(
        "this sampler cannot start at zero terminal SNR: `{kind}`\nhint: these can: {}",
        names(SamplerKind::offers_zero_terminal_snr)
    )]
    ZeroTerminalSnr {
        /// Sampler asked for.
        kind: SamplerKind,
    },
    /// Pure noise has nothing of the picture in it that a prediction of the noise could reveal.
    #[error(
        "the first timestep is pure noise, which a model that predicts noise says nothing about: \
         `{kind}`\nhint: zero terminal SNR belongs to models with v-prediction"
    )]
    PureNoise {
        /// Sampler asked for.
        kind: SamplerKind,
    },
    /// Another spacing of timesteps where the sampler has one only.
    #[error("the spacing of timesteps cannot be chosen for this sampler: `{kind}`")]
    Spacing {
        /// Sampler asked for.
        kind: SamplerKind,
    },
    /// A prediction or noise that has not the size of the latents.
    #[error("{what} should have {expected} values, it has: {got}")]
    Length {
        /// Which argument.
        what: &'static str,
        /// Values of the latents.
        expected: usize,
        /// Values found.
        got: usize,
    },
    /// A step after the last.
    #[error("the sampler has made all its evaluations: {0}")]
    Finished(usize),
}

fn names(offers: fn(SamplerKind) -> bool) -> String {
    let names: Vec<&str> =
        SamplerKind::all().filter(|kind| offers(*kind)).map(SamplerKind::name).collect();
    names.join(", ")
}
