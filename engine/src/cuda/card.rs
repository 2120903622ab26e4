//! A card in use: its driver, its memory, and the buffers of tensors that live on it.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock};

use super::driver::{Address, Arg, CardFacts, Driver, Graph, Launch, Stream};
use super::elements::floats;
use super::memory::{Block, CardMemory, Memory};
use super::transfer::{scale_count, scales_offset, values_of};
use crate::{DType, Device, EngineError, Result, Tensor};

/// Cards opened by this process; they stay open until it ends.
static CARDS: RwLock<Vec<&'static Card>> = RwLock::new(Vec::new());

/// An opened card; the operation table is implemented on it in the files beside this one.
pub struct Card {
    device: Device,
    driver: Box<dyn Driver>,
    memory: Mutex<Memory>,
    /// Work is being captured: what the host gives now would be given again by each replay.
    capturing: AtomicBool,
    /// What the host gives now never changes.
    constant: AtomicBool,
}

impl Card {
    /// Opens a card over `driver`, of whose memory at most `limit` bytes may be used.
    pub fn open(driver: Box<dyn Driver>, limit: usize) -> Result<Device> {
        let mut cards = CARDS.write().unwrap_or_else(PoisonError::into_inner);
        let index = u16::try_from(cards.len())
            .map_err(|_| EngineError::Unsupported("too many cards are open".into()))?;
        let device = Device::Card(index);
        let memory = Mutex::new(Memory::new(limit));
        let (capturing, constant) = (AtomicBool::new(false), AtomicBool::new(false));
        cards.push(Box::leak(Box::new(Card { device, driver, memory, capturing, constant })));
        Ok(device)
    }

    /// The card behind `Device::Card(index)`.
    pub(crate) fn of(index: u16) -> &'static Card {
        let cards = CARDS.read().unwrap_or_else(PoisonError::into_inner);
        // Only `open` makes such devices, and cards are never closed.
        cards[usize::from(index)]
    }

    /// What it is.
    pub fn facts(&self) -> &CardFacts {
        self.driver.facts()
    }

    /// This card for as long as the process lives.
    pub(super) fn itself(&self) -> &'static Card {
        let Device::Card(index) = self.device else { unreachable!("cards are made by `open`") };
        Card::of(index)
    }

    /// This card as a device.
    pub fn device(&self) -> Device {
        self.device
    }

    /// The driver.
    pub fn driver(&self) -> &dyn Driver {
        &*self.driver
    }

    pub(super) fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes in use now and at most so far.
    pub fn memory_stats(&self) -> CardMemory {
        self.memory().stats()
    }

    /// Gives blocks that no tensor uses back to the driver.
    pub fn release_idle(&self) {
        self.memory().release(self.driver());
    }

    /// Runs `run`, whose uploads are the same each time: a capture may keep them.
    pub(crate) fn constant<T>(&self, run: impl FnOnce() -> Result<T>) -> Result<T> {
        let before = self.constant.swap(true, Ordering::Relaxed);
        let result = run();
        self.constant.store(before, Ordering::Relaxed);
        result
    }

    /// Notes the work that `run` gives to the card as a graph instead of doing it. Memory that `run`
    /// takes must be free of other use whenever the graph is replayed.
    pub fn capture<T>(&self, run: impl FnOnce() -> Result<T>) -> Result<(Graph, T)> {
        self.driver.begin_capture()?;
        self.capturing.store(true, Ordering::Relaxed);
        let result = run();
        self.capturing.store(false, Ordering::Relaxed);
        // Ended in any case: a stream left in capture takes no other work.
        let graph = self.driver.end_capture();
        match (result, graph) {
            (Ok(value), Ok(graph)) => Ok((graph, value)),
            (Err(error), Ok(graph)) => {
                self.driver.drop_graph(graph);
                Err(error)
            }
            (Ok(_), Err(error)) | (Err(error), Err(_)) => Err(error),
        }
    }

    /// Fails where the host must not look at, or change, what the card computes.
    pub(super) fn check_outside_capture(&self, what: &str) -> Result<()> {
        if self.capturing.load(Ordering::Relaxed) && !self.constant.load(Ordering::Relaxed) {
            return Err(EngineError::NotCapturable(format!("{what} within a captured step")));
        }
        Ok(())
    }

    /// An uninitialised tensor.
    pub(super) fn empty(&'static self, shape: &[usize], dtype: DType) -> Result<Tensor> {
        Ok(Tensor::on_card(CardBuffer::of_shape(self, shape, dtype)?, shape))
    }

    /// A copy that nothing shares; not of 8 bits, whose scales would stay behind.
    pub(super) fn copied(&'static self, x: &Tensor) -> Result<Tensor> {
        floats(self, "copy", x)?;
        let out = self.empty(x.shape(), x.dtype())?;
        let (to, from) = (out.address("copy")?, x.address("copy")?);
        self.driver.copy(Stream::Compute, to, from, x.len() * x.dtype().size())?;
        Ok(out)
    }

    /// Starts kernel `name` of `module` for elements of type `dtype` (`name_f32`, `name_bf16`...).
    pub(super) fn launch(
        &self,
        (module, name): (&'static str, &str),
        dtype: DType,
        (grid, block, shared): ([u32; 3], u32, u32),
        args: &[Arg],
    ) -> Result<()> {
        let kernel = format!("{name}_{}", dtype.suffix());
        self.driver.launch(&Launch { module, kernel: &kernel, grid, block, shared, args })
    }
}

