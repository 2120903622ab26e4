//! The driver of a real card: streams, memory, graphs; kernels and libraries are handed on.
//!
//! Three streams that do not wait for each other unless told to. A capture is relaxed: what other
//! threads do meanwhile, on streams that are not captured, neither breaks it nor lands in it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use cudarc::driver::sys as cu;

use super::context::{Context, Cuda, Event, Queue};
use super::convolution::Convolutions;
use super::launch::Kernels;
use super::libraries::{Library, find};
use super::matmul::Products;
use super::staging::{Kept, Landing, Ring};
use super::tuning::{Scratch, Tuning};
use crate::cuda::Card;
use crate::cuda::driver::{
    Address, CardFacts, Convolution, Driver, Graph, Launch, Matmul, Stream, WORKSPACE,
};
use crate::{Device, EngineError, Result};

/// Bytes of the card that are left alone without a limit: what libraries load on first use.
const RESERVE: usize = 256 << 20;

/// What card `index` is, if it and the libraries on this machine can train; else what is missing.
/// Opens nothing on the card.
pub fn usable(index: usize) -> Result<CardFacts> {
    let (_, facts) = Cuda::get()?.facts(index)?;
    if facts.capability < (8, 0) {
        let (major, minor) = facts.capability;
        return Err(EngineError::Unsupported(format!(
            "{} is too old: compute capability {major}.{minor}, 8.0 is needed (Ampere, 2020)\n\
             hint: `--device cpu` trains without it",
            facts.name
        )));
    }
    find(Library::Nvrtc)?;
    find(Library::CublasLt)?;
    Ok(facts)
}

/// Opens card `index`. At most `limit` bytes of it are used for tensors and the libraries'
/// workspace, by default what is free now; the context itself, some 300 to 500 MB that the driver
/// takes for code and stacks, comes on top of a limit. Kernels that are not in the cache are
/// compiled first.
pub fn open(index: usize, limit: Option<usize>) -> Result<Device> {
    let facts = usable(index)?;
    let cuda = Cuda::get()?;
    let (device, _) = cuda.facts(index)?;
    let context = Context::open(cuda, device)?;
    let kernels = Kernels::prepare(facts.capability)?;
    let driver = Nvidia::new(context, facts, kernels)?;
    let free = driver.free_memory()?.saturating_sub(RESERVE);
    let limit = limit.map_or(free, |limit| limit.saturating_sub(WORKSPACE).min(free));
    Card::open(Box::new(driver), limit)
}

/// An open card.
struct Nvidia {
    context: Context,
    facts: CardFacts,
    kernels: Kernels,
    products: Products,
    convolutions: Convolutions,
    tuning: Tuning,
    streams: [Queue; 3],
    /// Of the last [`Driver::order`] after each stream.
    events: [Mutex<Event>; 3],
    rings: [Mutex<Ring>; 3],
    landing: Mutex<Landing>,
    workspace: Address,
    capture: Mutex<Option<Capture>>,
    graphs: Mutex<HashMap<u64, Replayable>>,
    next_graph: AtomicU64,
}

/// A capture under way.
#[derive(Default)]
struct Capture {
    kept: Kept,
    /// To be freed when it has ended: freeing waits for streams, which a capture cannot.
    freed: Vec<Address>,
}

/// A captured sequence, ready to start.
struct Replayable {
    raw: cu::CUgraphExec,
    kept: Kept,
}
// SAFETY: graphs may be started from any thread; the map's lock keeps it to one at a time.
unsafe impl Send for Replayable {}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Nvidia {
    fn new(context: Context, facts: CardFacts, kernels: Kernels) -> Result<Self> {
        let api = context.bind()?;
        let (mut least, mut greatest) = (0, 0);
        // SAFETY: both numbers go where they are told.
        let status =
            unsafe { (api.cuCtxGetStreamPriorityRange)(&raw mut least, &raw mut greatest) };
        context.check("asking for priorities", status)?;
        // Gradients go first: their kernels are small, and the other ranks wait for them.
        let stream = |priority| -> Result<Queue> {
            let mut raw = std::ptr::null_mut();
            // CU_STREAM_NON_BLOCKING
            // SAFETY: the stream goes where it is told; it is kept for the life of the process.
            let status = unsafe { (api.cuStreamCreateWithPriority)(&raw mut raw, 1, priority) };
            context.check("making a stream", status)?;
            Ok(Queue(raw))
        };
        let streams = [stream(least)?, stream(least)?, stream(greatest)?];
        let event = || context.event(false).map(Mutex::new);
        let events = [event()?, event()?, event()?];
        let workspace = context.allocate(WORKSPACE)?;
        let products = Products::open()?;
        let convolutions = Convolutions::open(&context, streams[0]);
        let tuning = Tuning::open(&context, &facts)?;
        Ok(Self {
            context,
            facts,
            kernels,
            products,
            convolutions,
            tuning,
            streams,
            events,
            rings: Default::default(),
            landing: Mutex::default(),
            workspace,
            capture: Mutex::new(None),
            graphs: Mutex::default(),
            next_graph: AtomicU64::new(1),
        })
    }

