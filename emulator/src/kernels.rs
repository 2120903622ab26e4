//! The kernels that build.rs compiled, and how one is run.

use std::ffi::{CStr, c_char, c_int, c_void};

use engine::cuda::driver::{Arg, Launch};
use engine::{EngineError, Result};

/// An entry of a module's list; `struct Kernel` in host.h.
#[repr(C)]
pub(crate) struct Kernel {
    name: *const c_char,
    signature: *const c_char,
    call: unsafe extern "C" fn(*mut *mut c_void),
    next: *const Kernel,
}

// SAFETY: made before `main` and never changed after.
unsafe impl Sync for Kernel {}

type ListOf = unsafe extern "C" fn() -> *const Kernel;

include!(concat!(env!("OUT_DIR"), "/modules.rs"));

unsafe extern "C" {
    fn emulated_run(
        kernel: *const Kernel,
        arguments: *mut *mut c_void,
        grid: *const u32,
        block: u32,
        shared: u32,
        backwards: c_int,
        why: *mut c_char,
        room: usize,
    ) -> c_int;
    fn emulated_shared_memory() -> u32;
}

/// Largest shared memory of a block in bytes.
pub(crate) fn shared_memory() -> usize {
    // SAFETY: gives a constant.
    unsafe { emulated_shared_memory() as usize }
}

/// A kernel of a module.
#[derive(Clone, Copy)]
pub(crate) struct Found(&'static Kernel);

/// Kernels of a module, in no order; `None` if there is no such module.
fn list(module: &str) -> Option<impl Iterator<Item = Found>> {
    let (_, first) = MODULES.iter().find(|(name, _)| *name == module)?;
    // SAFETY: lists are made before `main`, never change and end with a null pointer.
    let mut at = unsafe { first().as_ref() };
    Some(std::iter::from_fn(move || {
        let kernel = at?;
        // SAFETY: as above.
        at = unsafe { kernel.next.as_ref() };
        Some(Found(kernel))
    }))
}

/// `module/kernel` of all kernels of the engine.
pub(crate) fn names() -> Vec<String> {
    let of = |module: &str| -> Vec<String> {
        let kernels = list(module).into_iter().flatten();
        kernels.map(|kernel| format!("{module}/{}", kernel.name())).collect()
    };
    MODULES.iter().filter(|(module, _)| *module != "trial").flat_map(|(m, _)| of(m)).collect()
}

/// The kernel that a launch names, or an error that lists what there is.
pub(crate) fn find(launch: &Launch) -> Result<Found> {
    let Some(mut kernels) = list(launch.module) else {
        let names: Vec<&str> = MODULES.iter().map(|(name, _)| *name).collect();
        let why = format!("there is no such module, only: {}", names.join(", "));
        return Err(failed(launch, why));
    };
    if let Some(found) = kernels.find(|kernel| kernel.name() == launch.kernel) {
        return Ok(found);
    }
    let names: Vec<&str> = list(launch.module).into_iter().flatten().map(Found::name).collect();
    Err(failed(launch, format!("the module has no such kernel, only: {}", names.join(", "))))
}

/// A launch that failed.
fn failed(launch: &Launch, why: String) -> EngineError {
    EngineError::Card { what: format!("kernel `{}` of `{}`", launch.kernel, launch.module), why }
}

impl Found {
    fn name(self) -> &'static str {
        // SAFETY: a string literal of the kernel's file.
        unsafe { CStr::from_ptr(self.0.name) }.to_str().unwrap_or("")
    }

    fn signature(self) -> &'static [u8] {
        // SAFETY: a constant with a null at its end.
        unsafe { CStr::from_ptr(self.0.signature) }.to_bytes()
    }

    /// Fails unless the launch is one that a card would take.
    pub(crate) fn check(self, launch: &Launch) -> Result<()> {
        let got: Vec<u8> = launch.args.iter().map(|arg| letter(*arg)).collect();
        if got != self.signature() {
            let text = |letters: &[u8]| String::from_utf8_lossy(letters).into_owned();
            let (want, got) = (text(self.signature()), text(&got));
            let why = format!("the signature has arguments `{want}`, got: `{got}`");
            return Err(failed(launch, why));
        }
        let [x, y, z] = launch.grid;
        let fits =
            (1..1 << 31).contains(&x) && (1..=65535).contains(&y) && (1..=65535).contains(&z);
        if !fits || !(1..=1024).contains(&launch.block) {
            let why = format!("no such grid and block: {:?}, {}", launch.grid, launch.block);
            return Err(failed(launch, why));
        }
        if launch.shared as usize > shared_memory() {
            let why = format!("too much shared memory: {}", launch.shared);
            return Err(failed(launch, why));
        }
        Ok(())
    }

    /// Runs all blocks of a launch that [`Found::check`] let pass.
    pub(crate) fn run(self, launch: &Launch, backwards: bool) -> Result<()> {
        let mut words: Vec<u64> = launch.args.iter().map(|arg| bits(*arg)).collect();
        let mut pointers: Vec<*mut c_void> =
            words.iter_mut().map(|word| std::ptr::from_mut(word).cast()).collect();
        let mut why = [0_u8; 600];
        // SAFETY: the arguments have the widths of the signature, which the machine is little
        // endian enough to read from the front of each word; `why` has the room that is told.
        let status = unsafe {
            emulated_run(
                self.0,
                pointers.as_mut_ptr(),
                launch.grid.as_ptr(),
                launch.block,
                launch.shared,
                c_int::from(backwards),
                why.as_mut_ptr().cast(),
                why.len(),
            )
        };
        if status == 0 {
            return Ok(());
        }
        let end = why.iter().position(|byte| *byte == 0).unwrap_or(why.len());
        Err(failed(launch, String::from_utf8_lossy(&why[..end]).into_owned()))
    }
}

/// As host.h's `letter` names the type.
fn letter(arg: Arg) -> u8 {
    match arg {
        Arg::Address(_) => b'p',
        Arg::I32(_) => b'i',
        Arg::I64(_) => b'l',
        Arg::F32(_) => b'f',
    }
}

/// The argument in the first bytes of a word.
fn bits(arg: Arg) -> u64 {
    match arg {
        Arg::Address(address) => address,
        Arg::I32(number) => u64::from(number.cast_unsigned()),
        Arg::I64(number) => number.cast_unsigned(),
        Arg::F32(number) => u64::from(number.to_bits()),
    }
}
