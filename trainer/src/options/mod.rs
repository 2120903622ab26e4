//! Options of `lorarun train`: one list declares name, type, default, help and support of each.
//!
//! Names and defaults are those of sd-scripts' `train_network.py`, so that existing configs work.
//! Two steps: what was written ([`parse`]: strict about names, lenient about types), then checks
//! across options ([`validate`]). Adding an option is one entry in a `list_*.rs`.
//!
//! - `value`, `choices`: types of values · `table`: the declaring macro and the row type
//! - `list_*`: the options · `arguments`, `network_args`, `optimizer_args`, `scheduler_args`:
//!   `key=value` lists
//! - `config_file`: TOML with places · `front_ends`, `foreign`: keys and values of other programs
//! - `parse`: command line over file over default · `validate`: rules · `suggest`: did-you-mean
//! - `help`, `print`, `docs`: options as help, TOML and document
//! - `lint`: advice about unusual settings

#[macro_use]
mod table;
#[macro_use]
mod list_dataset;
#[macro_use]
mod list_machine;
#[macro_use]
mod list_model;
#[macro_use]
mod list_output;
#[macro_use]
mod list_training;
mod arguments;
mod choices;
mod config_file;
mod docs;
mod foreign;
#[cfg(test)]
mod front_end_tests;
mod front_ends;
mod help;
mod lint;
mod literal;
mod lycoris;
mod network_args;
mod optimizer_args;
mod parse;
mod print;
mod scheduler_args;
mod size;
mod suggest;
#[cfg(test)]
mod tests;
mod validate;
mod value;

pub use choices::*;
pub use docs::markdown;
pub use help::help_text;
pub use lint::lint;
pub use literal::Literal;
pub use lycoris::LycorisArgs;
pub use network_args::NetworkArgs;
pub use parse::{Action, Parsed, UsageError, find_option, parse, write_config};
pub(crate) use print::PRIVATE;
pub use scheduler_args::TORCH_SCHEDULES;
pub use size::ByteSize;
pub use suggest::closest;
pub use table::{Group, OptionSpec, Origin, Support};
pub use value::{CropRange, IntOrFloat, Kind, Mismatch, OptionValue, Resolution};

use std::path::PathBuf;

chain_lists! { [
    config_options model_options network_options dataset_options caption_options
    training_options optimizer_options noise_options saving_options metadata_options
    logging_options sampling_options validation_options performance_options
    deepspeed_options hub_options
] }
