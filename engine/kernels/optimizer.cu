// AdamW over flat f32 buffers, with full or 8-bit moments; the gradient's norm and its clipping;
// sums into a flat gradient. Bits are those of the CPU: products are not fused with sums, and
// divisions and roots are rounded to the nearest.
#include "prelude.cuh"

#define THREADS 256
// Elements of a block with full moments.
#define CHUNK 1024
// Values of a moment in 8 bits that share a scale; a thread for each.
#define BLOCK 256

#ifdef LORARUN_HOST
static inline float mul(float a, float b) { return a * b; }
static inline float add(float a, float b) { return a + b; }
static inline float sub(float a, float b) { return a - b; }
#else
__device__ __forceinline__ float mul(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ float sub(float a, float b) { return __fsub_rn(a, b); }
#endif

typedef Pack<float, 4> Four;

// Of all tensors.
struct Rule {
    float keep1, take1, keep2, take2, eps;
};

// Of one tensor in one step.
struct Rates {
    float decay, step_size, root_correction2;
};

// PyTorch's order of operations.
__device__ __forceinline__ void move_plain(const Rule& f, const Rates& r, float& p, float g,
                                           float& m, float& v) {
    float decayed = mul(p, r.decay), distance = sub(g, m);
    // PyTorch's `lerp` picks the end it is nearer to: exact for a zero distance.
    m = f.take1 < 0.5f ? add(m, mul(f.take1, distance)) : sub(g, mul(distance, f.keep1));
    v = add(mul(v, f.keep2), mul(mul(f.take2, g), g));
    float denominator = add(sqrtf(v) / r.root_correction2, f.eps);
    p = sub(decayed, mul(r.step_size, m / denominator));
}

// That of bitsandbytes' optimizers in 8 bits.
__device__ __forceinline__ void move_blockwise(const Rule& f, const Rates& r, float& p, float g,
                                               float& m, float& v) {
    m = add(mul(m, f.keep1), mul(f.take1, g));
    v = add(mul(v, f.keep2), mul(mul(f.take2, g), g));
    float denominator = add(sqrtf(v) / r.root_correction2, f.eps);
    p = sub(mul(p, r.decay), mul(r.step_size, m) / denominator);
}

// ---- one range with one learning rate

extern "C" __global__ void __launch_bounds__(THREADS) adamw_range_f32(
    float* param, const float* gradient, float* first, float* second, long long len, float decay,
    float step_size, float root_correction2, float keep1, float take1, float keep2, float take2,
    float eps) {
    Rule rule = {keep1, take1, keep2, take2, eps};
    Rates rates = {decay, step_size, root_correction2};
    i64 i = static_cast<i64>(blockIdx.x) * THREADS + threadIdx.x;
    if (i >= len) return;
    float p = param[i], m = first[i], v = second[i];
    move_plain(rule, rates, p, gradient[i], m, v);
    param[i] = p;
    first[i] = m;
    second[i] = v;
}
REGISTER(adamw_range_f32)

// ---- all tensors of a flat buffer

// A tensor, as engine/src/cuda/flat.rs writes it: first element and number of elements, the axes
// that files have in the other order (1 and 1 if none), its place among the moments, and that of its
// scales.
struct Tensor {
    u32 start, len, inner, window, state, scales;
};

// A piece of a tensor, for one block.
struct Piece {
    u32 tensor, number;
};

__device__ __forceinline__ Rates rates_of(const float* rates, u32 tensor) {
    const float* of = rates + static_cast<i64>(tensor) * 3;
    Rates r = {of[0], of[1], of[2]};
    return r;
}

// `kind`: 0 for PyTorch's order of operations, 1 for that of the 8-bit optimizers. Nothing moves if
// `clip` is NaN, and no tensor that `touched` leaves out.
extern "C" __global__ void __launch_bounds__(THREADS) adamw_full_f32(
    float* param, const float* gradient, float* first, float* second, const float* touched,
    const float* clip, const float* rates, const Tensor* tensors, const Piece* pieces, float keep1,
    float take1, float keep2, float take2, float eps, int kind, int vector) {
    Piece piece = pieces[blockIdx.x];
    float factor = *clip;
    if (factor != factor || !(touched[piece.tensor] > 0.f)) return;
    Rule rule = {keep1, take1, keep2, take2, eps};
    Rates r = rates_of(rates, piece.tensor);
    Tensor tensor = tensors[piece.tensor];
    u32 begin = piece.number * CHUNK, end = min(tensor.len - begin, static_cast<u32>(CHUNK)) + begin;
    param += tensor.start;
    gradient += tensor.start;
    first += tensor.state;
    second += tensor.state;
    u32 at = begin + threadIdx.x * 4;
    // `state` is a multiple of 4 for every tensor.
    if (vector && tensor.start % 4 == 0 && at + 4 <= end) {
        Four p = *reinterpret_cast<Four*>(param + at), m = *reinterpret_cast<Four*>(first + at);
        Four v = *reinterpret_cast<Four*>(second + at);
        Four g = *reinterpret_cast<const Four*>(gradient + at);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float scaled = mul(g.v[i], factor);
            if (kind) move_blockwise(rule, r, p.v[i], scaled, m.v[i], v.v[i]);
            else move_plain(rule, r, p.v[i], scaled, m.v[i], v.v[i]);
        }
        *reinterpret_cast<Four*>(param + at) = p;
        *reinterpret_cast<Four*>(first + at) = m;
        *reinterpret_cast<Four*>(second + at) = v;
        return;
    }
    for (u32 i = at; i < min(at + 4, end); ++i) {
        float p = param[i], m = first[i], v = second[i], scaled = mul(gradient[i], factor);
        if (kind) move_blockwise(rule, r, p, scaled, m, v);
        else move_plain(rule, r, p, scaled, m, v);
        param[i] = p;
        first[i] = m;
        second[i] = v;
    }
}
REGISTER(adamw_full_f32)

