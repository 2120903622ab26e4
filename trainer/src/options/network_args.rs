//! Settings of the network: `network_args`, typed.

use super::Options;
use super::arguments::{read_number, refuse_key, split_pairs};
use super::lycoris::{self, LycorisArgs};
use anyhow::{Result, bail};
use engine::Dropouts;
use models::lora::{
    BlockLayout, BlockLrText, BlockRankText, BlockRanks, BlockRates, LoraPlus, UniformRank,
};

/// Settings from `--network_args`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct NetworkArgs {
    /// Rank of LoRA on 3x3 convolutions; `None`: they are not trained.
    pub conv_dim: Option<usize>,
    /// Alpha of these; 1 when only `conv_dim` is given.
    pub conv_alpha: f64,
    /// Probability with which an element of the hidden values is dropped; `network_dropout` wins.
    pub dropout: Option<f64>,
    /// Probability with which a rank of a module is dropped for one sample.
    pub rank_dropout: Option<f64>,
    /// Probability with which a module is left out of a step.
    pub module_dropout: Option<f64>,
    /// Ranks that DyLoRA trains together; 1 where not given.
    pub unit: Option<usize>,
    /// Ranks by block.
    pub block_ranks: BlockRankText,
    /// Learning rates by block.
    pub block_rates: BlockLrText,
    /// Learning rates of `lora_up`.
    pub loraplus: LoraPlus,
    /// Settings of LyCORIS' networks.
    pub lycoris: LycorisArgs,
    /// Every pair as written, for the metadata.
    pub pairs: Vec<(String, String)>,
    /// Keys that the kind of network does not read.
    pub idle: Vec<&'static str>,
}

/// Keys of `networks.lora` that `networks.dylora` does not read.
const NOT_DYLORA_KEYS: &[&str] = &[
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
];

/// Keys that ask for nothing here.
const IDLE_NETWORK_KEYS: &[&str] = &["verbose"];

/// Keys that are read.
const NETWORK_KEYS: &[&str] = &[
    "conv_dim",
    "conv_alpha",
    "dropout",
    "rank_dropout",
    "module_dropout",
    "unit",
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
];

impl Options {
    /// The settings in `network_args`. Errors name the pair.
    pub fn read_network_args(&self) -> Result<NetworkArgs> {
        let mut args = NetworkArgs { conv_alpha: 1.0, ..NetworkArgs::default() };
        for (key, value) in split_pairs("network_args", self.network_args.as_deref())? {
            args.set(&key, &value)?;
            args.pairs.push((key, value));
        }
        if self.is_dylora() {
            args.leave_out(NOT_DYLORA_KEYS);
        } else {
            args.leave_out(&["unit"]);
        }
        Ok(args)
    }

    /// Whether the network is one whose ranks are trained a few at a time.
    pub fn is_dylora(&self) -> bool {
        self.network_module.as_deref() == Some("networks.dylora")
    }

    /// What modules leave out in training.
    pub fn read_dropouts(&self) -> Result<Dropouts> {
        let args = self.read_network_args()?;
        // DyLoRA has none.
        let own = self.network_dropout.filter(|_| !self.is_dylora());
        let read = |value: Option<f64>| value.unwrap_or(0.) as f32;
        Ok(Dropouts {
            element: read(own.or(args.dropout)),
            rank: read(args.rank_dropout),
            module: read(args.module_dropout),
        })
    }

    /// Rank of the network: 4 where none is given, as in the reference.
    pub fn network_rank(&self) -> usize {
        self.network_dim.unwrap_or(4)
    }
}

