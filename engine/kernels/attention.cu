// Attention on tensor cores without an N x N tensor: bf16 and f16, heads of 40, 64, 80 and 160
// elements whose rows start at multiples of 16 bytes. What else there is goes through
// attention_plain.cu.
//
// FlashAttention-2 (Dao, arXiv:2307.08691): a warp holds its queries in registers and walks over
// tiles of 64 keys with a running base and sum of powers of 2; what is saved is the log-sum-exp.
//
// A right operand is 256 bytes of shared memory for each m16n8k16, as much as a multiprocessor reads
// while its tensor cores compute one or two: "wide" kernels hold two row tiles to a warp and use each
// operand twice. The others have half the rows in a block, for launches that would not fill the card
// and for heads of 160, of which 32 rows do not fit into the registers.
#include "attention_tiles.cuh"

namespace {

// Blocks that a multiprocessor is to hold, by registers: 65536 of them.
__host__ __device__ constexpr int blocks_of(int dim, int row_tiles) {
    if (row_tiles == 2) return dim == 40 ? 3 : 2;
    return dim == 40 ? 4 : dim == 160 ? 2 : 3;
}

// Keys whose scores are in registers at a time.
__host__ __device__ constexpr int keys_at_once(int row_tiles) { return row_tiles == 2 ? 32 : 64; }

// Takes keys that are not there, or that a query does not see, out of the scores.
template <int M>
__device__ __forceinline__ void hide(float (&s)[keys_at_once(M) / 16][M][2][4], int first_key,
                                     int first_row, int keys, int causal) {
    int lane = threadIdx.x & 31;
    first_key += 2 * (lane & 3), first_row += lane >> 2;
#pragma unroll
    for (int block = 0; block < keys_at_once(M) / 16; block++)
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int i = 0; i < 8; i++) {
                int key = first_key + block * 16 + (i >> 2) * 8 + (i & 1);
                int row = first_row + m * 16 + (i >> 1 & 1) * 8;
                if (key >= keys || (causal && key > row)) s[block][m][i >> 2][i & 3] = -INFINITY_F;
            }
}

// Raises the exponent `base` that probabilities are relative to where a new score exceeds it by
// more than 8: they stay below 2^8, which every type holds, and the sums are seldom rescaled.
template <int M, int CHUNKS>
__device__ __forceinline__ void raise(const float (&s)[keys_at_once(M) / 16][M][2][4],
                                      float (&sums)[M][CHUNKS][4], float (&base)[M][2],
                                      float (&total)[M][2], float scale_2) {
    float high[M][2];
    bool exceeds = false;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            high[m][half] = -INFINITY_F;
#pragma unroll
            for (int i = 0; i < keys_at_once(M) / 4; i++)
                high[m][half] = fmaxf(high[m][half], s[i / 4][m][i / 2 % 2][half * 2 + i % 2]);
            exceeds |= high[m][half] * scale_2 - base[m][half] > 8.f;
        }
    if (!__any_sync(0xffffffffu, exceeds)) return;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            // Finite: every query sees key 0, with which it begins.
            float raised = fmaxf(base[m][half], quad_max(high[m][half]) * scale_2);
            float shrink = power_of_2(base[m][half] - raised);
            base[m][half] = raised;
            total[m][half] *= shrink;
#pragma unroll
            for (int c = 0; c < CHUNKS; c++) {
                sums[m][c][half * 2] *= shrink;
                sums[m][c][half * 2 + 1] *= shrink;
            }
        }
}

