//! The functions that are used of NVIDIA's libraries, looked up in the very file that was found.
//!
//! `cudarc`'s own wrappers open libraries by a list of guessed names and panic where one, or one of
//! its functions, is missing; here that is an error before the first call. The signatures are held
//! to `cudarc`'s by the compiler. What a function returns is taken as a number: a newer library may
//! return a code that the enum does not have.

use std::ffi::{CStr, c_char, c_int, c_uchar, c_uint, c_ulonglong, c_void};

use cudarc::{cublaslt::sys as lt, cudnn::sys as dnn, driver::sys as cu, nvrtc::sys as rtc};
use libloading::os::unix::Library;

/// Declares a table of functions of one library.
macro_rules! functions {
    ($(#[$doc:meta])* $table:ident: $sys:ident, $status:ident {
        $(fn $name:ident $(like $like:ident)? ($($arg:ty),* $(,)?);)*
    }) => {
        $(#[$doc])*
        #[expect(non_snake_case, reason = "named as in the library")]
        pub(super) struct $table {
            $(pub(super) $name: unsafe extern "C" fn($($arg),*) -> u32,)*
        }

        impl $table {
            /// Looks all of them up; the name of the first that is missing otherwise.
            pub(super) fn load(library: &Library) -> Result<Self, &'static str> {
                Ok(Self {
                    $($name: {
                        let name = concat!(stringify!($name), "\0");
                        // SAFETY: the type is that of the function, as `cudarc` declares it (see
                        // below); its result is an enum of 32 bits. Libraries are never closed.
                        *unsafe { library.get(name.as_bytes()) }.map_err(|_| stringify!($name))?
                    },)*
                })
            }
        }

        // The compiler compares the signatures.
        $(const _: unsafe fn($($arg),*) -> $sys::$status = functions!(@of $sys $name $($like)?);)*
    };
    (@of $sys:ident $name:ident) => { $sys::$name };
    // An older name of the same function, which older drivers have too.
    (@of $sys:ident $name:ident $like:ident) => { $sys::$like };
}

functions! {
    /// The driver.
    CudaApi: cu, CUresult {
        fn cuInit(c_uint);
        fn cuDeviceGetCount(*mut c_int);
        fn cuDeviceGet(*mut cu::CUdevice, c_int);
        fn cuDeviceGetName(*mut c_char, c_int, cu::CUdevice);
        fn cuDeviceGetUuid_v2(*mut cu::CUuuid, cu::CUdevice);
        fn cuDeviceTotalMem_v2(*mut usize, cu::CUdevice);
        fn cuDeviceGetAttribute(*mut c_int, cu::CUdevice_attribute, cu::CUdevice);
        fn cuDevicePrimaryCtxRetain(*mut cu::CUcontext, cu::CUdevice);
        fn cuCtxSetCurrent(cu::CUcontext);
        fn cuMemGetInfo_v2(*mut usize, *mut usize);
        fn cuMemAlloc_v2(*mut cu::CUdeviceptr, usize);
        fn cuMemFree_v2(cu::CUdeviceptr);
        fn cuMemHostAlloc(*mut *mut c_void, usize, c_uint);
        fn cuMemFreeHost(*mut c_void);
        fn cuMemcpyHtoDAsync_v2(cu::CUdeviceptr, *const c_void, usize, cu::CUstream);
        fn cuMemcpyDtoHAsync_v2(*mut c_void, cu::CUdeviceptr, usize, cu::CUstream);
        fn cuMemcpyDtoDAsync_v2(cu::CUdeviceptr, cu::CUdeviceptr, usize, cu::CUstream);
        fn cuMemsetD8Async(cu::CUdeviceptr, c_uchar, usize, cu::CUstream);
        fn cuCtxGetStreamPriorityRange(*mut c_int, *mut c_int);
        fn cuStreamCreateWithPriority(*mut cu::CUstream, c_uint, c_int);
        fn cuStreamSynchronize(cu::CUstream);
        fn cuStreamIsCapturing(cu::CUstream, *mut cu::CUstreamCaptureStatus);
        fn cuStreamWaitEvent(cu::CUstream, cu::CUevent, c_uint);
        fn cuStreamBeginCapture_v2(cu::CUstream, cu::CUstreamCaptureMode);
        fn cuStreamEndCapture(cu::CUstream, *mut cu::CUgraph);
        fn cuEventCreate(*mut cu::CUevent, c_uint);
        fn cuEventRecord(cu::CUevent, cu::CUstream);
        fn cuEventSynchronize(cu::CUevent);
        fn cuEventElapsedTime like cuEventElapsedTime_v2(*mut f32, cu::CUevent, cu::CUevent);
        fn cuGraphInstantiateWithFlags(*mut cu::CUgraphExec, cu::CUgraph, c_ulonglong);
        fn cuGraphUpload(cu::CUgraphExec, cu::CUstream);
        fn cuGraphLaunch(cu::CUgraphExec, cu::CUstream);
        fn cuGraphExecDestroy(cu::CUgraphExec);
        fn cuGraphDestroy(cu::CUgraph);
        fn cuModuleLoadData(*mut cu::CUmodule, *const c_void);
        fn cuModuleGetFunction(*mut cu::CUfunction, cu::CUmodule, *const c_char);
        fn cuFuncSetAttribute(cu::CUfunction, cu::CUfunction_attribute, c_int);
        fn cuFuncGetAttribute(*mut c_int, cu::CUfunction_attribute, cu::CUfunction);
        fn cuLaunchKernel(
            cu::CUfunction, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, cu::CUstream,
            *mut *mut c_void, *mut *mut c_void,
        );
    }
}

