// Backward of attention.cu: probabilities are made again from the saved log-sum-exp, in two kernels
// without atomics, so that results are the same bits every time.
//
// `queries` gives dQ (and rowsum(dO·O) on the way), `keys` gives dK and dV. `keys` computes the
// scores transposed, keys along the rows: probabilities then are left operands as they come out of
// the product before, and nothing passes through shared memory. With few keys the queries are split
// over blocks and the partial sums joined by attention_plain.cu in a fixed order.
//
// Wide kernels as in attention.cu; dK/dV of 64 and more elements have none because two accumulators
// of 32 rows do not fit into 255 registers. With heads of 160 the keys stay in shared memory.
#include "attention_tiles.cuh"

namespace {

// Blocks of dQ's kernel that a multiprocessor is to hold.
__host__ __device__ constexpr int blocks_for_queries(int dim, int row_tiles) {
    if (row_tiles == 2) return dim == 40 ? 3 : 2;
    return dim == 40 ? 4 : dim == 160 ? 2 : 3;
}

// dQ, and `delta` = rowsum(dO·O).
template <class T, int D, int M>
__device__ __forceinline__ void queries_backward(const T* q, const T* k, const T* v, const T* out,
                                                 const T* dy, const float* lse, float* delta, T* dq,
                                                 int heads, int queries, int keys, float scale,
                                                 int causal) {
    constexpr int ROWS = WARPS * M * 16, TILE = KEYS * Head<D>::STRIDE, STEPS = Head<D>::STEPS;
    DYNAMIC_SHARED(T, shared);
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    int first_row = blockIdx.x * ROWS + warp * M * 16;
    int stride = heads * D;
    i64 at = head_at(queries, heads, D);
    q += at, out += at, dy += at, dq += at;
    k += head_at(keys, heads, D), v += head_at(keys, heads, D);
    lse += statistics_at(queries, heads), delta += statistics_at(queries, heads);

    int seen = causal ? min(keys, static_cast<int>(blockIdx.x + 1) * ROWS) : keys;
    int tiles = (seen + KEYS - 1) / KEYS;
    Copies<T, D> copies(stride);
    const T *k_from = copies.from(k, 0), *v_from = copies.from(v, 0);
    copies.template start<KEYS>(shared, k_from, keys);
    copies.template start<KEYS>(shared + TILE, v_from, keys);
    cp_async_commit();

    u32 q_left[M][STEPS][4], dy_left[M][STEPS][4];
    float sums[M][Head<D>::CHUNKS][4], lse_2[M][2], dots[M][2];
#pragma unroll
    for (int m = 0; m < M; m++) {
        hold<T, D>(dy_left[m], dy, stride, first_row + m * 16, queries);
        hold<T, D>(q_left[m], out, stride, first_row + m * 16, queries);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float dot = 0.f;
#pragma unroll
            for (int step = 0; step < STEPS; step++)
#pragma unroll
                for (int i = half; i < 4; i += 2) {
                    u32 a = dy_left[m][step][i], b = q_left[m][step][i];
                    dot += half_of<T>(a, 0) * half_of<T>(b, 0);
                    dot += half_of<T>(a, 1) * half_of<T>(b, 1);
                }
            dot = quad_sum(dot);
            int row = first_row + m * 16 + (lane >> 2) + half * 8;
            if ((lane & 3) == 0 && row < queries) delta[row] = dot;
            dots[m][half] = dot;
            // No probability in rows that are not there.
            lse_2[m][half] = row < queries ? lse[row] * LOG2_E : INFINITY_F;
        }
        hold<T, D>(q_left[m], q, stride, first_row + m * 16, queries);
#pragma unroll
        for (int c = 0; c < Head<D>::CHUNKS; c++)
#pragma unroll
            for (int i = 0; i < 4; i++) sums[m][c][i] = 0.f;
    }
    float scale_2 = scale * LOG2_E;
    for (int tile = 0; tile < tiles; tile++) {
        cp_async_wait<0>();
        __syncthreads();
        int first = tile * KEYS;
        T* k_tile = shared + (tile & 1) * 2 * TILE;
        if (tile + 1 < tiles) {
            T* next = shared + ((tile + 1) & 1) * 2 * TILE;
            k_from += KEYS * stride, v_from += KEYS * stride;
            copies.template start<KEYS>(next, k_from, keys - first - KEYS);
            copies.template start<KEYS>(next + TILE, v_from, keys - first - KEYS);
            cp_async_commit();
        }
        bool edge = first + KEYS > keys || (causal && first + KEYS > first_row + 1);
#pragma unroll 1
        for (int block = 0; block < KEYS / 16; block++) {
            const T* rows = k_tile + block * 16 * Head<D>::STRIDE;
            float s[M][2][4], dp[M][2][4];
            times_rows<T, D, M>(s, q_left, rows);
            times_rows<T, D, M>(dp, dy_left, rows + TILE);
            u32 ds[M][4];
#pragma unroll
            for (int m = 0; m < M; m++) {
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    int n = i >> 2, e = i & 3, half = e >> 1;
                    float p = power_of_2(s[m][n][e] * scale_2 - lse_2[m][half]);
                    if (edge) {
                        int key = first + block * 16 + n * 8 + 2 * (lane & 3) + (e & 1);
                        int row = first_row + m * 16 + (lane >> 2) + half * 8;
                        if (key >= keys || (causal && key > row)) p = 0.f;
                    }
                    s[m][n][e] = p * (dp[m][n][e] - dots[m][half]);
                }
                as_left<T>(ds[m], s[m]);
            }
            add_rows<T, D, M>(sums, ds, rows);
        }
    }
