//! The driver library in use: what it answers, and the context of one card.

use std::ffi::{c_int, c_void};
use std::sync::{Mutex, OnceLock, PoisonError};

use cudarc::driver::sys as cu;

use super::libraries::{Found, Library, find};
use super::symbols::{CudaApi, driver_error};
use crate::cuda::driver::CardFacts;
use crate::{EngineError, Result};

/// Codes after which a context takes no more work.
const FATAL: [u32; 11] = [214, 220, 700, 702, 710, 714, 715, 716, 717, 718, 719];
/// `CUDA_ERROR_OUT_OF_MEMORY`.
pub(super) const OUT_OF_MEMORY: u32 = 2;

/// The driver, initialised.
pub(super) struct Cuda {
    found: &'static Found,
    pub(super) api: CudaApi,
}

impl Cuda {
    /// The driver, or why there is none.
    pub(super) fn get() -> Result<&'static Self> {
        static CUDA: OnceLock<std::result::Result<Cuda, String>> = OnceLock::new();
        let found = find(Library::Driver)?;
        let cuda = CUDA.get_or_init(|| {
            let api = CudaApi::load(&found.handle).map_err(|name| {
                let path = found.path.display();
                format!(
                    "the driver is too old: {path} has no function `{name}`\n\
                     hint: install version 525 or newer"
                )
            })?;
            let cuda = Cuda { found, api };
            // SAFETY: takes no pointers.
            let status = unsafe { (cuda.api.cuInit)(0) };
            if status != 0 {
                return Err(format!(
                    "no NVIDIA GPU can be used: {}\n\
                     hint: `nvidia-smi` should list it; in a container give it to the container, \
                     and see whether `CUDA_VISIBLE_DEVICES` hides it",
                    driver_error(&found.handle, status)
                ));
            }
            Ok(cuda)
        });
        cuda.as_ref().map_err(|why| EngineError::Unsupported(why.clone()))
    }

    /// The library's name of an error.
    pub(super) fn error_name(&self, status: u32) -> String {
        driver_error(&self.found.handle, status)
    }

    fn check(&self, what: &str, status: u32) -> Result<()> {
        match status {
            0 => Ok(()),
            _ => Err(EngineError::Card { what: what.to_owned(), why: self.error_name(status) }),
        }
    }

    /// How many cards this process sees.
    pub(super) fn count(&self) -> Result<usize> {
        let mut count: c_int = 0;
        // SAFETY: the number goes where it is told.
        self.check("counting cards", unsafe { (self.api.cuDeviceGetCount)(&raw mut count) })?;
        Ok(usize::try_from(count).unwrap_or(0))
    }

    /// What card `index` is; makes no context.
    pub(super) fn facts(&self, index: usize) -> Result<(cu::CUdevice, CardFacts)> {
        use cu::CUdevice_attribute as A;
        let count = self.count()?;
        let ordinal = c_int::try_from(index).ok().filter(|_| index < count);
        let Some(ordinal) = ordinal else {
            let hint = match count {
                0 => "hint: `nvidia-smi` should list a card; see `CUDA_VISIBLE_DEVICES`".to_owned(),
                _ => format!("hint: cards are counted from 0, there are: {count}"),
            };
            return Err(EngineError::Unsupported(format!(
                "there is no card `cuda:{index}`\n{hint}"
            )));
        };
        let mut device = 0;
        // SAFETY: here and below, each function puts what it is asked for where it is told.
        let status = unsafe { (self.api.cuDeviceGet)(&raw mut device, ordinal) };
        self.check("choosing a card", status)?;
        let mut name = [0_u8; 256];
        // SAFETY: as above; the length is that of the buffer.
        let status = unsafe {
            (self.api.cuDeviceGetName)(name.as_mut_ptr().cast(), name.len() as c_int, device)
        };
        self.check("asking for a card's name", status)?;
        let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
        let mut memory = 0;
        // SAFETY: as above.
        let status = unsafe { (self.api.cuDeviceTotalMem_v2)(&raw mut memory, device) };
        self.check("asking for a card's memory", status)?;
        let attribute = |attribute| -> Result<u32> {
            let mut value: c_int = 0;
            // SAFETY: as above.
            let status =
                unsafe { (self.api.cuDeviceGetAttribute)(&raw mut value, attribute, device) };
            self.check("asking for a card's properties", status)?;
            Ok(u32::try_from(value).unwrap_or(0))
        };
        let shared = attribute(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        let facts = CardFacts {
            name: String::from_utf8_lossy(name).into_owned(),
            label: format!("cuda:{index}"),
            capability: (
                attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            ),
            processors: attribute(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            memory,
            shared_memory: shared as usize,
            computes: true,
        };
        Ok((device, facts))
    }
}

/// What every card that this process sees is; makes no context and takes no memory.
pub fn cards() -> Result<Vec<CardFacts>> {
    let cuda = Cuda::get()?;
    (0..cuda.count()?).map(|index| cuda.facts(index).map(|(_, facts)| facts)).collect()
}

/// Free and all bytes of card `index`, other processes included. Makes a context on the card, which
/// takes some hundred MB of it until this process ends.
pub fn memory(index: usize) -> Result<(usize, usize)> {
    let cuda = Cuda::get()?;
    Context::open(cuda, cuda.facts(index)?.0)?.memory()
}

/// The primary context of a card, shared with every library that runs in this process.
pub(super) struct Context {
    pub(super) cuda: &'static Cuda,
    raw: cu::CUcontext,
    device: cu::CUdevice,
    /// The kernel that was started last.
    last_kernel: Mutex<String>,
    /// What the card stopped at.
    stopped: OnceLock<String>,
}

// SAFETY: a context may be used from any thread that has made it current, which `bind` does.
unsafe impl Send for Context {}
// SAFETY: as above; the driver's functions are safe to call from several threads.
unsafe impl Sync for Context {}

impl Context {
    pub(super) fn open(cuda: &'static Cuda, device: cu::CUdevice) -> Result<Self> {
        let mut raw = std::ptr::null_mut();
        // SAFETY: the context goes where it is told; it is kept for the life of the process.
        let status = unsafe { (cuda.api.cuDevicePrimaryCtxRetain)(&raw mut raw, device) };
        cuda.check("opening the card", status)?;
        let (last_kernel, stopped) = (Mutex::new(String::new()), OnceLock::new());
        Ok(Self { cuda, raw, device, last_kernel, stopped })
    }

    /// The card's UUID (that of the slice, for a slice of a card).
    pub(super) fn identity(&self) -> Option<String> {
        let mut uuid = cu::CUuuid { bytes: [0; 16] };
        // SAFETY: sixteen bytes go where they are told.
        let status = unsafe { (self.cuda.api.cuDeviceGetUuid_v2)(&raw mut uuid, self.device) };
        (status == 0).then(|| {
            let bytes = uuid.bytes.iter().map(|byte| format!("{:02x}", *byte as u8));
            format!("GPU-{}", bytes.collect::<String>())
        })
    }

    /// Makes this card the one that the calling thread talks to. Cheap; done at each call since
    /// other libraries and other cards may have changed it.
    pub(super) fn bind(&self) -> Result<&CudaApi> {
        // SAFETY: the context is never released.
        let status = unsafe { (self.cuda.api.cuCtxSetCurrent)(self.raw) };
        self.check("choosing the card", status)?;
        Ok(&self.cuda.api)
    }

    pub(super) fn note_kernel(&self, kernel: &str) {
        let mut last = self.last_kernel.lock().unwrap_or_else(PoisonError::into_inner);
        last.clear();
        last.push_str(kernel);
    }

    /// An error unless `status` is success. Kernels fail after the call that started them: whoever
    /// notices first reports the kernel that was started last, everybody after is short.
    pub(super) fn check(&self, what: &str, status: u32) -> Result<()> {
        if status == 0 {
            return Ok(());
        }
        let name = self.cuda.error_name(status);
        let why = if !FATAL.contains(&status) {
            name
        } else if let Some(first) = self.stopped.get() {
            format!("the card stopped before, at: {first}")
        } else {
            let last = self.last_kernel.lock().unwrap_or_else(PoisonError::into_inner).clone();
            drop(self.stopped.set(name.clone()));
            format!(
                "{name}; the kernel started last: `{last}`\n\
                 hint: `CUDA_LAUNCH_BLOCKING=1` shows which one it was"
            )
        };
        Err(EngineError::Card { what: what.to_owned(), why })
    }

    /// Free and all bytes of the card.
    pub(super) fn memory(&self) -> Result<(usize, usize)> {
        let (mut free, mut total) = (0, 0);
        // SAFETY: both numbers go where they are told.
        let status = unsafe { (self.bind()?.cuMemGetInfo_v2)(&raw mut free, &raw mut total) };
        self.check("asking for free memory", status)?;
        Ok((free, total))
    }

    /// Memory of the card.
    pub(super) fn allocate(&self, bytes: usize) -> Result<u64> {
        let mut address = 0;
        // SAFETY: the address goes where it is told.
        let status = unsafe { (self.bind()?.cuMemAlloc_v2)(&raw mut address, bytes.max(1)) };
        if status == OUT_OF_MEMORY {
            let (free, total) = self.memory()?;
            let live = total.saturating_sub(free);
            return Err(EngineError::OutOfMemory { wanted: bytes, live, limit: total });
        }
        self.check("taking memory of the card", status)?;
        Ok(address)
    }

    /// Gives memory back that no work uses any more.
    pub(super) fn free(&self, address: u64) -> Result<()> {
        // SAFETY: callers give what `allocate` gave, once, when all work that uses it is done.
        let status = unsafe { (self.bind()?.cuMemFree_v2)(address) };
        self.check("giving memory back", status)
    }

    /// An event; with a time stamp if it is to be measured with.
    pub(super) fn event(&self, timing: bool) -> Result<Event> {
        // CU_EVENT_DISABLE_TIMING
        let flags = if timing { 0 } else { 2 };
        let mut event = std::ptr::null_mut();
        // SAFETY: the event goes where it is told; it is kept for the life of the process.
        let status = unsafe { (self.bind()?.cuEventCreate)(&raw mut event, flags) };
        self.check("making an event", status)?;
        Ok(Event(event))
    }

    pub(super) fn record(&self, event: Event, stream: Queue) -> Result<()> {
        // SAFETY: both were made in this context and are never destroyed.
        let status = unsafe { (self.bind()?.cuEventRecord)(event.0, stream.0) };
        self.check("recording an event", status)
    }

    pub(super) fn wait(&self, event: Event) -> Result<()> {
        // SAFETY: as above.
        let status = unsafe { (self.bind()?.cuEventSynchronize)(event.0) };
        self.check("waiting for an event", status)
    }

    pub(super) fn synchronize(&self, stream: Queue) -> Result<()> {
        // SAFETY: as above.
        let status = unsafe { (self.bind()?.cuStreamSynchronize)(stream.0) };
        self.check("waiting for the card", status)
    }

    /// Whether work given to the stream is noted instead of done.
    pub(super) fn is_capturing(&self, stream: Queue) -> Result<bool> {
        let mut state: u32 = 0;
        // SAFETY: the state, an enum of 32 bits, goes where it is told.
        let status =
            unsafe { (self.bind()?.cuStreamIsCapturing)(stream.0, (&raw mut state).cast()) };
        self.check("asking for a capture", status)?;
        Ok(state != 0)
    }

    /// Page-locked memory of the host.
    pub(super) fn pinned(&self, bytes: usize) -> Result<Pinned> {
        let mut address: *mut c_void = std::ptr::null_mut();
        // SAFETY: the address goes where it is told.
        let status = unsafe { (self.bind()?.cuMemHostAlloc)(&raw mut address, bytes, 0) };
        self.check("taking page-locked memory", status)?;
        Ok(Pinned { address: address.cast(), bytes })
    }

    pub(super) fn release(&self, pinned: &Pinned) -> Result<()> {
        // SAFETY: callers give it back once, when no copy uses it.
        let status = unsafe { (self.bind()?.cuMemFreeHost)(pinned.address.cast()) };
        self.check("giving page-locked memory back", status)
    }
}

/// An event of the card.
#[derive(Clone, Copy)]
pub(super) struct Event(pub(super) cu::CUevent);
// SAFETY: events may be used from any thread.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

/// A queue of the card.
#[derive(Clone, Copy)]
pub(super) struct Queue(pub(super) cu::CUstream);
// SAFETY: streams may be used from any thread.
unsafe impl Send for Queue {}
// SAFETY: as above.
unsafe impl Sync for Queue {}

/// Page-locked memory; given back by [`Context::release`].
pub(super) struct Pinned {
    pub(super) address: *mut u8,
    pub(super) bytes: usize,
}
// SAFETY: plain memory with one owner.
unsafe impl Send for Pinned {}
