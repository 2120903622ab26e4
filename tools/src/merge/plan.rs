//! Which modules change which layers of a model, found out before anything is written.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use anyhow::{bail, ensure};
use formats::Dtype;
use formats::adapter::{AdapterFile, AdapterKind, AdapterModule};
use formats::model_files::{Layer, LayerPlace, ModelFiles};

use super::change::Change;
use super::input::Input;
use crate::finite::FiniteRule;

/// Names in a message before the rest is counted.
const NAMED: usize = 10;

/// What is to be done to a model.
#[derive(Debug)]
pub(super) struct Plan<'a> {
    model: &'a ModelFiles,
    inputs: &'a [Input],
    finite: FiniteRule,
    /// The type that the merge is made in; `None` is f32.
    rounding: Option<Dtype>,
    /// For each layer the modules in the order of the inputs.
    layers: HashMap<usize, Vec<Place>>,
    /// For each stored bias or scale of a normalisation, by file and key, what is added to it.
    vectors: BTreeMap<(usize, String), Vec<Addend>>,
}

/// A module of an input.
#[derive(Clone, Copy, Debug)]
struct Place {
    input: usize,
    module: usize,
}

/// What is added to a stored vector.
#[derive(Clone, Debug)]
struct Addend {
    place: Place,
    /// Key in the adapter's file.
    key: String,
    /// The first of the layer's numbers in the stored vector.
    first: usize,
}

/// The changes of one layer.
#[derive(Debug)]
pub(super) struct Changed {
    /// The layer's rows where the stored tensor joins several layers.
    pub rows: Option<Range<usize>>,
    /// In the order in which they are made.
    pub changes: Vec<Change>,
}

impl<'a> Plan<'a> {
    /// Finds the layer of every module; gives what to tell the user too.
    ///
    /// # Errors
    /// A file none of whose modules has a layer in the model, a module of another shape.
    pub fn new(
        model: &'a ModelFiles,
        inputs: &'a [Input],
        rounding: Option<Dtype>,
        finite: FiniteRule,
    ) -> anyhow::Result<(Self, Vec<String>)> {
        let (layers, vectors) = (HashMap::new(), BTreeMap::new());
        let mut plan = Self { model, inputs, finite, rounding, layers, vectors };
        let mut told = Vec::new();
        for input in 0..inputs.len() {
            plan.add(input, &mut told)?;
        }
        Ok((plan, told))
    }

    fn add(&mut self, input: usize, told: &mut Vec<String>) -> anyhow::Result<()> {
        let Input { file, ratio, .. } = &self.inputs[input];
        let mut left_out = Vec::new();
        for (index, module) in file.modules.iter().enumerate() {
            let place = Place { input, module: index };
            let found = match &module.kind {
                AdapterKind::Norm { w_norm, b_norm } => {
                    self.add_norm(module, place, [w_norm.as_deref(), b_norm.as_deref()])?
                }
                _ => self.add_layer(file, module, place, told)?,
            };
            if !found {
                left_out.push(module.name.as_str());
            }
        }
        let merged = file.modules.len() - left_out.len();
        // Models of two families can be alike in all names and shapes, if they are small.
        if merged == 0 || file.family.is_some_and(|family| family != self.model.family) {
            bail!(no_place(file, self.model));
        }
        let path = file.path.display();
        told.push(format!("`{path}`, ratio {ratio}: {merged} modules"));
        if !left_out.is_empty() {
            told.push(format!(
                "`{path}` has {} modules without a place in `{}`, they are left out: {}",
                left_out.len(),
                self.model.path.display(),
                listed(&left_out)
            ));
        }
        if !file.unknown.is_empty() {
            let unknown: Vec<&str> = file.unknown.iter().map(String::as_str).collect();
            told.push(format!(
                "`{path}` has {} tensors that belong to no module, they are left out: {}",
                unknown.len(),
                listed(&unknown)
            ));
        }
        Ok(())
    }

    /// False when the model has no such layer.
    fn add_layer(
        &mut self,
        file: &AdapterFile,
        module: &AdapterModule,
        place: Place,
        told: &mut Vec<String>,
    ) -> anyhow::Result<bool> {
        let Some(layer) = self.model.layer(&module.name) else { return Ok(false) };
        check_shape(file, module, layer, self.model)?;
        let layers = self.model.layers();
        let at = layers.partition_point(|other| other.name < layer.name);
        self.layers.entry(at).or_default().push(place);
        let Some(key) = &module.bias else { return Ok(true) };
        if !self.add_vector((&layer.place, "bias"), place, key)? {
            told.push(format!(
                "`{}` adds a bias to `{}`, which has none in the model: left out",
                file.path.display(),
                module.name
            ));
        }
        Ok(true)
    }

