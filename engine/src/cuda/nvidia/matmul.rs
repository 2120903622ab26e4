//! Matrix products by cublasLt.
//!
//! The library thinks in columns: a row-major matrix is to it the transposed one, so the operands
//! change places and nothing is copied. Sums are in f32, never in TF32, also where a product is cut
//! along its inner size. What the library says about a shape is asked for once.

use std::collections::HashMap;
use std::ffi::{c_int, c_void};
use std::sync::{Mutex, PoisonError};

use cudarc::cublaslt::sys as lt;

use super::libraries::{Found, Library, find};
use super::symbols::{LtApi, error_words};
use super::tuning::{CANDIDATES, Scratch};
use crate::cuda::driver::{Matmul, WORKSPACE};
use crate::{DType, EngineError, Result};

/// Everything that the choice of an algorithm depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Shape {
    mnk: (usize, usize, usize),
    transposed: (bool, bool),
    dtype: DType,
    d_dtype: DType,
    bias: bool,
    adds: bool,
    /// Bytes that the addresses of a, b, c and d are multiples of.
    aligned: [u32; 4],
}

impl Shape {
    fn of(p: &Matmul) -> Self {
        let aligned = [p.a.address, p.b.address, p.c.unwrap_or(p.d), p.d].map(alignment);
        Self {
            mnk: (p.m, p.n, p.k),
            transposed: (p.a.transposed, p.b.transposed),
            dtype: p.a.dtype,
            d_dtype: p.d_dtype,
            bias: p.bias.is_some(),
            adds: p.c.is_some(),
            aligned,
        }
    }
}

/// The largest power of two that an address is a multiple of, 256 at most.
fn alignment(address: u64) -> u32 {
    1 << address.trailing_zeros().min(8)
}

/// As the library writes it; the enum has the C layout but for the state, which may be any number.
#[repr(C)]
#[derive(Clone, Copy)]
struct Guess {
    algorithm: lt::cublasLtMatmulAlgo_t,
    workspace: usize,
    state: u32,
    waves: f32,
    reserved: [c_int; 4],
}
const _: () = assert!(size_of::<Guess>() == size_of::<lt::cublasLtMatmulHeuristicResult_t>());

/// What the library needs for one shape, kept for the life of the process.
struct Plan {
    operation: lt::cublasLtMatmulDesc_t,
    /// Of the library's A, which is our b, its B and its D.
    layouts: [lt::cublasLtMatrixLayout_t; 3],
    guesses: Vec<Guess>,
    chosen: Option<usize>,
}

struct State {
    handle: lt::cublasLtHandle_t,
    plans: HashMap<Shape, Plan>,
}
// SAFETY: the handle and descriptors may be used from any thread, one at a time.
unsafe impl Send for State {}

/// The library, opened for one card.
pub(super) struct Products {
    found: &'static Found,
    api: LtApi,
    state: Mutex<State>,
}

impl Products {
    /// Opens the library for the card that is current on this thread.
    pub(super) fn open() -> Result<Self> {
        let found = find(Library::CublasLt)?;
        let api = LtApi::load(&found.handle).map_err(|name| {
            let path = found.path.display();
            EngineError::Unsupported(format!("{path} has no function `{name}`"))
        })?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: the handle goes where it is told.
        let status = unsafe { (api.cublasLtCreate)(&raw mut handle) };
        let state = Mutex::new(State { handle, plans: HashMap::new() });
        let products = Self { found, api, state };
        products.check("opening cublasLt", status)?;
        Ok(products)
    }

    fn check(&self, what: &str, status: u32) -> Result<()> {
        if status == 0 {
            return Ok(());
        }
        let why = error_words(&self.found.handle, "cublasLtGetStatusName\0", status);
        Err(EngineError::Card { what: what.to_owned(), why })
    }

