//! The walk over the tensors of a step: each with its weights, its gradient and its state, on as
//! many threads as there are.
//!
//! One tensor is always one thread's, and what the tensors give back is in their order: the bits do
//! not depend on the number of threads.

use anyhow::{Context, Result, bail};
use engine::{ParamId, ParamStore};
use rayon::prelude::*;

use super::state::{Reader, Writer};
use super::{Optimize, OptimizerState, StepInput, TensorForm};

/// What an optimizer keeps for one tensor.
pub(super) trait Slot: Send + Sync {
    /// Adds its fields, which belong to the tensor `name`.
    fn save(&self, name: &str, writer: &mut Writer) -> Result<()>;
    /// Takes its fields back.
    fn load(&mut self, name: &str, reader: &mut Reader) -> Result<()>;
}

/// A field of a [`Slot`].
pub(super) trait Field {
    /// Adds it under the name of the field and the tensor.
    fn save(&self, field: &str, name: &str, writer: &mut Writer) -> Result<()>;
    /// Takes it back; sizes must be those of now.
    fn load(&mut self, field: &str, name: &str, reader: &mut Reader) -> Result<()>;
}

impl Field for u32 {
    fn save(&self, field: &str, name: &str, writer: &mut Writer) -> Result<()> {
        writer.number(field, name, f64::from(*self));
        Ok(())
    }

    fn load(&mut self, field: &str, name: &str, reader: &mut Reader) -> Result<()> {
        *self = reader.count(field, name)?;
        Ok(())
    }
}

impl Field for f64 {
    fn save(&self, field: &str, name: &str, writer: &mut Writer) -> Result<()> {
        writer.number(field, name, *self);
        Ok(())
    }

    fn load(&mut self, field: &str, name: &str, reader: &mut Reader) -> Result<()> {
        *self = reader.number(field, name)?;
        Ok(())
    }
}

impl Field for Vec<f32> {
    fn save(&self, field: &str, name: &str, writer: &mut Writer) -> Result<()> {
        if self.is_empty() {
            return Ok(());
        }
        writer.values(field, name, self)
    }

    fn load(&mut self, field: &str, name: &str, reader: &mut Reader) -> Result<()> {
        if !self.is_empty() {
            *self = reader.values(field, name, self.len())?;
        }
        Ok(())
    }
}