functions! {
    /// The compiler of kernels.
    NvrtcApi: rtc, nvrtcResult {
        fn nvrtcGetNumSupportedArchs(*mut c_int);
        fn nvrtcGetSupportedArchs(*mut c_int);
        fn nvrtcCreateProgram(
            *mut rtc::nvrtcProgram, *const c_char, *const c_char, c_int,
            *const *const c_char, *const *const c_char,
        );
        fn nvrtcDestroyProgram(*mut rtc::nvrtcProgram);
        fn nvrtcCompileProgram(rtc::nvrtcProgram, c_int, *const *const c_char);
        fn nvrtcGetCUBINSize(rtc::nvrtcProgram, *mut usize);
        fn nvrtcGetCUBIN(rtc::nvrtcProgram, *mut c_char);
        fn nvrtcGetPTXSize(rtc::nvrtcProgram, *mut usize);
        fn nvrtcGetPTX(rtc::nvrtcProgram, *mut c_char);
        fn nvrtcGetProgramLogSize(rtc::nvrtcProgram, *mut usize);
        fn nvrtcGetProgramLog(rtc::nvrtcProgram, *mut c_char);
    }
}

functions! {
    /// Matrix products.
    LtApi: lt, cublasStatus_t {
        fn cublasLtCreate(*mut lt::cublasLtHandle_t);
        fn cublasLtMatmulDescCreate(
            *mut lt::cublasLtMatmulDesc_t, lt::cublasComputeType_t, lt::cudaDataType_t,
        );
        fn cublasLtMatmulDescSetAttribute(
            lt::cublasLtMatmulDesc_t, lt::cublasLtMatmulDescAttributes_t, *const c_void, usize,
        );
        fn cublasLtMatrixLayoutCreate(
            *mut lt::cublasLtMatrixLayout_t, lt::cudaDataType, u64, u64, i64,
        );
        fn cublasLtMatmulPreferenceCreate(*mut lt::cublasLtMatmulPreference_t);
        fn cublasLtMatmulPreferenceSetAttribute(
            lt::cublasLtMatmulPreference_t, lt::cublasLtMatmulPreferenceAttributes_t,
            *const c_void, usize,
        );
        fn cublasLtMatmulPreferenceDestroy(lt::cublasLtMatmulPreference_t);
        fn cublasLtMatmulAlgoGetHeuristic(
            lt::cublasLtHandle_t, lt::cublasLtMatmulDesc_t, lt::cublasLtMatrixLayout_t,
            lt::cublasLtMatrixLayout_t, lt::cublasLtMatrixLayout_t, lt::cublasLtMatrixLayout_t,
            lt::cublasLtMatmulPreference_t, c_int, *mut lt::cublasLtMatmulHeuristicResult_t,
            *mut c_int,
        );
        fn cublasLtMatmul(
            lt::cublasLtHandle_t, lt::cublasLtMatmulDesc_t, *const c_void, *const c_void,
            lt::cublasLtMatrixLayout_t, *const c_void, lt::cublasLtMatrixLayout_t, *const c_void,
            *const c_void, lt::cublasLtMatrixLayout_t, *mut c_void, lt::cublasLtMatrixLayout_t,
            *const lt::cublasLtMatmulAlgo_t, *mut c_void, usize, lt::cudaStream_t,
        );
    }
}

