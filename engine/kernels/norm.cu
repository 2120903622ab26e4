// Group and layer normalisation over the last axis, forward and the gradient of the input.
//
// A group norm takes two kernels each way: blocks sum up parts of an image, and the kernel that
// writes the result joins the sums of all parts again, in one order (Chan et al., 1983). Means are
// taken around a value of the data, so that no precision is lost to a large mean. A fused SiLU is
// computed again in the backward pass instead of saved.
#include "prelude.cuh"

#define THREADS 256
#define WARPS (THREADS / 32)

template <class T, int N>
__device__ __forceinline__ void widen(float (&out)[N], const Pack<T, N>& pack) {
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = to_f32(pack.v[i]);
}

template <class T, int N>
__device__ __forceinline__ Pack<T, N> narrow(const float (&values)[N]) {
    Pack<T, N> pack;
#pragma unroll
    for (int i = 0; i < N; ++i) pack.v[i] = from_f32<T>(values[i]);
    return pack;
}

// N floats, by 16 bytes at most.
template <int N>
__device__ __forceinline__ void load_floats(float (&out)[N], const float* from) {
    constexpr int at_once = N < 4 ? N : 4;
#pragma unroll
    for (int start = 0; start < N; start += at_once) {
        Pack<float, at_once> pack = *reinterpret_cast<const Pack<float, at_once>*>(from + start);
#pragma unroll
        for (int i = 0; i < at_once; ++i) out[start + i] = pack.v[i];
    }
}

// 1/(1 + exp(-z)); with the card's short forms where the result is rounded to 16 bits anyway.
template <class T>
__device__ __forceinline__ float sigmoid(float z) {
    return __fdividef(1.f, 1.f + __expf(-z));
}
template <>
__device__ __forceinline__ float sigmoid<float>(float z) {
    return 1.f / (1.f + expf(-z));
}

template <class T>
__device__ __forceinline__ float silu_slope(float z) {
    float s = sigmoid<T>(z);
    return s * (1.f + z * (1.f - s));
}

// ---- group norm

// How images `[area, channels]` are cut: a block takes `chunk` consecutive pixels of an image
// (blockIdx.x: image and chunk) of the channels of `tile` whole groups (blockIdx.y).
struct Split {
    int area, channels, per_group, tile, chunks, chunk;
};

// What one thread of a block does: pixels `row`, `row + rows`..., in each the packs of N channels
// `lane`, `lane + lanes`... of the tile.
template <int N>
struct Place {
    int image, part, pixels, width, packs, lanes, rows, lane, row;
    i64 start;  // Of the first pixel's first channel.
    __device__ __forceinline__ explicit Place(const Split& s) {
        image = static_cast<int>(blockIdx.x) / s.chunks;
        part = static_cast<int>(blockIdx.x) % s.chunks;
        int first = part * s.chunk;
        pixels = min(s.chunk, s.area - first);
        width = s.tile * s.per_group;
        packs = width / N;
        lanes = min(packs, THREADS);
        rows = THREADS / lanes;
        lane = static_cast<int>(threadIdx.x) % lanes;
        row = static_cast<int>(threadIdx.x) / lanes;
        start = (static_cast<i64>(image) * s.area + first) * s.channels +
                static_cast<i64>(blockIdx.y) * width;
    }
    // Threads left over after the last whole row have nothing to do.
    __device__ __forceinline__ bool works() const { return row < rows && row < pixels; }
    // Rows that have a pixel.
    __device__ __forceinline__ int live() const { return min(rows, pixels); }
    // Pixels of a row.
    __device__ __forceinline__ int count(int of_row) const {
        return (pixels - of_row + rows - 1) / rows;
    }
};

// Where the two sums of a part and group lie: `[image, group, part, 2]`.
__device__ __forceinline__ i64 sums_at(const Split& s, int image, int group, int part) {
    int groups = s.channels / s.per_group;
    return ((static_cast<i64>(image) * groups + group) * s.chunks + part) * 2;
}

