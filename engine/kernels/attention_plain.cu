// Attention in f32 arithmetic for every element type and heads of up to 512 elements, forward and
// backward, without an N x N tensor: what f32 training uses, and what the tensor core kernels have
// no instance for (the VAE's head of 512).
//
// A block of 256 threads owns 32 rows (queries; keys in dK/dV) and walks over 32 columns at a time.
// Heads are cut into chunks of 64 elements: of a chunk, a thread accumulates element `at` of 8 rows,
// so that a warp reads 32 neighbouring numbers of a row, and 8 factors that all its lanes share.
// Sums have a fixed order. Statistics are natural logarithms.
#include "prelude.cuh"

namespace {

constexpr int THREADS = 256, SIDE = 32, CHUNK = 64;
// Floats from row to row: 16-byte aligned, 4 banks on.
constexpr int CHUNK_STRIDE = CHUNK + 4, SIDE_STRIDE = SIDE + 4;

typedef Pack<float, 4> Four;

// Tokens of one head of one sample.
template <class T>
struct Rows {
    const T* at;
    int count, stride;
};

template <class T>
__device__ __forceinline__ Rows<T> head_of(const T* x, int rows, int heads, int dim) {
    i64 sample = static_cast<i64>(blockIdx.z) * rows * heads * dim;
    return {x + sample + static_cast<i64>(blockIdx.y) * dim, rows, heads * dim};
}

__device__ __forceinline__ i64 statistics_at(int rows, int heads) {
    return (static_cast<i64>(blockIdx.z) * heads + blockIdx.y) * rows;
}

// Elements [chunk·64, +64) of rows [first, first + 32), zeros beyond both.
template <class T>
__device__ __forceinline__ void load(float* to, int to_stride, Rows<T> from, int first, int chunk,
                                     int dim) {
    constexpr int AT_ONCE = THREADS / CHUNK;
    int column = threadIdx.x % CHUNK, row = threadIdx.x / CHUNK, element = chunk * CHUNK + column;
    int left = element < dim ? from.count - first - row : 0;
    const T* at = from.at + static_cast<i64>(first + row) * from.stride + element;
    to += row * to_stride + column;
#pragma unroll
    for (int i = 0; i < SIDE; i += AT_ONCE) {
        to[i * to_stride] = i < left ? to_f32(*at) : 0.f;
        at += AT_ONCE * from.stride;
    }
}

// A thread's scores: rows `row` and `row + 16`, columns `column` and `column + 16`.
struct Place {
    int row, column;
};

__device__ __forceinline__ Place score_place() {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    return {(warp >> 1) * 4 + (lane >> 3), (warp & 1) * 8 + (lane & 7)};
}

// s += a·bᵀ over one chunk.
__device__ __forceinline__ void add_scores(float (&s)[2][2], const float* a, int a_stride,
                                           const float* b, Place place, int width) {
    a += place.row * a_stride, b += place.column * CHUNK_STRIDE;
#pragma unroll 4
    for (int d = 0; d < width; d += 4) {
        Four x[2], y[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            x[i] = *reinterpret_cast<const Four*>(a + i * 16 * a_stride + d);
            y[i] = *reinterpret_cast<const Four*>(b + i * 16 * CHUNK_STRIDE + d);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            s[0][0] += x[0].v[i] * y[0].v[i];
            s[0][1] += x[0].v[i] * y[1].v[i];
            s[1][0] += x[1].v[i] * y[0].v[i];
            s[1][1] += x[1].v[i] * y[1].v[i];
        }
    }
}

__device__ __forceinline__ int chunks_of(int dim) { return (dim + CHUNK - 1) / CHUNK; }

// The width of a chunk in use, in whole groups of 4.
__device__ __forceinline__ int width_of(int chunk, int dim) {
    return min(CHUNK, (dim - chunk * CHUNK + 3) / 4 * 4);
}

// sums[row][chunk] += factors[column][row] · x[column][element] for 32 columns.
template <int CHUNKS>
__device__ __forceinline__ void add_chunk(float (&sums)[8][CHUNKS], int chunk, const float* factors,
                                          const float* x) {
    factors += threadIdx.x / CHUNK * 8, x += threadIdx.x % CHUNK;
#pragma unroll 4
    for (int column = 0; column < SIDE; column++) {
        Four f[2];
        f[0] = *reinterpret_cast<const Four*>(factors + column * SIDE_STRIDE);
        f[1] = *reinterpret_cast<const Four*>(factors + column * SIDE_STRIDE + 4);
        float y = x[column * CHUNK_STRIDE];
#pragma unroll
        for (int row = 0; row < 8; row++) sums[row][chunk] += f[row / 4].v[row % 4] * y;
    }
}

template <int CHUNKS>
__device__ __forceinline__ void clear(float (&sums)[8][CHUNKS]) {
#pragma unroll
    for (int row = 0; row < 8; row++)
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; chunk++) sums[row][chunk] = 0.f;
}

