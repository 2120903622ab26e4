//! Networks of LyCORIS: which kind of network `network_module` and `network_args` ask for.
//!
//! `networks.loha` and `networks.lokr` train the layers of `networks.lora`; `lycoris.kohya` takes the
//! kind from `algo` and the layers from `preset`, with LyCORIS' own defaults. What would train
//! something else than LyCORIS does is refused by name.

use anyhow::{Result, bail};
use models::lora::{Algorithm, Composition, Form, Preset, PresetRanks, Rank, Split};

use super::arguments::read_number;
use super::{NetworkArgs, Options};

/// `network_module` of LyCORIS itself.
const KOHYA: &str = "lycoris.kohya";

/// Values of `network_module`.
pub const MODULES: &[&str] =
    &["networks.lora", "networks.dylora", "networks.loha", "networks.lokr", KOHYA];

/// Kinds of networks that `algo` may name.
const ALGORITHMS: &[&str] = &["lora", "locon", "loha", "lokr"];

/// Keys that are read.
pub(super) const KEYS: &[&str] = &[
    "algo",
    "preset",
    "factor",
    "decompose_both",
    "full_matrix",
    "unbalanced_factorization",
    "use_tucker",
    "use_cp",
    "use_conv_cp",
    "disable_conv_cp",
    "dora_wd",
    "wd_on_output",
    "rs_lora",
];

/// Keys that may say `False`, and why not `True`.
const REFUSED: &[(&str, &str)] = &[
    ("use_scalar", "a trained factor of the whole update is not built"),
    ("train_norm", "normalisations are not trained here"),
    ("rank_dropout_scale", "dropped rows are not made up for by the others"),
];

/// Keys of LyCORIS that change nothing here: of other kinds of networks and other base models, and
/// ways of computing the same.
const IDLE: &[&str] =
    &["bypass_mode", "block_size", "constraint", "rescaled", "train_t5xxl", "train_llm_adapter"];

/// Settings of LyCORIS' networks from `--network_args`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LycorisArgs {
    /// Kind of network.
    algo: Option<String>,
    /// Choice of layers.
    preset: Option<Preset>,
    /// Sizes of Kronecker products.
    split: Split,
    /// 3x3 convolutions get a Tucker core.
    tucker: bool,
    /// Lengths of the weights' rows are trained (DoRA).
    magnitude: bool,
    /// Updates are multiplied by alpha/√dim (rsLoRA).
    pub rs_lora: bool,
}

/// `True` or `False`, however Python or TOML writes it.
fn read_flag(key: &str, value: &str) -> Result<bool> {
    match value.to_ascii_lowercase().as_str() {
        "true" | "1" | "yes" => Ok(true),
        "false" | "0" | "no" | "none" => Ok(false),
        _ => bail!("`{key}` in `network_args` must be True or False, not: `{value}`"),
    }
}

fn read_algo(value: &str) -> Result<String> {
    let name = value.to_ascii_lowercase();
    match name.as_str() {
        name if ALGORITHMS.contains(&name) => Ok(name.to_owned()),
        "dylora" => bail!(
            "`algo` in `network_args` is not built as LyCORIS has it: `dylora`\n\
             hint: `network_module = \"networks.dylora\"` trains sd-scripts' own"
        ),
        "full" => bail!(
            "`algo` in `network_args` is not a small network: `full`\n\
             hint: `algo=lokr` with `full_matrix=True` comes near to it"
        ),
        _ => bail!(
            "`algo` in `network_args` is not built, use one of {}: `{value}`",
            ALGORITHMS.join(", ")
        ),
    }
}

fn read_preset(value: &str) -> Result<Preset> {
    let known = Preset::NAMES.into_iter().find(|(name, _)| *name == value);
    known.map(|(_, preset)| preset).ok_or_else(|| {
        let names = Preset::NAMES.map(|(name, _)| name).join(", ");
        anyhow::anyhow!(
            "`preset` in `network_args` is not one of {names}: `{value}`\n\
             hint: files with presets of your own are not read"
        )
    })
}

