//! The engine's kernels on one card: loaded once, started by name.

use std::collections::HashMap;
use std::ffi::{CString, c_int, c_void};
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError, RwLock};

use cudarc::driver::sys as cu;

use super::context::{Context, Queue};
use super::kernels::{self, Capability};
use crate::cuda::driver::{Arg, Launch};
use crate::{EngineError, Result};

/// Shared memory that every kernel may use without asking, in bytes.
const GRANTED: u32 = 48 << 10;

/// A kernel on a card.
struct Function {
    raw: cu::CUfunction,
    /// Dynamic shared memory that it may be started with.
    allowed: AtomicU32,
}
// SAFETY: functions may be started from any thread.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

/// A loaded module and those of its kernels that were started.
struct Module {
    raw: cu::CUmodule,
    functions: HashMap<String, Function>,
}
// SAFETY: modules may be used from any thread.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

/// The kernels of one card.
pub(super) struct Kernels {
    capability: Capability,
    /// Compiled and not loaded yet.
    images: Mutex<HashMap<&'static str, Vec<u8>>>,
    modules: RwLock<HashMap<&'static str, Module>>,
    /// Wait for each kernel, so that a failure names the right one.
    blocking: bool,
}

impl Kernels {
    /// Takes all modules from the cache; compiles what is not there, on all cores at once.
    pub(super) fn prepare(capability: Capability) -> Result<Self> {
        let names: Vec<&'static str> = kernels::modules().collect();
        let (next, images) = (AtomicUsize::new(0), Mutex::new(HashMap::new()));
        let failed = Mutex::new(None);
        let run = || {
            while let Some(name) = names.get(next.fetch_add(1, Ordering::Relaxed)) {
                match kernels::image(name, capability) {
                    Ok(image) => drop(lock(&images).insert(*name, image)),
                    Err(error) => drop(lock(&failed).replace(error)),
                }
            }
        };
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        std::thread::scope(|scope| {
            for _ in 1..threads.min(names.len()) {
                scope.spawn(run);
            }
            run();
        });
        if let Some(error) = failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
            return Err(error);
        }
        let blocking = std::env::var("CUDA_LAUNCH_BLOCKING").is_ok_and(|value| value == "1");
        Ok(Self { capability, images, modules: RwLock::default(), blocking })
    }

    /// Starts a kernel.
    pub(super) fn launch(&self, context: &Context, stream: Queue, launch: &Launch) -> Result<()> {
        if launch.grid.contains(&0) {
            // An empty grid is nothing to do for us and an error for the driver.
            return Ok(());
        }
        let modules = self.modules.read().unwrap_or_else(PoisonError::into_inner);
        let known = modules.get(launch.module).and_then(|m| m.functions.get(launch.kernel));
        if let Some(function) = known {
            return self.start(context, stream, launch, function);
        }
        drop(modules);
        let mut modules = self.modules.write().unwrap_or_else(PoisonError::into_inner);
        if !modules.contains_key(launch.module) {
            let module = self.load(context, launch.module)?;
            modules.insert(launch.module, module);
        }
        let Some(module) = modules.get_mut(launch.module) else { return Ok(()) };
        if !module.functions.contains_key(launch.kernel) {
            let function = function(context, module.raw, launch)?;
            module.functions.insert(launch.kernel.to_owned(), function);
        }
        let Some(function) = module.functions.get(launch.kernel) else { return Ok(()) };
        self.start(context, stream, launch, function)
    }

    fn load(&self, context: &Context, module: &'static str) -> Result<Module> {
        let prepared = lock(&self.images).remove(module);
        let image = match prepared {
            Some(image) => image,
            None => kernels::image(module, self.capability)?,
        };
        let mut raw = std::ptr::null_mut();
        // SAFETY: the image is what the compiler made; text images end with a zero.
        let status =
            unsafe { (context.bind()?.cuModuleLoadData)(&raw mut raw, image.as_ptr().cast()) };
        context.check(&format!("loading the kernels `{module}`"), status)?;
        Ok(Module { raw, functions: HashMap::new() })
    }

    fn start(
        &self,
        context: &Context,
        stream: Queue,
        launch: &Launch,
        function: &Function,
    ) -> Result<()> {
        let api = context.bind()?;
        if launch.shared > function.allowed.load(Ordering::Relaxed) {
            let attribute =
                cu::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: takes no pointers but the function.
            let status = unsafe {
                (api.cuFuncSetAttribute)(function.raw, attribute, launch.shared as c_int)
            };
            context.check(&format!("shared memory for `{}`", launch.kernel), status)?;
            function.allowed.store(launch.shared, Ordering::Relaxed);
        }
        // Each argument in 8 bytes of its own; the driver reads as many as the signature says.
        let values: Vec<u64> = launch
            .args
            .iter()
            .map(|arg| match *arg {
                Arg::Address(address) => address,
                Arg::I32(value) => u64::from(value as u32),
                Arg::I64(value) => value as u64,
                Arg::F32(value) => u64::from(value.to_bits()),
            })
            .collect();
        let mut pointers: Vec<*mut c_void> =
            values.iter().map(|value| std::ptr::from_ref(value).cast_mut().cast()).collect();
        let [x, y, z] = launch.grid;
        context.note_kernel(launch.kernel);
        // SAFETY: the arguments are in the order and of the widths of the kernel's signature, by the
        // contract of `Launch`; little-endian, so that the first bytes are the value. The driver
        // copies them before it returns.
        let status = unsafe {
            (api.cuLaunchKernel)(
                function.raw,
                x,
                y,
                z,
                launch.block,
                1,
                1,
                launch.shared,
                stream.0,
                pointers.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        context.check(&format!("starting the kernel `{}`", launch.kernel), status)?;
        if self.blocking && !context.is_capturing(stream)? {
            context.synchronize(stream)?;
        }
        Ok(())
    }
}

fn function(context: &Context, module: cu::CUmodule, launch: &Launch) -> Result<Function> {
    let name = CString::new(launch.kernel)
        .map_err(|_| EngineError::Unsupported("a kernel's name holds a zero byte".into()))?;
    let api = context.bind()?;
    let mut raw = std::ptr::null_mut();
    // SAFETY: the module is loaded and stays; the name ends with a zero.
    let status = unsafe { (api.cuModuleGetFunction)(&raw mut raw, module, name.as_ptr()) };
    let what = format!("finding the kernel `{}` in `kernels/{}.cu`", launch.kernel, launch.module);
    context.check(&what, status)?;
    let mut fixed: c_int = 0;
    let attribute = cu::CUfunction_attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES;
    // SAFETY: the number goes where it is told.
    let status = unsafe { (api.cuFuncGetAttribute)(&raw mut fixed, attribute, raw) };
    context.check(&what, status)?;
    let allowed = GRANTED.saturating_sub(u32::try_from(fixed).unwrap_or(0));
    Ok(Function { raw, allowed: AtomicU32::new(allowed) })
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
