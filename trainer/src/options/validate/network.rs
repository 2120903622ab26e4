//! Rules of the network and its settings.

use super::Check;

impl Check<'_> {
    /// Network and its settings.
    pub(super) fn network(&mut self) {
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
        if let Err(fault) = o.read_network_args() {
            self.problems.push(fault.to_string());
        }
    }
}