    /// Starts a product.
    pub(super) fn matmul(&self, scratch: &Scratch, p: &Matmul) -> Result<()> {
        if p.m == 0 || p.n == 0 {
            return Ok(());
        }
        scratch.context.bind()?;
        let shape = Shape::of(p);
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let handle = state.handle;
        let plan = match state.plans.entry(shape) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => {
                entry.insert(self.plan(handle, &shape)?)
            }
        };
        if let Some(bias) = p.bias {
            let attribute = lt::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER;
            self.describe(plan.operation, attribute, &bias)?;
        }
        let run = |guess: &Guess, d: u64| self.run(scratch, (handle, plan), guess, p, d);
        let chosen = match plan.chosen {
            Some(chosen) => Some(chosen),
            None => {
                // A sum in place must not be made twice.
                let in_place = p.c == Some(p.d);
                let spare = if in_place { p.m * p.n * p.d_dtype.size() } else { 0 };
                let target = (scratch.context, scratch.stream);
                let name = format!("matmul {shape:?}");
                let count = plan.guesses.len();
                scratch.tuning.choose(target, &name, count, spare, &|candidate, place| {
                    run(&plan.guesses[candidate], place.unwrap_or(p.d))
                })?
            }
        };
        run(&plan.guesses[chosen.unwrap_or(0)], p.d)?;
        plan.chosen = chosen;
        Ok(())
    }

    /// Starts one of the algorithms, with the result at `d`.
    fn run(
        &self,
        scratch: &Scratch,
        (handle, plan): (lt::cublasLtHandle_t, &Plan),
        guess: &Guess,
        p: &Matmul,
        d: u64,
    ) -> Result<()> {
        let beta: f32 = if p.c.is_some() { 1. } else { 0. };
        let [a, b, of_d] = plan.layouts;
        let place = |address: u64| address as *const c_void;
        // SAFETY: descriptors are those of this shape, addresses those of the caller's tensors; the
        // two factors are read before the call returns. The workspace is used by one call after
        // the other on this stream.
        let status = unsafe {
            (self.api.cublasLtMatmul)(
                handle,
                plan.operation,
                (&raw const p.alpha).cast(),
                place(p.b.address),
                a,
                place(p.a.address),
                b,
                (&raw const beta).cast(),
                place(p.c.unwrap_or(d)),
                of_d,
                d as *mut c_void,
                of_d,
                &raw const guess.algorithm,
                scratch.workspace as *mut c_void,
                WORKSPACE,
                scratch.stream.0.cast(),
            )
        };
        if status == 0 {
            scratch.context.note_kernel("a matrix product of cublasLt");
        }
        self.check(&format!("multiplying [{}, {}] by [{}, {}]", p.m, p.k, p.k, p.n), status)
    }

    /// Describes a shape to the library and asks for algorithms.
    fn plan(&self, handle: lt::cublasLtHandle_t, shape: &Shape) -> Result<Plan> {
        use lt::cublasLtMatmulDescAttributes_t as A;
        let (m, n, k) = shape.mnk;
        let mut operation = std::ptr::null_mut();
        let compute = lt::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        // SAFETY: the descriptor goes where it is told.
        let status = unsafe {
            (self.api.cublasLtMatmulDescCreate)(
                &raw mut operation,
                compute,
                lt::cudaDataType_t::CUDA_R_32F,
            )
        };
        self.check("describing a product", status)?;
        let (a, b) = shape.transposed;
        self.describe(operation, A::CUBLASLT_MATMUL_DESC_TRANSA, &i32::from(b))?;
        self.describe(operation, A::CUBLASLT_MATMUL_DESC_TRANSB, &i32::from(a))?;
        if shape.bias {
            let epilogue = lt::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS as u32;
            self.describe(operation, A::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue)?;
            let dtype = data_type(shape.d_dtype)? as i32;
            self.describe(operation, A::CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &dtype)?;
        }
        // Row-major [r, c] is to the library [c, r] with leading dimension c.
        let layout = |dtype, rows: usize, columns: usize| -> Result<lt::cublasLtMatrixLayout_t> {
            let mut layout = std::ptr::null_mut();
            // SAFETY: the descriptor goes where it is told.
            let status = unsafe {
                (self.api.cublasLtMatrixLayoutCreate)(
                    &raw mut layout,
                    data_type(dtype)?,
                    columns as u64,
                    rows as u64,
                    columns as i64,
                )
            };
            self.check("describing a matrix", status)?;
            Ok(layout)
        };
        let of_b = if b { layout(shape.dtype, n, k)? } else { layout(shape.dtype, k, n)? };
        let of_a = if a { layout(shape.dtype, k, m)? } else { layout(shape.dtype, m, k)? };
        let layouts = [of_b, of_a, layout(shape.d_dtype, m, n)?];
        let guesses = self.guesses(handle, operation, layouts, shape)?;
        Ok(Plan { operation, layouts, guesses, chosen: None })
    }

    fn guesses(
        &self,
        handle: lt::cublasLtHandle_t,
        operation: lt::cublasLtMatmulDesc_t,
        [a, b, d]: [lt::cublasLtMatrixLayout_t; 3],
        shape: &Shape,
    ) -> Result<Vec<Guess>> {
        use lt::cublasLtMatmulPreferenceAttributes_t as P;
        let mut preference = std::ptr::null_mut();
        // SAFETY: the preference goes where it is told.
        let status = unsafe { (self.api.cublasLtMatmulPreferenceCreate)(&raw mut preference) };
        self.check("describing what a product may use", status)?;
        let prefer = |attribute, bytes: &[u8]| -> Result<()> {
            // SAFETY: the value is as long as it is said to be; it is copied.
            let status = unsafe {
                (self.api.cublasLtMatmulPreferenceSetAttribute)(
                    preference,
                    attribute,
                    bytes.as_ptr().cast(),
                    bytes.len(),
                )
            };
            self.check("describing what a product may use", status)
        };
        let [of_a, of_b, of_c, of_d] = shape.aligned.map(u32::to_ne_bytes);
        prefer(P::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &WORKSPACE.to_ne_bytes())?;
        // Parts of a sum are added in f32 in the workspace, in order; not in the type of the result.
        let scheme = lt::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
        prefer(P::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &scheme.to_ne_bytes())?;
        prefer(P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &of_b)?;
        prefer(P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &of_a)?;
        prefer(P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &of_c)?;
        prefer(P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &of_d)?;
        let empty = Guess {
            algorithm: lt::cublasLtMatmulAlgo_t { data: [0; 8] },
            workspace: 0,
            state: 0,
            waves: 0.,
            reserved: [0; 4],
        };
        let mut guesses = [empty; CANDIDATES];
        let mut count: c_int = 0;
        // SAFETY: `Guess` has the layout of the library's structure, and there is room for as many
        // as are asked for; the preference is destroyed once.
        let status = unsafe {
            let status = (self.api.cublasLtMatmulAlgoGetHeuristic)(
                handle,
                operation,
                a,
                b,
                d,
                d,
                preference,
                CANDIDATES as c_int,
                guesses.as_mut_ptr().cast(),
                &raw mut count,
            );
            (self.api.cublasLtMatmulPreferenceDestroy)(preference);
            status
        };
        let what = format!("choosing an algorithm for the product {shape:?}");
        self.check(&what, status)?;
        let count = usize::try_from(count).unwrap_or(0).min(CANDIDATES);
        let usable = |guess: &&Guess| guess.state == 0 && guess.workspace <= WORKSPACE;
        let guesses: Vec<Guess> = guesses[..count].iter().filter(usable).copied().collect();
        if guesses.is_empty() {
            return Err(EngineError::Card { what, why: "cublasLt has none".into() });
        }
        Ok(guesses)
    }

    fn describe<T>(
        &self,
        operation: lt::cublasLtMatmulDesc_t,
        attribute: lt::cublasLtMatmulDescAttributes_t,
        value: &T,
    ) -> Result<()> {
        // SAFETY: the value is as long as it is said to be; it is copied.
        let status = unsafe {
            (self.api.cublasLtMatmulDescSetAttribute)(
                operation,
                attribute,
                std::ptr::from_ref(value).cast(),
                size_of::<T>(),
            )
        };
        self.check("describing a product", status)
    }
}

