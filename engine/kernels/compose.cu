// Weights made of small trainable tensors, and the way back to these; f32 throughout.

#include "prelude.cuh"

namespace {

typedef Pack<float, 4> Four;

__device__ __forceinline__ i64 index()
{
    return (i64)blockIdx.x * blockDim.x + threadIdx.x;
}

__device__ __forceinline__ bool aligned(const void* address)
{
    return (unsigned long long)address % 16 == 0;
}

// `multiplier·(m/norm - 1) + 1`; the norm has f32's epsilon added, as in cpu/compose.rs.
__device__ __forceinline__ float row_scale(float m, float norm, float multiplier)
{
    return multiplier * (m / (norm + 1.1920929e-7f) - 1.f) + 1.f;
}

// Sum of products of two rows over the threads of a block, the same on all of them.
template <int N>
__device__ __forceinline__ float dot(const float* a, const float* b, i64 length, float* scratch)
{
    float sum = 0.f;
#pragma unroll 4
    for (i64 i = (i64)threadIdx.x * N; i < length; i += (i64)blockDim.x * N) {
        const Pack<float, N> x = *reinterpret_cast<const Pack<float, N>*>(a + i);
        const Pack<float, N> y = *reinterpret_cast<const Pack<float, N>*>(b + i);
#pragma unroll
        for (int k = 0; k < N; k++) sum += x.v[k] * y.v[k];
    }
    return block_sum(sum, scratch);
}

// `out = x·scale + y·shift`.
template <int N>
__device__ __forceinline__ void mix(float* out, const float* x, float scale, const float* y,
                                    float shift, i64 length)
{
    for (i64 i = (i64)threadIdx.x * N; i < length; i += (i64)blockDim.x * N) {
        Pack<float, N> v = *reinterpret_cast<const Pack<float, N>*>(x + i);
        const Pack<float, N> w = *reinterpret_cast<const Pack<float, N>*>(y + i);
#pragma unroll
        for (int k = 0; k < N; k++) v.v[k] = v.v[k] * scale + w.v[k] * shift;
        *reinterpret_cast<Pack<float, N>*>(out + i) = v;
    }
}

template <int N>
__device__ __forceinline__ void rescale(float* out, float* norms, const float* v, const float* m,
                                        i64 length, float multiplier, float* scratch)
{
    const i64 row = blockIdx.x;
    const float* from = v + row * length;
    const float norm = sqrtf(dot<N>(from, from, length, scratch));
    if (threadIdx.x == 0) norms[row] = norm;
    mix<N>(out + row * length, from, row_scale(m[row], norm, multiplier), from, 0.f, length);
}

struct Rescaled {
    const float* dy;
    const float* v;
    const float* norms;
    const float* m;
};

template <int N>
__device__ __forceinline__ void rescale_backward(float* of_v, float* of_m, const Rescaled& x,
                                                 i64 length, float multiplier, float* scratch)
{
    const i64 row = blockIdx.x;
    const float *dy = x.dy + row * length, *v = x.v + row * length;
    const float norm = x.norms[row], m = x.m[row];
    const float inverse = 1.f / (norm + 1.1920929e-7f);
    const float along = dot<N>(dy, v, length, scratch);
    if (threadIdx.x == 0) of_m[row] = multiplier * inverse * along;
    // A row of zeros has no direction.
    const float direction = norm > 0.f ? 1.f / norm : 0.f;
    const float shift = -multiplier * m * inverse * inverse * along * direction;
    mix<N>(of_v + row * length, dy, row_scale(m, norm, multiplier), v, shift, length);
}

} // namespace

extern "C" __global__ void multiply_f32(float* out, const float* a, const float* b, long long n)
{
    const i64 at = index() * 4;
    if (at + 4 <= n && aligned(a) && aligned(b)) {
        Four x = *reinterpret_cast<const Four*>(a + at);
        const Four y = *reinterpret_cast<const Four*>(b + at);
#pragma unroll
        for (int k = 0; k < 4; k++) x.v[k] *= y.v[k];
        *reinterpret_cast<Four*>(out + at) = x;
    } else {
        for (i64 i = at; i < n && i < at + 4; i++) out[i] = a[i] * b[i];
    }
}
REGISTER(multiply_f32)

