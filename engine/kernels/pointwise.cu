// Casts, sums, products and activations, element by element; sums over rows.
//
// A thread takes one chunk: as many elements as the widest type has in 16 bytes, read and written by
// one access where addresses allow it, one by one in tails and in views that start anywhere. Results
// may lie where an operand of the same type does: a thread writes only what it has read before.

#include "prelude.cuh"

namespace {

constexpr float DENSITY = 0.3989423f; // 1/sqrt(2 pi)

// Elements of one access to `N` elements of type T.
template <class T, int N>
constexpr int AT_ONCE = N * (int)sizeof(T) > 16 ? 16 / (int)sizeof(T) : N;

// Elements of a chunk where T is the widest type.
template <class T>
constexpr int CHUNK = 16 / (int)sizeof(T);

// Whether `N` elements can be read at once from here.
template <int N, class T>
__device__ __forceinline__ bool fits(const T* address)
{
    return (unsigned long long)address % (AT_ONCE<T, N> * sizeof(T)) == 0;
}

// The first `count` of N elements, the others 0. `packed`: all N, by wide accesses.
template <int N, class T>
__device__ __forceinline__ void read(float (&v)[N], const T* from, i64 count, bool packed)
{
    constexpr int W = AT_ONCE<T, N>;
    if (packed) {
#pragma unroll
        for (int k = 0; k < N; k += W) {
            const Pack<T, W> pack = *reinterpret_cast<const Pack<T, W>*>(from + k);
#pragma unroll
            for (int j = 0; j < W; j++) v[k + j] = to_f32(pack.v[j]);
        }
    } else {
#pragma unroll
        for (int k = 0; k < N; k++) v[k] = k < count ? to_f32(from[k]) : 0.f;
    }
}

// The counterpart of `read`.
template <int N, class T>
__device__ __forceinline__ void write(T* to, const float (&v)[N], i64 count, bool packed)
{
    constexpr int W = AT_ONCE<T, N>;
    if (packed) {
#pragma unroll
        for (int k = 0; k < N; k += W) {
            if constexpr (sizeof(T) == 2 && W > 1) {
                Pack<u32, W / 2> pack;
#pragma unroll
                for (int j = 0; j < W; j += 2) pack.v[j / 2] = pack2<T>(v[k + j], v[k + j + 1]);
                *reinterpret_cast<Pack<u32, W / 2>*>(to + k) = pack;
            } else {
                Pack<T, W> pack;
#pragma unroll
                for (int j = 0; j < W; j++) pack.v[j] = from_f32<T>(v[k + j]);
                *reinterpret_cast<Pack<T, W>*>(to + k) = pack;
            }
        }
    } else {
#pragma unroll
        for (int k = 0; k < N; k++)
            if (k < count) to[k] = from_f32<T>(v[k]);
    }
}

// The chunk of this thread.
__device__ __forceinline__ i64 chunk_index()
{
    return (i64)blockIdx.x * blockDim.x + threadIdx.x;
}

// ---- Casts.

template <class From, class To>
__device__ __forceinline__ void cast(To* out, const From* x, i64 n)
{
    constexpr int N = CHUNK<From> < CHUNK<To> ? CHUNK<From> : CHUNK<To>;
    const i64 at = chunk_index() * N;
    if (at >= n) return;
    const i64 left = n - at;
    float v[N];
    read<N>(v, x + at, left, left >= N && fits<N>(x));
    write<N>(out + at, v, left, left >= N && fits<N>(out));
}

// Numbers in 8 bits mean themselves times the scale of their row, a power of two.

template <class T>
constexpr bool IS_F8 = sizeof(T) == 1;

// From or to 8 bits, where the number at 0 is the one after `before` others in rows of `width`.
template <class From, class To>
__device__ __forceinline__ void cast_rows(To* out, const From* x, i64 n, const float* scales, i64 width,
                                          i64 before)
{
    constexpr int N = CHUNK<From> < CHUNK<To> ? CHUNK<From> : CHUNK<To>;
    const i64 at = chunk_index() * N;
    if (at >= n) return;
    const i64 left = n - at, place = before + at;
    // A division of 64 bits costs as much as all the rest.
    const bool short_place = before + n <= 0xffffffffll && width <= 0xffffffffll;
    i64 row = short_place ? (i64)((u32)place / (u32)width) : place / width;
    i64 row_end = (row + 1) * width - place;
    float scale = scales[row];
    float v[N];
    read<N>(v, x + at, left, left >= N && fits<N>(x));
#pragma unroll
    for (int k = 0; k < N; k++) {
        if (k >= row_end && k < left) {
            scale = scales[++row];
            row_end += width;
        }
        if constexpr (IS_F8<From>) v[k] *= scale;
        else v[k] /= scale;
    }
    write<N>(out + at, v, left, left >= N && fits<N>(out));
}

// The least power of two that brings `largest` within 448, which is 1.75 x 2^8.
__device__ __forceinline__ float scale_for(float largest)
{
    const u32 bits = bits_of_f32(largest);
    if (bits == 0 || !isfinite_f(largest)) return 1.f;
    const int exponent = (int)(bits >> 23) + ((bits & 0x7fffffu) > 0x600000u ? 1 : 0) - 8;
    return f32_of_bits((u32)(exponent < 1 ? 1 : exponent) << 23);
}

// A block for each row; NaN is passed over.
template <class T>
__device__ __forceinline__ void find_scales(float* scales, const T* x, i64 width)
{
    constexpr int N = CHUNK<T>;
    __shared__ float scratch[32];
    const T* row = x + blockIdx.x * width;
    const bool packed = fits<N>(row);
    float most = 0.f;
    for (i64 at = (i64)threadIdx.x * N; at < width; at += (i64)blockDim.x * N) {
        float v[N];
        read<N>(v, row + at, width - at, packed && width - at >= N);
#pragma unroll
        for (int k = 0; k < N; k++) most = fmaxf(most, fabsf(v[k]));
    }
    most = block_max(most, scratch);
    if (threadIdx.x == 0) scales[blockIdx.x] = scale_for(most);
}

// ---- Functions of one element, with their slopes, for a result of type T.

// Divisions within 2 units of the last place: exact ones branch, one element after the other. So is
// the exponential, where the result has 16 bits.

template <class T>
__device__ __forceinline__ float exponential(float x)
{
    if constexpr (sizeof(T) == 2) return __expf(x);
    else return expf(x);
}

template <class T>
__device__ __forceinline__ float sigmoid(float x)
{
    return __fdividef(1.f, 1.f + exponential<T>(-x));
}

// The normal distribution function at x, and e^(-x^2/2): the approximation of cpu/transcendental.rs.
template <class T>
__device__ __forceinline__ float normal(float x, float& bell)
{
    const float u = fabsf(x);
    const float t = __fdividef(1.f, u * 0.24f + 1.f);
    float p = 0.025413234f;
    p = p * t - 0.123990156f;
    p = p * t + 0.2038648f;
    p = p * t - 0.14197141f;
    p = p * t + 0.13939698f;
    p = p * t + 0.029347223f;
    p = p * t + 0.08731349f;
    p = p * t + 0.08903966f;
    p = p * t + 0.095843315f;
    p = p * t + 0.09574287f;
    bell = exponential<T>(-0.5f * u * u);
    const float tail = p * t * bell;
    return x > 0.f ? 1.f - tail : tail;
}

template <class T>
struct Silu {
    static __device__ __forceinline__ float value(float x) { return x * sigmoid<T>(x); }
    static __device__ __forceinline__ float slope(float x)
    {
        const float s = sigmoid<T>(x);
        return s * (1.f + x * (1.f - s));
    }
};

template <class T>
struct QuickGelu {
    static __device__ __forceinline__ float value(float x) { return x * sigmoid<T>(1.702f * x); }
    static __device__ __forceinline__ float slope(float x)
    {
        const float s = sigmoid<T>(1.702f * x);
        return s * (1.f + 1.702f * x * (1.f - s));
    }
};

template <class T>
struct Gelu {
    static __device__ __forceinline__ float value(float x)
    {
        float bell;
        return x * normal<T>(x, bell);
    }
    static __device__ __forceinline__ float slope(float x)
    {
        float bell;
        const float phi = normal<T>(x, bell);
        return x * DENSITY * bell + phi;
    }
};

template <class F, class T>
__device__ __forceinline__ void forward(T* out, const T* x, i64 n)
{
    constexpr int N = CHUNK<T>;
    const i64 at = chunk_index() * N;
    if (at >= n) return;
    const i64 left = n - at;
    float v[N];
    read<N>(v, x + at, left, left >= N && fits<N>(x));
#pragma unroll
    for (int k = 0; k < N; k++) v[k] = F::value(v[k]);
    write<N>(out + at, v, left, left >= N && fits<N>(out));
}

template <class F, class T>
__device__ __forceinline__ void backward(T* dx, const T* dy, const T* x, i64 n)
{
    constexpr int N = CHUNK<T>;
    const i64 at = chunk_index() * N;
    if (at >= n) return;
    const i64 left = n - at;
    float v[N], d[N];
    read<N>(v, x + at, left, left >= N && fits<N>(x));
    read<N>(d, dy + at, left, left >= N && fits<N>(dy));
#pragma unroll
    for (int k = 0; k < N; k++) d[k] *= F::slope(v[k]);
    write<N>(dx + at, d, left, left >= N && fits<N>(dx));
}

// ---- GEGLU: rows of a value and a gate, `width` elements each.

// Chunks of N elements; `width` is a multiple of N.
template <int N, class T>
__device__ __forceinline__ void gate(T* out, const T* x, i64 chunks, i64 width)
{
    const i64 chunk = chunk_index();
    if (chunk >= chunks) return;
    const i64 row = chunk / (width / N);
    const T* value = x + chunk * N + row * width;
    float v[N], g[N];
    read<N>(v, value, N, N > 1);
    read<N>(g, value + width, N, N > 1);
#pragma unroll
    for (int k = 0; k < N; k++) v[k] *= Gelu<T>::value(g[k]);
    write<N>(out + chunk * N, v, N, N > 1);
}

template <int N, class T>
__device__ __forceinline__ void gate_backward(T* dx, const T* dy, const T* x, i64 chunks, i64 width)
{
    const i64 chunk = chunk_index();
    if (chunk >= chunks) return;
    const i64 row = chunk / (width / N);
    const i64 at = chunk * N + row * width;
    float v[N], g[N], d[N];
    read<N>(d, dy + chunk * N, N, N > 1);
    read<N>(v, x + at, N, N > 1);
    read<N>(g, x + at + width, N, N > 1);
#pragma unroll
    for (int k = 0; k < N; k++) {
        float bell;
        const float phi = normal<T>(g[k], bell);
        const float slope = g[k] * DENSITY * bell + phi;
        const float value = v[k];
        v[k] = d[k] * g[k] * phi;
        g[k] = d[k] * value * slope;
    }
    write<N>(dx + at, v, N, N > 1);
    write<N>(dx + at + width, g, N, N > 1);
}

// ---- Sums and products.

template <class T>
__device__ __forceinline__ void add(T* out, const T* a, const T* b, i64 n)
{
    constexpr int N = CHUNK<T>;
    const i64 at = chunk_index() * N;
    if (at >= n) return;
    const i64 left = n - at;
    float v[N], w[N];
    read<N>(v, a + at, left, left >= N && fits<N>(a));
    read<N>(w, b + at, left, left >= N && fits<N>(b));
#pragma unroll
    for (int k = 0; k < N; k++) v[k] += w[k];
    write<N>(out + at, v, left, left >= N && fits<N>(out));
}

template <class T>
__device__ __forceinline__ void scale(T* out, const T* x, i64 n, float factor)
{
    constexpr int N = CHUNK<T>;
    const i64 at = chunk_index() * N;
    if (at >= n) return;
    const i64 left = n - at;
    float v[N];
    read<N>(v, x + at, left, left >= N && fits<N>(x));
#pragma unroll
    for (int k = 0; k < N; k++) v[k] *= factor;
    write<N>(out + at, v, left, left >= N && fits<N>(out));
}

template <class T>
__device__ __forceinline__ void scale_rows(T* out, const T* x, const float* factors, i64 n, i64 width)
{
    constexpr int N = CHUNK<T>;
    const i64 at = chunk_index() * N;
    if (at >= n) return;
    const i64 left = n - at;
    float v[N];
    read<N>(v, x + at, left, left >= N && fits<N>(x));
    i64 row = at / width, column = at - row * width;
    float factor = factors[row];
#pragma unroll
    for (int k = 0; k < N; k++) {
        if (column == width && k < left) {
            column = 0;
            factor = factors[++row];
        }
        v[k] *= factor;
        column++;
    }
    write<N>(out + at, v, left, left >= N && fits<N>(out));
}

// ---- Sums over rows: `[B, area, width]` to `[B, width]`.

constexpr int LANES = 16; // Threads side by side; as many groups of rows below each other.

// A block sums one of `splits` parts of an image's rows for LANES chunks of N columns. The sums go to
// `out` if there is one part, else to `parts` [B, splits, width].
template <int N, class T>
__device__ __forceinline__ void sum_rows(T* out, float* parts, const T* x, i64 area, i64 width,
                                         int tiles, int splits)
{
    __shared__ float sums[LANES * LANES * N];
    const int tile = blockIdx.x % tiles;
    const i64 part = blockIdx.x / tiles; // image * splits + split
    const i64 image = part / splits;
    const i64 rows = (area + splits - 1) / splits;
    const i64 first = (part - image * splits) * rows;
    const i64 end = first + rows < area ? first + rows : area;
    const int lane = threadIdx.x % LANES, group = threadIdx.x / LANES;
    const i64 column = ((i64)tile * LANES + lane) * N;
    float sum[N];
#pragma unroll
    for (int k = 0; k < N; k++) sum[k] = 0.f;
    if (column < width) {
        const T* from = x + image * area * width + column;
#pragma unroll 4
        for (i64 row = first + group; row < end; row += LANES) {
            float v[N];
            read<N>(v, from + row * width, N, N > 1);
#pragma unroll
            for (int k = 0; k < N; k++) sum[k] += v[k];
        }
    }
#pragma unroll
    for (int k = 0; k < N; k++) sums[(group * N + k) * LANES + lane] = sum[k];
    __syncthreads();
    if (threadIdx.x < LANES * N) {
        float total = 0.f;
        for (int g = 0; g < LANES; g++) total += sums[g * N * LANES + threadIdx.x];
        const i64 to = ((i64)tile * LANES + threadIdx.x % LANES) * N + threadIdx.x / LANES;
        if (to < width) {
            if (splits == 1) out[image * width + to] = from_f32<T>(total);
            else parts[part * width + to] = total;
        }
    }
}

// The parts of each sum, in order.
template <class T>
__device__ __forceinline__ void sum_parts(T* out, const float* parts, i64 n, i64 width, int splits)
{
    const i64 i = chunk_index();
    if (i >= n) return;
    const i64 image = i / width;
    const float* from = parts + image * (splits - 1) * width + i;
    float sum = 0.f;
#pragma unroll 4
    for (int split = 0; split < splits; split++) sum += from[split * width];
    out[i] = from_f32<T>(sum);
}

} // namespace