fn data_type(dtype: DType) -> Result<lt::cudaDataType_t> {
    match dtype {
        DType::F32 => Ok(lt::cudaDataType_t::CUDA_R_32F),
        DType::BF16 => Ok(lt::cudaDataType_t::CUDA_R_16BF),
        DType::F16 => Ok(lt::cudaDataType_t::CUDA_R_16F),
        DType::F8 | DType::U32 => Err(EngineError::DType {
            op: "matmul",
            expected: "f32, bf16 or f16",
            got: format!("{dtype:?}"),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::driver::Matrix;

    #[test]
    fn addresses_that_are_less_aligned_are_another_shape() {
        assert_eq!([256, 512 + 2, 16, 4096].map(alignment), [256, 2, 16, 256]);
        let matrix = |address| Matrix { address, dtype: DType::BF16, transposed: false };
        let p = Matmul {
            m: 3,
            n: 5,
            k: 7,
            a: matrix(256),
            b: matrix(512),
            alpha: 1.,
            c: None,
            bias: None,
            d: 1024,
            d_dtype: DType::BF16,
        };
        let moved = Matmul { d: 1026, ..p };
        assert_eq!(Shape::of(&p).aligned, [256; 4]);
        assert_eq!(Shape::of(&moved).aligned, [256, 256, 2, 2]);
        assert_ne!(Shape::of(&p), Shape::of(&moved));
        // The factor is no part of it.
        assert_eq!(Shape::of(&p), Shape::of(&Matmul { alpha: 2., ..p }));
    }
}
