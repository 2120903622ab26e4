//! NCCL's functions, as a table that is filled from a file at run time.
//!
//! Only the types are those of `cudarc`: its loader looks for `libnccl.so` alone, which pip's wheels
//! and distributions without development packages lack, and panics where it finds nothing. Answers
//! are plain numbers, since a newer NCCL may give some that no list knows. [`Api`] is what the rest
//! of this folder uses; tests put another one in its place.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::mem::ManuallyDrop;
use std::path::Path;

use cudarc::nccl::sys::{
    cudaStream_t, ncclComm_t, ncclConfig_t, ncclDataType_t, ncclRedOp_t, ncclUniqueId,
};

/// `NCCL_UNIQUE_ID_BYTES`.
const ID_BYTES: usize = 128;
/// Mark of a configuration made for this interface (`NCCL_CONFIG_INITIALIZER`).
const CONFIG_MAGIC: u32 = 0xcafe_beef;
/// Version of the interface whose fields [`ncclConfig_t`] has. A library that knows fewer fields
/// reads those it knows, one that knows more takes its own values for the rest.
const CONFIG_VERSION: u32 = 2 * 10_000 + 30 * 100;
/// "Not set" of a field.
const UNSET: c_int = c_int::MIN;
/// The oldest version that this code was written against.
const OLDEST: i32 = 2 * 10_000 + 18 * 100;

/// NCCL's answer, a `ncclResult_t`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Code(pub i32);

impl Code {
    /// Done, or given to the stream.
    pub(crate) const SUCCESS: Code = Code(0);
    /// Ask again.
    pub(crate) const IN_PROGRESS: Code = Code(7);
}

/// A communicator, NCCL's pointer to it. NCCL takes calls from any thread, one at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Handle(pub usize);

/// What a communicator is called by before it exists.
pub(crate) type Id = [u8; ID_BYTES];

/// What is asked of NCCL. No call waits for another rank but [`Api::destroy`] and [`Api::abort`],
/// which may wait for work of this rank that is under way.
pub(crate) trait Api: Send + Sync {
    /// Version, `major * 10000 + minor * 100 + patch`.
    fn version(&self) -> Result<i32, Code>;
    /// A fresh name; the caller's process then listens for the ranks that use it.
    fn unique_id(&self) -> Result<Id, Code>;
    /// Starts to make a communicator on the card that is current on this thread.
    fn init(&self, world_size: usize, id: &Id, rank: usize) -> (Option<Handle>, Code);
    /// What became of the calls so far.
    fn async_error(&self, handle: Handle) -> Code;
    /// The card, as CUDA counts it.
    fn card(&self, handle: Handle) -> Result<i32, Code>;
    /// Puts a sum over the ranks of `len` floats at `address`, in place, in the stream's queue.
    fn all_reduce(&self, handle: Handle, address: u64, len: usize, stream: u64) -> Code;
    /// Starts to end a communicator whose work is done.
    fn finalize(&self, handle: Handle) -> Code;
    /// Frees a finalized communicator.
    fn destroy(&self, handle: Handle) -> Code;
    /// Ends work under way and frees the communicator.
    fn abort(&self, handle: Handle) -> Code;
    /// Words for an answer.
    fn describe(&self, code: Code) -> String;
}

type OnComm = unsafe extern "C" fn(ncclComm_t) -> c_int;

/// The functions of a loaded library.
pub(crate) struct Library {
    get_version: unsafe extern "C" fn(*mut c_int) -> c_int,
    get_unique_id: unsafe extern "C" fn(*mut ncclUniqueId) -> c_int,
    init: unsafe extern "C" fn(
        *mut ncclComm_t,
        c_int,
        ncclUniqueId,
        c_int,
        *mut ncclConfig_t,
    ) -> c_int,
    async_error: unsafe extern "C" fn(ncclComm_t, *mut c_int) -> c_int,
    card: unsafe extern "C" fn(ncclComm_t, *mut c_int) -> c_int,
    all_reduce: unsafe extern "C" fn(
        *const c_void,
        *mut c_void,
        usize,
        c_int,
        c_int,
        ncclComm_t,
        cudaStream_t,
    ) -> c_int,
    finalize: OnComm,
    destroy: OnComm,
    abort: OnComm,
    error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    last_error: unsafe extern "C" fn(ncclComm_t) -> *const c_char,
    /// Never closed: NCCL has threads of its own, which run its code.
    _file: ManuallyDrop<libloading::Library>,
}