impl NetworkArgs {
    /// Forgets the keys that this kind of network does not read, as sd-scripts passes over them.
    fn leave_out(&mut self, keys: &[&'static str]) {
        let (ranks, rates) = (&mut self.block_ranks, &mut self.block_rates);
        for key in keys {
            let was_written = match *key {
                "dropout" => self.dropout.take().is_some(),
                "rank_dropout" => self.rank_dropout.take().is_some(),
                "module_dropout" => self.module_dropout.take().is_some(),
                "unit" => self.unit.take().is_some(),
                "block_dims" => ranks.dims.take().is_some(),
                "block_alphas" => ranks.alphas.take().is_some(),
                "conv_block_dims" => ranks.conv_dims.take().is_some(),
                "conv_block_alphas" => ranks.conv_alphas.take().is_some(),
                "down_lr_weight" => rates.down.take().is_some(),
                "mid_lr_weight" => rates.mid.take().is_some(),
                "up_lr_weight" => rates.up.take().is_some(),
                _ => false,
            };
            if was_written {
                self.idle.push(key);
            }
        }
    }

    fn set(&mut self, key: &str, value: &str) -> Result<()> {
        let text = || Some(value.to_owned());
        match key {
            "conv_dim" => self.conv_dim = Some(whole(key, value)?),
            "conv_alpha" => self.conv_alpha = read_number("network_args", key, value)?,
            "dropout" => self.dropout = Some(probability(key, value)?),
            "rank_dropout" => self.rank_dropout = Some(probability(key, value)?),
            "module_dropout" => self.module_dropout = Some(probability(key, value)?),
            "unit" => self.unit = Some(whole(key, value)?),
            "block_dims" => self.block_ranks.dims = text(),
            "block_alphas" => self.block_ranks.alphas = text(),
            "conv_block_dims" => self.block_ranks.conv_dims = text(),
            "conv_block_alphas" => self.block_ranks.conv_alphas = text(),
            "down_lr_weight" => self.block_rates.down = text(),
            "mid_lr_weight" => self.block_rates.mid = text(),
            "up_lr_weight" => self.block_rates.up = text(),
            "block_lr_zero_threshold" => {
                self.block_rates.zero_threshold = read_number("network_args", key, value)?;
            }
            "loraplus_lr_ratio" => self.loraplus.all = Some(ratio(key, value)?),
            "loraplus_unet_lr_ratio" => self.loraplus.unet = Some(ratio(key, value)?),
            "loraplus_text_encoder_lr_ratio" => {
                self.loraplus.text_encoder = Some(ratio(key, value)?);
            }
            _ if IDLE_NETWORK_KEYS.contains(&key) => {}
            _ if self.lycoris.set(key, value)? => {}
            _ => {
                let known = [NETWORK_KEYS, lycoris::KEYS].concat();
                return refuse_key("network_args", key, &known);
            }
        }
        Ok(())
    }

    /// Learning rates by block, `None` where all blocks have one.
    pub fn read_block_rates(
        &self,
        layout: BlockLayout,
        notes: &mut Vec<String>,
    ) -> Result<Option<BlockRates>> {
        Ok(BlockRates::read(layout, &self.block_rates, notes)?)
    }

    /// Ranks by block, `None` where all blocks have one; as in sd-scripts, learning rates by block
    /// alone make it so too, and the other lists need `block_dims` or such rates.
    pub fn read_block_ranks(
        &self,
        layout: BlockLayout,
        (dim, alpha): (usize, f64),
        rates: Option<&BlockRates>,
    ) -> Result<Option<BlockRanks>> {
        if self.block_ranks.dims.is_none() && rates.is_none() {
            return Ok(None);
        }
        let uniform = UniformRank {
            dim,
            alpha: alpha as f32,
            conv_dim: self.conv_dim,
            conv_alpha: self.conv_alpha as f32,
        };
        Ok(Some(BlockRanks::read(layout, &self.block_ranks, uniform, rates)?))
    }
}

/// A whole number from 1.
fn whole(key: &str, value: &str) -> Result<usize> {
    let number = value.parse::<usize>();
    match number {
        Ok(0) if key == "conv_dim" => bail!(
            "`network_args` sets a rank of 0: `conv_dim=0`\nhint: leave `conv_dim` out to train no 3x3 convolutions"
        ),
        Ok(number) if number > 0 => Ok(number),
        _ => bail!("`{key}` in `network_args` must be a whole number from 1, not: `{value}`"),
    }
}

/// From 0 up to, but not, 1: nothing would be left to learn.
fn probability(key: &str, value: &str) -> Result<f64> {
    match value.parse::<f64>() {
        Ok(number) if (0.0..1.0).contains(&number) => Ok(number),
        _ => bail!(
            "`{key}` in `network_args` must be a probability from 0 up to but not 1, not: `{value}`"
        ),
    }
}

/// A factor above 0.
fn ratio(key: &str, value: &str) -> Result<f64> {
    match value.parse::<f64>() {
        Ok(number) if number > 0. && number.is_finite() => Ok(number),
        _ => bail!("`{key}` in `network_args` must be a number above 0, not: `{value}`"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network(items: &[&str]) -> Result<NetworkArgs> {
        network_of("networks.lora", items)
    }

    fn network_of(module: &str, items: &[&str]) -> Result<NetworkArgs> {
        let network_args = Some(items.iter().map(|item| (*item).to_owned()).collect());
        let network_module = Some(module.to_owned());
        Options { network_args, network_module, ..Options::default() }.read_network_args()
    }

    #[test]
    fn dylora_reads_its_own_keys() {
        let args = network_of("networks.dylora", &["unit=4", "block_dims=1", "dropout=0.5"]);
        let args = args.unwrap();
        assert_eq!((args.unit, args.dropout), (Some(4), None));
        assert_eq!(args.idle, ["dropout", "block_dims"]);
        let dropouts = |module: &str| {
            let network_args = Some(vec!["dropout=0.5".to_owned(), "rank_dropout=0.25".to_owned()]);
            let network_module = Some(module.to_owned());
            let mut options = Options { network_args, network_module, ..Options::default() };
            let read = options.read_dropouts().unwrap();
            options.network_dropout = Some(0.125);
            (read, options.read_dropouts().unwrap())
        };
        let (own, given) = dropouts("networks.lora");
        assert_eq!((own.element, given.element, own.rank), (0.5, 0.125, 0.25));
        let none = (Dropouts::default(), Dropouts::default());
        assert_eq!(dropouts("networks.dylora"), none);
    }

    #[test]
    fn network_keys() {
        let args = network(&["conv_dim=4", "conv_alpha=0.5"]).unwrap();
        assert_eq!((args.conv_dim, args.conv_alpha), (Some(4), 0.5));
        assert_eq!(network(&["conv_dim=8"]).unwrap().conv_alpha, 1.0);
        assert_eq!(network(&[]).unwrap().conv_dim, None);
        let message = |item| network(&[item]).unwrap_err().to_string();
        assert!(message("con_dim=1").contains("did you mean `conv_dim`?"));
        assert!(message("blok_dims=1").contains("did you mean `block_dims`?"));
        assert!(message("conv_dim").contains("`key=value`"));
        assert!(message("conv_dim=4.5").contains("a whole number"));
        assert!(message("conv_dim=0").contains("rank of 0"));
        assert!(message("unit=0").contains("a whole number from 1"));
        assert!(message("rank_dropout=1").contains("a probability"));
        assert!(message("module_dropout=-0.1").contains("a probability"));
        assert!(message("loraplus_lr_ratio=0").contains("above 0"));
        assert!(network(&["conv_dim=1", "conv_dim=2"]).is_err());
        assert_eq!(network(&["verbose=True"]).unwrap().pairs.len(), 1);
    }

    #[test]
    fn every_key_is_read() {
        let args = network(&[
            "dropout=0.1",
            "rank_dropout=0.2",
            "module_dropout=0.3",
            "unit=4",
            "down_lr_weight=sine",
            "mid_lr_weight=0.5",
            "up_lr_weight=cosine+.25",
            "block_lr_zero_threshold=0.1",
            "loraplus_lr_ratio=16",
            "loraplus_unet_lr_ratio=8",
            "loraplus_text_encoder_lr_ratio=4",
        ])
        .unwrap();
        assert_eq!((args.dropout, args.rank_dropout), (Some(0.1), Some(0.2)));
        assert_eq!((args.module_dropout, args.unit), (Some(0.3), None));
        assert_eq!(args.idle, ["unit"]);
        assert_eq!(args.loraplus.all, Some(16.));
        assert_eq!((args.loraplus.unet, args.loraplus.text_encoder), (Some(8.), Some(4.)));
        let mut notes = Vec::new();
        let rates = args.read_block_rates(BlockLayout::Sd, &mut notes).unwrap().unwrap();
        assert_eq!(rates.weights()[12], 0.5);
        // The first block of the sine and the last of the cosine, before its offset, are 0.
        assert_eq!((rates.weights()[0], rates.weights()[24]), (0., 0.25));
        assert!(notes.is_empty());
        let ranks = args.read_block_ranks(BlockLayout::Sd, (4, 1.), Some(&rates)).unwrap();
        assert!(ranks.is_some());
        let plain = network(&["block_alphas=1"]).unwrap();
        assert_eq!(plain.read_block_ranks(BlockLayout::Sd, (4, 1.), None).unwrap(), None);
    }
}
