// Trainable values as products read them: each tensor times its factor, in the compute type.
#include "prelude.cuh"

// table: per tensor the first element, the number of elements, and the bits of the factor.
template <class T>
__device__ void working_any(const float* flat, T* out, const u32* table) {
    const u32* row = table + 3 * (i64)blockIdx.y;
    const i64 first = row[0], count = row[1];
    const float factor = f32_of_bits(row[2]);
    const i64 step = (i64)gridDim.x * blockDim.x;
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
        out[first + i] = from_f32<T>(flat[first + i] * factor);
    }
}

#define WORKING_KERNEL(T, suffix)                                                                  \
    extern "C" __global__ void working_##suffix(const float* flat, T* out, const u32* table) {     \
        working_any<T>(flat, out, table);                                                          \
    }                                                                                              \
    REGISTER(working_##suffix)

WORKING_KERNEL(float, f32)
WORKING_KERNEL(bf16, bf16)
WORKING_KERNEL(f16, f16)
