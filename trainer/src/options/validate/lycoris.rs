//! Rules of the networks of LyCORIS.

use super::Check;
use crate::options::NetworkArgs;
use models::lora::{Algorithm, Form};

/// Keys of Kronecker products.
const SPLIT_KEYS: [&str; 4] =
    ["factor", "decompose_both", "full_matrix", "unbalanced_factorization"];

impl Check<'_> {
    /// Kind of network, and what does not go with it.
    pub(super) fn algorithm(&mut self, args: &NetworkArgs, notes: &mut Vec<String>) {
        let o = self.options;
        let algorithm = match o.read_algorithm(args) {
            Ok(algorithm) => algorithm,
            Err(fault) => return self.problems.push(fault.to_string()),
        };
        let written = |key: &str| args.pairs.iter().any(|(other, _)| other == key);
        let kronecker =
            matches!(algorithm, Algorithm::Composed(c) if matches!(c.form, Form::Kronecker(_)));
        for key in SPLIT_KEYS.iter().filter(|key| written(key) && !kronecker) {
            notes.push(format!("`{key}` in `network_args` has no effect without LoKr"));
        }
        let of_lycoris = o.read_preset_ranks(args).is_some();
        let rates = [&args.block_rates.down, &args.block_rates.mid, &args.block_rates.up];
        let by_block = !args.block_ranks.is_empty() || rates.iter().any(|list| list.is_some());
        if of_lycoris && by_block {
            self.problems.push(
                "ranks and learning rates by block in `network_args` do not go with: \
                 `lycoris.kohya`\nhint: `networks.lora`, `networks.loha` and `networks.lokr` have them"
                    .to_owned(),
            );
        }
        let Algorithm::Composed(composition) = algorithm else { return };
        self.forbid(
            o.scale_weight_norms.is_some_and(|limit| limit > 0.),
            "scale_weight_norms",
            "is built for LoRA alone, without `dora_wd` and `use_tucker`",
            "leave it out",
        );
        if o.network_dropout.or(args.dropout).is_some_and(|p| p > 0.) {
            notes.push(
                "`network_dropout` has no effect on this kind of network; `rank_dropout` drops rows \
                 of the update, `module_dropout` modules"
                    .to_owned(),
            );
        }
        let ratios = [args.loraplus.all, args.loraplus.unet, args.loraplus.text_encoder];
        if composition.form != Form::LowRank && ratios.iter().any(Option::is_some) {
            notes.push("LoRA+ has no effect without `lora_up`: LoHa and LoKr have none".to_owned());
        }
    }
}
