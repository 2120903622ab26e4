// Kernels of the emulation's own tests.
#include "prelude.cuh"

// One product of m16n8k16 by the instructions that attention uses: a is [16,16], b [8,16] (or
// [16,8], read transposed), d [16,8], all row-major.
template <class T>
__device__ void product(float* d, const T* a, const T* b, int transposed) {
    __shared__ __align__(16) T sa[16 * 16];
    __shared__ __align__(16) T sb[16 * 8];
    int lane = threadIdx.x;
    for (int i = lane; i < 256; i += 32) sa[i] = a[i];
    for (int i = lane; i < 128; i += 32) sb[i] = b[i];
    __syncthreads();
    u32 fa[4], fb[2];
    // Matrices of 8x8: rows 0-7, rows 8-15, then the same 8 columns further.
    ldmatrix_x4(fa, sa + (lane % 16) * 16 + (lane / 16) * 8);
    if (transposed)
        ldmatrix_x2_trans(fb, sb + (lane % 16) * 8);
    else
        ldmatrix_x2(fb, sb + (lane % 8) * 16 + (lane / 8 % 2) * 8);
    float acc[4] = {1.f, 1.f, 1.f, 1.f};
    mma_16816(acc, fa, fb, static_cast<T*>(nullptr));
    for (int i = 0; i < 4; i++)
        d[(lane / 4 + 8 * (i / 2)) * 8 + 2 * (lane % 4) + i % 2] = acc[i];
}
extern "C" __global__ void product_bf16(float* d, const bf16* a, const bf16* b, int transposed) {
    product(d, a, b, transposed);
}
REGISTER(product_bf16)
extern "C" __global__ void product_f16(float* d, const f16* a, const f16* b, int transposed) {
    product(d, a, b, transposed);
}
REGISTER(product_f16)

// The registers that each lane gets of four matrices: [32,4] words.
extern "C" __global__ void registers_u32(u32* out, const u16* in, int transposed) {
    __shared__ __align__(16) u16 tile[4 * 64];
    for (int i = threadIdx.x; i < 256; i += 32) tile[i] = in[i];
    __syncthreads();
    u32 r[4];
    if (transposed)
        ldmatrix_x4_trans(r, tile + threadIdx.x * 8);
    else
        ldmatrix_x4(r, tile + threadIdx.x * 8);
    for (int i = 0; i < 4; i++) out[threadIdx.x * 4 + i] = r[i];
}
REGISTER(registers_u32)

// Sum and maximum of each block's values, by every thread.
extern "C" __global__ void reduce_f32(float* sums, float* maxima, const float* x) {
    __shared__ float scratch[32];
    i64 at = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
    sums[at] = block_sum(x[at], scratch);
    maxima[at] = block_max(x[at], scratch);
}
REGISTER(reduce_f32)

// All conversions of one number: to bf16, f16 and f8 and back.
extern "C" __global__ void convert_f32(float* out, const float* x, int count) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    out[3 * i] = to_f32(from_f32<bf16>(x[i]));
    out[3 * i + 1] = to_f32(from_f32<f16>(x[i]));
    out[3 * i + 2] = to_f32(from_f32<f8>(x[i]));
}
REGISTER(convert_f32)

// Passes each value to the next thread through shared memory, with or without what is needed.
extern "C" __global__ void pass_f32(float* out, const float* x, int with_barrier, int with_wait) {
    DYNAMIC_SHARED(float, tile);
    int count = blockDim.x, i = threadIdx.x;
    if (i % 4 == 0) cp_async_16(tile + i, x + i, true);
    cp_async_commit();
    if (with_wait) cp_async_wait<0>();
    if (with_barrier) __syncthreads();
    out[static_cast<i64>(blockIdx.x) * count + i] = tile[(i + 1) % count];
}
REGISTER(pass_f32)

// Half of the threads never reach the barrier.
extern "C" __global__ void hang_f32(float* out) {
    if (threadIdx.x >= blockDim.x / 2) return;
    __syncthreads();
    out[threadIdx.x] = 1.f;
}
REGISTER(hang_f32)

// Half of a warp shuffles.
extern "C" __global__ void diverge_f32(float* out) {
    float x = 1.f;
    if (threadIdx.x % 32 < 16) x = warp_sum(x);
    __syncthreads();
    out[threadIdx.x] = x;
}
REGISTER(diverge_f32)

// Loads four numbers at once from where `offset` says.
extern "C" __global__ void vector_f32(float* out, const float* x, int offset) {
    Pack<float, 4> p = *reinterpret_cast<const Pack<float, 4>*>(x + offset);
    for (int i = 0; i < 4; i++) out[i] = p.v[i];
}
REGISTER(vector_f32)