// How many of the 255 middles are below x: the number of the nearest value.
__device__ __forceinline__ u32 nearest(const float* middles, float x) {
    u32 below = 0;
#pragma unroll
    for (u32 step = 128; step > 0; step >>= 1) {
        if (middles[below + step - 1] < x) below += step;
    }
    return below;
}

// Moments in 8 bits, in the order of files. `code`: 256 values and 255 middles (and a number that is
// not read) of the code with signs, then those of the one without.
extern "C" __global__ void __launch_bounds__(THREADS) adamw_eight_f32(
    float* param, const float* gradient, unsigned char* first, unsigned char* second,
    float* first_scales, float* second_scales, const float* code, const float* touched,
    const float* clip, const float* rates, const Tensor* tensors, const Piece* pieces, int count,
    float keep1, float take1, float keep2, float take2, float eps) {
    __shared__ float codes[4 * 256];
    __shared__ float scratch[32];
    float factor = *clip;
    if (factor != factor) return;
    for (int i = threadIdx.x; i < 4 * 256; i += THREADS) codes[i] = code[i];
    __syncthreads();
    Rule rule = {keep1, take1, keep2, take2, eps};
    for (int number = blockIdx.x; number < count; number += gridDim.x) {
        Piece piece = pieces[number];
        if (!(touched[piece.tensor] > 0.f)) continue;
        Rates r = rates_of(rates, piece.tensor);
        Tensor tensor = tensors[piece.tensor];
        u32 in_file = piece.number * BLOCK + threadIdx.x;
        bool live = in_file < tensor.len;
        u32 matrix = tensor.inner * tensor.window;
        u32 place = in_file / matrix * matrix + in_file % tensor.window * tensor.inner +
                    in_file / tensor.window % tensor.inner;
        i64 at = static_cast<i64>(tensor.start) + place;
        i64 state = static_cast<i64>(tensor.state) + in_file;
        i64 scale = static_cast<i64>(tensor.scales) + piece.number;
        float m = 0.f, v = 0.f;
        if (live) {
            m = mul(codes[first[state]], first_scales[scale]);
            v = mul(codes[512 + second[state]], second_scales[scale]);
            float p = param[at];
            move_blockwise(rule, r, p, mul(gradient[at], factor), m, v);
            param[at] = p;
        }
        float largest1 = block_max(fabsf(m), scratch);
        float largest2 = block_max(fabsf(v), scratch);
        float inverse1 = largest1 > 0.f ? 1.f / largest1 : 0.f;
        float inverse2 = largest2 > 0.f ? 1.f / largest2 : 0.f;
        if (live) {
            first[state] = static_cast<u8>(nearest(codes + 256, mul(m, inverse1)));
            second[state] = static_cast<u8>(nearest(codes + 768, mul(v, inverse2)));
        }
        // All have read the scales before the barriers of `block_max`.
        if (threadIdx.x == 0) {
            first_scales[scale] = largest1;
            second_scales[scale] = largest2;
        }
    }
}
REGISTER(adamw_eight_f32)