impl Library {
    /// Loads the file and finds every function; the error says what is missing.
    pub(crate) fn load(path: &Path) -> Result<Library, String> {
        // SAFETY: loading runs the library's initialisers; the caller names a file that is NCCL, and
        // NCCL's only prepare its own tables.
        let file = unsafe { libloading::Library::new(path) }.map_err(|error| words(&error))?;
        /// One function.
        fn symbol<T: Copy>(file: &libloading::Library, name: &str) -> Result<T, String> {
            // SAFETY: `T` is the type that NCCL's header gives this name; it is used below alone.
            let symbol = unsafe { file.get::<T>(name.as_bytes()) };
            symbol.map(|symbol| *symbol).map_err(|_| format!("it has no function `{name}`"))
        }
        let library = Library {
            get_version: symbol(&file, "ncclGetVersion")?,
            get_unique_id: symbol(&file, "ncclGetUniqueId")?,
            init: symbol(&file, "ncclCommInitRankConfig")?,
            async_error: symbol(&file, "ncclCommGetAsyncError")?,
            card: symbol(&file, "ncclCommCuDevice")?,
            all_reduce: symbol(&file, "ncclAllReduce")?,
            finalize: symbol(&file, "ncclCommFinalize")?,
            destroy: symbol(&file, "ncclCommDestroy")?,
            abort: symbol(&file, "ncclCommAbort")?,
            error_string: symbol(&file, "ncclGetErrorString")?,
            last_error: symbol(&file, "ncclGetLastError")?,
            _file: ManuallyDrop::new(file),
        };
        match library.version() {
            Ok(version) if version >= OLDEST => Ok(library),
            Ok(version) => {
                let oldest = name_version(OLDEST);
                Err(format!("{oldest} or newer is needed, got: {}", name_version(version)))
            }
            Err(code) => Err(format!("it does not tell its version: {}", library.describe(code))),
        }
    }
}

/// An error of the loader with its cause, which says which file it is about.
fn words(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(cause) => format!("{error}: {}", words(cause)),
        None => error.to_string(),
    }
}

/// `2.28.9`.
pub(crate) fn name_version(version: i32) -> String {
    format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100)
}

fn pointer(handle: Handle) -> ncclComm_t {
    handle.0 as ncclComm_t
}

fn result<T>(code: c_int, value: T) -> Result<T, Code> {
    if Code(code) == Code::SUCCESS { Ok(value) } else { Err(Code(code)) }
}

/// A configuration in which no call waits, everything else left to NCCL.
fn config() -> ncclConfig_t {
    ncclConfig_t {
        size: size_of::<ncclConfig_t>(),
        magic: CONFIG_MAGIC,
        version: CONFIG_VERSION,
        blocking: 0,
        cgaClusterSize: UNSET,
        minCTAs: UNSET,
        maxCTAs: UNSET,
        netName: std::ptr::null(),
        splitShare: UNSET,
        trafficClass: UNSET,
        commName: std::ptr::null(),
        collnetEnable: UNSET,
        CTAPolicy: UNSET,
        shrinkShare: UNSET,
        nvlsCTAs: UNSET,
        nChannelsPerNetPeer: UNSET,
        nvlinkCentricSched: UNSET,
        graphUsageMode: UNSET,
        numRmaCtx: UNSET,
        maxP2pPeers: UNSET,
    }
}

/// A text of NCCL's.
fn text(pointer: *const c_char) -> String {
    if pointer.is_null() {
        return String::new();
    }
    // SAFETY: NCCL gives NUL-terminated texts that stay where they are until its next error.
    unsafe { CStr::from_ptr(pointer) }.to_string_lossy().trim().to_owned()
}

impl Api for Library {
    fn version(&self) -> Result<i32, Code> {
        let mut version = 0;
        // SAFETY: writes one int.
        let code = unsafe { (self.get_version)(&raw mut version) };
        result(code, version)
    }

    fn unique_id(&self) -> Result<Id, Code> {
        let mut id = ncclUniqueId { internal: [0; ID_BYTES] };
        // SAFETY: writes 128 bytes.
        let code = unsafe { (self.get_unique_id)(&raw mut id) };
        result(code, id.internal.map(|byte| byte as u8))
    }