impl LycorisArgs {
    /// Takes a pair; `false` where the key is not LyCORIS'.
    pub(super) fn set(&mut self, key: &str, value: &str) -> Result<bool> {
        match key {
            "algo" => self.algo = Some(read_algo(value)?),
            "preset" => self.preset = Some(read_preset(value)?),
            "factor" => self.split.factor = read_number("network_args", key, value)?,
            "decompose_both" => self.split.decompose_both = read_flag(key, value)?,
            "full_matrix" => self.split.full_matrix = read_flag(key, value)?,
            "unbalanced_factorization" => self.split.unbalanced = read_flag(key, value)?,
            "use_tucker" | "use_cp" | "use_conv_cp" => self.tucker |= read_flag(key, value)?,
            "disable_conv_cp" => self.tucker |= !read_flag(key, value)?,
            "dora_wd" => self.magnitude = read_flag(key, value)?,
            "rs_lora" => self.rs_lora = read_flag(key, value)?,
            "wd_on_output" if !read_flag(key, value)? => bail!(
                "`wd_on_output=False` in `network_args` is not built: lengths are trained by output"
            ),
            "wd_on_output" => {}
            _ if IDLE.contains(&key) => {}
            _ => {
                let Some((_, reason)) = REFUSED.iter().find(|(name, _)| *name == key) else {
                    return Ok(false);
                };
                if read_flag(key, value)? {
                    bail!("`{key}` in `network_args` cannot be True: {reason}");
                }
            }
        }
        Ok(true)
    }
}

impl Options {
    /// `network_module`, the default where it is not given.
    pub fn network_module_name(&self) -> &str {
        self.network_module.as_deref().unwrap_or("networks.lora")
    }

    /// The kind of network, an error naming what is not built.
    pub fn read_algorithm(&self, args: &NetworkArgs) -> Result<Algorithm> {
        let (module, lycoris) = (self.network_module_name(), &args.lycoris);
        if module != KOHYA {
            for (key, written) in
                [("algo", lycoris.algo.is_some()), ("preset", lycoris.preset.is_some())]
            {
                if written {
                    bail!(
                        "`{key}` in `network_args` needs another `network_module`: `{module}`\n\
                         hint: `network_module = \"{KOHYA}\"` reads it"
                    );
                }
            }
        }
        let form = match (module, lycoris.algo.as_deref()) {
            ("networks.lora", _) | (KOHYA, None | Some("lora" | "locon")) => Form::LowRank,
            ("networks.loha", _) | (KOHYA, Some("loha")) => Form::Hadamard,
            ("networks.lokr", _) | (KOHYA, _) => Form::Kronecker(lycoris.split),
            ("networks.dylora", _) if lycoris.tucker || lycoris.magnitude || lycoris.rs_lora => {
                bail!(
                    "`use_tucker`, `dora_wd` and `rs_lora` in `network_args` do not go with: `{module}`"
                )
            }
            ("networks.dylora", _) => {
                return Ok(Algorithm::DyLora { unit: args.unit.unwrap_or(1) });
            }
            _ => bail!(
                "`network_module` is not built, use one of {}: `{module}`",
                MODULES.join(", ")
            ),
        };
        let (tucker, magnitude) = (lycoris.tucker, lycoris.magnitude);
        Ok(match form {
            Form::LowRank if !tucker && !magnitude => Algorithm::LowRank,
            _ => Algorithm::Composed(Composition { form, tucker, magnitude }),
        })
    }

