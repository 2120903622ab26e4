//! What the metadata of a file say of its training and making, in the few words people ask for.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::Value;

/// Facts as the file tells them; absent ones are left out.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Training {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub title: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base_model: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base_model_version: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network_module: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network_dim: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network_alpha: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub steps: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epochs: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub images: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resolution: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub learning_rate: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unet_learning_rate: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text_encoder_learning_rate: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub optimizer: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scheduler: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prediction: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub architecture: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub date: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub merged_from: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub comment: Option<String>,
}

impl Training {
    /// Reads sd-scripts' and ModelSpec's keys.
    pub fn of(metadata: &BTreeMap<String, String>) -> Self {
        let get = |key: &str| {
            let value = metadata.get(key).filter(|value| !value.is_empty() && *value != "None")?;
            Some(value.clone())
        };
        let pair = |done: &str, planned: &str| match (get(done), get(planned)) {
            (Some(done), Some(planned)) if done != planned => Some(format!("{done} of {planned}")),
            (done, planned) => done.or(planned),
        };
        Self {
            title: get("modelspec.title").or_else(|| get("ss_output_name")),
            base_model: get("ss_sd_model_name"),
            base_model_version: get("ss_base_model_version"),
            network_module: get("ss_network_module"),
            network_dim: get("ss_network_dim"),
            network_alpha: get("ss_network_alpha"),
            steps: pair("ss_steps", "ss_max_train_steps"),
            epochs: pair("ss_epoch", "ss_num_epochs"),
            images: get("ss_num_train_images"),
            resolution: dataset_resolutions(metadata)
                .or_else(|| get("ss_resolution"))
                .or_else(|| get("modelspec.resolution")),
            learning_rate: get("ss_learning_rate"),
            unet_learning_rate: get("ss_unet_lr"),
            text_encoder_learning_rate: get("ss_text_encoder_lr"),
            optimizer: get("ss_optimizer"),
            scheduler: get("ss_lr_scheduler"),
            prediction: get("modelspec.prediction_type"),
            architecture: get("modelspec.architecture"),
            date: get("modelspec.date"),
            merged_from: get("modelspec.merged_from"),
            comment: get("ss_training_comment"),
        }
    }

    /// (what, value) of all facts at hand, in the order of the fields.
    pub fn rows(&self) -> Vec<(String, String)> {
        let Ok(Value::Object(fields)) = serde_json::to_value(self) else { return Vec::new() };
        // The order of the fields, which a JSON object need not keep.
        const ORDER: [&str; 20] = [
            "title",
            "base_model",
            "base_model_version",
            "architecture",
            "prediction",
            "network_module",
            "network_dim",
            "network_alpha",
            "steps",
            "epochs",
            "images",
            "resolution",
            "learning_rate",
            "unet_learning_rate",
            "text_encoder_learning_rate",
            "optimizer",
            "scheduler",
            "date",
            "merged_from",
            "comment",
        ];
        let row = |name: &&str| {
            let value = fields.get(*name)?.as_str()?;
            Some((name.replace('_', " "), value.to_owned()))
        };
        ORDER.iter().filter_map(row).collect()
    }
}

/// `512x512, 768x512`: the resolutions of the datasets, each once.
fn dataset_resolutions(metadata: &BTreeMap<String, String>) -> Option<String> {
    let datasets: Value = serde_json::from_str(metadata.get("ss_datasets")?).ok()?;
    let mut found: Vec<String> = Vec::new();
    for dataset in datasets.as_array()? {
        let text = match dataset.get("resolution") {
            Some(Value::Array(sides)) => {
                let sides: Vec<String> = sides.iter().map(ToString::to_string).collect();
                sides.join("x")
            }
            Some(Value::Number(side)) => format!("{side}x{side}"),
            _ => continue,
        };
        if !found.contains(&text) {
            found.push(text);
        }
    }
    (!found.is_empty()).then(|| found.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_of_a_training_run() {
        let metadata = [
            ("ss_steps", "3"),
            ("ss_max_train_steps", "10"),
            ("ss_unet_lr", "None"),
            ("ss_learning_rate", "0.0001"),
            (
                "ss_datasets",
                r#"[{"resolution":[512,768]},{"resolution":[512,768]},{"resolution":640}]"#,
            ),
            ("modelspec.resolution", "512x512"),
        ];
        let metadata = metadata.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
        let training = Training::of(&metadata);
        let expected =
            [("steps", "3 of 10"), ("resolution", "512x768, 640x640"), ("learning rate", "0.0001")];
        let expected: Vec<(String, String)> =
            expected.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect();
        assert_eq!(training.rows(), expected);
        assert!(Training::of(&BTreeMap::new()).rows().is_empty());
    }
}