template <class T, int D, int M>
__device__ __forceinline__ void forward(const T* q, const T* k, const T* v, T* out, float* lse,
                                        int heads, int queries, int keys, float scale, int causal) {
    constexpr int ROWS = WARPS * M * 16, TILE = KEYS * Head<D>::STRIDE, AT_ONCE = keys_at_once(M);
    DYNAMIC_SHARED(T, shared);
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    int first_row = blockIdx.x * ROWS + warp * M * 16;
    int stride = heads * D;
    q += head_at(queries, heads, D), k += head_at(keys, heads, D), v += head_at(keys, heads, D);

    int seen = causal ? min(keys, static_cast<int>(blockIdx.x + 1) * ROWS) : keys;
    int tiles = (seen + KEYS - 1) / KEYS;
    Copies<T, D> copies(stride);
    const T *k_from = copies.from(k, 0), *v_from = copies.from(v, 0);
    copies.template start<KEYS>(shared, k_from, keys);
    copies.template start<KEYS>(shared + TILE, v_from, keys);
    cp_async_commit();

    u32 left[M][Head<D>::STEPS][4];
    float sums[M][Head<D>::CHUNKS][4], base[M][2], total[M][2];
#pragma unroll
    for (int m = 0; m < M; m++) {
        hold<T, D>(left[m], q, stride, first_row + m * 16, queries);
        base[m][0] = base[m][1] = -INFINITY_F, total[m][0] = total[m][1] = 0.f;
#pragma unroll
        for (int c = 0; c < Head<D>::CHUNKS; c++)
#pragma unroll
            for (int i = 0; i < 4; i++) sums[m][c][i] = 0.f;
    }
    float scale_2 = scale * LOG2_E;
    for (int tile = 0; tile < tiles; tile++) {
        cp_async_wait<0>();
        // Everybody's part has arrived, and nobody reads the other buffer any more.
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
#pragma unroll 1
        for (int part = 0; part < KEYS; part += AT_ONCE) {
            const T* rows = k_tile + part * Head<D>::STRIDE;
            float s[AT_ONCE / 16][M][2][4];
#pragma unroll
            for (int block = 0; block < AT_ONCE / 16; block++)
                times_rows<T, D, M>(s[block], left, rows + block * 16 * Head<D>::STRIDE);
            int key = first + part;
            if (key + AT_ONCE > keys || (causal && key + AT_ONCE > first_row + 1))
                hide<M>(s, key, first_row, keys, causal);
            raise<M>(s, sums, base, total, scale_2);
#pragma unroll
            for (int block = 0; block < AT_ONCE / 16; block++) {
                u32 p[M][4];
#pragma unroll
                for (int m = 0; m < M; m++) {
#pragma unroll
                    for (int i = 0; i < 8; i++) {
                        float& x = s[block][m][i >> 2][i & 3];
                        int half = i >> 1 & 1;
                        x = power_of_2(x * scale_2 - base[m][half]);
                        total[m][half] += x;
                    }
                    as_left<T>(p[m], s[block][m]);
                }
                add_rows<T, D, M>(sums, p, rows + TILE + block * 16 * Head<D>::STRIDE);
            }
        }
    }
    out += head_at(queries, heads, D), lse += statistics_at(queries, heads);
#pragma unroll
    for (int m = 0; m < M; m++) {
        float upper = quad_sum(total[m][0]), lower = quad_sum(total[m][1]);
        int first = first_row + m * 16, row = first + (lane >> 2);
        store<T, D>(out, stride, first, queries, sums[m], 1.f / upper, 1.f / lower);
        if ((lane & 3) == 0) {
            if (row < queries) lse[row] = base[m][0] / LOG2_E + logf(upper);
            if (row + 8 < queries) lse[row + 8] = base[m][1] / LOG2_E + logf(lower);
        }
    }
}

}  // namespace

#define FORWARD(name, T, D, M)                                                                    \
    extern "C" __global__ void __launch_bounds__(THREADS, blocks_of(D, M))                        \
        name(const T* q, const T* k, const T* v, T* out, float* lse, int heads, int queries,      \
             int keys, float scale, int causal) {                                                 \
        forward<T, D, M>(q, k, v, out, lse, heads, queries, keys, scale, causal);                 \
    }                                                                                             \
    REGISTER(name)

#define EACH(T)                                                  \
    FORWARD(attention_forward_40_##T, T, 40, 1)                  \
    FORWARD(attention_forward_64_##T, T, 64, 1)                  \
    FORWARD(attention_forward_80_##T, T, 80, 1)                  \
    FORWARD(attention_forward_160_##T, T, 160, 1)                \
    FORWARD(attention_forward_wide_40_##T, T, 40, 2)             \
    FORWARD(attention_forward_wide_64_##T, T, 64, 2)             \
    FORWARD(attention_forward_wide_80_##T, T, 80, 2)

EACH(bf16)
EACH(f16)
