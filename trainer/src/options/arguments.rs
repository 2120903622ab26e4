//! The `key=value` lists: settings of the network and of the optimizer, typed.

use super::Options;
use super::suggest::closest;
use crate::metadata::{python_float, python_literal};
use anyhow::{Result, bail};

/// Settings of `networks.lora` from `--network_args`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct NetworkArgs {
    /// Rank of LoRA on 3x3 convolutions; `None`: they are not trained.
    pub conv_dim: Option<usize>,
    /// Alpha of these; 1 when only `conv_dim` is given.
    pub conv_alpha: f64,
    /// Every pair as written, for the metadata.
    pub pairs: Vec<(String, String)>,
}

/// Settings of AdamW from `--optimizer_args`.
#[derive(Clone, Debug, PartialEq)]
pub struct AdamwArgs {
    /// Decoupled weight decay. Default 0.01.
    pub weight_decay: f64,
    /// Decay of the running means. Default (0.9, 0.999).
    pub betas: (f64, f64),
    /// Added to the denominator. Default 1e-8.
    pub eps: f64,
    /// The settings that were written, as Python would print them: `weight_decay=0.1,eps=1e-06`.
    pub python_text: String,
}

/// Keys of `networks.lora` that exist in sd-scripts but are not built here yet.
const LATER_NETWORK_KEYS: &[&str] = &[
    "dropout",
    "rank_dropout",
    "module_dropout",
    "block_dims",
    "block_alphas",
    "conv_block_dims",
    "conv_block_alphas",
    "down_lr_weight",
    "mid_lr_weight",
    "up_lr_weight",
    "block_lr_zero_threshold",
    "loraplus_lr_ratio",
    "loraplus_unet_lr_ratio",
    "loraplus_text_encoder_lr_ratio",
    "unit",
    "verbose",
];

/// Keys of PyTorch's AdamW that are not built here.
const LATER_ADAMW_KEYS: &[&str] =
    &["amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused"];

impl Options {
    /// The settings in `network_args`. Errors name the pair.
    pub fn read_network_args(&self) -> Result<NetworkArgs> {
        let mut args = NetworkArgs { conv_alpha: 1.0, ..NetworkArgs::default() };
        for (key, value) in split_pairs("network_args", self.network_args.as_deref())? {
            match key.as_str() {
                "conv_dim" => args.conv_dim = Some(read_number("network_args", &key, &value)?),
                "conv_alpha" => args.conv_alpha = read_number("network_args", &key, &value)?,
                _ => {
                    return refuse_key(
                        "network_args",
                        &key,
                        LATER_NETWORK_KEYS,
                        &["conv_dim", "conv_alpha"],
                    );
                }
            }
            args.pairs.push((key, value));
        }
        if args.conv_dim == Some(0) {
            bail!(
                "`network_args` sets a rank of 0: `conv_dim=0`\nhint: leave `conv_dim` out to train no 3x3 convolutions"
            );
        }
        Ok(args)
    }

    /// The settings in `optimizer_args`, for AdamW. Errors name the pair.
    pub fn read_adamw_args(&self) -> Result<AdamwArgs> {
        let mut args = AdamwArgs {
            weight_decay: 0.01,
            betas: (0.9, 0.999),
            eps: 1e-8,
            python_text: String::new(),
        };
        let mut written = Vec::new();
        for (key, value) in split_pairs("optimizer_args", self.optimizer_args.as_deref())? {
            match key.as_str() {
                "weight_decay" => args.weight_decay = read_number("optimizer_args", &key, &value)?,
                "eps" => args.eps = read_number("optimizer_args", &key, &value)?,
                "betas" => args.betas = read_betas(&value)?,
                _ => {
                    return refuse_key(
                        "optimizer_args",
                        &key,
                        LATER_ADAMW_KEYS,
                        &["weight_decay", "betas", "eps"],
                    );
                }
            }
            let shown = match key.as_str() {
                "betas" => {
                    format!("({}, {})", python_float(args.betas.0), python_float(args.betas.1))
                }
                _ => python_literal(&value),
            };
            written.push(format!("{key}={shown}"));
        }
        if args.weight_decay < 0.0 || args.eps < 0.0 {
            bail!("`optimizer_args` must not be negative: `{}`", written.join(" "));
        }
        args.python_text = written.join(",");
        Ok(args)
    }

    /// Rank of the network: 4 where none is given, as in the reference.
    pub fn network_rank(&self) -> usize {
        self.network_dim.unwrap_or(4)
    }
}