impl std::fmt::Debug for Card {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.facts().label)
    }
}

/// Memory of one tensor; goes back to the card when dropped.
pub(crate) struct CardBuffer {
    card: &'static Card,
    block: Block,
    len: usize,
    dtype: DType,
    /// Scales behind the numbers, one for each row of a tensor in 8 bits.
    scales: usize,
}

impl CardBuffer {
    /// For `len` numbers that have no scales.
    pub(crate) fn new(card: &'static Card, len: usize, dtype: DType) -> Result<Self> {
        Self::with_scales(card, len, dtype, 0)
    }

    /// For a tensor of `shape`, with its rows' scales if it is kept in 8 bits.
    pub(crate) fn of_shape(card: &'static Card, shape: &[usize], dtype: DType) -> Result<Self> {
        let scales = if dtype == DType::F8 { scale_count(shape) } else { 0 };
        Self::with_scales(card, shape.iter().product(), dtype, scales)
    }

    fn with_scales(card: &'static Card, len: usize, dtype: DType, scales: usize) -> Result<Self> {
        let bytes = bytes_taken(len, dtype, scales);
        let block = card.memory().take(card.driver(), bytes)?;
        let buffer = Self { card, block, len, dtype, scales };
        card.driver.begin_tensor(buffer.address(), bytes)?;
        Ok(buffer)
    }

    /// Where the first scale lies, and how many there are.
    pub(crate) fn scales(&self) -> (Address, usize) {
        (self.address() + scales_offset(self.len) as Address, self.scales)
    }

    /// The scales of the rows that hold the numbers `range`, one for each number.
    pub(crate) fn scales_of(&self, range: Range<usize>) -> Result<Vec<f32>> {
        if range.is_empty() || self.scales == 0 {
            return Ok(vec![1.; range.len()]);
        }
        let width = self.len / self.scales;
        let rows = range.start / width..range.end.div_ceil(width);
        let mut bytes = vec![0; rows.len() * 4];
        self.read(scales_offset(self.len) + rows.start * 4, &mut bytes)?;
        let scales = values_of(&bytes, DType::F32);
        Ok(range.map(|at| scales[at / width - rows.start]).collect())
    }

    fn bytes(&self) -> usize {
        bytes_taken(self.len, self.dtype, self.scales)
    }

    pub(crate) fn device(&self) -> Device {
        self.card.device
    }

    pub(crate) fn address(&self) -> Address {
        self.block.address
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn dtype(&self) -> DType {
        self.dtype
    }

    /// Fills the buffer with host bytes, by the compute stream.
    pub(crate) fn fill(&self, bytes: &[u8]) -> Result<()> {
        self.card.check_outside_capture("numbers from the host")?;
        self.card.driver.upload(Stream::Compute, self.block.address, bytes)
    }

    pub(crate) fn zero(&self) -> Result<()> {
        self.card.driver.zero(Stream::Compute, self.block.address, self.bytes())
    }

    /// `bytes` from `offset` on, when all work before is done.
    pub(crate) fn read(&self, offset: usize, bytes: &mut [u8]) -> Result<()> {
        self.card.check_outside_capture("numbers for the host")?;
        self.card.driver.download(Stream::Compute, bytes, self.block.address + offset as u64)
    }
}

fn bytes_taken(len: usize, dtype: DType, scales: usize) -> usize {
    match scales {
        0 => len * dtype.size(),
        _ => scales_offset(len) + scales * DType::F32.size(),
    }
}

impl Drop for CardBuffer {
    fn drop(&mut self) {
        self.card.driver.end_tensor(self.block.address, self.bytes());
        self.card.take_back(&mut self.block);
    }
}