// Mean and sum of squares around it of each group of this block's part.
template <class T, int N>
__device__ __forceinline__ void group_stats(const T* x, float* sums, const Split& s) {
    DYNAMIC_SHARED(float, means);
    Place<N> at(s);
    float* squares = means + at.rows * at.width;
    if (at.works()) {
        for (int pack = at.lane; pack < at.packs; pack += at.lanes) {
            const T* from = x + at.start + pack * N;
            float shift[N], sum[N], square[N];
            widen(shift, *reinterpret_cast<const Pack<T, N>*>(
                             from + static_cast<i64>(at.row) * s.channels));
#pragma unroll
            for (int i = 0; i < N; ++i) sum[i] = square[i] = 0.f;
#pragma unroll 4
            for (int pixel = at.row + at.rows; pixel < at.pixels; pixel += at.rows) {
                float v[N];
                widen(v, *reinterpret_cast<const Pack<T, N>*>(
                             from + static_cast<i64>(pixel) * s.channels));
#pragma unroll
                for (int i = 0; i < N; ++i) {
                    float d = v[i] - shift[i];
                    sum[i] += d;
                    square[i] += d * d;
                }
            }
            float inverse = 1.f / static_cast<float>(at.count(at.row));
            int to = at.row * at.width + pack * N;
#pragma unroll
            for (int i = 0; i < N; ++i) {
                float rest = sum[i] * inverse;
                means[to + i] = shift[i] + rest;
                squares[to + i] = fmaxf(square[i] - sum[i] * rest, 0.f);
            }
        }
    }
    __syncthreads();
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    int entries = at.live() * s.per_group;
    for (int group = warp; group < s.tile; group += WARPS) {
        int first = group * s.per_group;
        float reference = means[first], sum = 0.f, square = 0.f;
        for (int entry = lane; entry < entries; entry += 32) {
            int row = entry / s.per_group, place = first + entry % s.per_group;
            float count = static_cast<float>(at.count(row));
            sum += count * (means[row * at.width + place] - reference);
        }
        float all = static_cast<float>(at.pixels) * static_cast<float>(s.per_group);
        float mean = reference + warp_sum(sum) / all;
        for (int entry = lane; entry < entries; entry += 32) {
            int row = entry / s.per_group, place = first + entry % s.per_group;
            float d = means[row * at.width + place] - mean;
            square += squares[row * at.width + place] + static_cast<float>(at.count(row)) * d * d;
        }
        square = warp_sum(square);
        if (lane == 0) {
            i64 to = sums_at(s, at.image, static_cast<int>(blockIdx.y) * s.tile + group, at.part);
            sums[to] = mean;
            sums[to + 1] = square;
        }
    }
}

// Mean and 1/deviation of each group of the tile, from the sums of all parts, to `shared`; the first
// part's block writes them to `stats`.
__device__ __forceinline__ void join_stats(const float* sums, float* stats, float* shared,
                                           const Split& s, int image, int part, float eps) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    float area = static_cast<float>(s.area), width = static_cast<float>(s.per_group);
    for (int group = warp; group < s.tile; group += WARPS) {
        int number = static_cast<int>(blockIdx.y) * s.tile + group;
        const float* from = sums + sums_at(s, image, number, 0);
        float reference = from[0], sum = 0.f, square = 0.f;
        for (int chunk = lane; chunk < s.chunks; chunk += 32) {
            float count = static_cast<float>(min(s.chunk, s.area - chunk * s.chunk));
            sum += count * (from[chunk * 2] - reference);
        }
        float mean = reference + warp_sum(sum) / area;
        for (int chunk = lane; chunk < s.chunks; chunk += 32) {
            float count = static_cast<float>(min(s.chunk, s.area - chunk * s.chunk));
            float d = from[chunk * 2] - mean;
            square += from[chunk * 2 + 1] + count * width * d * d;
        }
        float variance = warp_sum(square) / area / width;
        float inverse = 1.f / sqrtf(variance + eps);
        if (lane == 0) {
            shared[group * 2] = mean;
            shared[group * 2 + 1] = inverse;
            if (part == 0) {
                i64 to = (static_cast<i64>(image) * (s.channels / s.per_group) + number) * 2;
                stats[to] = mean;
                stats[to + 1] = inverse;
            }
        }
    }
    __syncthreads();
}