    fn stream(&self, stream: Stream) -> Queue {
        self.streams[stream as usize]
    }

    /// What libraries need for one call on the compute stream.
    fn scratch(&self) -> Scratch<'_> {
        Scratch {
            context: &self.context,
            stream: self.stream(Stream::Compute),
            workspace: self.workspace,
            tuning: &self.tuning,
        }
    }

    /// Turns what the stream noted into something that can be started.
    fn instantiate(&self, graph: cu::CUgraph) -> Result<cu::CUgraphExec> {
        let api = self.context.bind()?;
        let compute = self.stream(Stream::Compute);
        let mut raw = std::ptr::null_mut();
        // SAFETY: the graph was just captured and is destroyed once, after its use.
        let status = unsafe {
            let status = (api.cuGraphInstantiateWithFlags)(&raw mut raw, graph, 0);
            (api.cuGraphDestroy)(graph);
            status
        };
        self.context.check("preparing the captured step", status)?;
        // SAFETY: both are alive.
        let status = unsafe { (api.cuGraphUpload)(raw, compute.0) };
        self.context.check("sending the captured step to the card", status)?;
        Ok(raw)
    }

    fn free_now(&self, address: Address) {
        // Errors here have nobody to go to; a card that stopped says so at the next call.
        for stream in self.streams {
            drop(self.context.synchronize(stream));
        }
        drop(self.context.free(address));
    }
}

impl Driver for Nvidia {
    fn facts(&self) -> &CardFacts {
        &self.facts
    }

    fn identity(&self) -> Option<String> {
        self.context.identity()
    }

    fn free_memory(&self) -> Result<usize> {
        Ok(self.context.memory()?.0)
    }

    fn allocate(&self, bytes: usize) -> Result<Address> {
        self.context.allocate(bytes)
    }

    fn free(&self, address: Address) {
        if let Some(capture) = lock(&self.capture).as_mut() {
            capture.freed.push(address);
            return;
        }
        self.free_now(address);
    }

    fn upload(&self, stream: Stream, to: Address, from: &[u8]) -> Result<()> {
        if from.is_empty() {
            return Ok(());
        }
        let queue = self.stream(stream);
        let mut capture = lock(&self.capture);
        if let Some(capture) = capture.as_mut()
            && self.context.is_capturing(queue)?
        {
            return capture.kept.upload(&self.context, queue, to, from);
        }
        drop(capture);
        lock(&self.rings[stream as usize]).upload(&self.context, queue, to, from)
    }

    fn download(&self, stream: Stream, to: &mut [u8], from: Address) -> Result<()> {
        if to.is_empty() {
            return Ok(());
        }
        let queue = self.stream(stream);
        if self.context.is_capturing(queue)? {
            return Err(EngineError::NotCapturable("numbers for the host".into()));
        }
        lock(&self.landing).download(&self.context, queue, to, from)
    }

    fn copy(&self, stream: Stream, to: Address, from: Address, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        let (api, queue) = (self.context.bind()?, self.stream(stream));
        // SAFETY: the caller's tensors have these bytes.
        let status = unsafe { (api.cuMemcpyDtoDAsync_v2)(to, from, bytes, queue.0) };
        self.context.check("copying within the card", status)
    }

