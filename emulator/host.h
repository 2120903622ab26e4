// What a card has built in, for kernels compiled by the host's compiler: included by prelude.cuh.
//
// Threads of a block are fibers of one thread of the host (fibers.cpp). What the lanes of a warp do
// together is a collective: each lane leaves its request, the last to come does the work of all.
#pragma once

#include <cmath>
#include <cstring>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// Blocks of one host thread run one after another.
#define __shared__ static thread_local
#define INFINITY_F __builtin_inff()

struct EmulatedIndex {
    u32 x, y, z;
};

// Of the thread that is running.
extern __thread EmulatedIndex threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

// What a warp does together.
enum Collective : int {
    SYNC,
    SHUFFLE,
    VOTE,
    LDMATRIX_2,
    LDMATRIX_4,
    LDMATRIX_2_TRANS,
    LDMATRIX_4_TRANS,
    MMA_BF16,
    MMA_F16,
};

struct Shuffle {
    unsigned long long value, result;
    int source;  // Lane to read; the lane itself where the instruction leaves the value as it is.
};

struct Vote {
    u32 set, result;
};

struct Load {
    u32* registers;
    const void* row;
};

struct Mma {
    float* d;
    const u32 *a, *b;
};

// Until all lanes of the warp are here; `request` is the lane's and of the collective's type.
void together(Collective what, void* request);
// Until all threads of the block are here.
void barrier();
// The block's dynamic shared memory.
void* dynamic_shared();
void copy_later(void* shared, const void* global, bool valid);
void commit_copies();
// Makes the copies of all groups but the last `n` visible.
void wait_for_copies(int n);
// Ends the launch with an error; does not return.
[[noreturn]] void fail(const char* why);

// A kernel by name; `call` reads the arguments from pointers to them, `signature` has a letter for
// each: p(ointer), i(nt), l(ong long), f(loat).
struct Kernel {
    const char* name;
    const char* signature;
    void (*call)(void** arguments);
    const Kernel* next;
};

template <class T>
constexpr char letter() {
    static_assert(sizeof(T) == 0, "a kernel's arguments are pointers, int, long long or float");
    return 0;
}
template <>
constexpr char letter<int>() { return 'i'; }
template <>
constexpr char letter<long long>() { return 'l'; }
template <>
constexpr char letter<float>() { return 'f'; }

template <class T>
struct Letter {
    static constexpr char value = letter<T>();
};
template <class T>
struct Letter<T*> {
    static constexpr char value = 'p';
};

template <auto function>
struct Bound;
template <class... Arguments, void (*function)(Arguments...)>
struct Bound<function> {
    static constexpr char signature[] = {Letter<Arguments>::value..., 0};
    template <int... at>
    static void call_with(void** arguments, std::integer_sequence<int, at...>) {
        function(*static_cast<Arguments*>(arguments[at])...);
    }
    static void call(void** arguments) {
        call_with(arguments, std::make_integer_sequence<int, sizeof...(Arguments)>());
    }
};

}  // namespace emulated

// Kernels of one module form a list that starts at `emulated_kernels`, defined by the file that
// build.rs writes around the module.
#define REGISTER(kernel)                                                                \
    static const emulated::Kernel emulated_##kernel = [] {                              \
        emulated::Kernel entry = {#kernel, emulated::Bound<&kernel>::signature,         \
                                  emulated::Bound<&kernel>::call, emulated_kernels};    \
        return entry;                                                                   \
    }();                                                                                \
    static const bool emulated_listed_##kernel = (emulated_kernels = &emulated_##kernel, true);

#define DYNAMIC_SHARED(T, name) T* name = static_cast<T*>(emulated::dynamic_shared())

// ---- numbers