// `out[a·C + c, w, b·D + d] = first[a,b]·second[c,w,d]`; 4 elements to a thread, `n` in all.
extern "C" __global__ void kronecker_f32(float* out, const float* first, const float* second,
                                         long long n, int B, int C, int window, int D)
{
    const i64 at = index() * 4;
    if (at >= n) return;
    const i64 line = at / ((i64)B * D); // (a·C + c)·window + w
    const i64 a = line / ((i64)C * window);
    i64 inner = line - a * C * window; // c·window + w
    const i64 column = at - line * B * D;
    int b = (int)column / D, d = (int)(column - (i64)b * D);
    const float* row = first + a * B;
    float v[4];
#pragma unroll
    for (int k = 0; k < 4; k++) {
        if (at + k >= n) break;
        v[k] = row[b] * second[inner * D + d];
        if (++d == D) {
            d = 0;
            if (++b == B) {
                b = 0;
                if (++inner == (i64)C * window) {
                    inner = 0;
                    row += B;
                }
            }
        }
    }
    if (at + 4 <= n) {
        Four pack = {{v[0], v[1], v[2], v[3]}};
        *reinterpret_cast<Four*>(out + at) = pack;
    } else {
        for (int k = 0; k < 3 && at + k < n; k++) out[at + k] = v[k];
    }
}
REGISTER(kronecker_f32)

// Parts [splits, A·B] of the gradient of `first`: a block sums one element over one of `splits` parts
// of the C·window rows of `second`.
extern "C" __global__ void kronecker_first_f32(float* parts, const float* dy, const float* second,
                                               int AB, int B, long long inner, int D, int splits)
{
    __shared__ float scratch[32];
    const int split = blockIdx.x / AB, element = blockIdx.x - split * AB;
    const int a = element / B, b = element - a * B;
    const i64 rows = (inner + splits - 1) / splits, first = split * rows;
    const i64 end = first + rows < inner ? first + rows : inner;
    const float* from = dy + (a * inner * B + b) * D;
    float sum = 0.f;
#pragma unroll 4
    for (i64 i = first * D + threadIdx.x; i < end * D; i += blockDim.x) {
        const i64 row = i / D;
        sum += from[row * B * D + i - row * D] * second[i];
    }
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}
REGISTER(kronecker_first_f32)

// Parts [splits, C·window·D] of the gradient of `second`: a thread sums one element over one of
// `splits` parts of `first`; `tiles` blocks to a part, `n` elements.
extern "C" __global__ void kronecker_second_f32(float* parts, const float* dy, const float* first,
                                                int AB, int B, long long n, int D, int tiles,
                                                int splits)
{
    const int split = blockIdx.x / tiles;
    const i64 i = (i64)(blockIdx.x - split * tiles) * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const int count = (AB + splits - 1) / splits, begin = split * count;
    const int end = begin + count < AB ? begin + count : AB;
    const i64 row = i / D;
    const float* from = dy + row * B * D + i - row * D;
    float sum = 0.f;
#pragma unroll 4
    for (int element = begin; element < end; element++) {
        const int a = element / B, b = element - a * B;
        sum += first[element] * from[a * n * B + (i64)b * D];
    }
    parts[split * n + i] = sum;
}
REGISTER(kronecker_second_f32)

// The sum of `splits` parts of n elements, in order.
extern "C" __global__ void kronecker_parts_f32(float* out, const float* parts, long long n, int splits)
{
    const i64 i = index();
    if (i >= n) return;
    float sum = 0.f;
#pragma unroll 4
    for (int split = 0; split < splits; split++) sum += parts[split * n + i];
    out[i] = sum;
}
REGISTER(kronecker_parts_f32)

// A block for each row.
extern "C" __global__ void rescale_rows_f32(float* out, float* norms, const float* v, const float* m,
                                            long long length, float multiplier, int packed)
{
    __shared__ float scratch[32];
    if (packed) rescale<4>(out, norms, v, m, length, multiplier, scratch);
    else rescale<1>(out, norms, v, m, length, multiplier, scratch);
}
REGISTER(rescale_rows_f32)

extern "C" __global__ void rescale_rows_backward_f32(float* of_v, float* of_m, const float* dy,
                                                     const float* v, const float* norms,
                                                     const float* m, long long length,
                                                     float multiplier, int packed)
{
    __shared__ float scratch[32];
    const Rescaled x = {dy, v, norms, m};
    if (packed) rescale_backward<4>(of_v, of_m, x, length, multiplier, scratch);
    else rescale_backward<1>(of_v, of_m, x, length, multiplier, scratch);
}
REGISTER(rescale_rows_backward_f32)
