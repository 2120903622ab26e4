// Convolutions as matrix products: windows of an NHWC map as rows, and back; what is added after.
#include "prelude.cuh"

struct Sizes {
    int h, w, ci, oh, ow, kh, kw, stride, before;
};

// windows[row - first][ky][kx][c] = x[b][oy*stride+ky-before][ox*stride+kx-before][c], 0 outside.
// N channels at a time.
template <class T, int N>
__device__ void windows_by(const T* x, T* out, i64 first, i64 rows, Sizes s) {
    const int groups = s.ci / N;
    const i64 per_row = (i64)s.kh * s.kw * groups;
    const i64 total = rows * per_row;
    const i64 step = (i64)gridDim.x * blockDim.x;
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < total; i += step) {
        const i64 row = i / per_row + first;
        const int rest = (int)(i % per_row);
        const int tap = rest / groups;
        const int group = rest % groups;
        const int ox = (int)(row % s.ow);
        const i64 line = row / s.ow;
        const int oy = (int)(line % s.oh);
        const i64 image = line / s.oh;
        const int y = oy * s.stride + tap / s.kw - s.before;
        const int xx = ox * s.stride + tap % s.kw - s.before;
        Pack<T, N> value;
        if (y >= 0 && y < s.h && xx >= 0 && xx < s.w) {
            const i64 pixel = (image * s.h + y) * s.w + xx;
            value = *(const Pack<T, N>*)(x + pixel * s.ci + (i64)group * N);
        } else {
            for (int j = 0; j < N; j++) value.v[j] = from_f32<T>(0.f);
        }
        *(Pack<T, N>*)(out + i * N) = value;
    }
}

template <class T>
__device__ void windows_any(const T* x, T* out, i64 first, i64 rows, Sizes s) {
    constexpr int wide = 16 / (int)sizeof(T);
    const bool aligned = ((unsigned long long)x | (unsigned long long)out) % 16 == 0;
    if (s.ci % wide == 0 && aligned) {
        windows_by<T, wide>(x, out, first, rows, s);
    } else {
        windows_by<T, 1>(x, out, first, rows, s);
    }
}

// dx[b][y][x][c] (+)= sum over the windows that saw the pixel, f32, taps in order.
template <class T>
__device__ void add_windows_any(const float* windows, T* dx, int images, int accumulate, Sizes s) {
    const i64 total = (i64)images * s.h * s.w * s.ci;
    const i64 step = (i64)gridDim.x * blockDim.x;
    const i64 width = (i64)s.kh * s.kw * s.ci;
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < total; i += step) {
        const int c = (int)(i % s.ci);
        const i64 pixel = i / s.ci;
        const int x = (int)(pixel % s.w);
        const int y = (int)((pixel / s.w) % s.h);
        const i64 image = pixel / s.w / s.h;
        float sum = accumulate ? to_f32(dx[i]) : 0.f;
        for (int ky = 0; ky < s.kh; ky++) {
            const int from_y = y + s.before - ky;
            if (from_y < 0 || from_y % s.stride != 0 || from_y / s.stride >= s.oh) continue;
            for (int kx = 0; kx < s.kw; kx++) {
                const int from_x = x + s.before - kx;
                if (from_x < 0 || from_x % s.stride != 0 || from_x / s.stride >= s.ow) continue;
                const i64 row = (image * s.oh + from_y / s.stride) * s.ow + from_x / s.stride;
                sum += windows[row * width + (i64)(ky * s.kw + kx) * s.ci + c];
            }
        }
        dx[i] = from_f32<T>(sum);
    }
}

template <class T, int N>
__device__ void add_pack(float (&sum)[N], const T* from) {
    const Pack<T, N> more = *(const Pack<T, N>*)from;
    for (int j = 0; j < N; j++) sum[j] += to_f32(more.v[j]);
}

// y += bias[c] + shift[image][c] + residual; absent ones are null.
template <class T, int N>
__device__ void finish_by(T* y, const T* bias, const T* shift, const T* residual, i64 len, int co,
                          i64 per_image) {
    const i64 step = (i64)gridDim.x * blockDim.x;
    const i64 groups = len / N;
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < groups; i += step) {
        const i64 at = i * N;
        const int c = (int)(at % co);
        float sum[N] = {};
        add_pack<T, N>(sum, y + at);
        if (bias) add_pack<T, N>(sum, bias + c);
        if (shift) add_pack<T, N>(sum, shift + at / per_image * co + c);
        if (residual) add_pack<T, N>(sum, residual + at);
        Pack<T, N> value;
        for (int j = 0; j < N; j++) value.v[j] = from_f32<T>(sum[j]);
        *(Pack<T, N>*)(y + at) = value;
    }
}

template <class T>
__device__ void finish_any(T* y, const T* bias, const T* shift, const T* residual, i64 len, int co,
                           i64 per_image) {
    constexpr int wide = 16 / (int)sizeof(T);
    const unsigned long long all = (unsigned long long)y | (unsigned long long)bias |
                                   (unsigned long long)shift | (unsigned long long)residual;
    if (co % wide == 0 && all % 16 == 0) {
        finish_by<T, wide>(y, bias, shift, residual, len, co, per_image);
    } else {
        finish_by<T, 1>(y, bias, shift, residual, len, co, per_image);
    }
}

#define CONV_KERNELS(T, suffix)                                                                    \
    extern "C" __global__ void windows_##suffix(const T* x, T* out, i64 first, i64 rows, int h,    \
                                                int w, int ci, int oh, int ow, int kh, int kw,     \
                                                int stride, int before) {                          \
        windows_any<T>(x, out, first, rows, Sizes{h, w, ci, oh, ow, kh, kw, stride, before});      \
    }                                                                                              \
    REGISTER(windows_##suffix)                                                                     \
    extern "C" __global__ void add_windows_##suffix(                                               \
        const float* windows, T* dx, int images, int accumulate, int h, int w, int ci, int oh,     \
        int ow, int kh, int kw, int stride, int before) {                                          \
        add_windows_any<T>(windows, dx, images, accumulate,                                        \
                           Sizes{h, w, ci, oh, ow, kh, kw, stride, before});                       \
    }                                                                                              \
    REGISTER(add_windows_##suffix)                                                                 \
    extern "C" __global__ void finish_##suffix(T* y, const T* bias, const T* shift,                \
                                               const T* residual, i64 len, int co,                 \
                                               i64 per_image) {                                    \
        finish_any<T>(y, bias, shift, residual, len, co, per_image);                               \
    }                                                                                              \
    REGISTER(finish_##suffix)

CONV_KERNELS(float, f32)
CONV_KERNELS(bf16, bf16)
CONV_KERNELS(f16, f16)