    /// Layers and ranks of `lycoris.kohya`; `None` with other networks.
    pub fn read_preset_ranks(&self, args: &NetworkArgs) -> Option<PresetRanks> {
        if self.network_module_name() != KOHYA {
            return None;
        }
        let written = |key: &str| args.pairs.iter().any(|(other, _)| other == key);
        let (dim, alpha) = (self.network_rank(), self.network_alpha);
        let conv_alpha = if written("conv_alpha") { args.conv_alpha } else { alpha };
        Some(PresetRanks {
            preset: args.lycoris.preset.unwrap_or(Preset::Full),
            linear: Rank::new(dim, alpha as f32),
            conv: Rank::new(args.conv_dim.unwrap_or(dim), conv_alpha as f32),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(module: &str, items: &[&str]) -> Options {
        let list = items.iter().map(|item| (*item).to_owned()).collect();
        let network_module = Some(module.to_owned());
        Options { network_module, network_args: Some(list), ..Options::default() }
    }

    fn algorithm(module: &str, items: &[&str]) -> Result<Algorithm> {
        let options = options(module, items);
        options.read_algorithm(&options.read_network_args()?)
    }

    #[test]
    fn modules_and_arguments_choose_the_kind() {
        let composed =
            |form, tucker, magnitude| Algorithm::Composed(Composition { form, tucker, magnitude });
        let split = Split { factor: 8, decompose_both: true, ..Split::default() };
        let cases: [(&str, &[&str], Algorithm); 9] = [
            ("networks.lora", &["rs_lora=True"], Algorithm::LowRank),
            ("networks.lora", &["dora_wd=True"], composed(Form::LowRank, false, true)),
            ("networks.dylora", &["unit=2"], Algorithm::DyLora { unit: 2 }),
            ("networks.loha", &["use_tucker=True"], composed(Form::Hadamard, true, false)),
            (
                "networks.lokr",
                &["factor=8", "decompose_both=true"],
                composed(Form::Kronecker(split), false, false),
            ),
            (KOHYA, &[], Algorithm::LowRank),
            (KOHYA, &["algo=LoCon", "use_cp=1"], composed(Form::LowRank, true, false)),
            (KOHYA, &["algo=loha", "disable_conv_cp=True"], composed(Form::Hadamard, false, false)),
            (
                KOHYA,
                &["algo=lokr", "dora_wd=True", "wd_on_output=True", "use_scalar=False"],
                composed(Form::Kronecker(Split::default()), false, true),
            ),
        ];
        for (module, items, want) in cases {
            assert_eq!(algorithm(module, items).unwrap(), want, "{module} {items:?}");
        }
    }

    #[test]
    fn what_is_not_built_is_named() {
        let cases: [(&str, &[&str], &str); 11] = [
            ("networks.lora_fa", &[], "networks.lora_fa"),
            ("networks.lora", &["algo=loha"], "`algo` in `network_args` needs another"),
            ("networks.loha", &["preset=full"], "`preset` in `network_args` needs another"),
            ("networks.dylora", &["dora_wd=True"], "do not go with: `networks.dylora`"),
            (KOHYA, &["algo=boft"], "`boft`"),
            (KOHYA, &["algo=full"], "`algo=lokr` with `full_matrix=True`"),
            (KOHYA, &["preset=mine.toml"], "presets of your own"),
            (KOHYA, &["train_norm=True"], "normalisations are not trained"),
            (KOHYA, &["dora_wd=maybe"], "True or False"),
            (KOHYA, &["wd_on_output=False"], "by output"),
            (KOHYA, &["algoo=loha"], "did you mean `algo`?"),
        ];
        for (module, items, want) in cases {
            let message = algorithm(module, items).unwrap_err().to_string();
            assert!(message.contains(want), "{module} {items:?}: {message}");
        }
    }

    #[test]
    fn presets_have_the_ranks_that_lycoris_takes() {
        let ranks = |items: &[&str]| {
            let options =
                Options { network_dim: Some(8), network_alpha: 2., ..options(KOHYA, items) };
            options.read_preset_ranks(&options.read_network_args().unwrap()).unwrap()
        };
        let (linear, conv) = (Rank::new(8, 2.), Rank::new(8, 2.));
        assert_eq!(ranks(&[]), PresetRanks { preset: Preset::Full, linear, conv });
        let got = ranks(&["preset=attn-mlp", "conv_dim=4", "conv_alpha=1"]);
        let conv = Rank::new(4, 1.);
        assert_eq!(got, PresetRanks { preset: Preset::AttentionMlp, linear, conv });
        let other = options("networks.loha", &[]);
        assert_eq!(other.read_preset_ranks(&other.read_network_args().unwrap()), None);
    }
}