    fn zero(&self, stream: Stream, to: Address, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        let (api, queue) = (self.context.bind()?, self.stream(stream));
        // SAFETY: the caller's tensor has these bytes.
        let status = unsafe { (api.cuMemsetD8Async)(to, 0, bytes, queue.0) };
        self.context.check("setting memory to zero", status)
    }

    fn launch(&self, launch: &Launch) -> Result<()> {
        self.kernels.launch(&self.context, self.stream(Stream::Compute), launch)
    }

    fn matmul(&self, matmul: &Matmul) -> Result<()> {
        self.products.matmul(&self.scratch(), matmul)
    }

    fn convolve(&self, convolution: &Convolution) -> Result<bool> {
        self.convolutions.convolve(&self.scratch(), convolution)
    }

    fn order(&self, after: Stream, before_this: Stream) -> Result<()> {
        if after == before_this {
            return Ok(());
        }
        // Waiting refers to the event as it was recorded last: the lock keeps the two together.
        let event = lock(&self.events[after as usize]);
        self.context.record(*event, self.stream(after))?;
        let (api, queue) = (self.context.bind()?, self.stream(before_this));
        // SAFETY: both are alive.
        let status = unsafe { (api.cuStreamWaitEvent)(queue.0, event.0, 0) };
        self.context.check("ordering streams", status)
    }

    fn synchronize(&self, stream: Stream) -> Result<()> {
        self.context.synchronize(self.stream(stream))
    }

    fn begin_capture(&self) -> Result<()> {
        let mut capture = lock(&self.capture);
        if capture.is_some() {
            return Err(EngineError::NotCapturable("a capture within a capture".into()));
        }
        let (api, queue) = (self.context.bind()?, self.stream(Stream::Compute));
        let mode = cu::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the stream is alive.
        let status = unsafe { (api.cuStreamBeginCapture_v2)(queue.0, mode) };
        self.context.check("beginning to capture a step", status)?;
        *capture = Some(Capture::default());
        Ok(())
    }

    fn end_capture(&self) -> Result<Graph> {
        let Some(capture) = lock(&self.capture).take() else {
            return Err(EngineError::NotCapturable("no capture was begun".into()));
        };
        let (api, queue) = (self.context.bind()?, self.stream(Stream::Compute));
        let mut graph = std::ptr::null_mut();
        // SAFETY: the graph goes where it is told.
        let status = unsafe { (api.cuStreamEndCapture)(queue.0, &raw mut graph) };
        let result = if status == 0 && !graph.is_null() {
            self.instantiate(graph)
        } else {
            let why = self.context.cuda.error_name(status);
            Err(EngineError::NotCapturable(format!("the driver refuses the captured step: {why}")))
        };
        for address in capture.freed {
            self.free_now(address);
        }
        let raw = match result {
            Ok(raw) => raw,
            Err(error) => {
                capture.kept.release(&self.context);
                return Err(error);
            }
        };
        let number = self.next_graph.fetch_add(1, Ordering::Relaxed);
        lock(&self.graphs).insert(number, Replayable { raw, kept: capture.kept });
        Ok(Graph(number))
    }

    fn replay(&self, graph: Graph) -> Result<()> {
        let graphs = lock(&self.graphs);
        let Some(found) = graphs.get(&graph.0) else {
            return Err(EngineError::NotCapturable("there is no such captured step".into()));
        };
        let (api, queue) = (self.context.bind()?, self.stream(Stream::Compute));
        self.context.note_kernel("a captured step");
        // SAFETY: the graph is alive; what it copies from is kept beside it.
        let status = unsafe { (api.cuGraphLaunch)(found.raw, queue.0) };
        self.context.check("starting a captured step", status)
    }

    fn drop_graph(&self, graph: Graph) {
        let Some(found) = lock(&self.graphs).remove(&graph.0) else { return };
        // Its copies may be under way. Nobody can do anything about a failure here.
        drop(self.synchronize(Stream::Compute));
        if let Ok(api) = self.context.bind() {
            // SAFETY: removed from the map above, destroyed once.
            unsafe { (api.cuGraphExecDestroy)(found.raw) };
        }
        found.kept.release(&self.context);
    }

    fn raw_stream(&self, stream: Stream) -> u64 {
        self.stream(stream).0 as u64
    }
}