// Rows from `first` on of a head of `to`.
template <class T, int CHUNKS>
__device__ __forceinline__ void store(T* to, int first, int rows, int stride, int dim,
                                      const float (&sums)[8][CHUNKS], float factor) {
    int row = first + threadIdx.x / CHUNK * 8, column = threadIdx.x % CHUNK;
#pragma unroll
    for (int i = 0; i < 8; i++)
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; chunk++) {
            int element = chunk * CHUNK + column;
            if (row + i < rows && element < dim)
                to[static_cast<i64>(row + i) * stride + element] =
                    from_f32<T>(sums[i][chunk] * factor);
        }
}

__device__ __forceinline__ float eighth_sum(float x) {
    for (int lane = 4; lane > 0; lane >>= 1) x += __shfl_xor_sync(0xffffffffu, x, lane);
    return x;
}

__device__ __forceinline__ float eighth_max(float x) {
    for (int lane = 4; lane > 0; lane >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lane));
    return x;
}

template <class T, int CHUNKS>
__device__ __forceinline__ void forward(const T* q, const T* k, const T* v, T* out, float* lse,
                                        int heads, int dim, int queries, int keys, float scale,
                                        int causal) {
    constexpr int Q_STRIDE = CHUNKS * CHUNK + 4;
    DYNAMIC_SHARED(float, shared);
    float *q_rows = shared, *k_rows = q_rows + SIDE * Q_STRIDE;
    float *v_rows = k_rows + SIDE * CHUNK_STRIDE, *p = v_rows + SIDE * CHUNK_STRIDE;
    float* factors = p + SIDE * SIDE_STRIDE;
    Rows<T> of_q = head_of(q, queries, heads, dim);
    Rows<T> of_k = head_of(k, keys, heads, dim), of_v = head_of(v, keys, heads, dim);
    int first_row = blockIdx.x * SIDE;
    Place place = score_place();
    // Statistics of a row are those of 8 threads.
    int row = threadIdx.x / 8, eighth = threadIdx.x % 8;
    float most = -INFINITY_F, total = 0.f, sums[8][CHUNKS];
    clear(sums);
    int chunks = chunks_of(dim);
    for (int chunk = 0; chunk < chunks; chunk++)
        load(q_rows + chunk * CHUNK, Q_STRIDE, of_q, first_row, chunk, dim);
    int seen = causal ? min(keys, first_row + SIDE) : keys;
    for (int first = 0; first < seen; first += SIDE) {
        float s[2][2] = {};
#pragma unroll 1
        for (int chunk = 0; chunk < chunks; chunk++) {
            __syncthreads();
            load(k_rows, CHUNK_STRIDE, of_k, first, chunk, dim);
            __syncthreads();
            add_scores(s, q_rows + chunk * CHUNK, Q_STRIDE, k_rows, place, width_of(chunk, dim));
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int r = place.row + i / 2 * 16, c = place.column + i % 2 * 16, key = first + c;
            bool hidden = key >= keys || (causal && key > first_row + r);
            p[c * SIDE_STRIDE + r] = hidden ? -INFINITY_F : s[i / 2][i % 2] * scale;
        }
        load(v_rows, CHUNK_STRIDE, of_v, first, 0, dim);
        __syncthreads();
        float x[SIDE / 8], high = most, sum = 0.f;
#pragma unroll
        for (int i = 0; i < SIDE / 8; i++) {
            x[i] = p[(eighth + 8 * i) * SIDE_STRIDE + row];
            high = fmaxf(high, x[i]);
        }
        // Finite: every query sees key 0.
        high = eighth_max(high);
        float shrink = expf(most - high);
        most = high;
#pragma unroll
        for (int i = 0; i < SIDE / 8; i++) {
            x[i] = expf(x[i] - high);
            sum += x[i];
            p[(eighth + 8 * i) * SIDE_STRIDE + row] = x[i];
        }
        total = total * shrink + sum;
        if (eighth == 0) factors[row] = shrink;
        __syncthreads();
#pragma unroll
        for (int r = 0; r < 8; r++) {
            float factor = factors[threadIdx.x / CHUNK * 8 + r];
#pragma unroll
            for (int chunk = 0; chunk < CHUNKS; chunk++) sums[r][chunk] *= factor;
        }
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; chunk++) {
            if (chunk >= chunks) break;
            if (chunk > 0) {
                __syncthreads();
                load(v_rows, CHUNK_STRIDE, of_v, first, chunk, dim);
                __syncthreads();
            }
            add_chunk(sums, chunk, p, v_rows);
        }
    }
    total = eighth_sum(total);
    __syncthreads();
    if (eighth == 0) {
        factors[row] = 1.f / total;
        if (first_row + row < queries)
            lse[statistics_at(queries, heads) + first_row + row] = most + logf(total);
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < 8; r++) {
        float factor = factors[threadIdx.x / CHUNK * 8 + r];
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; chunk++) sums[r][chunk] *= factor;
    }
    T* head = out + (of_q.at - q);
    store(head, first_row, queries, of_q.stride, dim, sums, 1.f);
}