#define ACTIVATION(kernel, F, name, T)                                                              \
    extern "C" __global__ void kernel##_##name(T* out, const T* x, long long n)                     \
    {                                                                                               \
        forward<F<T>>(out, x, n);                                                                      \
    }                                                                                               \
    REGISTER(kernel##_##name)                                                                       \
    extern "C" __global__ void kernel##_backward_##name(T* dx, const T* dy, const T* x, long long n) \
    {                                                                                               \
        backward<F<T>>(dx, dy, x, n);                                                                  \
    }                                                                                               \
    REGISTER(kernel##_backward_##name)

#define KERNELS(name, T)                                                                            \
    ACTIVATION(silu, Silu, name, T)                                                                 \
    ACTIVATION(gelu, Gelu, name, T)                                                                 \
    ACTIVATION(quick_gelu, QuickGelu, name, T)                                                      \
    extern "C" __global__ void geglu_##name(T* out, const T* x, long long chunks, long long width,  \
                                            int packed)                                             \
    {                                                                                               \
        if (packed) gate<CHUNK<T>>(out, x, chunks, width);                                          \
        else gate<1>(out, x, chunks, width);                                                        \
    }                                                                                               \
    REGISTER(geglu_##name)                                                                          \
    extern "C" __global__ void geglu_backward_##name(T* dx, const T* dy, const T* x,                \
                                                     long long chunks, long long width, int packed) \
    {                                                                                               \
        if (packed) gate_backward<CHUNK<T>>(dx, dy, x, chunks, width);                              \
        else gate_backward<1>(dx, dy, x, chunks, width);                                            \
    }                                                                                               \
    REGISTER(geglu_backward_##name)                                                                 \
    extern "C" __global__ void add_##name(T* out, const T* a, const T* b, long long n)              \
    {                                                                                               \
        add(out, a, b, n);                                                                          \
    }                                                                                               \
    REGISTER(add_##name)                                                                            \
    extern "C" __global__ void scale_##name(T* out, const T* x, long long n, float factor)          \
    {                                                                                               \
        scale(out, x, n, factor);                                                                   \
    }                                                                                               \
    REGISTER(scale_##name)                                                                          \
    extern "C" __global__ void scale_rows_##name(T* out, const T* x, const float* factors,          \
                                                 long long n, long long width)                      \
    {                                                                                               \
        scale_rows(out, x, factors, n, width);                                                      \
    }                                                                                               \
    REGISTER(scale_rows_##name)                                                                     \
    extern "C" __global__ void sum_rows_##name(T* out, float* parts, const T* x, long long area,    \
                                               long long width, int tiles, int splits, int packed)  \
    {                                                                                               \
        if (packed) sum_rows<CHUNK<T>>(out, parts, x, area, width, tiles, splits);                  \
        else sum_rows<1>(out, parts, x, area, width, tiles, splits);                                \
    }                                                                                               \
    REGISTER(sum_rows_##name)                                                                       \
    extern "C" __global__ void sum_parts_##name(T* out, const float* parts, long long n,            \
                                                long long width, int splits)                        \
    {                                                                                               \
        sum_parts(out, parts, n, width, splits);                                                    \
    }                                                                                               \
    REGISTER(sum_parts_##name)                                                                      \
    extern "C" __global__ void find_scales_##name(float* scales, const T* x, long long width)       \
    {                                                                                               \
        find_scales(scales, x, width);                                                              \
    }                                                                                               \
    REGISTER(find_scales_##name)

KERNELS(f32, float)
KERNELS(bf16, bf16)
KERNELS(f16, f16)

#define CAST(from, From, to, To)                                                                    \
    extern "C" __global__ void cast_##from##_##to(To* out, const From* x, long long n)              \
    {                                                                                               \
        cast(out, x, n);                                                                            \
    }                                                                                               \
    REGISTER(cast_##from##_##to)

#define CAST_ROWS(from, From, to, To)                                                               \
    extern "C" __global__ void cast_##from##_##to(To* out, const From* x, long long n,              \
                                                  const float* scales, long long width,             \
                                                  long long before)                                 \
    {                                                                                               \
        cast_rows(out, x, n, scales, width, before);                                                \
    }                                                                                               \
    REGISTER(cast_##from##_##to)

CAST(f32, float, bf16, bf16)
CAST(f32, float, f16, f16)
CAST(bf16, bf16, f32, float)
CAST(bf16, bf16, f16, f16)
CAST(f16, f16, f32, float)
CAST(f16, f16, bf16, bf16)
CAST_ROWS(f32, float, f8, f8)
CAST_ROWS(bf16, bf16, f8, f8)
CAST_ROWS(f16, f16, f8, f8)
CAST_ROWS(f8, f8, f32, float)
CAST_ROWS(f8, f8, bf16, bf16)
CAST_ROWS(f8, f8, f16, f16)