#pragma unroll
    for (int m = 0; m < M; m++)
        store<T, D>(dq, stride, first_row + m * 16, queries, sums[m], scale, scale);
}

// dK and dV of WARPS·M·16 keys, from the queries of one of `splits` parts; with more than one part
// into `partial`, f32 `[splits,2,B,keys,heads·D]`.
template <class T, int D, int M>
__device__ __forceinline__ void keys_backward(const T* q, const T* k, const T* v, const T* dy,
                                              const float* lse, const float* delta, T* dk, T* dv,
                                              float* partial, int heads, int queries, int keys,
                                              float scale, int causal, int splits) {
    constexpr int ROWS = WARPS * M * 16, STRIDE = Head<D>::STRIDE, QUERIES = Head<D>::QUERIES;
    constexpr int TILE = QUERIES * STRIDE;
    constexpr bool HELD = Head<D>::HELD;
    // Two blocks of queries beside each other as far as no multiprocessor loses a block by it.
    constexpr int UNROLL = M == 1 && (D == 40 || D == 80) ? 2 : 1;
    // Two stages of queries and their gradients; log-sum-exp and delta of both; keys and values
    // if they are not held.
    DYNAMIC_SHARED(T, shared);
    float* statistics = reinterpret_cast<float*>(shared + 4 * TILE);
    T* k_rows = reinterpret_cast<T*>(statistics + 4 * QUERIES);
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    int part = blockIdx.x % splits, first_key = blockIdx.x / splits * ROWS;
    int first_row = first_key + warp * M * 16;
    int stride = heads * D;
    i64 at = head_at(keys, heads, D);
    k += at, v += at;
    q += head_at(queries, heads, D), dy += head_at(queries, heads, D);
    lse += statistics_at(queries, heads), delta += statistics_at(queries, heads);

    int all = (queries + QUERIES - 1) / QUERIES, share = (all + splits - 1) / splits;
    int tile = part * share, end = min(all, tile + share);
    if (causal) tile = max(tile, first_key / QUERIES);
    Copies<T, D> copies(stride);
    const T *q_from = copies.from(q, tile * QUERIES), *dy_from = copies.from(dy, tile * QUERIES);
    if (tile < end) {
        copies.template start<QUERIES>(shared, q_from, queries - tile * QUERIES);
        copies.template start<QUERIES>(shared + TILE, dy_from, queries - tile * QUERIES);
    }
    u32 k_left[M][HELD ? Head<D>::STEPS : 1][4], v_left[M][HELD ? Head<D>::STEPS : 1][4];
    if constexpr (HELD) {
#pragma unroll
        for (int m = 0; m < M; m++) {
            hold<T, D>(k_left[m], k, stride, first_row + m * 16, keys);
            hold<T, D>(v_left[m], v, stride, first_row + m * 16, keys);
        }
    } else {
        copies.template start<ROWS>(k_rows, copies.from(k, first_key), keys - first_key);
        copies.template start<ROWS>(k_rows + ROWS * STRIDE, copies.from(v, first_key),
                                    keys - first_key);
    }
    cp_async_commit();
    // A thread brings one number of the statistics of a tile, a tile ahead.
    auto statistic = [&](int of) {
        int i = threadIdx.x, row = of * QUERIES + i % QUERIES;
        if (i < QUERIES) return row < queries ? lse[row] * LOG2_E : INFINITY_F;
        return i < 2 * QUERIES && row < queries ? delta[row] : 0.f;
    };
    float next_statistic = tile < end ? statistic(tile) : 0.f;

    float dk_sums[M][Head<D>::CHUNKS][4], dv_sums[M][Head<D>::CHUNKS][4];
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int c = 0; c < Head<D>::CHUNKS; c++)
#pragma unroll
            for (int i = 0; i < 4; i++) dk_sums[m][c][i] = dv_sums[m][c][i] = 0.f;
    float scale_2 = scale * LOG2_E;
    for (int turn = 0; tile < end; tile++, turn ^= 1) {
        T* q_tile = shared + turn * 2 * TILE;
        float* known = statistics + turn * 2 * QUERIES;
        if (threadIdx.x < 2 * QUERIES) known[threadIdx.x] = next_statistic;
        cp_async_wait<0>();
        __syncthreads();
        int first = tile * QUERIES;
        if (tile + 1 < end) {
            T* next = shared + (turn ^ 1) * 2 * TILE;
            q_from += QUERIES * stride, dy_from += QUERIES * stride;
            copies.template start<QUERIES>(next, q_from, queries - first - QUERIES);
            copies.template start<QUERIES>(next + TILE, dy_from, queries - first - QUERIES);
            cp_async_commit();
            next_statistic = statistic(tile + 1);
        }
        bool edge = causal && first < first_row + M * 16;
#pragma unroll UNROLL
        for (int block = 0; block < QUERIES / 16; block++) {
            const T* rows = q_tile + block * 16 * STRIDE;
            float s[M][2][4], dp[M][2][4];
            if constexpr (HELD) {
                times_rows<T, D, M>(s, k_left, rows);
                times_rows<T, D, M>(dp, v_left, rows + TILE);
            } else {
                const T* of_warp = k_rows + warp * 16 * STRIDE;
                times_rows_shared<T, D>(s, of_warp, rows);
                times_rows_shared<T, D>(dp, of_warp + ROWS * STRIDE, rows + TILE);
            }
            u32 p_left[M][4], ds_left[M][4];
#pragma unroll
            for (int m = 0; m < M; m++) {
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    int n = i >> 2, e = i & 3;
                    int column = block * 16 + n * 8 + 2 * (lane & 3) + (e & 1);
                    float p = power_of_2(s[m][n][e] * scale_2 - known[column]);
                    if (edge && first + column < first_row + m * 16 + (lane >> 2) + (e >> 1) * 8)
                        p = 0.f;
                    s[m][n][e] = p;
                    dp[m][n][e] = p * (dp[m][n][e] - known[QUERIES + column]);
                }
                as_left<T>(p_left[m], s[m]);
                as_left<T>(ds_left[m], dp[m]);
            }
            add_rows<T, D, M>(dv_sums, p_left, rows + TILE);
            add_rows<T, D, M>(dk_sums, ds_left, rows);
        }
    }
    i64 all_keys = static_cast<i64>(gridDim.z) * keys * stride;
    if (splits > 1) partial += 2 * part * all_keys + at;