// Scores of queries and keys and, in the same places, products of dO and V; `x` are the block's
// rows. The last chunk of all four stays in shared memory.
template <class T>
__device__ __forceinline__ void pair_scores(float (&s)[2][2], float (&dp)[2][2],
                                            const Rows<T> (&x)[2], const Rows<T> (&y)[2],
                                            int first_row, int first, int dim, float* shared) {
    constexpr int SIZE = SIDE * CHUNK_STRIDE;
    Place place = score_place();
#pragma unroll
    for (int i = 0; i < 4; i++) s[i / 2][i % 2] = dp[i / 2][i % 2] = 0.f;
#pragma unroll 1
    for (int chunk = 0; chunk < chunks_of(dim); chunk++) {
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 2; i++) {
            load(shared + i * SIZE, CHUNK_STRIDE, x[i], first_row, chunk, dim);
            load(shared + (2 + i) * SIZE, CHUNK_STRIDE, y[i], first, chunk, dim);
        }
        __syncthreads();
        int width = width_of(chunk, dim);
        add_scores(s, shared, CHUNK_STRIDE, shared + 2 * SIZE, place, width);
        add_scores(dp, shared + SIZE, CHUNK_STRIDE, shared + 3 * SIZE, place, width);
    }
}

template <class T, int CHUNKS>
__device__ __forceinline__ void queries_backward(const T* q, const T* k, const T* v, const T* dy,
                                                 const float* lse, const float* delta, T* dq,
                                                 int heads, int dim, int queries, int keys,
                                                 float scale, int causal) {
    constexpr int SIZE = SIDE * CHUNK_STRIDE;
    DYNAMIC_SHARED(float, shared);
    float *k_rows = shared + 2 * SIZE, *ds = shared + 4 * SIZE;
    Rows<T> x[2] = {head_of(q, queries, heads, dim), head_of(dy, queries, heads, dim)};
    Rows<T> y[2] = {head_of(k, keys, heads, dim), head_of(v, keys, heads, dim)};
    lse += statistics_at(queries, heads), delta += statistics_at(queries, heads);
    int first_row = blockIdx.x * SIDE;
    int chunks = chunks_of(dim);
    Place place = score_place();
    float sums[8][CHUNKS], row_lse[2], row_delta[2];
    clear(sums);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int row = first_row + place.row + i * 16;
        // No probability in rows that are not there.
        row_lse[i] = row < queries ? lse[row] : INFINITY_F;
        row_delta[i] = row < queries ? delta[row] : 0.f;
    }
    int seen = causal ? min(keys, first_row + SIDE) : keys;
    for (int first = 0; first < seen; first += SIDE) {
        float s[2][2], dp[2][2];
        pair_scores(s, dp, x, y, first_row, first, dim, shared);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int r = place.row + i / 2 * 16, c = place.column + i % 2 * 16, key = first + c;
            bool hidden = key >= keys || (causal && key > first_row + r);
            float prob = hidden ? 0.f : expf(s[i / 2][i % 2] * scale - row_lse[i / 2]);
            ds[c * SIDE_STRIDE + r] = prob * (dp[i / 2][i % 2] - row_delta[i / 2]);
        }
        __syncthreads();