static inline u32 bits_of_f32(float x) {
    u32 bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
static inline float f32_of_bits(u32 bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
static inline u32 __float_as_uint(float x) { return bits_of_f32(x); }
static inline int __float_as_int(float x) { return static_cast<int>(bits_of_f32(x)); }
static inline float __uint_as_float(u32 x) { return f32_of_bits(x); }
static inline float __int_as_float(int x) { return f32_of_bits(static_cast<u32>(x)); }

static inline float to_f32(f16 x) {
    u32 sign = static_cast<u32>(x.x & 0x8000u) << 16, magnitude = x.x & 0x7fffu;
    // The fields of a float with a smaller bias: 2^112 makes up for it, subnormals included.
    float y = f32_of_bits(magnitude << 13) * f32_of_bits((127u + 112u) << 23);
    u32 bits = magnitude >= 0x7c00u ? 0x7f800000u | (magnitude << 13) : bits_of_f32(y);
    return f32_of_bits(bits | sign);
}

static inline f16 round_to_f16(float x) {
    u32 bits = bits_of_f32(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    u32 half;
    if (magnitude > 0x7f800000u) {
        half = 0x7fffu;
    } else if (magnitude >= 0x477ff000u) {  // 65520: halfway to what would follow the largest.
        half = 0x7c00u;
    } else if (magnitude < 0x38800000u) {  // 2^-14: steps of 2^-24, which are ulps of 0.5 and more.
        half = bits_of_f32(f32_of_bits(magnitude) + 0.5f) - 0x3f000000u;
    } else {
        half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    }
    return f16{static_cast<u16>(half | sign)};
}

static inline bf16 round_to_bf16(float x) {
    u32 bits = bits_of_f32(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16{0x7fffu};
    return bf16{static_cast<u16>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

static inline u32 pack2_f16(float lo, float hi) {
    return round_to_f16(lo).x | static_cast<u32>(round_to_f16(hi).x) << 16;
}
static inline u32 pack2_bf16(float lo, float hi) {
    return round_to_bf16(lo).x | static_cast<u32>(round_to_bf16(hi).x) << 16;
}

static inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
// Names that the C library has as well.
#define __expf expf
#define __logf logf
static inline float __fdividef(float x, float y) { return x / y; }
static inline float __frcp_rn(float x) { return 1.f / x; }
static inline int __float2int_rn(float x) { return static_cast<int>(rintf(x)); }
static inline int min(int a, int b) { return a < b ? a : b; }
static inline int max(int a, int b) { return a > b ? a : b; }
static inline u32 min(u32 a, u32 b) { return a < b ? a : b; }
static inline u32 max(u32 a, u32 b) { return a > b ? a : b; }
static inline i64 min(i64 a, i64 b) { return a < b ? a : b; }
static inline i64 max(i64 a, i64 b) { return a > b ? a : b; }
static inline float min(float a, float b) { return fminf(a, b); }
static inline float max(float a, float b) { return fmaxf(a, b); }
static inline int __popc(u32 x) { return __builtin_popcount(x); }
static inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<u32>(x)); }
static inline u32 __umulhi(u32 a, u32 b) {
    return static_cast<u32>(static_cast<unsigned long long>(a) * b >> 32);
}
template <class T>
static inline T __ldg(const T* at) { return *at; }

// ---- vectors

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
static inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
static inline int2 make_int2(int x, int y) { return {x, y}; }
static inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }

// ---- threads together

static inline void __syncthreads() { emulated::barrier(); }
static inline void __syncwarp(u32 mask = 0xffffffffu) {
    if (mask != 0xffffffffu) emulated::fail("a warp's lanes must all take part in `__syncwarp`");
    emulated::together(emulated::SYNC, nullptr);
}
static inline void __threadfence() {}
static inline void __threadfence_block() {}

namespace emulated {
template <class T>
static inline T shuffle(u32 mask, T value, int source, int width) {
    static_assert(sizeof(T) <= 8, "a shuffle moves 8 bytes at most");
    if (mask != 0xffffffffu || width != 32) fail("a shuffle must take in the whole warp");
    Shuffle request = {0, 0, source};
    std::memcpy(&request.value, &value, sizeof(T));
    together(SHUFFLE, &request);
    std::memcpy(&value, &request.result, sizeof(T));
    return value;
}
static inline int lane() { return static_cast<int>(threadIdx.x & 31); }
static inline u32 vote(u32 mask, int set) {
    if (mask != 0xffffffffu) fail("a vote must take in the whole warp");
    Vote request = {set != 0, 0};
    together(VOTE, &request);
    return request.result;
}
}  // namespace emulated

template <class T>
static inline T __shfl_sync(u32 mask, T value, int source, int width = 32) {
    return emulated::shuffle(mask, value, source & 31, width);
}
template <class T>
static inline T __shfl_xor_sync(u32 mask, T value, int other, int width = 32) {
    return emulated::shuffle(mask, value, emulated::lane() ^ (other & 31), width);
}
template <class T>
static inline T __shfl_down_sync(u32 mask, T value, u32 by, int width = 32) {
    int source = emulated::lane() + static_cast<int>(by);
    return emulated::shuffle(mask, value, source < 32 ? source : emulated::lane(), width);
}
template <class T>
static inline T __shfl_up_sync(u32 mask, T value, u32 by, int width = 32) {
    int source = emulated::lane() - static_cast<int>(by);
    return emulated::shuffle(mask, value, source >= 0 ? source : emulated::lane(), width);
}
static inline u32 __ballot_sync(u32 mask, int set) { return emulated::vote(mask, set); }
static inline int __any_sync(u32 mask, int set) { return emulated::vote(mask, set) != 0; }
static inline int __all_sync(u32 mask, int set) {
    return emulated::vote(mask, set) == 0xffffffffu;
}

// Blocks are not run beside each other.
template <class T>
static inline T atomicAdd(T* at, T value) {
    T before = *at;
    *at = before + value;
    return before;
}
template <class T>
static inline T atomicMax(T* at, T value) {
    T before = *at;
    if (value > before) *at = value;
    return before;
}
template <class T>
static inline T atomicOr(T* at, T value) {
    T before = *at;
    *at = before | value;
    return before;
}

static inline void mma_16816(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], bf16*) {
    emulated::Mma request = {d, a, b};
    emulated::together(emulated::MMA_BF16, &request);
}
static inline void mma_16816(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], f16*) {
    emulated::Mma request = {d, a, b};
    emulated::together(emulated::MMA_F16, &request);
}
static inline void ldmatrix_x4(u32 (&r)[4], const void* shared) {
    emulated::Load request = {r, shared};
    emulated::together(emulated::LDMATRIX_4, &request);
}
static inline void ldmatrix_x4_trans(u32 (&r)[4], const void* shared) {
    emulated::Load request = {r, shared};
    emulated::together(emulated::LDMATRIX_4_TRANS, &request);
}
static inline void ldmatrix_x2(u32 (&r)[2], const void* shared) {
    emulated::Load request = {r, shared};
    emulated::together(emulated::LDMATRIX_2, &request);
}
static inline void ldmatrix_x2_trans(u32 (&r)[2], const void* shared) {
    emulated::Load request = {r, shared};
    emulated::together(emulated::LDMATRIX_2_TRANS, &request);
}

static inline void cp_async_16(void* shared, const void* global, bool valid) {
    emulated::copy_later(shared, global, valid);
}
static inline void cp_async_commit() { emulated::commit_copies(); }
template <int N>
static inline void cp_async_wait() {
    emulated::wait_for_copies(N);
}
