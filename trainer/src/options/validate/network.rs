//! Rules of the network and its settings.

use super::Check;
use crate::options::NetworkArgs;
use models::lora::BlockLayout;

impl Check<'_> {
    /// Network and its settings.
    pub(super) fn network(&mut self, notes: &mut Vec<String>) {
        let o = self.options;
        if let Some(module) = o.network_module.as_deref().filter(|name| *name != "networks.lora") {
            let fault = format!("is not supported yet: `{module}`");
            self.problem("network_module", &fault, "use `networks.lora`");
        }
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
        match o.read_network_args() {
            Err(fault) => self.problems.push(fault.to_string()),
            Ok(args) => {
                self.block_lists(&args, notes);
                self.idle_arguments(&args, notes);
            }
        }
    }

    /// Learning rates and ranks by block.
    fn block_lists(&mut self, args: &NetworkArgs, notes: &mut Vec<String>) {
        let o = self.options;
        let rates = match args.read_block_rates(BlockLayout::Sd, notes) {
            Ok(rates) => rates,
            Err(fault) => return self.problems.push(format!("in `network_args`: {fault}")),
        };
        let rank = (o.network_rank(), o.network_alpha);
        if let Err(fault) = args.read_block_ranks(BlockLayout::Sd, rank, rates.as_ref()) {
            self.problems.push(format!("in `network_args`: {fault}"));
        }
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
        for key in ["dropout", "rank_dropout", "module_dropout", "unit"] {
            if written(key) {
                self.problems.push(format!("`{key}` in `network_args` is not supported yet"));
            }
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
