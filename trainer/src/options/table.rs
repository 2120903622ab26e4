//! The machinery that turns the option lists into the struct `Options` and the table `OPTIONS`.
//!
//! A list macro hands its entries to the next list and the last one to `declare_options!`, so that
//! one struct can be declared from several files.

use super::{Options, value::Kind, value::Mismatch};
use std::path::PathBuf;

/// Chapter of the help that an option stands in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Group {
    /// The command line and the machine.
    Config,
    /// Base model.
    Model,
    /// What is trained.
    Network,
    /// Images.
    Dataset,
    /// Captions.
    Captions,
    /// Length and precision of the run.
    Training,
    /// Optimizer and learning rate.
    Optimizer,
    /// Noise and loss.
    NoiseAndLoss,
    /// Files that are written.
    Saving,
    /// Metadata of these files.
    Metadata,
    /// Logs.
    Logging,
    /// Sample images.
    Sampling,
    /// Validation.
    Validation,
    /// Performance switches.
    Performance,
    /// DeepSpeed.
    Deepspeed,
    /// Uploads.
    Hub,
}

impl Group {
    /// Title of the chapter.
    pub fn title(self) -> &'static str {
        match self {
            Group::Config => "Configuration and machine",
            Group::Model => "Base model",
            Group::Network => "Network",
            Group::Dataset => "Dataset",
            Group::Captions => "Captions",
            Group::Training => "Training",
            Group::Optimizer => "Optimizer and learning rate",
            Group::NoiseAndLoss => "Noise and loss",
            Group::Saving => "Saving",
            Group::Metadata => "Metadata",
            Group::Logging => "Logging",
            Group::Sampling => "Sample images",
            Group::Validation => "Validation",
            Group::Performance => "Performance",
            Group::Deepspeed => "DeepSpeed",
            Group::Hub => "Uploads",
        }
    }
}

/// How far an option is built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Support {
    /// It does what the help says.
    Supported,
    /// Accepted for the sake of existing configs; the text says why nothing needs to be done.
    NoEffect(&'static str),
    /// Any value but the default is refused; the text, where there is one, says what to do instead.
    NotYet(&'static str),
    /// Refused like `NotYet`, and not going to be built; the text says why and what to do instead.
    Refused(&'static str),
}

/// One row of the option table.
#[derive(Debug)]
pub struct OptionSpec {
    /// Name in configs and, after `--`, on the command line.
    pub name: &'static str,
    /// Chapter of the help.
    pub group: Group,
    /// Shape of the value.
    pub kind: Kind,
    /// Help text; line breaks carry no meaning.
    pub help: &'static str,
    /// How far it is built.
    pub support: Support,
    /// The default as TOML; `None` where unset.
    pub default: fn() -> Option<toml::Value>,
    /// Sets the field from a TOML value.
    pub assign: fn(&mut Options, &toml::Value) -> Result<(), Mismatch>,
    /// Reads the field as TOML; `None` where unset.
    pub read: fn(&Options) -> Option<toml::Value>,
}

impl OptionSpec {
    /// Whether `options` holds the default of this option.
    pub fn is_default(&self, options: &Options) -> bool {
        (self.read)(options) == (self.default)()
    }
}

/// Where the value of an option was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// As `--name value`.
    CommandLine,
    /// In a config file.
    File {
        /// The file.
        path: PathBuf,
        /// Line, from 1; 0 where unknown.
        line: usize,
    },
}

impl Origin {
    /// The option as its user wrote it, with the place: the start of an error message.
    pub fn name_option(&self, name: &str) -> String {
        match self {
            Origin::CommandLine => format!("`--{name}`"),
            Origin::File { path, line } => format!("{}:{line}: `{name}`", path.display()),
        }
    }
}

/// Passes the collected lists to the next list macro, and to `declare_options!` after the last.
macro_rules! chain_lists {
    ([] $($lists:tt)*) => { declare_options! { $($lists)* } };
    ([$next:ident $($rest:ident)*] $($lists:tt)*) => { $next! { [$($rest)*] $($lists)* } };
}

/// Declares `Options` and `OPTIONS` from the collected lists.
macro_rules! declare_options {
    ($(group $group:ident { $(
        $(#[doc = $help:literal])+
        $name:ident : $type:ty = $default:expr, $support:expr;
    )* })*) => {
        /// Every option of a training run, one field each; the defaults are the reference's.
        #[derive(Clone, Debug, PartialEq)]
        pub struct Options {
            $($( $(#[doc = $help])+ pub $name: $type, )*)*
            /// Which options the user wrote, and where.
            pub written: std::collections::BTreeMap<&'static str, Origin>,
        }

        impl Default for Options {
            fn default() -> Self {
                Options {
                    $($( $name: $default, )*)*
                    written: std::collections::BTreeMap::new(),
                }
            }
        }

        /// One row per option, in the order of the help.
        pub static OPTIONS: &[OptionSpec] = &[ $($( OptionSpec {
            name: stringify!($name),
            group: Group::$group,
            kind: <$type as OptionValue>::KIND,
            help: concat!($($help, "\n"),+),
            support: { use Support::*; $support },
            default: || { let value: $type = $default; OptionValue::to_toml(&value) },
            assign: |options, value| {
                options.$name = OptionValue::from_toml(value)?;
                Ok(())
            },
            read: |options| OptionValue::to_toml(&options.$name),
        }, )*)* ];
    };
}
