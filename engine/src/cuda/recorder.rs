//! A driver that computes nothing and remembers what it was asked: for planning memory where there
//! is no card, and for tests of bookkeeping.
//!
//! Addresses never overlap and are not real; downloads give zeros. Like NVIDIA's driver it keeps
//! [`WORKSPACE`] for its libraries and has a convolution for everything.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Card;
use super::driver::{
    Address, CardFacts, Convolution, Driver, Graph, Launch, Matmul, Stream, WORKSPACE,
};
use crate::{Device, EngineError, Result};

/// First address that is handed out; 0 means none.
const FIRST: Address = 1 << 32;
/// Alignment of addresses.
const ALIGN: usize = 256;

/// What a recording card was asked so far. Work given within a capture is counted when it is given,
/// not when it is replayed.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Counts {
    /// Starts of each kernel, by `module/kernel`.
    pub launches: BTreeMap<String, usize>,
    /// Matrix products.
    pub matmuls: usize,
    /// Convolutions, forward and backward.
    pub convolutions: usize,
    /// Floating point operations of both: 2 for a multiplication and an addition.
    pub flops: f64,
    /// Copies from the host.
    pub uploads: usize,
    /// Bytes of them.
    pub uploaded: usize,
    /// Copies to the host.
    pub downloads: usize,
    /// Copies within the card, and fills with zeros.
    pub copies: usize,
    /// Blocks taken from the driver.
    pub allocations: usize,
    /// Bytes of blocks that were not freed.
    pub allocated: usize,
    /// Captures that ended well.
    pub captured: usize,
    /// Starts of captured sequences.
    pub replays: usize,
    /// Captured sequences that were not dropped.
    pub graphs: usize,
}

#[derive(Default)]
struct State {
    counts: Counts,
    /// Where the next block starts, from [`FIRST`].
    next: Address,
    blocks: BTreeMap<Address, usize>,
    capturing: bool,
    graphs: BTreeSet<u64>,
}

/// Looks at the counts of a recording card.
#[derive(Clone)]
pub struct Counter(Arc<Mutex<State>>);

impl Counter {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The counts so far.
    pub fn read(&self) -> Counts {
        self.state().counts.clone()
    }
}

/// Opens a recording card that is like another but for what it computes; `limit` bytes of it may be
/// used, the libraries' scratch included.
pub fn open(like: CardFacts, limit: usize) -> Result<Device> {
    open_counted(like, limit).map(|(device, _)| device)
}

/// As [`open`], with its counts.
pub fn open_counted(like: CardFacts, limit: usize) -> Result<(Device, Counter)> {
    let counter = Counter(Arc::default());
    let facts = CardFacts { computes: false, ..like };
    let driver = Recorder { facts, counter: counter.clone() };
    Ok((Card::open(Box::new(driver), limit.saturating_sub(WORKSPACE))?, counter))
}

struct Recorder {
    facts: CardFacts,
    counter: Counter,
}

impl Recorder {
    fn count(&self, note: impl FnOnce(&mut Counts)) -> Result<()> {
        note(&mut self.counter.state().counts);
        Ok(())
    }

    /// As a card would: the host cannot wait for work that is only noted.
    fn check_not_capturing(&self, what: &str) -> Result<()> {
        if self.counter.state().capturing {
            return Err(EngineError::NotCapturable(format!("{what} within a captured step")));
        }
        Ok(())
    }
}

impl Driver for Recorder {
    fn facts(&self) -> &CardFacts {
        &self.facts
    }
    fn free_memory(&self) -> Result<usize> {
        let used = self.counter.state().counts.allocated + WORKSPACE;
        Ok(self.facts.memory.saturating_sub(used))
    }
    fn allocate(&self, bytes: usize) -> Result<Address> {
        let mut state = self.counter.state();
        let address = FIRST + state.next;
        // A gap of one unit, so that a write past the end is not inside the next block.
        state.next += (bytes.next_multiple_of(ALIGN) + ALIGN) as Address;
        state.blocks.insert(address, bytes);
        state.counts.allocations += 1;
        state.counts.allocated += bytes;
        Ok(address)
    }
    fn free(&self, address: Address) {
        let mut state = self.counter.state();
        if let Some(bytes) = state.blocks.remove(&address) {
            state.counts.allocated -= bytes;
        }
    }
    fn upload(&self, _: Stream, _: Address, from: &[u8]) -> Result<()> {
        self.count(|counts| {
            counts.uploads += 1;
            counts.uploaded += from.len();
        })
    }
    fn download(&self, _: Stream, to: &mut [u8], _: Address) -> Result<()> {
        self.check_not_capturing("a download")?;
        to.fill(0);
        self.count(|counts| counts.downloads += 1)
    }
    fn copy(&self, _: Stream, _: Address, _: Address, _: usize) -> Result<()> {
        self.count(|counts| counts.copies += 1)
    }
    fn zero(&self, _: Stream, _: Address, _: usize) -> Result<()> {
        self.count(|counts| counts.copies += 1)
    }
    fn launch(&self, launch: &Launch) -> Result<()> {
        let name = format!("{}/{}", launch.module, launch.kernel);
        self.count(|counts| *counts.launches.entry(name).or_default() += 1)
    }
    fn matmul(&self, matmul: &Matmul) -> Result<()> {
        self.count(|counts| {
            counts.matmuls += 1;
            counts.flops += 2. * matmul.m as f64 * matmul.n as f64 * matmul.k as f64;
        })
    }
    fn convolve(&self, p: &Convolution) -> Result<bool> {
        let outputs = p.output.iter().product::<usize>() as f64;
        let window = (p.kernel.0 * p.kernel.1 * p.input[3]) as f64;
        self.count(|counts| {
            counts.convolutions += 1;
            counts.flops += 2. * outputs * window;
        })?;
        Ok(true)
    }
    fn order(&self, _: Stream, _: Stream) -> Result<()> {
        Ok(())
    }
    fn synchronize(&self, _: Stream) -> Result<()> {
        self.check_not_capturing("waiting")
    }
    fn begin_capture(&self) -> Result<()> {
        self.check_not_capturing("a capture")?;
        self.counter.state().capturing = true;
        Ok(())
    }
    fn end_capture(&self) -> Result<Graph> {
        let mut state = self.counter.state();
        if !std::mem::take(&mut state.capturing) {
            return Err(EngineError::NotCapturable("no capture was begun".into()));
        }
        let graph = state.counts.captured as u64;
        state.counts.captured += 1;
        state.counts.graphs += 1;
        state.graphs.insert(graph);
        Ok(Graph(graph))
    }
    fn replay(&self, graph: Graph) -> Result<()> {
        let mut state = self.counter.state();
        if !state.graphs.contains(&graph.0) {
            let why = format!("there is no captured sequence of this number: {}", graph.0);
            return Err(EngineError::Unsupported(why));
        }
        state.counts.replays += 1;
        Ok(())
    }
    fn drop_graph(&self, graph: Graph) {
        let mut state = self.counter.state();
        if state.graphs.remove(&graph.0) {
            state.counts.graphs -= 1;
        }
    }
    fn raw_stream(&self, _: Stream) -> u64 {
        0
    }
}
