// Group normalisation of NHWC maps, forward and the gradient of the input.
//
// It takes two kernels each way: blocks sum up parts of an image, and the kernel that writes the
// result joins the sums of all parts again, in one order (Chan et al., 1983). Means are
// taken around a value of the data, so that no precision is lost to a large mean. A fused SiLU is
// computed again in the backward pass instead of saved.
#include "prelude.cuh"

#define THREADS 256

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
};

// Where the two sums of a part and group lie: `[image, group, part, 2]`.
__device__ __forceinline__ i64 sums_at(const Split& s, int image, int group, int part) {
    int groups = s.channels / s.per_group;
    return ((static_cast<i64>(image) * groups + group) * s.chunks + part) * 2;
}

// Neighbouring lanes that join the numbers of one group: so few that a block's threads take all
// groups of a tile at once, if they can.
struct Team {
    int lanes, lane, number, teams;
    __device__ __forceinline__ explicit Team(int groups) {
        lanes = 32;
        while (lanes > 4 && lanes * groups > THREADS) lanes >>= 1;
        lane = static_cast<int>(threadIdx.x) % lanes;
        number = static_cast<int>(threadIdx.x) / lanes;
        teams = THREADS / lanes;
    }
    // All lanes of the warp must call it.
    __device__ __forceinline__ float sum(float x) const {
        for (int other = lanes >> 1; other > 0; other >>= 1)
            x += __shfl_xor_sync(0xffffffffu, x, other);
        return x;
    }
};

// Means and sums of squares of several sets of numbers become those of all together; means are seen
// from one of them, since sums of squares around a far point would lose what matters.
struct Joint {
    float reference, sum, spread, square;
    __device__ __forceinline__ explicit Joint(float a_mean) : reference(a_mean) {
        sum = spread = square = 0.f;
    }
    __device__ __forceinline__ void add(float count, float mean, float squares) {
        float d = mean - reference;
        sum += count * d;
        spread += count * d * d;
        square += squares;
    }
    __device__ __forceinline__ void join(const Team& team) {
        sum = team.sum(sum);
        spread = team.sum(spread);
        square = team.sum(square);
    }
    // `all`: the sum of the counts.
    __device__ __forceinline__ float mean(float all) const { return reference + sum / all; }
    __device__ __forceinline__ float squares(float all) const {
        return square + fmaxf(spread - sum * (sum / all), 0.f);
    }
};

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
            // Pixels of this row.
            float inverse =
                1.f / static_cast<float>((at.pixels - at.row + at.rows - 1) / at.rows);
#pragma unroll
            for (int i = 0; i < N; ++i) {
                float rest = sum[i] * inverse;
                shift[i] += rest;
                square[i] = fmaxf(square[i] - sum[i] * rest, 0.f);
            }
            store_floats(means + at.row * at.width + pack * N, shift);
            store_floats(squares + at.row * at.width + pack * N, square);
        }
    }
    __syncthreads();
    // The rows of a channel, to the place of the first.
    const float pixels = static_cast<float>(at.pixels);
    const int live = at.live(), few = at.pixels / at.rows, longer = at.pixels % at.rows;
    for (int channel = threadIdx.x; channel < at.width; channel += THREADS) {
        Joint joint(means[channel]);
        for (int row = 0; row < live; ++row) {
            float count = static_cast<float>(row < longer ? few + 1 : few);
            joint.add(count, means[row * at.width + channel], squares[row * at.width + channel]);
        }
        means[channel] = joint.mean(pixels);
        squares[channel] = joint.squares(pixels);
    }
    __syncthreads();
    const Team team(s.tile);
    const float width = static_cast<float>(s.per_group);
    for (int base = 0; base < s.tile; base += team.teams) {
        int group = base + team.number;
        bool real = group < s.tile;
        int first = real ? group * s.per_group : 0;
        Joint joint(means[first]);
        for (int channel = team.lane; channel < s.per_group; channel += team.lanes)
            joint.add(pixels, means[first + channel], squares[first + channel]);
        joint.join(team);
        if (real && team.lane == 0) {
            i64 to = sums_at(s, at.image, static_cast<int>(blockIdx.y) * s.tile + group, at.part);
            sums[to] = joint.mean(pixels * width);
            sums[to + 1] = joint.squares(pixels * width);
        }
    }
}