// `z = (x - mean)·factor + shift` of the N channels of a pack.
template <int N>
struct Line {
    float mean[N], factor[N], shift[N];
    // `stats` are those of the tile's groups, `first` is the pack's first channel in the tile.
    __device__ __forceinline__ Line(const float* stats, const float* gamma, const float* beta,
                                    const Split& s, int first) {
        i64 channel = static_cast<i64>(blockIdx.y) * s.tile * s.per_group + first;
        load_floats(factor, gamma + channel);
        load_floats(shift, beta + channel);
        int group = first / s.per_group, end = (group + 1) * s.per_group;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            if (first + i == end) {
                ++group;
                end += s.per_group;
            }
            mean[i] = stats[group * 2];
            factor[i] *= stats[group * 2 + 1];
        }
    }
};

template <class T, int N>
__device__ __forceinline__ void group_apply(T* __restrict__ out, const T* __restrict__ x,
                                            const float* sums, float* stats, const float* gamma,
                                            const float* beta, const Split& s, float eps,
                                            int silu) {
    DYNAMIC_SHARED(float, shared);
    Place<N> at(s);
    join_stats(sums, stats, shared, s, at.image, at.part, eps);
    if (!at.works()) return;
    for (int pack = at.lane; pack < at.packs; pack += at.lanes) {
        Line<N> line(shared, gamma, beta, s, pack * N);
        const T* from = x + at.start + pack * N;
        T* to = out + at.start + pack * N;
#pragma unroll 4
        for (int pixel = at.row; pixel < at.pixels; pixel += at.rows) {
            i64 offset = static_cast<i64>(pixel) * s.channels;
            float v[N];
            widen(v, *reinterpret_cast<const Pack<T, N>*>(from + offset));
#pragma unroll
            for (int i = 0; i < N; ++i) {
                float z = (v[i] - line.mean[i]) * line.factor[i] + line.shift[i];
                v[i] = silu ? z * sigmoid<T>(z) : z;
            }
            *reinterpret_cast<Pack<T, N>*>(to + offset) = narrow<T>(v);
        }
    }
}

// Copies `[groups, 2]` of this block's tile from `stats`.
__device__ __forceinline__ void tile_stats(const float* stats, float* shared, const Split& s,
                                           int image) {
    i64 first = static_cast<i64>(image) * (s.channels / s.per_group) +
                static_cast<i64>(blockIdx.y) * s.tile;
    for (int i = threadIdx.x; i < s.tile * 2; i += THREADS) shared[i] = stats[first * 2 + i];
    __syncthreads();
}

