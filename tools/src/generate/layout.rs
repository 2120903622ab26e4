//! What varies beside prompt and seed: the columns and bands of a contact sheet. Without `--grid` one
//! of each.

use super::networks::Networks;
use super::options::Options;
use crate::Usage;

/// Multipliers of all applied LoRAs.
pub(super) type Multipliers = Vec<f32>;

/// Rows of one prompt and seed: one, or one for each multiplier.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Band {
    /// What its label adds; empty if there is one band.
    pub label: String,
    /// One for each column.
    pub cells: Vec<Multipliers>,
}

/// The form of a sheet.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Layout {
    /// Labels.
    pub columns: Vec<String>,
    pub bands: Vec<Band>,
}

impl Layout {
    /// A column for each LoRA by itself, or for each multiplier of a single one; before them one
    /// without any. Several LoRAs and several multipliers make a band for each multiplier.
    ///
    /// # Errors
    /// A sheet of LoRAs that are merged.
    pub fn new(options: &Options, networks: &Networks) -> Result<Self, Usage> {
        if !options.files.grid || networks.all.is_empty() {
            let cells = vec![networks.applied_multipliers().to_vec()];
            let band = Band { label: String::new(), cells };
            return Ok(Self { columns: vec![String::new()], bands: vec![band] });
        }
        if networks.merged > 0 {
            return Err(Usage(
                "`--grid` changes multipliers, `--network_merge` makes them part of the model\n\
                 hint: leave one of the two out"
                    .to_owned(),
            ));
        }
        let given = match options.lora.multipliers.as_slice() {
            [] => vec![1.],
            given => given.to_vec(),
        };
        let count = networks.all.len();
        let alone = |index: usize, multiplier: f32| -> Multipliers {
            (0..count).map(|other| if other == index { multiplier } else { 0. }).collect()
        };
        let shows_base = !given.contains(&0.);
        let base = shows_base.then(|| vec![0.; count]);
        let mut columns: Vec<String> = base.iter().map(|_| "no LoRA".to_owned()).collect();
        if let [only] = networks.all.as_slice() {
            columns.extend(given.iter().map(|number| format!("{} x{number}", only.name)));
            let cells = base.into_iter().chain(given.iter().map(|number| alone(0, *number)));
            let band = Band { label: String::new(), cells: cells.collect() };
            return Ok(Self { columns, bands: vec![band] });
        }
        columns.extend(networks.all.iter().map(|network| network.name.clone()));
        let is_one = given.len() == 1;
        let band = |number: &f32| Band {
            label: if is_one && *number == 1. { String::new() } else { format!("x{number}") },
            cells: base
                .iter()
                .cloned()
                .chain((0..count).map(|index| alone(index, *number)))
                .collect(),
        };
        Ok(Self { columns, bands: given.iter().map(band).collect() })
    }
}
