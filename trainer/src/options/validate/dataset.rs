//! Rules of where images come from.

use super::Check;

impl Check<'_> {
    /// Where images come from, and options that exclude each other.
    pub(super) fn dataset(&mut self, inline: bool, notes: &mut Vec<String>) {
        let o = self.options;
        let folders = o.train_data_dir.is_some() || o.in_json.is_some();
        match (inline, &o.dataset_config) {
            (true, Some(_)) => self.problem(
                "dataset_config",
                "is given although the config file holds `[[datasets]]`",
                "keep one of them",
            ),
            (false, None) if !folders => self.problems.push(
                "no dataset is named\nhint: give `dataset_config`, `[[datasets]]` in the config file, or `train_data_dir`".to_owned(),
            ),
            (false, None) => {
                self.forbid(o.resolution.is_none(), "resolution", "is missing", "add `resolution = 512`");
                self.forbid(
                    o.train_data_dir.is_none(),
                    "in_json",
                    "needs the folder of its images",
                    "add `train_data_dir`",
                );
            }
            _ if folders || o.reg_data_dir.is_some() => notes.push(
                "`train_data_dir`, `reg_data_dir` and `in_json` are ignored, since a dataset config is given".to_owned(),
            ),
            _ => {}
        }
        for (name, set) in [("color_aug", o.color_aug), ("random_crop", o.random_crop)] {
            self.forbid(
                o.cache_latents && set,
                name,
                "changes images at random, which `cache_latents` excludes",
                "remove one of the two",
            );
        }
        self.forbid(
            o.cache_text_encoder_outputs && !o.network_train_unet_only,
            "cache_text_encoder_outputs",
            "keeps what the text encoders say before training, so they cannot be trained",
            "add `network_train_unet_only`, or train the text encoders without the cache",
        );
        if o.min_bucket_reso > o.max_bucket_reso {
            let fault = format!(
                "is above `max_bucket_reso`: `{}` > `{}`",
                o.min_bucket_reso, o.max_bucket_reso
            );
            let name =
                if o.is_written("min_bucket_reso") { "min_bucket_reso" } else { "max_bucket_reso" };
            match name {
                "min_bucket_reso" => self.problem(name, &fault, ""),
                _ => self.problem(
                    name,
                    &format!(
                        "is below `min_bucket_reso`: `{}` < `{}`",
                        o.max_bucket_reso, o.min_bucket_reso
                    ),
                    "",
                ),
            }
        }
        if o.bucket_reso_steps == 0 || !o.bucket_reso_steps.is_multiple_of(8) {
            let fault = format!(
                "must be a multiple of 8, since latents are 8 times smaller than images: `{}`",
                o.bucket_reso_steps
            );
            self.problem("bucket_reso_steps", &fault, "64 is usual");
        }
    }
}
