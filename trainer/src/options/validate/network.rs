//! Rules of the network and its settings.

use super::Check;
use crate::options::NetworkArgs;
use models::lora::BlockLayout;

impl Check<'_> {
    /// Network and its settings.
    pub(super) fn network(&mut self, notes: &mut Vec<String>) {
        let o = self.options;
        self.forbid(
            o.network_train_unet_only && o.network_train_text_encoder_only,
            "network_train_unet_only",
            "and `network_train_text_encoder_only` together leave nothing to train",
            "give one of them, or neither to train both parts",
        );
        self.forbid(
            o.dim_from_weights && o.network_weights.is_none(),
            "dim_from_weights",
            "needs the file to take the rank from",
            "add `network_weights`",
        );
        self.forbid(
            o.network_dropout.is_some_and(|p| !(0. ..1.).contains(&p)),
            "network_dropout",
            "must be a probability from 0 up to but not 1",
            "0.1 is a usual value",
        );
        self.forbid(
            o.scale_weight_norms.is_some_and(|limit| limit < 0. || !limit.is_finite()),
            "scale_weight_norms",
            "must not be negative",
            "1 is a usual value, 0 turns it off",
        );
        let files = o.base_weights.as_ref().map_or(0, Vec::len);
        let multipliers = o.base_weights_multiplier.as_ref().map_or(0, Vec::len);
        if multipliers > files {
            notes.push(format!(
                "`base_weights_multiplier` has {multipliers} numbers for {files} files of \
                 `base_weights`: the rest has no effect"
            ));
        }
        match o.read_network_args() {
            Err(fault) => self.problems.push(fault.to_string()),
            Ok(args) => {
                self.algorithm(&args, notes);
                self.dylora(&args, notes);
                self.block_lists(&args, notes);
                self.idle_arguments(&args, notes);
            }
        }
    }

    /// Ranks that are trained a few at a time.
    fn dylora(&mut self, args: &NetworkArgs, notes: &mut Vec<String>) {
        let o = self.options;
        if !o.is_dylora() {
            return;
        }
        let (rank, unit) = (o.network_rank(), args.unit.unwrap_or(1));
        if !rank.is_multiple_of(unit) && !o.dim_from_weights {
            self.problems.push(format!(
                "`unit` in `network_args` must divide the rank of {rank}, not: `{unit}`"
            ));
        }
        if let Some(conv_dim) = args.conv_dim.filter(|dim| *dim != rank) {
            self.problems.push(format!(
                "`conv_dim` in `network_args` must be the same as `network_dim` ({rank}) with \
                 `networks.dylora`, not: `{conv_dim}`"
            ));
        }
        for (option, written) in [
            ("network_dropout", o.network_dropout.is_some_and(|p| p > 0.)),
            ("scale_weight_norms", o.scale_weight_norms.is_some_and(|limit| limit > 0.)),
        ] {
            if written {
                notes.push(format!("`{option}` has no effect with `networks.dylora`"));
            }
        }
    }

    /// Learning rates and ranks by block.
    fn block_lists(&mut self, args: &NetworkArgs, notes: &mut Vec<String>) {
        let o = self.options;
        let rank = (o.network_rank(), o.network_alpha);
        let read = |layout| {
            let rates = args.read_block_rates(layout, &mut Vec::new())?;
            args.read_block_ranks(layout, rank, rates.as_ref()).map(|_| rates)
        };
        // The model, which is not open yet, tells the number of blocks; what is odd about the lists is
        // said when it is.
        let rates = match (read(BlockLayout::Sd), read(BlockLayout::Sdxl)) {
            (Ok(rates), _) | (Err(_), Ok(rates)) => rates,
            (Err(fault), Err(other)) => {
                let (fault, other) = (fault.to_string(), other.to_string());
                return self.problems.push(match fault == other {
                    true => format!("in `network_args`: {fault}"),
                    false => format!("in `network_args`: {fault}; with SDXL {other}"),
                });
            }
        };
        let lists = &args.block_ranks;
        if rates.is_none() && lists.dims.is_none() && !lists.is_empty() {
            notes.push(
                "`block_alphas`, `conv_block_dims` and `conv_block_alphas` have no effect without \
                 `block_dims` or learning rates by block"
                    .to_owned(),
            );
        } else if lists.conv_dims.is_none() && lists.conv_alphas.is_some() {
            notes.push("`conv_block_alphas` has no effect without `conv_block_dims`".to_owned());
        }
    }

    /// Settings that are read and then not used.
    fn idle_arguments(&mut self, args: &NetworkArgs, notes: &mut Vec<String>) {
        let written = |key: &str| args.pairs.iter().any(|(other, _)| other == key);
        let module = self.options.network_module.as_deref().unwrap_or("networks.lora");
        for key in &args.idle {
            notes.push(format!("`{key}` in `network_args` has no effect with `{module}`"));
        }
        let lists = &args.block_ranks;
        if written("conv_alpha") && args.conv_dim.is_none() && lists.conv_dims.is_none() {
            notes.push("`conv_alpha` has no effect without `conv_dim`".to_owned());
        }
        if self.options.dim_from_weights
            && (args.conv_dim.is_some() || !lists.is_empty() || self.options.network_dim.is_some())
        {
            notes.push(
                "`dim_from_weights` takes all ranks from the file; those of the options have no effect"
                    .to_owned(),
            );
        }
    }
}