// Mean and 1/deviation of each group of the tile, from the sums of all parts, to `shared`; the
// first part's block writes them to `stats`.
__device__ __forceinline__ void join_stats(const float* sums, float* stats, float* shared,
                                           const Split& s, int image, int part, float eps) {
    const Team team(s.tile);
    const int last = s.chunks - 1;
    const float width = static_cast<float>(s.per_group), whole = width * s.chunk;
    const float rest = width * (s.area - last * s.chunk), all = width * s.area;
    for (int base = 0; base < s.tile; base += team.teams) {
        int group = base + team.number;
        bool real = group < s.tile;
        int number = static_cast<int>(blockIdx.y) * s.tile + (real ? group : 0);
        const float* from = sums + sums_at(s, image, number, 0);
        Joint joint(from[0]);
        for (int chunk = team.lane; chunk < s.chunks; chunk += team.lanes)
            joint.add(chunk == last ? rest : whole, from[chunk * 2], from[chunk * 2 + 1]);
        joint.join(team);
        if (real && team.lane == 0) {
            float mean = joint.mean(all), inverse = 1.f / sqrtf(joint.squares(all) / all + eps);
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
    float* plains = shared + (s.tile * 2 + 3) / 4 * 4;
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
#pragma unroll
            for (int i = 0; i < N; ++i) {
                plain[i] *= weight[i];
                moment[i] *= weight[i];
            }
            store_floats(plains + at.row * at.width + pack * N, plain);
            store_floats(moments + at.row * at.width + pack * N, moment);
        }
    }
    __syncthreads();
    const int live = at.live();
    for (int channel = threadIdx.x; channel < at.width; channel += THREADS) {
        float plain = 0.f, moment = 0.f;
        for (int row = 0; row < live; ++row) {
            plain += plains[row * at.width + channel];
            moment += moments[row * at.width + channel];
        }
        plains[channel] = plain;
        moments[channel] = moment;
    }
    __syncthreads();
    const Team team(s.tile);
    for (int base = 0; base < s.tile; base += team.teams) {
        int group = base + team.number;
        bool real = group < s.tile;
        int first = real ? group * s.per_group : 0;
        float plain = 0.f, moment = 0.f;
        for (int channel = team.lane; channel < s.per_group; channel += team.lanes) {
            plain += plains[first + channel];
            moment += moments[first + channel];
        }
        plain = team.sum(plain);
        moment = team.sum(moment);
        if (real && team.lane == 0) {
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
    const Team team(s.tile);
    const float count = static_cast<float>(s.area) * static_cast<float>(s.per_group);
    for (int base = 0; base < s.tile; base += team.teams) {
        int group = base + team.number;
        bool real = group < s.tile;
        int number = static_cast<int>(blockIdx.y) * s.tile + (real ? group : 0);
        const float* from = sums + sums_at(s, at.image, number, 0);
        float plain = 0.f, moment = 0.f;
        for (int chunk = team.lane; chunk < s.chunks; chunk += team.lanes) {
            plain += from[chunk * 2];
            moment += from[chunk * 2 + 1];
        }
        plain = team.sum(plain);
        moment = team.sum(moment);
        if (real && team.lane == 0) {
            float inverse = shared[group * 2 + 1], scale = inverse / count;
            lines[group * 2] = plain * scale;
            lines[group * 2 + 1] = moment * scale * inverse * inverse;
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
    REGISTER(group_norm_backward_##suffix)

NORM(float, f32)
NORM(bf16, bf16)
NORM(f16, f16)
