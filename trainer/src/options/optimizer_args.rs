//! Settings of the optimizer: `optimizer_args`, typed.

use super::Options;
use super::arguments::{read_number, refuse_key, split_pairs};
use crate::metadata::{python_float, python_literal};
use anyhow::{Result, bail};

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

/// Keys of PyTorch's AdamW that are not built here.
const LATER_ADAMW_KEYS: &[&str] =
    &["amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused"];

impl Options {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn adamw(items: &[&str]) -> Result<AdamwArgs> {
        let list = items.iter().map(|item| (*item).to_owned()).collect();
        Options { optimizer_args: Some(list), ..Options::default() }.read_adamw_args()
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
