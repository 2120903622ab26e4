//! Settings of the network: `network_args`, typed.

use super::Options;
use super::arguments::{read_number, refuse_key, split_pairs};
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

    /// Rank of the network: 4 where none is given, as in the reference.
    pub fn network_rank(&self) -> usize {
        self.network_dim.unwrap_or(4)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network(items: &[&str]) -> Result<NetworkArgs> {
        let list = items.iter().map(|item| (*item).to_owned()).collect();
        Options { network_args: Some(list), ..Options::default() }.read_network_args()
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
}
