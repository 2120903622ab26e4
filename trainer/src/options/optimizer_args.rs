//! The chosen optimizer with `optimizer_args`.

use anyhow::Result;

use super::Options;
use super::arguments::split_pairs;
use crate::optimizer::{Choice, choose};

impl Options {
    /// The optimizer and its settings. Errors name the pair.
    pub fn choose_optimizer(&self) -> Result<Choice> {
        let pairs = split_pairs("optimizer_args", self.optimizer_args.as_deref())?;
        choose(&self.optimizer_type, &pairs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choice(name: &str, items: &[&str]) -> Result<Choice> {
        let list = items.iter().map(|item| (*item).to_owned()).collect();
        let options = Options {
            optimizer_type: name.to_owned(),
            optimizer_args: Some(list),
            ..Options::default()
        };
        options.choose_optimizer()
    }

    fn fault(name: &str, items: &[&str]) -> String {
        match choice(name, items) {
            Ok(_) => panic!("{name} {items:?} must be refused"),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn settings_are_written_as_the_reference_writes_them() {
        let text = |name: &str, items: &[&str]| {
            let choice = choice(name, items).unwrap();
            format!("{}({})", choice.class, choice.python_text)
        };
        let items = ["weight_decay=1e-1", "betas=(0.9, 0.99)", "eps=1e-06"];
        assert_eq!(
            text("", &items),
            "torch.optim.adamw.AdamW(weight_decay=0.1,betas=(0.9, 0.99),eps=1e-06)"
        );
        assert_eq!(text("adamw", &[]), "torch.optim.adamw.AdamW()");
        assert_eq!(text("SGDNesterov", &[]), "torch.optim.sgd.SGD(momentum=0.9)");
        assert_eq!(
            text("adafactor", &["relative_step=False", "scale_parameter=False"]),
            "transformers.optimization.Adafactor(relative_step=False,scale_parameter=False)"
        );
        assert_eq!(
            text("AdaFactor", &["relative_step=False", "warmup_init=True"]),
            "transformers.optimization.Adafactor(warmup_init=True,relative_step=True)"
        );
        assert_eq!(
            text("prodigyopt.Prodigy", &["d_coef=2", "decouple=True"]),
            "prodigyopt.prodigy.Prodigy(d_coef=2,decouple=True)"
        );
        assert!(text("pytorch_optimizer.CAME", &[]).starts_with("pytorch_optimizer.optimizer."));
        assert!(text("came_pytorch.CAME", &[]).starts_with("came_pytorch.CAME.CAME("));
    }

    #[test]
    fn wrong_settings_are_refused_with_what_there_is() {
        assert!(fault("", &["betas=0.9"]).contains("must be two numbers"));
        assert!(fault("", &["betas=0.9,1.0"]).contains("from 0 up to but not 1"));
        assert!(fault("", &["weight_decay=-1"]).contains("a number not below 0"));
        assert!(fault("", &["eps=nan"]).contains("not a value that Python would read: `nan`"));
        assert!(fault("Lion", &["eps=1e-8"]).contains("Lion has betas, weight_decay"));
        assert!(fault("Lion", &["weight_deca=0.1"]).contains("did you mean `weight_decay`?"));
        assert!(fault("Prodigy", &["slice_p=0"]).contains("a whole number above 0"));
        assert!(fault("SGD", &["nesterov=True"]).contains("`momentum` above 0"));
        assert!(fault("AdamWScheduleFree", &["betas=0.0,0.9"]).contains("divides by it"));
    }

    #[test]
    fn unknown_optimizers_are_refused_with_all_names() {
        let message = fault("Prodgy", &[]);
        assert!(message.contains("did you mean `Prodigy`?"), "{message}");
        assert!(message.contains("AdamW, AdamW8bit"), "{message}");
        assert!(fault("torch.optim.LBFGS", &[]).contains("of this name here: `torch.optim.LBFGS`"));
    }

    #[test]
    fn keys_that_only_choose_how_to_compute_are_noted() {
        let choice = choice("AdamW", &["fused=True"]).unwrap();
        assert!(choice.notes[0].contains("`fused` in `optimizer_args` has no effect here"));
        assert_eq!(choice.python_text, "fused=True");
    }
}
