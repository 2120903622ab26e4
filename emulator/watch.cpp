// Watches what kernels read and write: each access is announced by the compiler's instrumentation
// (-fsanitize=kernel-address with calls, whose other half is here).
//
// Card memory is one region of addresses with a count for every 256 bytes of it: how many of them,
// from the first on, belong to a tensor. What lies outside of the region is the host's own: stacks
// and static shared memory, which the compiler knows; dynamic shared memory has its size.
#include "prelude.cuh"
#include "machine.h"

#include <cstdio>

namespace emulated {

constexpr size_t GRANULE = 256, NOTHING_BELOW = 1 << 16;

static size_t region = 0, region_bytes = 0;
static const u16* held = nullptr;

static bool holds(size_t at) {
    size_t offset = at - region;
    return offset % GRANULE < held[offset / GRANULE];
}

static void refuse(const char* how, size_t address, size_t bytes, const char* where) {
    char why[160];
    snprintf(why, sizeof why, "%s %zu bytes at %#zx, %s", how, bytes, address, where);
    fail(why);
}

void touch(const char* how, const void* pointer, size_t bytes) {
    // Before `main` the modules' lists are made.
    if (!running()) return;
    size_t address = reinterpret_cast<size_t>(pointer);
    if (address - region < region_bytes) {
        if (!holds(address) || !holds(address + bytes - 1))
            refuse(how, address, bytes, "where there is no tensor");
        return;
    }
    size_t shared = address - reinterpret_cast<size_t>(dynamic_shared());
    if (shared < SHARED_MEMORY && shared + bytes > shared_bytes())
        refuse(how, address, bytes, "beyond the block's shared memory");
    if (address < NOTHING_BELOW) refuse(how, address, bytes, "through no pointer");
}

}  // namespace emulated

// Tells where card memory is; counts are `bytes / 256` of 16 bits.
extern "C" void emulated_watch(size_t start, size_t bytes, const u16* counts) {
    emulated::region = start;
    emulated::region_bytes = bytes;
    emulated::held = counts;
}

#define WATCHED(bytes)                                                      \
    extern "C" void __asan_load##bytes##_noabort(const void* address) {     \
        emulated::touch("reads", address, bytes);                           \
    }                                                                       \
    extern "C" void __asan_store##bytes##_noabort(const void* address) {    \
        emulated::touch("writes", address, bytes);                          \
    }
WATCHED(1)
WATCHED(2)
WATCHED(4)
WATCHED(8)
WATCHED(16)
extern "C" void __asan_loadN_noabort(const void* address, size_t bytes) {
    emulated::touch("reads", address, bytes);
}
extern "C" void __asan_storeN_noabort(const void* address, size_t bytes) {
    emulated::touch("writes", address, bytes);
}
extern "C" void __asan_handle_no_return() {}
extern "C" void __asan_before_dynamic_init(const char*) {}
extern "C" void __asan_after_dynamic_init() {}