#pragma unroll
    for (int m = 0; m < M; m++) {
        int first = first_row + m * 16;
        if (splits > 1) {
            store_sum<D>(partial, stride, first, keys, dk_sums[m], scale);
            store_sum<D>(partial + all_keys, stride, first, keys, dv_sums[m], 1.f);
        } else {
            store<T, D>(dk + at, stride, first, keys, dk_sums[m], scale, scale);
            store<T, D>(dv + at, stride, first, keys, dv_sums[m], 1.f, 1.f);
        }
    }
}

}  // namespace

#define QUERIES_BACKWARD(name, T, D, M)                                                           \
    extern "C" __global__ void __launch_bounds__(THREADS, blocks_for_queries(D, M))               \
        name(const T* q, const T* k, const T* v, const T* out, const T* dy, const float* lse,     \
             float* delta, T* dq, int heads, int queries, int keys, float scale, int causal) {    \
        queries_backward<T, D, M>(q, k, v, out, dy, lse, delta, dq, heads, queries, keys, scale,  \
                                  causal);                                                        \
    }                                                                                             \
    REGISTER(name)

#define KEYS_BACKWARD(name, T, D, M)                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS, D <= 64 && M == 1 ? 3 : 2)              \
        name(const T* q, const T* k, const T* v, const T* dy, const float* lse,                   \
             const float* delta, T* dk, T* dv, float* partial, int heads, int queries, int keys,  \
             float scale, int causal, int splits) {                                               \
        keys_backward<T, D, M>(q, k, v, dy, lse, delta, dk, dv, partial, heads, queries, keys,    \
                               scale, causal, splits);                                            \
    }                                                                                             \
    REGISTER(name)

#define EACH(T)                                                  \
    QUERIES_BACKWARD(attention_queries_40_##T, T, 40, 1)         \
    QUERIES_BACKWARD(attention_queries_64_##T, T, 64, 1)         \
    QUERIES_BACKWARD(attention_queries_80_##T, T, 80, 1)         \
    QUERIES_BACKWARD(attention_queries_160_##T, T, 160, 1)       \
    QUERIES_BACKWARD(attention_queries_wide_40_##T, T, 40, 2)    \
    QUERIES_BACKWARD(attention_queries_wide_64_##T, T, 64, 2)    \
    QUERIES_BACKWARD(attention_queries_wide_80_##T, T, 80, 2)    \
    KEYS_BACKWARD(attention_keys_40_##T, T, 40, 1)               \
    KEYS_BACKWARD(attention_keys_64_##T, T, 64, 1)               \
    KEYS_BACKWARD(attention_keys_80_##T, T, 80, 1)               \
    KEYS_BACKWARD(attention_keys_160_##T, T, 160, 1)             \
    KEYS_BACKWARD(attention_keys_wide_40_##T, T, 40, 2)

EACH(bf16)
EACH(f16)
