// Joins, cuts, upsampling and row lookup.
//
// What only moves is moved in units of 2, 4, 8 or 16 bytes, whatever its type: the largest that
// divides all widths and addresses. Widths and counts of these kernels are in units.

#include "prelude.cuh"

namespace {

typedef Pack<u32, 2> u64x;
typedef Pack<u32, 4> u128x;

__device__ __forceinline__ i64 index()
{
    return (i64)blockIdx.x * blockDim.x + threadIdx.x;
}

// Rows of `wa` units of `a`, each followed by `wb` of `b`; `n` units in all.
template <class U>
__device__ __forceinline__ void join(U* out, const U* a, const U* b, i64 n, i64 wa, i64 wb)
{
    const i64 i = index();
    if (i >= n) return;
    const i64 row = i / (wa + wb), column = i - row * (wa + wb);
    out[i] = column < wa ? a[row * wa + column] : b[row * wb + column - wa];
}

template <class U>
__device__ __forceinline__ void cut(U* a, U* b, const U* x, i64 n, i64 wa, i64 wb)
{
    const i64 i = index();
    if (i >= n) return;
    const i64 row = i / (wa + wb), column = i - row * (wa + wb);
    if (column < wa) a[row * wa + column] = x[i];
    else b[row * wb + column - wa] = x[i];
}

// Pixels of `width` units, `line` pixels to a line of the input, to 2 x 2 of them; `n` units go in.
template <class U>
__device__ __forceinline__ void upsample(U* out, const U* x, i64 n, i64 line, i64 width)
{
    const i64 i = index();
    if (i >= n) return;
    const i64 pixel = i / width, row = pixel / line;
    // Two lines of the output for each of the input, twice as long.
    const i64 to = (2 * row * line + pixel) * width + i;
    const U unit = x[i];
    out[to] = unit;
    out[to + width] = unit;
    out[to + 2 * line * width] = unit;
    out[to + (2 * line + 1) * width] = unit;
}

// Rows of `table`, `n` units in all; an id outside reads the last row.
template <class U>
__device__ __forceinline__ void gather(U* out, const U* table, const u32* ids, i64 n, i64 width,
                                       i64 rows)
{
    const i64 i = index();
    if (i >= n) return;
    const i64 row = i / width, id = ids[row];
    out[i] = table[(id < rows ? id : rows - 1) * width + i - row * width];
}

// Sums of 2 x 2 pixels, N channels to a thread; `line` pixels to a line of `out`, `n` elements.
template <int N, class T>
__device__ __forceinline__ void sum_pixels(T* out, const T* dy, i64 n, i64 line, i64 width)
{
    const i64 i = index() * N;
    if (i >= n) return;
    const i64 pixel = i / width, row = pixel / line;
    const T* from = dy + (2 * row * line + pixel) * width + i;
    typedef Pack<T, N> Chunk;
    const Chunk top_left = *reinterpret_cast<const Chunk*>(from);
    const Chunk top_right = *reinterpret_cast<const Chunk*>(from + width);
    const Chunk left = *reinterpret_cast<const Chunk*>(from + 2 * line * width);
    const Chunk right = *reinterpret_cast<const Chunk*>(from + (2 * line + 1) * width);
    Chunk sum;
#pragma unroll
    for (int k = 0; k < N; k++) {
        const float top = to_f32(top_left.v[k]) + to_f32(top_right.v[k]);
        sum.v[k] = from_f32<T>(top + to_f32(left.v[k]) + to_f32(right.v[k]));
    }
    *reinterpret_cast<Chunk*>(out + i) = sum;
}

} // namespace

#define MOVES(bytes, U)                                                                             \
    extern "C" __global__ void concat_last_##bytes(U* out, const U* a, const U* b, long long n,     \
                                                   long long wa, long long wb)                      \
    {                                                                                               \
        join(out, a, b, n, wa, wb);                                                                 \
    }                                                                                               \
    REGISTER(concat_last_##bytes)                                                                   \
    extern "C" __global__ void split_last_##bytes(U* a, U* b, const U* x, long long n,              \
                                                  long long wa, long long wb)                       \
    {                                                                                               \
        cut(a, b, x, n, wa, wb);                                                                    \
    }                                                                                               \
    REGISTER(split_last_##bytes)                                                                    \
    extern "C" __global__ void upsample2x_##bytes(U* out, const U* x, long long n, long long line,  \
                                                  long long width)                                  \
    {                                                                                               \
        upsample(out, x, n, line, width);                                                           \
    }                                                                                               \
    REGISTER(upsample2x_##bytes)                                                                    \
    extern "C" __global__ void embedding_##bytes(U* out, const U* table, const u32* ids,            \
                                                 long long n, long long width, long long rows)      \
    {                                                                                               \
        gather(out, table, ids, n, width, rows);                                                    \
    }                                                                                               \
    REGISTER(embedding_##bytes)

MOVES(2, u16)
MOVES(4, u32)
MOVES(8, u64x)
MOVES(16, u128x)

#define SUMS(name, T)                                                                               \
    extern "C" __global__ void upsample2x_backward_##name(T* out, const T* dy, long long n,         \
                                                          long long line, long long width,          \
                                                          int packed)                               \
    {                                                                                               \
        if (packed) sum_pixels<16 / sizeof(T)>(out, dy, n, line, width);                            \
        else sum_pixels<1>(out, dy, n, line, width);                                                \
    }                                                                                               \
    REGISTER(upsample2x_backward_##name)

SUMS(f32, float)
SUMS(bf16, bf16)
SUMS(f16, f16)
