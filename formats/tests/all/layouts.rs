//! Full-size models without their numbers: names and shapes of `tests/data/layouts`, and files of
//! holes that have them.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use serde_json::json;

use crate::support::data;

/// A tensor in the LDM layout.
pub struct Row {
    pub key: String,
    /// `component/name` in diffusers' layout; three for a joined projection.
    pub names: Vec<String>,
    pub shape: Vec<usize>,
}

impl Row {
    /// Shape of each of `names`.
    pub fn diffusers_shape(&self) -> Vec<usize> {
        let mut shape = self.shape.clone();
        if self.names.len() == 3 {
            shape[0] /= 3;
        }
        if self.key.contains(".mid.attn_1.") {
            shape.truncate(2);
        }
        if self.key.ends_with("text_projection") {
            shape.reverse();
        }
        shape
    }
}

/// All tensors of a family's full-size model.
pub fn rows(family: &str) -> Vec<Row> {
    let text = fs::read_to_string(data(&format!("layouts/{family}.txt"))).unwrap();
    let mut rows = Vec::new();
    for line in text.lines() {
        let fields: Vec<&str> = line.split('\t').collect();
        let names: Vec<String> = fields[1].split(' ').map(str::to_owned).collect();
        let shape: Vec<usize> = fields[2].split('x').map(|n| n.parse().unwrap()).collect();
        if fields.get(3) == Some(&"bias") {
            let of_bias = |name: &str| format!("{}bias", name.strip_suffix("weight").unwrap());
            rows.push(Row {
                key: of_bias(fields[0]),
                names: names.iter().map(|name| of_bias(name)).collect(),
                shape: vec![shape[0]],
            });
        }
        rows.push(Row { key: fields[0].to_owned(), names, shape });
    }
    rows
}

/// A safetensors file of f16 zeros that takes no space.
pub fn write_hollow(path: &Path, tensors: &BTreeMap<String, Vec<usize>>) {
    let mut end = 0;
    let mut header = serde_json::Map::new();
    for (name, shape) in tensors {
        let start = end;
        end += 2 * shape.iter().product::<usize>();
        let tensor = json!({"dtype": "F16", "shape": shape, "data_offsets": [start, end]});
        header.insert(name.clone(), tensor);
    }
    let header = serde_json::to_vec(&header).unwrap();
    let mut file = File::create(path).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(&header).unwrap();
    file.set_len((8 + header.len() + end) as u64).unwrap();
}

/// The model of a family as a single file.
pub fn write_single_file(path: &Path, family: &str) {
    let mut tensors = BTreeMap::new();
    for row in rows(family) {
        // The layer that SD2 does not use.
        if family == "sd2" && row.key.contains(".resblocks.22.") {
            tensors.insert(row.key.replace(".22.", ".23."), row.shape.clone());
        }
        tensors.insert(row.key, row.shape);
    }
    write_hollow(path, &tensors);
}

/// Tensors of a family in diffusers' layout: component -> name -> shape.
pub fn components(family: &str) -> BTreeMap<String, BTreeMap<String, Vec<usize>>> {
    let mut components: BTreeMap<String, BTreeMap<String, Vec<usize>>> = BTreeMap::new();
    for row in rows(family) {
        for name in &row.names {
            let (component, name) = name.split_once('/').unwrap();
            let tensors = components.entry(component.to_owned()).or_default();
            tensors.insert(name.to_owned(), row.diffusers_shape());
        }
    }
    components
}

/// The model of a family as a folder.
pub fn write_folder(path: &Path, family: &str) {
    for (component, tensors) in components(family) {
        let folder = path.join(&component);
        fs::create_dir_all(&folder).unwrap();
        let stem = if component.starts_with("text") { "model" } else { "diffusion_pytorch_model" };
        write_hollow(&folder.join(format!("{stem}.safetensors")), &tensors);
    }
}
