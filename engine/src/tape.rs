//! Reverse-mode differentiation over the operations of this crate.
//!
//! A [`Value`] is a tensor and, if a gradient must reach something behind it, an origin. Operations
//! push a node only when an input is tracked; its backward closure keeps just what it needs and is
//! dropped as soon as it has run. Gradients are moved on the first contribution and added in place
//! after. A parameter's gradient goes to the caller the moment it is final. A segment can be
//! checkpointed: its inside is forgotten and replayed when its gradient is needed.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::rc::Rc;

use crate::ops::Draws;
use crate::params::{ParamId, ParamStore};
use crate::{DType, EngineError, Result, Tensor};

/// What a gradient flows to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// Frozen: no gradient is wanted.
    None,
    /// A node of the tape that made the value.
    Node(usize),
    /// A trainable parameter.
    Param(ParamId),
    /// Tracked, inside a checkpointed segment whose nodes are not kept.
    Forgotten,
}

/// A tensor and where its gradient goes.
#[derive(Clone, Debug)]
pub struct Value {
    tensor: Tensor,
    origin: Origin,
}

impl Value {
    /// A value that needs no gradient.
    pub fn constant(tensor: Tensor) -> Self {
        Self { tensor, origin: Origin::None }
    }

    /// The numbers.
    pub fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    /// Shape of the tensor.
    pub fn shape(&self) -> &[usize] {
        self.tensor.shape()
    }

    /// Whether a gradient will be computed for it.
    pub fn is_tracked(&self) -> bool {
        self.origin != Origin::None
    }

    /// The same numbers without a gradient.
    pub fn detach(&self) -> Self {
        Self::constant(self.tensor.clone())
    }

    pub(crate) fn origin(&self) -> Origin {
        self.origin
    }
}

type Backward<'m> = Box<dyn FnOnce(Tensor, &mut Gradients<'_, '_>) -> Result<()> + 'm>;

/// How operations are noted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// Nodes are kept for a backward pass.
    Record,
    /// Inside a checkpointed segment: only the uses of parameters are counted.
    Forget,
    /// A checkpointed segment run again: nodes are kept, uses were counted the first time.
    Replay,
    /// No gradient will be asked for.
    Inference,
}

/// Which segments of a tape are recomputed in the backward pass instead of kept.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Checkpointing {
    /// None: fast, and everything is kept.
    #[default]
    None,
    /// Every one.
    All,
    /// These, counted from 0 in the order in which a forward pass reaches them.
    Chosen(Rc<BTreeSet<usize>>),
}

impl Checkpointing {
    fn has(&self, segment: usize) -> bool {
        match self {
            Checkpointing::None => false,
            Checkpointing::All => true,
            Checkpointing::Chosen(segments) => segments.contains(&segment),
        }
    }
}

impl From<bool> for Checkpointing {
    fn from(all: bool) -> Self {
        if all { Checkpointing::All } else { Checkpointing::None }
    }
}

/// A tape over parameters of `'m`, the life of the model whose layers it runs.
pub struct Tape<'m> {
    params: Option<&'m ParamStore>,
    /// One per tracked result; `None` for the inputs of a replayed segment.
    nodes: RefCell<Vec<Option<Backward<'m>>>>,
    /// How often each parameter was read, shared with the segments of this tape.
    uses: Rc<RefCell<Vec<u32>>>,
    mode: Mode,
    checkpointing: Checkpointing,
    /// Segments reached so far.
    segments: Cell<usize>,
    draws: Option<Rc<dyn Draws>>,
}

impl<'m> Tape<'m> {
    /// A tape that records for one backward pass over `params`. With `checkpointing`, the inside of
    /// every [`Tape::segment`], or of those chosen, is recomputed in the backward pass instead of
    /// kept.
    pub fn new(params: &'m ParamStore, checkpointing: impl Into<Checkpointing>) -> Self {
        let uses = Rc::new(RefCell::new(vec![0; params.count()]));
        let tape = Self::with_mode(Some(params), uses, Mode::Record);
        Self { checkpointing: checkpointing.into(), ..tape }
    }

    /// A tape that records nothing; adapters read from `params` where given.
    pub fn inference(params: Option<&'m ParamStore>) -> Self {
        Self::with_mode(params, Rc::default(), Mode::Inference)
    }

