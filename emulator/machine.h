// What the files of the emulation share.
#pragma once

namespace emulated {

// Largest shared memory of a block: that of compute capability 8.6 and 8.9, the smallest of all
// that are supported.
constexpr u32 SHARED_MEMORY = 99 << 10;

// Whether a launch is under way on this thread of the host.
bool running();

// Bytes of the running block's dynamic shared memory.
size_t shared_bytes();

// Ends the launch if the running thread may not access this.
void touch(const char* how, const void* address, size_t bytes);

// Does what the 32 lanes asked for; null, or what is wrong with it.
const char* perform(Collective what, void* const* requests);

}  // namespace emulated