// Sums of `dz·gamma` and `dz·gamma·(x - mean)` of each group of this block's part, where `dz` is the
// gradient before SiLU.
template <class T, int N>
__device__ __forceinline__ void group_slopes(const T* dy, const T* x, const float* stats,
                                             const float* gamma, const float* beta, float* sums,
                                             const Split& s, int silu) {
    DYNAMIC_SHARED(float, shared);
    Place<N> at(s);
    float* plains = shared + s.tile * 2;
    float* moments = plains + at.rows * at.width;
    tile_stats(stats, shared, s, at.image);
    if (at.works()) {
        for (int pack = at.lane; pack < at.packs; pack += at.lanes) {
            Line<N> line(shared, gamma, beta, s, pack * N);
            float plain[N], moment[N], weight[N];
#pragma unroll
            for (int i = 0; i < N; ++i) plain[i] = moment[i] = 0.f;
#pragma unroll 2
            for (int pixel = at.row; pixel < at.pixels; pixel += at.rows) {
                i64 offset = at.start + static_cast<i64>(pixel) * s.channels + pack * N;
                float d[N], slope[N];
                widen(d, *reinterpret_cast<const Pack<T, N>*>(x + offset));
                widen(slope, *reinterpret_cast<const Pack<T, N>*>(dy + offset));
#pragma unroll
                for (int i = 0; i < N; ++i) {
                    d[i] -= line.mean[i];
                    if (silu) slope[i] *= silu_slope<T>(d[i] * line.factor[i] + line.shift[i]);
                    plain[i] += slope[i];
                    moment[i] += slope[i] * d[i];
                }
            }
            load_floats(weight, gamma + static_cast<i64>(blockIdx.y) * at.width + pack * N);
            int to = at.row * at.width + pack * N;
#pragma unroll
            for (int i = 0; i < N; ++i) {
                plains[to + i] = plain[i] * weight[i];
                moments[to + i] = moment[i] * weight[i];
            }
        }
    }
    __syncthreads();
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    int entries = at.live() * s.per_group;
    for (int group = warp; group < s.tile; group += WARPS) {
        float plain = 0.f, moment = 0.f;
        for (int entry = lane; entry < entries; entry += 32) {
            int place = entry / s.per_group * at.width + group * s.per_group + entry % s.per_group;
            plain += plains[place];
            moment += moments[place];
        }
        plain = warp_sum(plain);
        moment = warp_sum(moment);
        if (lane == 0) {
            i64 to = sums_at(s, at.image, static_cast<int>(blockIdx.y) * s.tile + group, at.part);
            sums[to] = plain;
            sums[to + 1] = moment;
        }
    }
}

// `dx = dz·factor - offset - (x - mean)·slope`, where offset and slope come from the sums of all
// parts. `out` may be `dy`: each element is read before it is written, by one thread.
template <class T, int N>
__device__ __forceinline__ void group_backward(T* out, const T* dy, const T* x, const float* stats,
                                               const float* gamma, const float* beta,
                                               const float* sums, const Split& s, int silu) {
    DYNAMIC_SHARED(float, shared);
    Place<N> at(s);
    float* lines = shared + s.tile * 2;
    tile_stats(stats, shared, s, at.image);
    int lane32 = threadIdx.x & 31, warp = threadIdx.x >> 5;
    for (int group = warp; group < s.tile; group += WARPS) {
        const float* from =
            sums + sums_at(s, at.image, static_cast<int>(blockIdx.y) * s.tile + group, 0);
        float plain = 0.f, moment = 0.f;
        for (int chunk = lane32; chunk < s.chunks; chunk += 32) {
            plain += from[chunk * 2];
            moment += from[chunk * 2 + 1];
        }
        float inverse = shared[group * 2 + 1];
        float scale = inverse / (static_cast<float>(s.area) * static_cast<float>(s.per_group));
        plain = warp_sum(plain) * scale;
        moment = warp_sum(moment) * scale * inverse * inverse;
        if (lane32 == 0) {
            lines[group * 2] = plain;
            lines[group * 2 + 1] = moment;
        }
    }
    __syncthreads();
    if (!at.works()) return;
    for (int pack = at.lane; pack < at.packs; pack += at.lanes) {
        Line<N> line(shared, gamma, beta, s, pack * N);
        float offset[N], slope[N];
        int group = pack * N / s.per_group, end = (group + 1) * s.per_group;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            if (pack * N + i == end) {
                ++group;
                end += s.per_group;
            }
            offset[i] = lines[group * 2];
            slope[i] = lines[group * 2 + 1];
        }
        const i64 first = at.start + pack * N;
        for (int pixel = at.row; pixel < at.pixels; pixel += 2 * at.rows) {
            // Two pixels at once: what is written might be what the next reads, for the compiler.
            Pack<T, N> slopes[2], inputs[2];
#pragma unroll
            for (int u = 0; u < 2; ++u) {
                int of = pixel + u * at.rows;
                if (of < at.pixels) {
                    i64 place = first + static_cast<i64>(of) * s.channels;
                    slopes[u] = *reinterpret_cast<const Pack<T, N>*>(dy + place);
                    inputs[u] = *reinterpret_cast<const Pack<T, N>*>(x + place);
                }
            }
#pragma unroll
            for (int u = 0; u < 2; ++u) {
                int of = pixel + u * at.rows;
                if (of >= at.pixels) continue;
                float d[N], dz[N];
                widen(d, inputs[u]);
                widen(dz, slopes[u]);
#pragma unroll
                for (int i = 0; i < N; ++i) {
                    d[i] -= line.mean[i];
                    if (silu) dz[i] *= silu_slope<T>(d[i] * line.factor[i] + line.shift[i]);
                    dz[i] = dz[i] * line.factor[i] - offset[i] - d[i] * slope[i];
                }
                i64 place = first + static_cast<i64>(of) * s.channels;
                *reinterpret_cast<Pack<T, N>*>(out + place) = narrow<T>(dz);
            }
        }
    }
}

