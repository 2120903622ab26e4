// Layer normalisation over the last axis, forward and the gradient of the input: a warp for each row.
#include "prelude.cuh"

#define THREADS 256
#define WARPS (THREADS / 32)

// A row, read once and kept in registers (P packs in each lane), or read again each time (P = 0).
template <class T, int N, int P>
struct Row {
    const T* from;
    int packs, lane;
    Pack<T, N> kept[P > 0 ? P : 1];

    __device__ __forceinline__ Row(const T* row, int width) : from(row), packs(width / N) {
        lane = threadIdx.x & 31;
        if (P > 0) {
#pragma unroll
            for (int p = 0; p < P; ++p) {
                if (has(p)) kept[p] = at(p);
            }
        }
    }
    __device__ __forceinline__ int column(int p) const { return p * 32 + lane; }
    __device__ __forceinline__ bool has(int p) const { return column(p) < packs; }
    __device__ __forceinline__ Pack<T, N> at(int p) const {
        return *reinterpret_cast<const Pack<T, N>*>(from + static_cast<i64>(column(p)) * N);
    }
    __device__ __forceinline__ int steps() const { return P > 0 ? P : (packs + 31) / 32; }
    __device__ __forceinline__ void get(float (&out)[N], int p) const {
        if (P > 0) {
            widen(out, kept[P > 0 ? p : 0]);
        } else {
            widen(out, at(p));
        }
    }
};

template <class T, int N, int P>
__device__ __forceinline__ void layer_row(T* out, const T* x, float* stats, const float* gamma,
                                          const float* beta, int width, float eps) {
    Row<T, N, P> row(x, width);
    const int steps = row.steps();
    float scale = 1.f / static_cast<float>(width), v[N];
    float sum = 0.f;
#pragma unroll
    for (int p = 0; p < steps; ++p) {
        if (!row.has(p)) continue;
        row.get(v, p);
#pragma unroll
        for (int i = 0; i < N; ++i) sum += v[i];
    }
    float rough = warp_sum(sum) * scale;
    sum = 0.f;
#pragma unroll
    for (int p = 0; p < steps; ++p) {
        if (!row.has(p)) continue;
        row.get(v, p);
#pragma unroll
        for (int i = 0; i < N; ++i) sum += v[i] - rough;
    }
    float mean = rough + warp_sum(sum) * scale;
    sum = 0.f;
#pragma unroll
    for (int p = 0; p < steps; ++p) {
        if (!row.has(p)) continue;
        row.get(v, p);
#pragma unroll
        for (int i = 0; i < N; ++i) sum += (v[i] - mean) * (v[i] - mean);
    }
    float inverse = 1.f / sqrtf(warp_sum(sum) * scale + eps);
    if (row.lane == 0) {
        stats[0] = mean;
        stats[1] = inverse;
    }
#pragma unroll
    for (int p = 0; p < steps; ++p) {
        if (!row.has(p)) continue;
        int first = row.column(p) * N;
        float weight[N], bias[N];
        load_floats(weight, gamma + first);
        load_floats(bias, beta + first);
        row.get(v, p);
#pragma unroll
        for (int i = 0; i < N; ++i) v[i] = (v[i] - mean) * inverse * weight[i] + bias[i];
        *reinterpret_cast<Pack<T, N>*>(out + first) = narrow<T>(v);
    }
}

// `out` may be `dy`: a lane reads a pack for the last time before it writes it.
template <class T, int N, int P>
__device__ __forceinline__ void layer_row_backward(T* out, const T* dy, const T* x,
                                                   const float* stats, const float* gamma,
                                                   int width) {
    Row<T, N, P> inputs(x, width), slopes(dy, width);
    const int steps = inputs.steps();
    float mean = stats[0], inverse = stats[1];
    float plain = 0.f, moment = 0.f, d[N], dz[N], weight[N];
#pragma unroll
    for (int p = 0; p < steps; ++p) {
        if (!inputs.has(p)) continue;
        load_floats(weight, gamma + inputs.column(p) * N);
        inputs.get(d, p);
        slopes.get(dz, p);
#pragma unroll
        for (int i = 0; i < N; ++i) {
            plain += dz[i] * weight[i];
            moment += dz[i] * weight[i] * (d[i] - mean);
        }
    }
    float scale = inverse / static_cast<float>(width);
    plain = warp_sum(plain) * scale;
    float slope = warp_sum(moment) * scale * inverse * inverse;
#pragma unroll
    for (int p = 0; p < steps; ++p) {
        if (!inputs.has(p)) continue;
        int first = inputs.column(p) * N;
        load_floats(weight, gamma + first);
        inputs.get(d, p);
        slopes.get(dz, p);
#pragma unroll
        for (int i = 0; i < N; ++i)
            dz[i] = dz[i] * weight[i] * inverse - plain - (d[i] - mean) * slope;
        *reinterpret_cast<Pack<T, N>*>(out + first) = narrow<T>(dz);
    }
}

// Packs of a row that each lane keeps: rows of 2560 bytes, 1280 numbers of 16 bits.
#define KEPT 5

// `vector`: all addresses and the width allow accesses of 16 bytes.

#define LAYER_NORM(T, suffix)                                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS, 3) layer_norm_##suffix(                  \
        T* out, const T* x, float* stats, const float* gamma, const float* beta,                \
        long long rows, int width, int vector, float eps) {                                     \
        constexpr int N = 16 / sizeof(T);                                                       \
        i64 row = static_cast<i64>(blockIdx.x) * WARPS + (threadIdx.x >> 5);                    \
        if (row >= rows) return;                                                                \
        i64 at = row * width;                                                                   \
        float* to = stats + row * 2;                                                            \
        if (!vector) layer_row<T, 1, 0>(out + at, x + at, to, gamma, beta, width, eps);         \
        else if (width <= KEPT * 32 * N)                                                        \
            layer_row<T, N, KEPT>(out + at, x + at, to, gamma, beta, width, eps);               \
        else layer_row<T, N, 0>(out + at, x + at, to, gamma, beta, width, eps);                 \
    }                                                                                           \
    REGISTER(layer_norm_##suffix)                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) layer_norm_backward_##suffix(      \
        T* out, const T* dy, const T* x, const float* stats, const float* gamma,                \
        long long rows, int width, int vector) {                                                \
        constexpr int N = 16 / sizeof(T);                                                       \
        i64 row = static_cast<i64>(blockIdx.x) * WARPS + (threadIdx.x >> 5);                    \
        if (row >= rows) return;                                                                \
        i64 at = row * width;                                                                   \
        const float* of = stats + row * 2;                                                      \
        if (!vector) layer_row_backward<T, 1, 0>(out + at, dy + at, x + at, of, gamma, width);  \
        else if (width <= KEPT * 32 * N)                                                        \
            layer_row_backward<T, N, KEPT>(out + at, dy + at, x + at, of, gamma, width);        \
        else layer_row_backward<T, N, 0>(out + at, dy + at, x + at, of, gamma, width);          \
    }                                                                                           \
    REGISTER(layer_norm_backward_##suffix)

LAYER_NORM(float, f32)
LAYER_NORM(bf16, bf16)
LAYER_NORM(f16, f16)