    /// A normalisation's scale and bias, or a layer's bias alone; false when the model has none.
    fn add_norm(
        &mut self,
        module: &AdapterModule,
        place: Place,
        [scale, bias]: [Option<&str>; 2],
    ) -> anyhow::Result<bool> {
        let model = self.model;
        let stored = match (model.norm(&module.name), model.layer(&module.name)) {
            (Some(stored), _) => stored,
            (None, Some(layer)) if scale.is_none() => &layer.place,
            (None, _) => return Ok(false),
        };
        let mut found = true;
        for (ending, key) in [("weight", scale), ("bias", bias)] {
            if let Some(key) = key {
                found &= self.add_vector((stored, ending), place, key)?;
            }
        }
        Ok(found)
    }

    /// False when the model has no such vector; an error when its length is another.
    fn add_vector(
        &mut self,
        (stored, ending): (&LayerPlace, &str),
        place: Place,
        key: &str,
    ) -> anyhow::Result<bool> {
        let Some(start) = stored.key.strip_suffix("weight") else { return Ok(false) };
        let stored_key = format!("{start}{ending}");
        let model_file = &self.model.files[stored.file].file;
        let Some([length]) = model_file.shape(&stored_key) else { return Ok(false) };
        let rows = stored.rows.clone().unwrap_or(0..*length);
        let file = &self.inputs[place.input].file;
        let given: usize = file.file.shape(key).unwrap_or_default().iter().product();
        ensure!(
            rows.end <= *length && given == rows.len(),
            "`{}` does not fit `{}`, `{key}` is for {} numbers, it has: {given}",
            file.path.display(),
            self.model.path.display(),
            rows.len()
        );
        let addend = Addend { place, key: key.to_owned(), first: rows.start };
        self.vectors.entry((stored.file, stored_key)).or_default().push(addend);
        Ok(true)
    }

    /// The layers of a stored tensor that are changed, in the order of their rows.
    ///
    /// # Errors
    /// Those of reading the modules.
    pub fn changes_at(&self, file: usize, key: &str) -> anyhow::Result<Vec<Changed>> {
        let mut found = Vec::new();
        for index in self.model.layers_at(file, key) {
            let (layer, Some(places)) = (&self.model.layers()[*index], self.layers.get(index))
            else {
                continue;
            };
            let read = |place: &Place| {
                let input = &self.inputs[place.input];
                let module = &input.file.modules[place.module];
                let ratio = input.ratio_of(&module.name);
                let how = (ratio, self.rounding);
                Change::read(&input.file, module, &layer.shape, how, self.finite)
            };
            let changes = places.iter().map(read).collect::<anyhow::Result<_>>()?;
            found.push(Changed { rows: layer.place.rows.clone(), changes });
        }
        found.sort_by_key(|changed| changed.rows.as_ref().map(|rows| rows.start));
        Ok(found)
    }

    /// What is added to a stored vector, and from which number on; empty when it stays.
    ///
    /// # Errors
    /// Those of reading.
    pub fn added_at(&self, file: usize, key: &str) -> anyhow::Result<Vec<(usize, Vec<f32>)>> {
        let Some(addends) = self.vectors.get(&(file, key.to_owned())) else {
            return Ok(Vec::new());
        };
        let read = |Addend { place, key, first }: &Addend| {
            let input = &self.inputs[place.input];
            let mut values = input.file.view(key)?.to_f32();
            self.finite.check(&input.file.path, key, &values)?;
            let ratio = input.ratio_of(&input.file.modules[place.module].name);
            values.iter_mut().for_each(|value| *value *= ratio);
            Ok((*first, values))
        };
        addends.iter().map(read).collect()
    }
}

/// `a`, `b` and 3 more.
fn listed(names: &[&str]) -> String {
    let named: Vec<String> = names.iter().take(NAMED).map(|name| format!("`{name}`")).collect();
    let rest = names.len().saturating_sub(NAMED);
    let more = if rest > 0 { format!(" and {rest} more") } else { String::new() };
    named.join(", ") + &more
}

fn check_shape(
    file: &AdapterFile,
    module: &AdapterModule,
    layer: &Layer,
    model: &ModelFiles,
) -> anyhow::Result<()> {
    let shape = module.layer_shape(file);
    let columns = |shape: &[usize]| shape.iter().skip(1).product::<usize>();
    let fits = shape.first() == layer.shape.first() && columns(&shape) == columns(&layer.shape);
    let of = file.family.map(|family| format!(", it is for {}", family.title()));
    ensure!(
        fits,
        "`{}` does not fit `{}`, the module `{}` is for a weight of shape {shape:?}, the model's \
         is: {:?}\nhint: the model is of {}; the file was trained on another one{}",
        file.path.display(),
        model.path.display(),
        module.name,
        layer.shape,
        model.family.title(),
        of.unwrap_or_default()
    );
    Ok(())
}

fn no_place(file: &AdapterFile, model: &ModelFiles) -> String {
    let what = match file.family {
        Some(family) if family != model.family => format!("it is for {}", family.title()),
        _ => "its names are of another kind of model".to_owned(),
    };
    let first = file.modules.first().map_or("", |module| module.name.as_str());
    format!(
        "`{}` does not fit `{}`, a model of {}: {what}, its first module is `{first}`\n\
         hint: merge it into a model of the kind that it was trained on",
        file.path.display(),
        model.path.display(),
        model.family.title()
    )
}