// ---- norm and clipping

// Sum over the threads of a block in one order, on all of them.
__device__ __forceinline__ double block_total(double x, double* scratch) {
    __syncthreads();
    scratch[threadIdx.x] = x;
    for (u32 half = THREADS / 2; half > 0; half >>= 1) {
        __syncthreads();
        if (threadIdx.x < half) scratch[threadIdx.x] += scratch[threadIdx.x + half];
    }
    __syncthreads();
    return scratch[0];
}

// A part of the sum of squares for each block, in f64: no square of a finite number is infinite.
extern "C" __global__ void __launch_bounds__(THREADS) squares_f32(
    double* sums, const float* x, long long len, int vector) {
    __shared__ double scratch[THREADS];
    i64 thread = static_cast<i64>(blockIdx.x) * THREADS + threadIdx.x;
    i64 threads = static_cast<i64>(gridDim.x) * THREADS, fours = vector ? len / 4 : 0;
    double sum = 0.;
    for (i64 i = thread; i < fours; i += threads) {
        Four four = *reinterpret_cast<const Four*>(x + i * 4);
#pragma unroll
        for (int k = 0; k < 4; ++k)
            sum += static_cast<double>(four.v[k]) * static_cast<double>(four.v[k]);
    }
    for (i64 i = fours * 4 + thread; i < len; i += threads)
        sum += static_cast<double>(x[i]) * static_cast<double>(x[i]);
    sum = block_total(sum, scratch);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}
REGISTER(squares_f32)

// One block: the factor of the gradient and the norm before clipping.
extern "C" __global__ void __launch_bounds__(THREADS) clip_factor_f32(
    float* out, const double* sums, int count, const float* inverse_scale, float max_norm) {
    __shared__ double scratch[THREADS];
    double sum = 0.;
    for (int i = threadIdx.x; i < count; i += THREADS) sum += sums[i];
    sum = block_total(sum, scratch);
    if (threadIdx.x != 0) return;
    double inverse = static_cast<double>(*inverse_scale), norm = sqrt(sum) * inverse;
    double factor = 1.;
    if (max_norm > 0.f) {
        double wanted = static_cast<double>(max_norm) / (norm + 1e-6);
        if (wanted < 1.) factor = wanted;
    }
    float rounded = static_cast<float>(norm);
    out[0] = isfinite_f(rounded) ? static_cast<float>(inverse * factor) : __int_as_float(0x7fc00000);
    out[1] = rounded;
}
REGISTER(clip_factor_f32)

// ---- a flat gradient

extern "C" __global__ void __launch_bounds__(THREADS) add_at_f32(float* flat, const float* x,
                                                                 long long len, int vector) {
    i64 at = (static_cast<i64>(blockIdx.x) * THREADS + threadIdx.x) * 4;
    if (vector && at + 4 <= len) {
        Four sum = *reinterpret_cast<Four*>(flat + at);
        Four more = *reinterpret_cast<const Four*>(x + at);
#pragma unroll
        for (int i = 0; i < 4; ++i) sum.v[i] += more.v[i];
        *reinterpret_cast<Four*>(flat + at) = sum;
        return;
    }
    for (i64 i = at; i < min(at + 4, len); ++i) flat[i] += x[i];
}
REGISTER(add_at_f32)