    fn with_mode(params: Option<&'m ParamStore>, uses: Rc<RefCell<Vec<u32>>>, mode: Mode) -> Self {
        let (nodes, segments) = (RefCell::default(), Cell::new(0));
        Self {
            params,
            nodes,
            uses,
            mode,
            checkpointing: Checkpointing::None,
            segments,
            draws: None,
        }
    }

    /// The same tape with random choices for the adapters; without them nothing is dropped.
    pub fn with_draws(self, draws: Option<Rc<dyn Draws>>) -> Self {
        Self { draws, ..self }
    }

    /// Random choices for the adapters.
    pub(crate) fn draws(&self) -> Option<&dyn Draws> {
        self.draws.as_deref()
    }

    /// A parameter times `factor` in type `dtype`, to read; its gradient is not asked for by this.
    pub(crate) fn scaled_param(&self, id: ParamId, factor: f32, dtype: DType) -> Result<Tensor> {
        self.store(id)?.scaled(id, factor, dtype)
    }

    fn store(&self, id: ParamId) -> Result<&'m ParamStore> {
        self.params.ok_or_else(|| {
            EngineError::Tape(format!("parameter {} is used without a parameter store", id.0))
        })
    }

    /// Several parameters as one tensor, to read; their gradients are not asked for by this.
    pub(crate) fn joined_params(&self, first: ParamId, count: usize) -> Result<Tensor> {
        self.store(first)?.joined(first, count)
    }

    /// A trainable parameter, to be used by exactly one operation.
    pub fn param(&self, id: ParamId) -> Result<Value> {
        let tensor = self.store(id)?.tensor(id)?;
        if self.mode == Mode::Inference {
            return Ok(Value::constant(tensor));
        }
        if self.mode != Mode::Replay {
            self.uses.borrow_mut()[id.0] += 1;
        }
        Ok(Value { tensor, origin: Origin::Param(id) })
    }

    /// Notes an operation: `backward` gets the gradient of `tensor` and adds those of `inputs`.
    pub(crate) fn record(
        &self,
        tensor: Tensor,
        inputs: &[&Value],
        backward: impl FnOnce(Tensor, &mut Gradients<'_, '_>) -> Result<()> + 'm,
    ) -> Value {
        let tracked = inputs.iter().any(|value| value.is_tracked());
        if !tracked || self.mode == Mode::Inference {
            return Value::constant(tensor);
        }
        if self.mode == Mode::Forget {
            return Value { tensor, origin: Origin::Forgotten };
        }
        let origin = self.push(Some(Box::new(backward)));
        Value { tensor, origin }
    }

    fn push(&self, node: Option<Backward<'m>>) -> Origin {
        let mut nodes = self.nodes.borrow_mut();
        nodes.push(node);
        Origin::Node(nodes.len() - 1)
    }

    /// Runs `run` on `inputs` as a unit that may be checkpointed.
    ///
    /// Gradients of the inputs are summed inside the segment before they join others outside, with
    /// checkpointing or without, so that both give the same bits.
    pub fn segment(
        &self,
        inputs: &[&Value],
        run: impl Fn(&Tape<'m>, &[Value]) -> Result<Value> + 'm,
    ) -> Result<Value> {
        let owned = |values: &[&Value]| values.iter().map(|v| (*v).clone()).collect::<Vec<_>>();
        match self.mode {
            Mode::Inference | Mode::Forget => run(self, &owned(inputs)),
            Mode::Record => {
                let index = self.segments.replace(self.segments.get() + 1);
                if self.checkpointing.has(index) {
                    return self.forget(inputs, run);
                }
                // A traced run tells what each segment keeps.
                let card = inputs.first().and_then(|input| input.tensor.device().card());
                if let Some(card) = card {
                    card.enter_segment();
                }
                let out = self.keep(inputs, run)?;
                if let Some(card) = card {
                    card.leave_segment(out.tensor.len() * out.tensor.dtype().size());
                }
                Ok(out)
            }
            Mode::Replay => self.keep(inputs, run),
        }
    }

    fn keep(
        &self,
        inputs: &[&Value],
        run: impl Fn(&Tape<'m>, &[Value]) -> Result<Value> + 'm,
    ) -> Result<Value> {
        let aliases: Vec<Value> = inputs.iter().map(|value| self.alias(value)).collect();
        run(self, &aliases)
    }

    fn alias(&self, value: &Value) -> Value {
        let origin = value.origin;
        self.record(value.tensor.clone(), &[value], move |dy, grads| grads.add(origin, dy))
    }

    fn forget(
        &self,
        inputs: &[&Value],
        run: impl Fn(&Tape<'m>, &[Value]) -> Result<Value> + 'm,
    ) -> Result<Value> {
        let forgetful = Self::with_mode(self.params, self.uses.clone(), Mode::Forget)
            .with_draws(self.draws.clone());
        let hidden: Vec<Value> = inputs
            .iter()
            .map(|value| Value {
                tensor: value.tensor.clone(),
                origin: if value.is_tracked() { Origin::Forgotten } else { Origin::None },
            })
            .collect();
        let out = run(&forgetful, &hidden)?;
        if !out.is_tracked() {
            return Ok(out);
        }
        let saved: Vec<Value> = inputs.iter().map(|value| (*value).clone()).collect();
        let (params, uses, draws) = (self.params, self.uses.clone(), self.draws.clone());
        let origin = self.push(Some(Box::new(move |dy, grads| {
            let replay = Tape::with_mode(params, uses, Mode::Replay).with_draws(draws);
            let leaves: Vec<Value> = saved
                .iter()
                .map(|value| Value {
                    tensor: value.tensor.clone(),
                    origin: if value.is_tracked() { replay.push(None) } else { Origin::None },
                })
                .collect();
            let out = run(&replay, &leaves)?;
            let (origin, count) = (out.origin, leaves.len());
            drop((out, leaves));
            let inner = replay.run_backward(origin, dy, count, grads.sink)?;
            let tracked = saved.iter().filter(|value| value.is_tracked());
            for (value, gradient) in tracked.zip(inner) {
                if let Some(gradient) = gradient {
                    grads.add(value.origin, gradient)?;
                }
            }
            Ok(())
        })));
        Ok(Value { tensor: out.tensor, origin })
    }

    /// Sends the gradient of the sum of `loss`, made by [`Tape::loss`], to every parameter it depends
    /// on.
    ///
    /// `ready` gets each parameter's gradient (f32, the parameter's shape) as soon as it is final,
    /// in an order that is the same on every rank.
    pub fn backward(
        self,
        loss: &Value,
        ready: &mut dyn FnMut(ParamId, Tensor) -> Result<()>,
    ) -> Result<()> {
        self.send_back(loss, None, ready)
    }

    /// As [`Tape::backward`] on a card, with each gradient added to the parameter's place in `flat`,
    /// f32 and laid out as the store: products add theirs by themselves, so that it is nowhere else.
    /// `ready` gets the place when it is final.
    pub fn backward_onto(
        self,
        loss: &Value,
        flat: &Tensor,
        ready: &mut dyn FnMut(ParamId, Tensor) -> Result<()>,
    ) -> Result<()> {
        let fits = |params: &&ParamStore| params.len() <= flat.len();
        let params = self.params.filter(|_| flat.device().card().is_some()).filter(fits);
        let params = params
            .ok_or_else(|| EngineError::Tape(format!("the gradient has no place in {flat:?}")))?;
        self.send_back(loss, Some((params, flat.clone())), ready)
    }

    fn send_back(
        self,
        loss: &Value,
        places: Option<(&ParamStore, Tensor)>,
        ready: &mut dyn FnMut(ParamId, Tensor) -> Result<()>,
    ) -> Result<()> {
        if !loss.is_tracked() {
            return Err(EngineError::Tape("the loss does not depend on any parameter".into()));
        }
        let remaining = std::mem::take(&mut *self.uses.borrow_mut());
        let slots = remaining.iter().map(|_| None).collect();
        let mut sink = ParamSink { slots, remaining, places, ready };
        self.run_backward(loss.origin, loss.tensor.clone(), 0, &mut sink)?;
        sink.flush()
    }

    /// Runs the nodes in reverse; gives the gradients of the first `leaves` nodes.
    fn run_backward(
        self,
        origin: Origin,
        seed: Tensor,
        leaves: usize,
        sink: &mut ParamSink<'_>,
    ) -> Result<Vec<Option<Tensor>>> {
        let mut nodes = self.nodes.into_inner();
        let slots = nodes.iter().map(|_| None).collect();
        let mut grads = Gradients { slots, sink };
        grads.add(origin, seed)?;
        while let Some(node) = nodes.pop() {
            let Some(backward) = node else {
                // The leaves of a replay were pushed before everything else.
                break;
            };
            if let Some(dy) = grads.slots[nodes.len()].take() {
                backward(dy, &mut grads)?;
            }
        }
        grads.slots.truncate(leaves);
        Ok(grads.slots)
    }
}

/// Gradients on their way: one slot per node of the running tape, and the parameters'.
pub(crate) struct Gradients<'g, 'h> {
    slots: Vec<Option<Tensor>>,
    sink: &'g mut ParamSink<'h>,
}

impl Gradients<'_, '_> {
    /// Where the gradient of a parameter is summed, if it is to be added there.
    pub(crate) fn place(&self, of: Origin) -> Result<Option<Tensor>> {
        match of {
            Origin::Param(id) => self.sink.place(id),
            _ => Ok(None),
        }
    }

    /// A contribution was added to the place of a parameter.
    pub(crate) fn placed(&mut self, of: Origin) -> Result<()> {
        match of {
            Origin::Param(id) => self.sink.placed(id),
            _ => Ok(()),
        }
    }

    /// Adds a contribution to the gradient of a value.
    pub(crate) fn add(&mut self, to: Origin, gradient: Tensor) -> Result<()> {
        match to {
            Origin::None => Ok(()),
            Origin::Node(index) => add_to(&mut self.slots[index], gradient),
            Origin::Param(id) => self.sink.add(id, gradient),
            Origin::Forgotten => {
                Err(EngineError::Tape("a gradient reached the inside of a closed segment".into()))
            }
        }
    }
}

/// The gradients of the parameters, handed out when the last use has contributed.
struct ParamSink<'h> {
    slots: Vec<Option<Tensor>>,
    remaining: Vec<u32>,
    /// Where gradients are summed, if not in tensors of their own.
    places: Option<(&'h ParamStore, Tensor)>,
    ready: &'h mut dyn FnMut(ParamId, Tensor) -> Result<()>,
}

impl ParamSink<'_> {
    /// Where the gradient of a parameter is summed.
    fn place(&self, id: ParamId) -> Result<Option<Tensor>> {
        let place = |(params, flat): &(&ParamStore, Tensor)| {
            flat.view(params.range(id).start, params.shape(id))
        };
        self.places.as_ref().map(place).transpose()
    }

    /// A contribution was added to the place of a parameter.
    fn placed(&mut self, id: ParamId) -> Result<()> {
        self.remaining[id.0] = self.remaining[id.0].saturating_sub(1);
        match self.place(id)? {
            Some(place) if self.remaining[id.0] == 0 => (self.ready)(id, place),
            place => {
                self.slots[id.0] = place;
                Ok(())
            }
        }
    }

    fn add(&mut self, id: ParamId, gradient: Tensor) -> Result<()> {
        if let (Some(place), Some(card)) = (self.place(id)?, gradient.device().card()) {
            card.add_onto(&place, &gradient)?;
            return self.placed(id);
        }
        add_to(&mut self.slots[id.0], gradient)?;
        self.remaining[id.0] = self.remaining[id.0].saturating_sub(1);
        match self.slots[id.0].take() {
            Some(done) if self.remaining[id.0] == 0 => (self.ready)(id, done),
            pending => {
                self.slots[id.0] = pending;
                Ok(())
            }
        }
    }

    /// Hands out what a dead branch kept from being final.
    fn flush(&mut self) -> Result<()> {
        for index in 0..self.slots.len() {
            if let Some(gradient) = self.slots[index].take() {
                (self.ready)(ParamId(index), gradient)?;
            }
        }
        Ok(())
    }
}

fn add_to(slot: &mut Option<Tensor>, gradient: Tensor) -> Result<()> {
    *slot = Some(match slot.take() {
        None => gradient,
        Some(sum) => sum.device().backend().accumulate(sum, &gradient)?,
    });
    Ok(())
}