    fn init(&self, world_size: usize, id: &Id, rank: usize) -> (Option<Handle>, Code) {
        let mut comm: ncclComm_t = std::ptr::null_mut();
        let id = ncclUniqueId { internal: id.map(|byte| byte as c_char) };
        let mut config = config();
        // SAFETY: the configuration has the size it says and is copied within the call; without
        // waiting, NCCL makes the handle before it returns and fills it on a thread of its own.
        let code = unsafe {
            (self.init)(&raw mut comm, world_size as c_int, id, rank as c_int, &raw mut config)
        };
        ((!comm.is_null()).then_some(Handle(comm as usize)), Code(code))
    }

    fn async_error(&self, handle: Handle) -> Code {
        let mut state = 0;
        // SAFETY: the handle lives (its owner takes it away before it frees it); writes one int.
        let code = unsafe { (self.async_error)(pointer(handle), &raw mut state) };
        if Code(code) == Code::SUCCESS { Code(state) } else { Code(code) }
    }

    fn card(&self, handle: Handle) -> Result<i32, Code> {
        let mut card = 0;
        // SAFETY: as above.
        let code = unsafe { (self.card)(pointer(handle), &raw mut card) };
        result(code, card)
    }

    fn all_reduce(&self, handle: Handle, address: u64, len: usize, stream: u64) -> Code {
        let place = address as *mut c_void;
        // SAFETY: the handle lives; address and stream are the card's, nothing of the host's memory
        // is touched. A wrong address is an error of the card, told by `async_error` or the stream.
        Code(unsafe {
            (self.all_reduce)(
                place.cast_const(),
                place,
                len,
                ncclDataType_t::ncclFloat32 as c_int,
                ncclRedOp_t::ncclSum as c_int,
                pointer(handle),
                stream as cudaStream_t,
            )
        })
    }

    fn finalize(&self, handle: Handle) -> Code {
        // SAFETY: the handle lives; freed by `destroy` or `abort` alone.
        Code(unsafe { (self.finalize)(pointer(handle)) })
    }

    fn destroy(&self, handle: Handle) -> Code {
        // SAFETY: the caller has taken the handle away; nobody uses it any more.
        Code(unsafe { (self.destroy)(pointer(handle)) })
    }

    fn abort(&self, handle: Handle) -> Code {
        // SAFETY: as above.
        Code(unsafe { (self.abort)(pointer(handle)) })
    }

    fn describe(&self, code: Code) -> String {
        // SAFETY: takes any number; gives a constant text.
        let words = text(unsafe { (self.error_string)(code.0) });
        // SAFETY: the last error of this process, whatever the communicator.
        let last = text(unsafe { (self.last_error)(std::ptr::null_mut()) });
        let detail = if last.is_empty() { last } else { format!(": {last}") };
        format!("{words} ({}){detail}", code.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_is_laid_out_as_nccl_lays_it_out() {
        // nccl.h of 2.30 on 64 bits: a size_t, two unsigned, four ints, a pointer, two ints, a
        // pointer, nine ints.
        assert_eq!(size_of::<ncclConfig_t>(), 96);
        assert_eq!(std::mem::offset_of!(ncclConfig_t, blocking), 16);
        assert_eq!(std::mem::offset_of!(ncclConfig_t, netName), 32);
        assert_eq!(std::mem::offset_of!(ncclConfig_t, commName), 48);
        assert_eq!(std::mem::offset_of!(ncclConfig_t, maxP2pPeers), 88);
        let config = config();
        assert_eq!((config.size, config.blocking, config.magic), (96, 0, 0xcafebeef));
        assert_eq!(name_version(config.version as i32), "2.30.0");
    }

    #[test]
    fn a_file_that_is_not_nccl_is_refused() {
        let missing = Library::load(Path::new("/nowhere/libnccl.so.2")).err().unwrap();
        assert!(missing.contains("libnccl.so.2"), "{missing}");
        // A library that every Linux has.
        let other = Library::load(Path::new("libc.so.6")).err().unwrap();
        assert_eq!(other, "it has no function `ncclGetVersion`");
    }

    /// The real library, where there is one: it needs no card for these.
    #[test]
    fn the_library_named_by_the_environment_answers() {
        let Some(path) = std::env::var_os("LORARUN_TEST_NCCL") else { return };
        let library = Library::load(Path::new(&path)).unwrap();
        assert!(library.version().unwrap() >= OLDEST);
        assert_ne!(library.unique_id().unwrap(), [0; ID_BYTES]);
        assert!(library.describe(Code(4)).contains("invalid argument"));
    }
}