functions! {
    /// Convolutions.
    CudnnApi: dnn, cudnnStatus_t {
        fn cudnnCreate(*mut dnn::cudnnHandle_t);
        fn cudnnSetStream(dnn::cudnnHandle_t, dnn::cudaStream_t);
        fn cudnnCreateTensorDescriptor(*mut dnn::cudnnTensorDescriptor_t);
        fn cudnnSetTensor4dDescriptor(
            dnn::cudnnTensorDescriptor_t, dnn::cudnnTensorFormat_t, dnn::cudnnDataType_t,
            c_int, c_int, c_int, c_int,
        );
        fn cudnnCreateFilterDescriptor(*mut dnn::cudnnFilterDescriptor_t);
        fn cudnnSetFilter4dDescriptor(
            dnn::cudnnFilterDescriptor_t, dnn::cudnnDataType_t, dnn::cudnnTensorFormat_t,
            c_int, c_int, c_int, c_int,
        );
        fn cudnnCreateConvolutionDescriptor(*mut dnn::cudnnConvolutionDescriptor_t);
        fn cudnnSetConvolution2dDescriptor(
            dnn::cudnnConvolutionDescriptor_t, c_int, c_int, c_int, c_int, c_int, c_int,
            dnn::cudnnConvolutionMode_t, dnn::cudnnDataType_t,
        );
        fn cudnnSetConvolutionMathType(dnn::cudnnConvolutionDescriptor_t, dnn::cudnnMathType_t);
        fn cudnnGetConvolutionForwardAlgorithm_v7(
            dnn::cudnnHandle_t, dnn::cudnnTensorDescriptor_t, dnn::cudnnFilterDescriptor_t,
            dnn::cudnnConvolutionDescriptor_t, dnn::cudnnTensorDescriptor_t, c_int, *mut c_int,
            *mut dnn::cudnnConvolutionFwdAlgoPerf_t,
        );
        fn cudnnGetConvolutionBackwardDataAlgorithm_v7(
            dnn::cudnnHandle_t, dnn::cudnnFilterDescriptor_t, dnn::cudnnTensorDescriptor_t,
            dnn::cudnnConvolutionDescriptor_t, dnn::cudnnTensorDescriptor_t, c_int, *mut c_int,
            *mut dnn::cudnnConvolutionBwdDataAlgoPerf_t,
        );
        fn cudnnConvolutionForward(
            dnn::cudnnHandle_t, *const c_void, dnn::cudnnTensorDescriptor_t, *const c_void,
            dnn::cudnnFilterDescriptor_t, *const c_void, dnn::cudnnConvolutionDescriptor_t,
            dnn::cudnnConvolutionFwdAlgo_t, *mut c_void, usize, *const c_void,
            dnn::cudnnTensorDescriptor_t, *mut c_void,
        );
        fn cudnnConvolutionBackwardData(
            dnn::cudnnHandle_t, *const c_void, dnn::cudnnFilterDescriptor_t, *const c_void,
            dnn::cudnnTensorDescriptor_t, *const c_void, dnn::cudnnConvolutionDescriptor_t,
            dnn::cudnnConvolutionBwdDataAlgo_t, *mut c_void, usize, *const c_void,
            dnn::cudnnTensorDescriptor_t, *mut c_void,
        );
    }
}

/// The library's words for an error code of the driver.
pub(super) fn driver_error(library: &Library, code: u32) -> String {
    type Name = unsafe extern "C" fn(u32, *mut *const c_char) -> u32;
    let mut name: *const c_char = std::ptr::null();
    // SAFETY: `cuGetErrorName` takes the code and where to put the address of a static string,
    // which it leaves alone for codes that it does not know.
    let text = unsafe {
        let Ok(function) = library.get::<Name>(b"cuGetErrorName\0") else {
            return format!("code {code}");
        };
        function(code, &raw mut name);
        words(name)
    };
    text.unwrap_or_else(|| format!("code {code}"))
}

/// The words that `function` of the library has for an error code.
pub(super) fn error_words(library: &Library, function: &str, code: u32) -> String {
    type Words = unsafe extern "C" fn(u32) -> *const c_char;
    // SAFETY: the functions named by the callers take the code and return a static string.
    let text = unsafe {
        match library.get::<Words>(function.as_bytes()) {
            Ok(function) => words(function(code)),
            Err(_) => None,
        }
    };
    text.unwrap_or_else(|| format!("code {code}"))
}

/// # Safety
/// `text` is null or a string that stays.
unsafe fn words(text: *const c_char) -> Option<String> {
    if text.is_null() {
        return None;
    }
    // SAFETY: by the contract of this function.
    Some(unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
}