#pragma unroll
        for (int chunk = CHUNKS - 1; chunk >= 0; chunk--) {
            if (chunk >= chunks) continue;
            if (chunk < chunks - 1) {
                __syncthreads();
                load(k_rows, CHUNK_STRIDE, y[0], first, chunk, dim);
                __syncthreads();
            }
            add_chunk(sums, chunk, ds, k_rows);
        }
    }
    store(dq + (x[0].at - q), first_row, queries, x[0].stride, dim, sums, scale);
}

// With more than one of `splits` parts of the queries into `partial`, f32
// `[splits,2,B,keys,heads·dim]`.
template <class T, int CHUNKS>
__device__ __forceinline__ void keys_backward(const T* q, const T* k, const T* v, const T* dy,
                                              const float* lse, const float* delta, T* dk, T* dv,
                                              float* partial, int heads, int dim, int queries,
                                              int keys, float scale, int causal, int splits) {
    constexpr int SIZE = SIDE * CHUNK_STRIDE;
    DYNAMIC_SHARED(float, shared);
    float *q_rows = shared + 2 * SIZE, *dy_rows = shared + 3 * SIZE;
    float *p = shared + 4 * SIZE, *ds = p + SIDE * SIDE_STRIDE;
    Rows<T> x[2] = {head_of(k, keys, heads, dim), head_of(v, keys, heads, dim)};
    Rows<T> y[2] = {head_of(q, queries, heads, dim), head_of(dy, queries, heads, dim)};
    lse += statistics_at(queries, heads), delta += statistics_at(queries, heads);
    int part = blockIdx.x % splits, first_row = blockIdx.x / splits * SIDE;
    int tiles = (queries + SIDE - 1) / SIDE, share = (tiles + splits - 1) / splits;
    int tile = part * share, end = min(tiles, tile + share);
    if (causal) tile = max(tile, first_row / SIDE);
    int chunks = chunks_of(dim);
    Place place = score_place();
    float dk_sums[8][CHUNKS], dv_sums[8][CHUNKS];
    clear(dk_sums);
    clear(dv_sums);
    for (; tile < end; tile++) {
        int first = tile * SIDE;
        float s[2][2], dp[2][2];
        pair_scores(s, dp, x, y, first_row, first, dim, shared);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int r = place.row + i / 2 * 16, c = place.column + i % 2 * 16, query = first + c;
            bool hidden = query >= queries || (causal && first_row + r > query);
            float prob = hidden ? 0.f : expf(s[i / 2][i % 2] * scale - lse[query]);
            p[c * SIDE_STRIDE + r] = prob;
            ds[c * SIDE_STRIDE + r] = hidden ? 0.f : prob * (dp[i / 2][i % 2] - delta[query]);
        }
        __syncthreads();
#pragma unroll
        for (int chunk = CHUNKS - 1; chunk >= 0; chunk--) {
            if (chunk >= chunks) continue;
            if (chunk < chunks - 1) {
                __syncthreads();
                load(q_rows, CHUNK_STRIDE, y[0], first, chunk, dim);
                load(dy_rows, CHUNK_STRIDE, y[1], first, chunk, dim);
                __syncthreads();
            }
            add_chunk(dk_sums, chunk, ds, q_rows);
            add_chunk(dv_sums, chunk, p, dy_rows);
        }
    }
    i64 at = x[0].at - k, all_keys = static_cast<i64>(gridDim.z) * keys * x[0].stride;
    if (splits > 1) {
        float* to = partial + 2 * part * all_keys + at;
        store(to, first_row, keys, x[0].stride, dim, dk_sums, scale);
        store(to + all_keys, first_row, keys, x[0].stride, dim, dv_sums, 1.f);
    } else {
        store(dk + at, first_row, keys, x[0].stride, dim, dk_sums, scale);
        store(dv + at, first_row, keys, x[0].stride, dim, dv_sums, 1.f);
    }
}