/// Splits every `key=value`.
fn split_pairs(option: &str, items: Option<&[String]>) -> Result<Vec<(String, String)>> {
    let mut pairs: Vec<(String, String)> = Vec::new();
    for item in items.unwrap_or_default() {
        let Some((key, value)) = item.split_once('=') else {
            bail!("`{option}` takes `key=value`, not: `{item}`");
        };
        let key = key.trim().to_owned();
        if pairs.iter().any(|(other, _)| *other == key) {
            bail!("`{option}` sets a key twice: `{key}`");
        }
        pairs.push((key, value.trim().to_owned()));
    }
    Ok(pairs)
}

/// Reads one number of a pair.
fn read_number<T: std::str::FromStr>(option: &str, key: &str, value: &str) -> Result<T> {
    let kind = if key.ends_with("dim") { "a whole number" } else { "a number" };
    match value.parse() {
        Ok(number) if value.parse::<f64>().is_ok_and(f64::is_finite) => Ok(number),
        _ => bail!("`{key}` in `{option}` must be {kind}, not: `{value}`"),
    }
}

/// Reads `0.9,0.999`, with or without parentheses.
fn read_betas(value: &str) -> Result<(f64, f64)> {
    let inner = value.trim_matches(|c: char| "()[]".contains(c) || c.is_whitespace());
    let numbers: Vec<f64> = inner.split(',').filter_map(|part| part.trim().parse().ok()).collect();
    match numbers[..] {
        [first, second]
            if inner.split(',').count() == 2
                && [first, second].iter().all(|beta| (0.0..1.0).contains(beta)) =>
        {
            Ok((first, second))
        }
        _ => bail!(
            "`betas` in `optimizer_args` must be two numbers from 0 up to but not 1, like `betas=0.9,0.999`, not: `{value}`"
        ),
    }
}

/// Refuses a key, telling "not built yet" from "never heard of".
fn refuse_key<T>(option: &str, key: &str, later: &[&str], known: &[&str]) -> Result<T> {
    if later.contains(&key) {
        bail!("`{key}` in `{option}` is not supported yet");
    }
    let all: Vec<&str> = known.iter().chain(later).copied().collect();
    match closest(key, &all) {
        Some(name) => bail!("unknown key in `{option}`: `{key}`\nhint: did you mean `{name}`?"),
        None => {
            bail!("unknown key in `{option}`: `{key}`\nhint: known keys are {}", known.join(", "))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network(items: &[&str]) -> Result<NetworkArgs> {
        let list = items.iter().map(|item| (*item).to_owned()).collect();
        Options { network_args: Some(list), ..Options::default() }.read_network_args()
    }

    fn adamw(items: &[&str]) -> Result<AdamwArgs> {
        let list = items.iter().map(|item| (*item).to_owned()).collect();
        Options { optimizer_args: Some(list), ..Options::default() }.read_adamw_args()
    }

    #[test]
    fn network_keys() {
        let args = network(&["conv_dim=4", "conv_alpha=0.5"]).unwrap();
        assert_eq!((args.conv_dim, args.conv_alpha), (Some(4), 0.5));
        assert_eq!(network(&["conv_dim=8"]).unwrap().conv_alpha, 1.0);
        assert_eq!(network(&[]).unwrap().conv_dim, None);
        let message = |item| network(&[item]).unwrap_err().to_string();
        assert_eq!(message("block_dims=1"), "`block_dims` in `network_args` is not supported yet");
        assert!(message("con_dim=1").contains("did you mean `conv_dim`?"));
        assert!(message("conv_dim").contains("`key=value`"));
        assert!(message("conv_dim=4.5").contains("a whole number"));
        assert!(message("conv_dim=0").contains("rank of 0"));
        assert!(network(&["conv_dim=1", "conv_dim=2"]).is_err());
    }

    #[test]
    fn adamw_keys() {
        let args = adamw(&["weight_decay=1e-1", "betas=(0.9, 0.99)", "eps=1e-06"]).unwrap();
        assert_eq!((args.weight_decay, args.betas, args.eps), (0.1, (0.9, 0.99), 1e-6));
        assert_eq!(args.python_text, "weight_decay=0.1,betas=(0.9, 0.99),eps=1e-06");
        assert_eq!(adamw(&[]).unwrap().python_text, "");
        assert!(adamw(&["betas=0.9"]).is_err());
        assert!(adamw(&["betas=0.9,1.0"]).is_err());
        assert!(adamw(&["weight_decay=-1"]).is_err());
        assert!(adamw(&["eps=nan"]).is_err());
        assert!(adamw(&["amsgrad=True"]).unwrap_err().to_string().contains("not supported yet"));
    }
}