// ---- layer norm: a warp for each row

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

// ---- `vector`: all addresses and channels allow accesses of 16 bytes

#define NORM(T, suffix)                                                                         \
    extern "C" __global__ void __launch_bounds__(THREADS, 3) group_norm_stats_##suffix(            \
        const T* x, float* sums, int area, int channels, int per_group, int tile, int chunks,   \
        int chunk, int vector) {                                                                \
        Split s = {area, channels, per_group, tile, chunks, chunk};                             \
        if (vector) group_stats<T, 16 / sizeof(T)>(x, sums, s);                                 \
        else group_stats<T, 1>(x, sums, s);                                                     \
    }                                                                                           \
    REGISTER(group_norm_stats_##suffix)                                                         \
    extern "C" __global__ void __launch_bounds__(THREADS, 3) group_norm_apply_##suffix(            \
        T* out, const T* x, const float* sums, float* stats, const float* gamma,                \
        const float* beta, int area, int channels, int per_group, int tile, int chunks,         \
        int chunk, int vector, float eps, int silu) {                                           \
        Split s = {area, channels, per_group, tile, chunks, chunk};                             \
        if (vector)                                                                             \
            group_apply<T, 16 / sizeof(T)>(out, x, sums, stats, gamma, beta, s, eps, silu);     \
        else group_apply<T, 1>(out, x, sums, stats, gamma, beta, s, eps, silu);                 \
    }                                                                                           \
    REGISTER(group_norm_apply_##suffix)                                                         \
    extern "C" __global__ void __launch_bounds__(THREADS, 3) group_norm_slopes_##suffix(           \
        const T* dy, const T* x, const float* stats, const float* gamma, const float* beta,     \
        float* sums, int area, int channels, int per_group, int tile, int chunks, int chunk,    \
        int vector, int silu) {                                                                 \
        Split s = {area, channels, per_group, tile, chunks, chunk};                             \
        if (vector)                                                                             \
            group_slopes<T, 16 / sizeof(T)>(dy, x, stats, gamma, beta, sums, s, silu);          \
        else group_slopes<T, 1>(dy, x, stats, gamma, beta, sums, s, silu);                      \
    }                                                                                           \
    REGISTER(group_norm_slopes_##suffix)                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS, 3) group_norm_backward_##suffix(         \
        T* out, const T* dy, const T* x, const float* stats, const float* gamma,                \
        const float* beta, const float* sums, int area, int channels, int per_group, int tile,  \
        int chunks, int chunk, int vector, int silu) {                                          \
        Split s = {area, channels, per_group, tile, chunks, chunk};                             \
        if (vector)                                                                             \
            group_backward<T, 16 / sizeof(T)>(out, dy, x, stats, gamma, beta, sums, s, silu);   \
        else group_backward<T, 1>(out, dy, x, stats, gamma, beta, sums, s, silu);               \
    }                                                                                           \
    REGISTER(group_norm_backward_##suffix)                                                      \
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
    extern "C" __global__ void __launch_bounds__(THREADS, 2) layer_norm_backward_##suffix(         \
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

NORM(float, f32)
NORM(bf16, bf16)
NORM(f16, f16)
