//! The device work of a step, captured once for each shape and then replayed.
//!
//! The first step of a shape runs as it is and its allocations are noted. The second is captured with
//! those allocations in fixed places of one arena, which all shapes share since they run one at a
//! time; from then on a step is one start of the captured sequence. Work that cannot be captured goes
//! on as it is, and the user is told why, once.

use std::collections::HashMap;
use std::rc::Rc;

use anyhow::Result;
use engine::cuda::driver::Graph;
use engine::cuda::{Arena, Card, Layout};
use engine::{DType, EngineError, Tensor};

use super::buffers::StepShape;
use crate::console;

/// Numbers of the smallest block of a card's memory, and how many of them a step leaves behind.
const SMALL: usize = 64;
const OUTLIVING: usize = 4;

/// What the device work of a step leaves behind: the same tensors each time it is replayed.
#[derive(Clone)]
pub struct Outcome {
    /// Weighted loss of each sample, f32 `[B]`.
    pub losses: Tensor,
    /// Which parameters have a gradient.
    pub reached: Rc<[bool]>,
    /// Factor of the gradient and its norm, where the update is part of the work.
    pub clip: Option<Tensor>,
}

enum Stage {
    /// Ran once; where its buffers will lie.
    Traced(Layout),
    /// Replayed from now on.
    Captured(Layout, Graph, Outcome),
}

/// The captured steps of a run.
pub struct Runner {
    card: &'static Card,
    stages: HashMap<StepShape, Stage>,
    arena: Option<Arena>,
    /// Nothing is captured any more.
    eager: bool,
}

/// How many captured steps there are, and how many replays there were.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GraphCounts {
    /// Captured sequences now.
    pub captured: usize,
    /// Shapes that ran once so far.
    pub traced: usize,
}

impl Runner {
    /// Captures steps on `card`; `eager` says why not to.
    pub fn new(card: &'static Card, eager: Option<String>) -> Self {
        if let Some(why) = &eager {
            say_eager(why);
        }
        Self { card, stages: HashMap::new(), arena: None, eager: eager.is_some() }
    }

    /// Does the work of a step of this shape, itself or by replaying it. `work` must give the card the
    /// same work each time for a shape.
    pub fn run(
        &mut self,
        shape: &StepShape,
        work: &mut dyn FnMut() -> Result<Outcome>,
    ) -> Result<Outcome> {
        if self.eager {
            return work();
        }
        let layout = match self.stages.get(shape) {
            Some(Stage::Captured(_, graph, outcome)) => {
                self.card.driver().replay(*graph)?;
                return Ok(outcome.clone());
            }
            Some(Stage::Traced(layout)) => layout.clone(),
            None => {
                self.make_room();
                let (trace, outcome) = self.card.trace(|| inside(work))?;
                self.stages.insert(shape.clone(), Stage::Traced(trace.layout()));
                return Ok(outcome);
            }
        };
        match self.capture(&layout, work) {
            Ok((graph, outcome)) => {
                let stage = Stage::Captured(layout, graph, outcome.clone());
                self.stages.insert(shape.clone(), stage);
                self.card.driver().replay(graph)?;
                Ok(outcome)
            }
            // Nothing was done yet: what is wrong with the work itself shows when it is done.
            Err(error) => {
                let why = error.to_string();
                say_eager(why.lines().next().unwrap_or_default());
                self.forget();
                self.eager = true;
                work()
            }
        }
    }

    fn capture(
        &mut self,
        layout: &Layout,
        work: &mut dyn FnMut() -> Result<Outcome>,
    ) -> engine::Result<(Graph, Outcome)> {
        let card = self.card;
        let fits = self.arena.as_ref().is_some_and(|arena| arena.bytes() >= layout.total());
        if !fits {
            // What was captured lies in the arena that is too small.
            self.forget();
            card.release_idle();
            self.arena = Some(Arena::new(card, layout.total())?);
        }
        // What outlives the step comes from the pool, which should not ask the card for memory while
        // a capture goes on.
        let small = |_| Tensor::zeros(card.device(), &[SMALL], DType::F32);
        drop((0..OUTLIVING).map(small).collect::<engine::Result<Vec<_>>>()?);
        let Some(arena) = &self.arena else {
            return Err(EngineError::Unsupported("a step has no arena".into()));
        };
        card.capture(|| card.within(arena, layout, || inside(work)))
    }

    /// A shape that runs for the first time takes its memory beside the arena. Where that could be too
    /// little the arena is given up: the others are captured again when their turn comes.
    fn make_room(&mut self) {
        let Some(arena) = &self.arena else { return };
        let memory = self.card.memory_stats();
        if memory.limit.saturating_sub(memory.live) < arena.bytes() + arena.bytes() / 4 {
            self.forget();
        }
    }

    /// Drops all captured sequences and their memory; the shapes are still known.
    pub fn forget(&mut self) {
        for stage in self.stages.values_mut() {
            if let Stage::Captured(layout, graph, _) = stage {
                self.card.driver().drop_graph(*graph);
                *stage = Stage::Traced(layout.clone());
            }
        }
        self.arena = None;
    }

    /// What is captured.
    pub fn counts(&self) -> GraphCounts {
        let is_captured = |stage: &&Stage| matches!(stage, Stage::Captured(..));
        let captured = self.stages.values().filter(is_captured).count();
        GraphCounts { captured, traced: self.stages.len() - captured }
    }
}

impl Drop for Runner {
    fn drop(&mut self) {
        self.forget();
    }
}

/// The work as the engine's functions take it.
fn inside(work: &mut dyn FnMut() -> Result<Outcome>) -> engine::Result<Outcome> {
    work().map_err(|error| match error.downcast::<EngineError>() {
        Ok(error) => error,
        Err(error) => EngineError::Unsupported(format!("{error:#}")),
    })
}

fn say_eager(why: &str) {
    console::note(&format!("steps are given to the card piece by piece, not as one: {why}"));
}
