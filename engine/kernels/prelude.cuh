// What every kernel of this folder may use, the same on a card and on the host.
//
// A card: compiled by NVRTC for compute capability 8.0 and later, without any header of CUDA's.
// The host: `LORARUN_HOST` is defined and emulator/host.h supplies what a card has built in.
// Interfaces are those of a card; where PTX is used, the names of its instructions are given.
#pragma once

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef long long i64;

// Storage types; arithmetic is done in f32. f8 is OCP E4M3, without its tensor's scale.
struct bf16 { u16 x; };
struct f16 { u16 x; };
struct f8 { u8 x; };

// N elements that are loaded or stored at once; the address must be a multiple of their size.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
    T v[N];
};

#ifdef LORARUN_HOST
#include "host.h"
#else

#define REGISTER(name)
#define DYNAMIC_SHARED(T, name)                                                     \
    extern __shared__ __align__(128) unsigned char lorarun_dynamic_shared[];        \
    T* name = reinterpret_cast<T*>(lorarun_dynamic_shared)
#define INFINITY_F __int_as_float(0x7f800000)

// ---- numbers

__device__ __forceinline__ u32 bits_of_f32(float x) { return __float_as_uint(x); }
__device__ __forceinline__ float f32_of_bits(u32 x) { return __uint_as_float(x); }

__device__ __forceinline__ float to_f32(f16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.x));
    return y;
}

__device__ __forceinline__ f16 round_to_f16(float x) {
    f16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.x) : "f"(x));
    return y;
}

__device__ __forceinline__ bf16 round_to_bf16(float x) {
    bf16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.x) : "f"(x));
    return y;
}

// The instructions take the upper half first.
__device__ __forceinline__ u32 pack2_f16(float lo, float hi) {
    u32 y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
    return y;
}

__device__ __forceinline__ u32 pack2_bf16(float lo, float hi) {
    u32 y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
    return y;
}

// ---- matrices of a warp: mma.sync and ldmatrix

__device__ __forceinline__ void mma_16816(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2],
                                          bf16*) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_16816(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2],
                                          f16*) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ u32 shared_address(const void* pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void ldmatrix_x4(u32 (&r)[4], const void* shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(shared))
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(u32 (&r)[4], const void* shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(shared))
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_x2(u32 (&r)[2], const void* shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(shared))
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_x2_trans(u32 (&r)[2], const void* shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(shared))
                 : "memory");
}

// ---- copies to shared memory that run beside arithmetic: cp.async

// 16 bytes, both addresses multiples of 16; zeros, and nothing is read, if not `valid`.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid) {
    int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(shared_address(shared)), "l"(__cvta_generic_to_global(global)), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void cp_async_commit() {
    asm volatile("cp.async.commit_group;" : : : "memory");
}

// Waits until at most N of the groups committed last are under way.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" : : "n"(N) : "memory");
}

#endif

// ---- the same on both sides

__device__ __forceinline__ float to_f32(float x) { return x; }
__device__ __forceinline__ float to_f32(bf16 x) {
    return f32_of_bits(static_cast<u32>(x.x) << 16);
}
// E4M3 has the fields of a float with a smaller bias: 2^120 makes up for it, subnormals included.
__device__ __forceinline__ float to_f32(f8 x) {
    u32 magnitude = x.x & 0x7fu, sign = static_cast<u32>(x.x & 0x80u) << 24;
    float y = f32_of_bits(magnitude << 20) * f32_of_bits((127u + 120u) << 23);
    u32 bits = magnitude == 0x7fu ? 0x7fc00000u : bits_of_f32(y);
    return f32_of_bits(bits | sign);
}

// To the nearest, ties to even; beyond the largest, the largest.
__device__ __forceinline__ f8 round_to_f8(float x) {
    u32 bits = bits_of_f32(x), sign = (bits >> 24) & 0x80u, magnitude = bits & 0x7fffffffu;
    f8 y;
    if (magnitude > 0x7f800000u) {
        y.x = static_cast<u8>(sign | 0x7fu);
    } else if (magnitude >= bits_of_f32(448.f)) {
        y.x = static_cast<u8>(sign | 0x7eu);
    } else {
        // 8 steps to a binade, which no longer shrink below 2^-6; a carry goes into the exponent.
        int exponent = static_cast<int>(magnitude >> 23) - 127;
        if (exponent < -6) exponent = -6;
        float steps = f32_of_bits(magnitude) * f32_of_bits(static_cast<u32>(127 + 3 - exponent) << 23);
        // At this magnitude a float has no fraction: the sum is rounded to a whole number.
        int whole = static_cast<int>(bits_of_f32(steps + 8388608.f) & 0x7fffffu);
        y.x = static_cast<u8>(sign | static_cast<u32>((exponent + 6) * 8 + whole));
    }
    return y;
}

template <class T>
__device__ __forceinline__ T from_f32(float x);
template <>
__device__ __forceinline__ float from_f32<float>(float x) { return x; }
template <>
__device__ __forceinline__ bf16 from_f32<bf16>(float x) { return round_to_bf16(x); }
template <>
__device__ __forceinline__ f16 from_f32<f16>(float x) { return round_to_f16(x); }
template <>
__device__ __forceinline__ f8 from_f32<f8>(float x) { return round_to_f8(x); }

// Two numbers of 16 bits in one register, the first in the lower half.
template <class T>
__device__ __forceinline__ u32 pack2(float lo, float hi);
template <>
__device__ __forceinline__ u32 pack2<bf16>(float lo, float hi) { return pack2_bf16(lo, hi); }
template <>
__device__ __forceinline__ u32 pack2<f16>(float lo, float hi) { return pack2_f16(lo, hi); }

__device__ __forceinline__ bool isfinite_f(float x) {
    return (bits_of_f32(x) & 0x7f800000u) != 0x7f800000u;
}

// ---- packs in registers

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

template <int N>
__device__ __forceinline__ void store_floats(float* to, const float (&values)[N]) {
    constexpr int at_once = N < 4 ? N : 4;
#pragma unroll
    for (int start = 0; start < N; start += at_once) {
        Pack<float, at_once> pack;
#pragma unroll
        for (int i = 0; i < at_once; ++i) pack.v[i] = values[start + i];
        *reinterpret_cast<Pack<float, at_once>*>(to + start) = pack;
    }
}

// ---- threads together

// All lanes of a warp, all with the same result.
__device__ __forceinline__ float warp_sum(float x) {
    for (int lane = 16; lane > 0; lane >>= 1) x += __shfl_xor_sync(0xffffffffu, x, lane);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
    for (int lane = 16; lane > 0; lane >>= 1)
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lane));
    return x;
}

// All threads of a block, a multiple of 32 of them; all with the same result. `scratch` are 32
// floats of shared memory, which may be those of the call before.
__device__ __forceinline__ float block_sum(float x, float* scratch) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    x = warp_sum(x);
    __syncthreads();
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    return warp_sum(lane < warps ? scratch[lane] : 0.f);
}

__device__ __forceinline__ float block_max(float x, float* scratch) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    x = warp_max(x);
    __syncthreads();
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    return warp_max(lane < warps ? scratch[lane] : -INFINITY_F);
}
