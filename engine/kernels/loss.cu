// The weighted loss of each sample and its gradient: one pass that leaves a sum for each part of a
// sample, and one that adds these up, in one order.
#include "prelude.cuh"

#define THREADS 256
// Elements of a block.
#define PART 2048

// Loss and derivative of one difference; `kind` as in engine/src/cuda/loss.rs.
__device__ __forceinline__ void element(int kind, float d, float c, float& loss, float& slope) {
    if (kind == 0) {
        loss = d * d;
        slope = 2.f * d;
    } else if (kind == 1) {
        loss = fabsf(d);
        slope = (d > 0.f ? 1.f : 0.f) - (d < 0.f ? 1.f : 0.f);
    } else {
        float root = sqrtf(d * d + c * c), factor = kind == 2 ? 2.f * c : 2.f;
        loss = factor * (root - c);
        slope = factor * (d / fmaxf(root, 1.17549435e-38f));
    }
}

// Parts of one sample are neighbours (blockIdx.x: sample and part); `mask` may be null.
template <class T>
__device__ __forceinline__ void loss_part(T* gradient, float* sums, const T* prediction,
                                          const float* target, const float* mask,
                                          const float* delta, const float* gradient_weight,
                                          i64 size, int parts, int kind) {
    __shared__ float scratch[32];
    int sample = static_cast<int>(blockIdx.x) / parts, part = static_cast<int>(blockIdx.x) % parts;
    i64 start = static_cast<i64>(part) * PART;
    i64 end = min(start + PART, size), before = static_cast<i64>(sample) * size;
    float c = delta[sample], factor = gradient_weight[sample] / static_cast<float>(size);
    float sum = 0.f;
    for (i64 i = before + start + threadIdx.x; i < before + end; i += THREADS) {
        float loss, slope;
        element(kind, to_f32(prediction[i]) - target[i], c, loss, slope);
        if (mask) {
            loss *= mask[i];
            slope *= mask[i];
        }
        sum += loss;
        gradient[i] = from_f32<T>(slope * factor);
    }
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// A block for each sample.
extern "C" __global__ void __launch_bounds__(THREADS) loss_total_f32(
    float* losses, const float* sums, const float* weight, long long size, int parts) {
    __shared__ float scratch[32];
    float sum = 0.f;
    for (int part = threadIdx.x; part < parts; part += THREADS)
        sum += sums[static_cast<i64>(blockIdx.x) * parts + part];
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0)
        losses[blockIdx.x] = weight[blockIdx.x] * (sum / static_cast<float>(size));
}
REGISTER(loss_total_f32)

#define LOSS(T, suffix)                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS) loss_part_##suffix(                  \
        T* gradient, float* sums, const T* prediction, const float* target, const float* mask, \
        const float* delta, const float* gradient_weight, long long size, int parts,           \
        int kind) {                                                                            \
        loss_part<T>(gradient, sums, prediction, target, mask, delta, gradient_weight, size,   \
                     parts, kind);                                                             \
    }                                                                                          \
    REGISTER(loss_part_##suffix)

LOSS(float, f32)
LOSS(bf16, bf16)
LOSS(f16, f16)
