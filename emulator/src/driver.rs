//! The driver of the emulated card: everything is done when a call returns.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use engine::cuda::driver::{CardFacts, Convolution, Driver, Graph, Launch, Matmul, Stream};
use engine::cuda::{Address, Card};
use engine::{Device, EngineError, Result};

use crate::calls::{Call, OwnedLaunch};
use crate::graph::Graphs;
use crate::memory::Blocks;
use crate::{convolve, kernels};

/// Opened cards and the counters of what they did.
static OPENED: Mutex<Vec<(Device, Arc<Mutex<State>>)>> = Mutex::new(Vec::new());

/// What a card has done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Launches {
    /// How often each kernel was started, by `module/kernel`.
    pub kernels: BTreeMap<String, u64>,
    /// Matrix products.
    pub matmuls: u64,
    /// Convolutions of the driver's own.
    pub convolutions: u64,
}

impl Launches {
    /// Counts a start; gives how many there were before.
    pub(crate) fn count(&mut self, module: &str, kernel: &str) -> u64 {
        let count = self.kernels.entry(format!("{module}/{kernel}")).or_default();
        *count += 1;
        *count - 1
    }

    /// Kernels of the engine that were never started.
    pub fn missing(&self) -> Vec<String> {
        kernels::names().into_iter().filter(|name| !self.kernels.contains_key(name)).collect()
    }
}

/// Everything that changes.
#[derive(Default)]
struct State {
    blocks: Blocks,
    graphs: Graphs,
    launches: Launches,
    /// Found where no error could be given; told by the next call that can.
    broken: Option<EngineError>,
}

/// A card on the host.
struct Emulated {
    facts: CardFacts,
    convolves: bool,
    state: Arc<Mutex<State>>,
}

/// Opens an emulated card of `limit` bytes that has a library for convolutions.
pub fn open(limit: usize) -> Result<Device> {
    open_with(limit, true)
}

/// Opens an emulated card without such a library.
pub fn open_without_convolution(limit: usize) -> Result<Device> {
    open_with(limit, false)
}

fn open_with(limit: usize, convolves: bool) -> Result<Device> {
    let facts = CardFacts {
        name: "emulated card".into(),
        label: "emulated".into(),
        capability: (8, 0),
        // Few, so that kernels which share work between processors do so in small tests.
        processors: 4,
        memory: limit,
        shared_memory: kernels::shared_memory(),
        computes: true,
    };
    let state = Arc::new(Mutex::new(State::default()));
    let device = Card::open(Box::new(Emulated { facts, convolves, state: state.clone() }), limit)?;
    OPENED.lock().unwrap_or_else(PoisonError::into_inner).push((device, state));
    Ok(device)
}

/// What an emulated card has done so far; nothing for other devices.
pub fn launches(device: Device) -> Launches {
    let opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
    let state = opened.iter().find(|(other, _)| *other == device).map(|(_, state)| state);
    state.map_or_else(Launches::default, |state| {
        state.lock().unwrap_or_else(PoisonError::into_inner).launches.clone()
    })
}

impl Emulated {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does the work, or notes it if the stream is being captured.
    fn give(&self, stream: Stream, call: Call) -> Result<()> {
        let state = &mut *self.state();
        if let Some(error) = state.broken.take() {
            return Err(error);
        }
        if state.graphs.captures(stream) {
            call.check(&state.blocks)?;
            state.graphs.note(call);
            return Ok(());
        }
        call.run(&mut state.blocks, &mut state.launches)
    }
}

impl Driver for Emulated {
    fn facts(&self) -> &CardFacts {
        &self.facts
    }

    fn free_memory(&self) -> Result<usize> {
        Ok(self.facts.memory.saturating_sub(self.state().blocks.used()))
    }

    /// Every tensor has fences of its own.
    fn granularity(&self) -> usize {
        256
    }

    fn allocate(&self, bytes: usize) -> Result<Address> {
        self.state().blocks.allocate(bytes)
    }

    fn free(&self, address: Address) {
        let state = &mut *self.state();
        if let Err(error) = state.blocks.free(address) {
            state.broken.get_or_insert(error);
        }
    }

    fn begin_tensor(&self, address: Address, bytes: usize) -> Result<()> {
        let state = &mut *self.state();
        if !state.graphs.captures(Stream::Compute) {
            return state.blocks.begin(address, bytes);
        }
        // Each replay loses what was there; now only the checks of what follows must know.
        state.graphs.note(Call::Begin { address, bytes });
        state.blocks.claim(address, bytes)
    }

    fn end_tensor(&self, address: Address, bytes: usize) {
        let state = &mut *self.state();
        if state.graphs.captures(Stream::Compute) {
            state.graphs.note(Call::End { address, bytes });
        }
        if let Err(error) = state.blocks.end(address, bytes) {
            state.broken.get_or_insert(error);
        }
    }

    fn upload(&self, stream: Stream, to: Address, from: &[u8]) -> Result<()> {
        self.give(stream, Call::Upload { to, bytes: from.to_vec() })
    }

    fn download(&self, stream: Stream, to: &mut [u8], from: Address) -> Result<()> {
        let state = &mut *self.state();
        if let Some(error) = state.broken.take() {
            return Err(error);
        }
        state.graphs.host_waits("download", stream)?;
        to.copy_from_slice(state.blocks.read("download", from, to.len())?);
        Ok(())
    }

    fn copy(&self, stream: Stream, to: Address, from: Address, bytes: usize) -> Result<()> {
        self.give(stream, Call::Copy { to, from, bytes })
    }

    fn zero(&self, stream: Stream, to: Address, bytes: usize) -> Result<()> {
        self.give(stream, Call::Zero { to, bytes })
    }

    fn launch(&self, launch: &Launch) -> Result<()> {
        self.give(Stream::Compute, Call::Launch(OwnedLaunch::new(launch)?))
    }

    fn matmul(&self, matmul: &Matmul) -> Result<()> {
        self.give(Stream::Compute, Call::Matmul(*matmul))
    }

    fn convolve(&self, convolution: &Convolution) -> Result<bool> {
        if !self.convolves || !convolve::has(convolution) {
            return Ok(false);
        }
        self.give(Stream::Compute, Call::Convolve(*convolution))?;
        Ok(true)
    }

    fn order(&self, after: Stream, before_this: Stream) -> Result<()> {
        self.state().graphs.order(after, before_this);
        Ok(())
    }

    fn synchronize(&self, stream: Stream) -> Result<()> {
        let state = &mut *self.state();
        if let Some(error) = state.broken.take() {
            return Err(error);
        }
        state.graphs.host_waits("synchronize", stream)
    }

    fn begin_capture(&self) -> Result<()> {
        self.state().graphs.begin()
    }

    fn end_capture(&self) -> Result<Graph> {
        self.state().graphs.end()
    }

    fn replay(&self, graph: Graph) -> Result<()> {
        let state = &mut *self.state();
        if state.graphs.captures(Stream::Compute) {
            return Err(EngineError::NotCapturable("a replay within a capture".into()));
        }
        let calls = state.graphs.calls(graph)?;
        calls.iter().try_for_each(|call| call.run(&mut state.blocks, &mut state.launches))
    }

    fn drop_graph(&self, graph: Graph) {
        self.state().graphs.forget(graph);
    }

    fn raw_stream(&self, _stream: Stream) -> u64 {
        0
    }
}
