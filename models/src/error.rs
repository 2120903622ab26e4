//! What can go wrong while a model or a LoRA is built, with tensor names and shapes in the message.

use engine::EngineError;
use formats::FormatError;

/// Result of every fallible call that builds something.
pub type Result<T> = std::result::Result<T, ModelError>;

/// Errors of this crate. Running a model gives [`EngineError`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// Reading a tensor failed.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The engine refused an operation.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// A tensor of the model does not have the shape that the rest of the model asks for.
    #[error("tensor `{name}` should have the shape {expected:?}, its shape is: {got:?}")]
    Shape {
        /// Name in diffusers' naming.
        name: String,
        /// Shape that the model's config or its other tensors ask for.
        expected: Vec<usize>,
        /// Shape found.
        got: Vec<usize>,
    },
    /// A tensor without which not even the size of the model is known.
    #[error("the {component} has no tensor `{name}`, so its size is unknown")]
    Unsized {
        /// `U-Net`, `text encoder` or `VAE`.
        component: &'static str,
        /// Name in diffusers' naming.
        name: String,
    },
    /// A config asks for something that this program does not compute, or contradicts itself.
    #[error("the {component}'s config is not supported, {reason}, `{key}` is: {got}")]
    Config {
        /// `U-Net`, `text encoder` or `VAE`.
        component: &'static str,
        /// Key of the config.
        key: String,
        /// What would be accepted.
        reason: String,
        /// Value found.
        got: String,
    },
    /// A LoRA tensor has a shape that does not fit the layer of its name.
    #[error(
        "LoRA tensor `{key}` should have the shape {expected:?}, its shape is: {got:?}\n\
         hint: the LoRA was probably trained with another rank or on another kind of base model; \
         `dim_from_weights` takes the ranks from the file"
    )]
    LoraShape {
        /// Key of the file.
        key: String,
        /// Shape that this network asks for.
        expected: Vec<usize>,
        /// Shape found.
        got: Vec<usize>,
    },
    /// A LoRA file in which nothing belongs to this model.
    #[error(
        "no module of the LoRA belongs to this base model, for example: {example}\n\
         hint: the LoRA was trained on another kind of base model, or is not in sd-scripts' format"
    )]
    LoraForeign {
        /// A key of the file, or `the file is empty`.
        example: String,
    },
    /// A LoRA of another family of models.
    #[error(
        "`{}` was trained on {lora}, the base model is: {model}\n\
         hint: choose a LoRA of that family, or the base model that it was trained on",
        path.display()
    )]
    LoraFamily {
        /// The LoRA file.
        path: std::path::PathBuf,
        /// Its family.
        lora: &'static str,
        /// The base model's.
        model: &'static str,
    },
    /// A file of another kind of network.
    #[error(
        "the LoRA is of another kind than the network, which has no tensor: `{key}`\n\
         hint: choose the kind of the file, by `network_module` (`networks.lora`, `networks.loha`, \
         `networks.lokr`) and `dora_wd` and `use_tucker` in `network_args`"
    )]
    LoraKind {
        /// Key of the file.
        key: String,
    },
    /// One half of a LoRA module is missing.
    #[error("the LoRA has `{found}` but lacks: `{missing}`")]
    LoraHalf {
        /// Key that is there.
        found: String,
        /// Key that is not.
        missing: String,
    },
    /// A rank of nothing or a LoRA without modules.
    #[error("{0}")]
    Network(String),
}