// rowsum(dO·O), f32 `[B,heads,queries]`: a warp for each.
template <class T>
__device__ __forceinline__ void dots(const T* out, const T* dy, float* delta, int heads, int dim,
                                     int queries) {
    int row = blockIdx.x * (THREADS / 32) + (threadIdx.x >> 5), lane = threadIdx.x & 31;
    Rows<T> x = head_of(out, queries, heads, dim), y = head_of(dy, queries, heads, dim);
    float sum = 0.f;
    if (row < queries) {
        i64 at = static_cast<i64>(row) * x.stride;
        for (int i = lane; i < dim; i += 32) sum += to_f32(x.at[at + i]) * to_f32(y.at[at + i]);
    }
    sum = warp_sum(sum);
    if (lane == 0 && row < queries) delta[statistics_at(queries, heads) + row] = sum;
}

// The parts of dK and dV that `splits` blocks made, summed in order; `count` elements of each.
template <class T>
__device__ __forceinline__ void join(const float* partial, T* dk, T* dv, i64 count, int splits) {
    i64 step = static_cast<i64>(gridDim.x) * THREADS;
    for (i64 i = static_cast<i64>(blockIdx.x) * THREADS + threadIdx.x; i < 2 * count; i += step) {
        float sum = 0.f;
#pragma unroll 4
        for (int part = 0; part < splits; part++) sum += partial[part * 2 * count + i];
        if (i < count) dk[i] = from_f32<T>(sum);
        else dv[i - count] = from_f32<T>(sum);
    }
}

}  // namespace

#define KERNEL(name) extern "C" __global__ void __launch_bounds__(THREADS) name

#define CHUNKS(T, N)                                                                              \
    KERNEL(attention_plain_forward_##N##_##T)                                                     \
    (const T* q, const T* k, const T* v, T* out, float* lse, int heads, int dim, int queries,     \
     int keys, float scale, int causal) {                                                         \
        forward<T, N>(q, k, v, out, lse, heads, dim, queries, keys, scale, causal);               \
    }                                                                                             \
    REGISTER(attention_plain_forward_##N##_##T)                                                   \
    KERNEL(attention_plain_queries_##N##_##T)                                                     \
    (const T* q, const T* k, const T* v, const T* dy, const float* lse, const float* delta,       \
     T* dq, int heads, int dim, int queries, int keys, float scale, int causal) {                 \
        queries_backward<T, N>(q, k, v, dy, lse, delta, dq, heads, dim, queries, keys, scale,     \
                               causal);                                                           \
    }                                                                                             \
    REGISTER(attention_plain_queries_##N##_##T)                                                   \
    KERNEL(attention_plain_keys_##N##_##T)                                                        \
    (const T* q, const T* k, const T* v, const T* dy, const float* lse, const float* delta,       \
     T* dk, T* dv, float* partial, int heads, int dim, int queries, int keys, float scale,        \
     int causal, int splits) {                                                                    \
        keys_backward<T, N>(q, k, v, dy, lse, delta, dk, dv, partial, heads, dim, queries, keys,  \
                            scale, causal, splits);                                               \
    }                                                                                             \
    REGISTER(attention_plain_keys_##N##_##T)

#define EACH(T)                                                                                   \
    CHUNKS(T, 1)                                                                                  \
    CHUNKS(T, 3)                                                                                  \
    CHUNKS(T, 8)                                                                                  \
    KERNEL(attention_delta_##T)                                                                   \
    (const T* out, const T* dy, float* delta, int heads, int dim, int queries) {                  \
        dots(out, dy, delta, heads, dim, queries);                                                \
    }                                                                                             \
    REGISTER(attention_delta_##T)                                                                 \
    KERNEL(attention_join_##T)                                                                    \
    (const float* partial, T* dk, T* dv, i64 count, int splits) {                                 \
        join(partial, dk, dv, count, splits);                                                     \
    }                                                                                             \
    REGISTER(attention_join_##T)

typedef float f32;
EACH(f32)
EACH(bf16)
EACH(f16)
