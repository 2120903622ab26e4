// Tiles of attention on tensor cores, for attention.cu and attention_backward.cu.
//
// Left operands are read once, from global memory to registers. Right operands are tiles in shared
// memory, the next one on its way while this one is used; a row is an odd number of 16-byte chunks,
// so that the 8 rows of an ldmatrix lie in different banks without swizzling. Heads are not padded:
// 40 = 2·16 + 8, and the last step is one of mma.m16n8k8.
#pragma once
#include "prelude.cuh"

namespace {

constexpr int WARPS = 4, THREADS = 32 * WARPS;
// Keys of a tile in the forward and in dQ.
constexpr int KEYS = 64;
constexpr float LOG2_E = 1.4426950408889634f;

template <int D>
struct Head {
    static constexpr int CHUNKS = D / 8, STEPS = (D + 15) / 16, STRIDE = (CHUNKS | 1) * 8;
    // Queries of a tile in dK/dV, and whether the keys stay in registers there.
    static constexpr int QUERIES = D > 128 ? 32 : 64;
    static constexpr bool HELD = D <= 128;
};

__device__ __forceinline__ float power_of_2(float x) {
#ifdef LORARUN_HOST
    return exp2f(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

template <class T>
__device__ __forceinline__ float half_of(u32 pair, int upper) {
    T x;
    x.x = static_cast<u16>(upper ? pair >> 16 : pair & 0xffffu);
    return to_f32(x);
}

__device__ constexpr bool is_bf16(bf16*) { return true; }
__device__ constexpr bool is_bf16(f16*) { return false; }

// Sum and maximum over the four lanes that share a row of an accumulator.
__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// The head of this block within a sample of `rows` tokens.
__device__ __forceinline__ i64 head_at(int rows, int heads, int dim) {
    return (static_cast<i64>(blockIdx.z) * rows * heads + blockIdx.y) * dim;
}

// The same within `[B,heads,rows]`.
__device__ __forceinline__ i64 statistics_at(int rows, int heads) {
    return (static_cast<i64>(blockIdx.z) * heads + blockIdx.y) * rows;
}

// What a thread copies to shared memory of each tile of a head: a chunk of every AT_ONCE-th row. It
// keeps its column, so that copies differ by what is known or the same for the whole block.
template <class T, int D>
struct Copies {
    static constexpr int CHUNKS = Head<D>::CHUNKS, AT_ONCE = THREADS / CHUNKS;
    int row, at, stride;

    __device__ __forceinline__ explicit Copies(int stride) : stride(stride) {
        row = static_cast<int>(threadIdx.x) / CHUNKS;
        at = static_cast<int>(threadIdx.x) % CHUNKS * 8;
    }

    // Where the thread's part of the tile from row `first` on begins.
    __device__ __forceinline__ const T* from(const T* head, int first) const {
        return head + static_cast<i64>(first + row) * stride + at;
    }

    // Starts to copy a tile of ROWS rows, of which `rows` exist; the others become zeros.
    template <int ROWS>
    __device__ __forceinline__ void start(T* shared, const T* from, int rows) const {
        if (THREADS % CHUNKS != 0 && row >= AT_ONCE) return;
        shared += row * Head<D>::STRIDE + at;
        rows -= row;
#pragma unroll
        for (int i = 0; i < ROWS; i += AT_ONCE) {
            if (i + AT_ONCE > ROWS && row + i >= ROWS) break;
            // Nothing is read where there is no row, wherever that is.
            cp_async_16(shared + i * Head<D>::STRIDE, from, i < rows);
            from += AT_ONCE * stride;
        }
    }
};

// 16 rows from `first` on as left operands, read from global memory; zeros beyond `rows`.
template <class T, int D>
__device__ __forceinline__ void hold(u32 (&a)[Head<D>::STEPS][4], const T* head, int stride,
                                     int first, int rows) {
    int lane = threadIdx.x & 31;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = first + (lane >> 2) + 8 * half;
        bool valid = row < rows;
        const T* source = head + (valid ? static_cast<i64>(row) * stride : 0) + 2 * (lane & 3);
#pragma unroll
        for (int step = 0; step < Head<D>::STEPS; step++) {
#pragma unroll
            for (int upper = 0; upper < 2; upper++) {
                int column = step * 16 + upper * 8;
                bool inside = column < D && valid;
                a[step][upper * 2 + half] =
                    inside ? *reinterpret_cast<const u32*>(source + column) : 0u;
            }
        }
    }
}

// Where a lane's address lies for ldmatrix: of 16 rows as columns of the right operand, and of 16
// rows as rows of either operand.
template <int D>
__device__ __forceinline__ int lane_across() {
    int lane = threadIdx.x & 31;
    return ((lane & 7) + ((lane >> 4) << 3)) * Head<D>::STRIDE + ((lane >> 3) & 1) * 8;
}

template <int D>
__device__ __forceinline__ int lane_along() {
    int lane = threadIdx.x & 31;
    return (lane & 15) * Head<D>::STRIDE + (lane >> 4) * 8;
}

// d += a · b over 8 elements: the first half of mma_16816.
template <class T>
__device__ __forceinline__ void mma_1688(float (&d)[4], const u32 (&a)[4], u32 b) {
#ifdef LORARUN_HOST
    u32 left[4] = {a[0], a[1], 0, 0}, right[2] = {b, 0};
    mma_16816(d, left, right, static_cast<T*>(nullptr));
#else
    if (is_bf16(static_cast<T*>(nullptr)))
        asm volatile(
            "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 "
            "{%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(b));
    else
        asm volatile(
            "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
            "{%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(b));
#endif
}

// d += a · rowsᵀ for 16 rows in shared memory, as two tiles of 8 columns, over one step of 16
// elements; over 8 where there are no more.
template <class T, int D, int M>
__device__ __forceinline__ void add_step(float (&d)[M][2][4],
                                         const u32 (&left)[M][Head<D>::STEPS][4], const T* rows,
                                         int step) {
    if (step * 16 + 16 <= D) {
        u32 r[4];
        ldmatrix_x4(r, rows + lane_across<D>() + step * 16);
        u32 first[2] = {r[0], r[1]}, second[2] = {r[2], r[3]};
#pragma unroll
        for (int m = 0; m < M; m++) {
            mma_16816(d[m][0], left[m][step], first, static_cast<T*>(nullptr));
            mma_16816(d[m][1], left[m][step], second, static_cast<T*>(nullptr));
        }
    } else {
        u32 r[2];
        ldmatrix_x2(r, rows + lane_along<D>() + step * 16);
#pragma unroll
        for (int m = 0; m < M; m++) {
            mma_1688<T>(d[m][0], left[m][step], r[0]);
            mma_1688<T>(d[m][1], left[m][step], r[1]);
        }
    }
}

// d = left · rowsᵀ for 16 rows in shared memory.
template <class T, int D, int M>
__device__ __forceinline__ void times_rows(float (&d)[M][2][4],
                                           const u32 (&left)[M][Head<D>::STEPS][4],
                                           const T* rows) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int i = 0; i < 8; i++) d[m][i >> 2][i & 3] = 0.f;
#pragma unroll
    for (int step = 0; step < Head<D>::STEPS; step++) add_step<T, D, M>(d, left, rows, step);
}

// The same with the left operand in shared memory; D is a multiple of 16.
template <class T, int D>
__device__ __forceinline__ void times_rows_shared(float (&d)[1][2][4], const T* left,
                                                  const T* rows) {
#pragma unroll
    for (int i = 0; i < 8; i++) d[0][i >> 2][i & 3] = 0.f;
#pragma unroll
    for (int step = 0; step < Head<D>::STEPS; step++) {
        u32 a[4], r[4];
        ldmatrix_x4(a, left + lane_along<D>() + step * 16);
        ldmatrix_x4(r, rows + lane_across<D>() + step * 16);
        u32 first[2] = {r[0], r[1]}, second[2] = {r[2], r[3]};
        mma_16816(d[0][0], a, first, static_cast<T*>(nullptr));
        mma_16816(d[0][1], a, second, static_cast<T*>(nullptr));
    }
}

// d += left · rows for 16 rows in shared memory: one step, all of a head's elements.
template <class T, int D, int M>
__device__ __forceinline__ void add_rows(float (&d)[M][Head<D>::CHUNKS][4], const u32 (&left)[M][4],
                                         const T* rows) {
    constexpr int CHUNKS = Head<D>::CHUNKS;
    rows += lane_along<D>();
#pragma unroll
    for (int c = 0; c + 1 < CHUNKS; c += 2) {
        u32 r[4];
        ldmatrix_x4_trans(r, rows + c * 8);
        u32 first[2] = {r[0], r[1]}, second[2] = {r[2], r[3]};
#pragma unroll
        for (int m = 0; m < M; m++) {
            mma_16816(d[m][c], left[m], first, static_cast<T*>(nullptr));
            mma_16816(d[m][c + 1], left[m], second, static_cast<T*>(nullptr));
        }
    }
    if (CHUNKS & 1) {
        u32 r[2];
        ldmatrix_x2_trans(r, rows + (CHUNKS - 1) * 8);
#pragma unroll
        for (int m = 0; m < M; m++)
            mma_16816(d[m][CHUNKS - 1], left[m], r, static_cast<T*>(nullptr));
    }
}

// Two tiles of accumulators as the left operand of the next product.
template <class T>
__device__ __forceinline__ void as_left(u32 (&a)[4], const float (&d)[2][4]) {
    a[0] = pack2<T>(d[0][0], d[0][1]);
    a[1] = pack2<T>(d[0][2], d[0][3]);
    a[2] = pack2<T>(d[1][0], d[1][1]);
    a[3] = pack2<T>(d[1][2], d[1][3]);
}

// 16 rows of accumulators times a factor for each half, to rows from `first` on of a head.
template <class T, int D>
__device__ __forceinline__ void store(T* head, int stride, int first, int rows,
                                      const float (&d)[Head<D>::CHUNKS][4], float upper,
                                      float lower) {
    int lane = threadIdx.x & 31;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = first + (lane >> 2) + 8 * half;
        if (row >= rows) continue;
        float factor = half ? lower : upper;
        T* to = head + static_cast<i64>(row) * stride + 2 * (lane & 3);
#pragma unroll
        for (int c = 0; c < Head<D>::CHUNKS; c++)
            *reinterpret_cast<u32*>(to + c * 8) =
                pack2<T>(d[c][2 * half] * factor, d[c][2 * half + 1] * factor);
    }
}

// The same in f32.
template <int D>
__device__ __forceinline__ void store_sum(float* head, int stride, int first, int rows,
                                          const float (&d)[Head<D>::CHUNKS][4], float factor) {
    int lane = threadIdx.x & 31;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = first + (lane >> 2) + 8 * half;
        if (row >= rows) continue;
        float* to = head + static_cast<i64>(row) * stride + 2 * (lane & 3);
#pragma unroll
        for (int c = 0; c < Head<D>::CHUNKS; c++) {
            to[c * 8] = d[c][2 * half] * factor;
            to[c * 8 + 1] = d[c][2 * half + 1] * factor;
        }
    }
}

}  // namespace