/// Declares a [`Slot`]; the fields' names are those in the saved state.
macro_rules! slot {
    ($(#[$doc:meta])* $name:ident { $( $(#[$field_doc:meta])* $field:ident: $kind:ty, )* }) => {
        $(#[$doc])*
        pub(super) struct $name { $( $(#[$field_doc])* $field: $kind, )* }

        impl $crate::optimizer::tensors::Slot for $name {
            fn save(
                &self,
                name: &str,
                writer: &mut $crate::optimizer::state::Writer,
            ) -> anyhow::Result<()> {
                use $crate::optimizer::tensors::Field;
                $( self.$field.save(stringify!($field), name, writer)?; )*
                Ok(())
            }

            fn load(
                &mut self,
                name: &str,
                reader: &mut $crate::optimizer::state::Reader,
            ) -> anyhow::Result<()> {
                use $crate::optimizer::tensors::Field;
                $( self.$field.load(stringify!($field), name, reader)?; )*
                Ok(())
            }
        }
    };
}
pub(super) use slot;

/// In which order a tensor's numbers are shown to the optimizer.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    /// As they lie: for what treats every number alike.
    Engine,
    /// As in files, `[out, in, kh, kw]`: for rows, columns and blocks.
    File,
}

/// One tensor in one step.
pub(super) struct Item<'a, S> {
    pub form: &'a TensorForm,
    pub lr: f64,
    pub weights: &'a mut [f32],
    pub gradient: &'a [f32],
    pub slot: &'a mut S,
}

/// The states of all tensors.
pub(super) struct Slots<S> {
    forms: Vec<TensorForm>,
    slots: Vec<S>,
}

impl<S: Slot> Slots<S> {
    /// One slot for each tensor.
    pub(super) fn new(forms: &[TensorForm], make: impl Fn(&TensorForm) -> S) -> Self {
        Self { forms: forms.to_vec(), slots: forms.iter().map(make).collect() }
    }

    /// Runs over the tensors of the step; gives what each gave, in their order.
    pub(super) fn visit<R: Send>(
        &mut self,
        params: &mut ParamStore,
        input: &StepInput,
        order: Order,
        run: impl Fn(Item<'_, S>) -> R + Sync,
    ) -> Result<Vec<R>> {
        let (forms, slots) = (&self.forms, &mut self.slots);
        params.update(|flat| {
            let items = items(forms, slots, flat, input)?;
            let results = items.into_par_iter().map(|item| match order {
                Order::Engine => run(item),
                Order::File => in_file_order(item, &run),
            });
            Ok(results.collect())
        })?
    }

    /// The slot of a tensor.
    pub(super) fn get(&self, id: ParamId) -> Option<&S> {
        self.slots.get(id.0)
    }

    /// Tensors and their slots.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&TensorForm, &S)> {
        self.forms.iter().zip(&self.slots)
    }

    /// Adds all slots to a state.
    pub(super) fn save(&self, writer: &mut Writer) -> Result<()> {
        self.iter().try_for_each(|(form, slot)| slot.save(&form.name, writer))
    }

    /// Takes all slots from a state.
    pub(super) fn load(&mut self, reader: &mut Reader) -> Result<()> {
        for (form, slot) in self.forms.iter().zip(&mut self.slots) {
            slot.load(&form.name, reader)?;
        }
        Ok(())
    }
}

/// Cuts the flat tensor into the tensors of the step.
fn items<'a, S>(
    forms: &'a [TensorForm],
    slots: &'a mut [S],
    flat: &'a mut [f32],
    input: &StepInput<'a>,
) -> Result<Vec<Item<'a, S>>> {
    let (mut rest, mut offset) = (flat, 0);
    let mut slots = forms.iter().zip(slots).enumerate();
    let mut items = Vec::with_capacity(input.tensors.len());
    for tensor in input.tensors {
        let range = tensor.range.clone();
        let found = slots.by_ref().find(|(index, _)| *index == tensor.id.0);
        let fits = range.start >= offset && range.end - offset <= rest.len();
        let (Some((_, (form, slot))), true) = (found, fits) else {
            bail!("an optimizer step needs the tensors in their order, got: {:?}", tensor.id);
        };
        let (_, tail) = rest.split_at_mut(range.start - offset);
        let (weights, tail) = tail.split_at_mut(range.len());
        (rest, offset) = (tail, range.end);
        let gradient = input.gradient.get(range).context("the gradient is too short")?;
        if weights.len() != form.len() {
            bail!("`{}` must have {} numbers, it has: {}", form.name, form.len(), weights.len());
        }
        items.push(Item { form, lr: f64::from(tensor.lr), weights, gradient, slot });
    }
    Ok(items)
}

fn in_file_order<S, R>(item: Item<'_, S>, run: impl Fn(Item<'_, S>) -> R) -> R {
    let (channels, pixels) = item.form.kernel();
    if pixels == 1 {
        return run(item);
    }
    let Item { form, lr, weights: place, gradient, slot } = item;
    let gradient = transpose(gradient, pixels, channels);
    let mut weights = transpose(place, pixels, channels);
    let result = run(Item { form, lr, weights: &mut weights, gradient: &gradient, slot });
    place.copy_from_slice(&transpose(&weights, channels, pixels));
    result
}

/// `[.., rows, columns]` to `[.., columns, rows]`.
fn transpose(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(values.len());
    for matrix in values.chunks_exact((rows * columns).max(1)) {
        for column in 0..columns {
            out.extend((0..rows).map(|row| matrix[row * columns + column]));
        }
    }
    out
}

/// An optimizer that moves each tensor by itself.
pub(super) trait Rule: Send + Sync {
    /// What it keeps for a tensor.
    type Slot: Slot;
    /// For messages.
    const NAME: &'static str;
    /// The order in which it wants to see a tensor.
    const ORDER: Order = Order::Engine;
    /// The state of a tensor before the first step.
    fn slot(&self, form: &TensorForm) -> Self::Slot;
    /// One step of one tensor.
    fn update(&self, item: Item<'_, Self::Slot>);
    /// The learning rate of the last step, where it is the optimizer's own.
    fn own_rate(&self, _slot: &Self::Slot) -> Option<f64> {
        None
    }
}

/// A [`Rule`] over all tensors.
pub(super) struct EachTensor<R: Rule> {
    rule: R,
    slots: Slots<R::Slot>,
}

impl<R: Rule> EachTensor<R> {
    /// With fresh states.
    pub(super) fn new(rule: R, forms: &[TensorForm]) -> Self {
        let slots = Slots::new(forms, |form| rule.slot(form));
        Self { rule, slots }
    }
}

impl<R: Rule> Optimize for EachTensor<R> {
    fn step(&mut self, params: &mut ParamStore, input: &StepInput) -> Result<()> {
        let rule = &self.rule;
        self.slots.visit(params, input, R::ORDER, |item| rule.update(item))?;
        Ok(())
    }

    fn state(&self) -> Result<OptimizerState> {
        let mut writer = Writer::default();
        self.slots.save(&mut writer)?;
        Ok(writer.finish())
    }

    fn load_state(&mut self, state: OptimizerState) -> Result<()> {
        let mut reader = Reader::new(R::NAME, state);
        self.slots.load(&mut reader)?;
        reader.finish()
    }

    fn own_rate(&self, id: ParamId) -> Option<f64> {
        self.rule.own_rate(self.slots.get(id)?)
    }
}
