// Runs kernels on the host: a block's threads are fibers that take turns.
//
// A thread runs until it ends or must wait for others of its warp or block; one that never waits
// costs two switches. Everything that would hang or be undefined on a card ends the launch with an
// error: threads that wait for ones that never come, collectives that not all lanes take part in,
// access to what is not a tensor's (watch.cpp) or not a multiple of its own size. Dynamic shared memory is filled
// with NaN before each block and the targets of asynchronous copies until they are waited for.
#include "prelude.cuh"
#include "machine.h"

#include <cstdio>
#include <cstdlib>
#include <sys/mman.h>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

__thread EmulatedIndex threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

constexpr int THREADS = 1024, WARP = 32;
constexpr size_t STACK = 256 << 10, GUARD = 4096;

enum State : int { NEW, READY, IN_WARP, AT_BARRIER, DONE };

struct Copy {
    void* shared;
    const void* global;
    bool valid;
    int group;
};

struct Fiber {
#if defined(__x86_64__)
    void* place;
#else
    ucontext_t place;
#endif
    unsigned char* stack;
    State state;
    // Asynchronous copies under way, oldest first; and groups committed so far.
    Copy* copies;
    int copy_count, copy_room, groups;
};

struct Warp {
    void* requests[WARP];
    int arrived;
    Collective what;
};

// What a launch needs; kept for the next one.
struct Machine {
    Fiber fibers[THREADS];
    Warp warps[THREADS / WARP];
#if defined(__x86_64__)
    void* scheduler;
#else
    ucontext_t scheduler;
#endif
    int running, size, at_barrier, done;
    void (*call)(void**);
    void** arguments;
    bool failed;
    char why[512];
    unsigned char* shared;
    size_t shared_bytes;
    Machine* next;
};

static __thread Machine* machine;

// ---- switching

#if defined(__x86_64__)
// Keeps what a call must keep (System V) on the stack of the one that stops.
extern "C" void emulated_switch(void** from, void* to);
asm(R"(
.text
.p2align 4
.globl emulated_switch
.type emulated_switch, @function
emulated_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulated_switch, .-emulated_switch
)");
static inline void to_scheduler(Fiber& fiber) {
    emulated_switch(&fiber.place, machine->scheduler);
}
static inline void to_fiber(Fiber& fiber) { emulated_switch(&machine->scheduler, fiber.place); }
#else
static inline void to_scheduler(Fiber& fiber) { swapcontext(&fiber.place, &machine->scheduler); }
static inline void to_fiber(Fiber& fiber) { swapcontext(&machine->scheduler, &fiber.place); }
#endif

static void finish_copies(Fiber& fiber, int last_group);

extern "C" void emulated_thread() {
    machine->call(machine->arguments);
    Fiber& fiber = machine->fibers[machine->running];
    // Copies that nobody waited for were of no use, and on a card come to an end as well.
    finish_copies(fiber, fiber.groups);
    fiber.state = DONE;
    machine->done++;
    to_scheduler(fiber);
    abort();
}

static void prepare(Fiber& fiber) {
    if (!fiber.stack) {
        void* memory = mmap(nullptr, STACK + GUARD, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) {
            fputs("no memory for an emulated thread\n", stderr);
            abort();
        }
        mprotect(memory, GUARD, PROT_NONE);
        fiber.stack = static_cast<unsigned char*>(memory) + GUARD;
    }
#if defined(__x86_64__)
    void** top = reinterpret_cast<void**>(fiber.stack + STACK);
    top[-1] = nullptr;
    top[-2] = reinterpret_cast<void*>(&emulated_thread);
    for (int i = 3; i <= 8; i++) top[-i] = nullptr;
    fiber.place = top - 8;
#else
    getcontext(&fiber.place);
    fiber.place.uc_stack.ss_sp = fiber.stack;
    fiber.place.uc_stack.ss_size = STACK;
    fiber.place.uc_link = nullptr;
    makecontext(&fiber.place, &emulated_thread, 0);
#endif
}

// ---- what threads ask for

void fail(const char* why) {
    if (!machine) {
        fprintf(stderr, "%s\n", why);
        abort();
    }
    if (!machine->failed) {
        machine->failed = true;
        snprintf(machine->why, sizeof machine->why, "%s (block %u,%u,%u thread %u)", why, blockIdx.x,
                 blockIdx.y, blockIdx.z, threadIdx.x);
    }
    // The scheduler gives the block up; nobody comes back here.
    to_scheduler(machine->fibers[machine->running]);
    abort();
}

void together(Collective what, void* request) {
    Machine& m = *machine;
    int thread = m.running, first = thread & ~(WARP - 1);
    Warp& warp = m.warps[thread / WARP];
    if (m.size - first < WARP) fail("a warp of fewer than 32 lanes shuffles or multiplies");
    if (warp.arrived == 0) warp.what = what;
    if (warp.what != what) fail("lanes of one warp are in different collectives");
    warp.requests[thread - first] = request;
    if (++warp.arrived < WARP) {
        m.fibers[thread].state = IN_WARP;
        to_scheduler(m.fibers[thread]);
        return;
    }
    warp.arrived = 0;
    if (const char* why = perform(what, warp.requests)) fail(why);
    for (int lane = 0; lane < WARP; lane++) m.fibers[first + lane].state = READY;
}

void barrier() {
    Fiber& fiber = machine->fibers[machine->running];
    fiber.state = AT_BARRIER;
    machine->at_barrier++;
    to_scheduler(fiber);
}

void* dynamic_shared() { return machine->shared; }
size_t shared_bytes() { return machine->shared_bytes; }
bool running() { return machine != nullptr; }

void copy_later(void* shared, const void* global, bool valid) {
    Fiber& fiber = machine->fibers[machine->running];
    if (reinterpret_cast<size_t>(shared) % 16 || (valid && reinterpret_cast<size_t>(global) % 16))
        fail("an asynchronous copy between addresses that are not multiples of 16");
    touch("writes", shared, 16);
    if (valid) touch("reads", global, 16);
    if (fiber.copy_count == fiber.copy_room) {
        fiber.copy_room = fiber.copy_room ? 2 * fiber.copy_room : 32;
        fiber.copies =
            static_cast<Copy*>(realloc(fiber.copies, sizeof(Copy) * fiber.copy_room));
    }
    fiber.copies[fiber.copy_count++] = Copy{shared, global, valid, fiber.groups + 1};
    std::memset(shared, 0xff, 16);
}

void commit_copies() { machine->fibers[machine->running].groups++; }

static void finish_copies(Fiber& fiber, int last_group) {
    int kept = 0;
    for (int i = 0; i < fiber.copy_count; i++) {
        Copy copy = fiber.copies[i];
        if (copy.group > last_group)
            fiber.copies[kept++] = copy;
        else if (copy.valid)
            std::memcpy(copy.shared, copy.global, 16);
        else
            std::memset(copy.shared, 0, 16);
    }
    fiber.copy_count = kept;
}

void wait_for_copies(int n) {
    Fiber& fiber = machine->fibers[machine->running];
    finish_copies(fiber, fiber.groups - n);
}

// ---- blocks

static void resume(Machine& m, int thread) {
    Fiber& fiber = m.fibers[thread];
    if (fiber.state == NEW) prepare(fiber);
    fiber.state = READY;
    m.running = thread;
    threadIdx.x = static_cast<u32>(thread);
    to_fiber(fiber);
}

// Lets the threads of one warp run until all of them have ended or wait for the block.
static void run_warp(Machine& m, int warp, bool backwards) {
    int first = warp * WARP, count = m.size - first < WARP ? m.size - first : WARP;
    for (bool ran = true; ran && !m.failed;) {
        ran = false;
        for (int i = 0; i < count && !m.failed; i++) {
            int thread = first + (backwards ? count - 1 - i : i);
            if (m.fibers[thread].state > READY) continue;
            resume(m, thread);
            ran = true;
        }
    }
}

static void run_block(Machine& m, bool backwards) {
    int warps = (m.size + WARP - 1) / WARP;
    for (int i = 0; i < m.size; i++) {
        Fiber& fiber = m.fibers[i];
        fiber.state = NEW;
        fiber.copy_count = fiber.groups = 0;
    }
    for (int i = 0; i < warps; i++) m.warps[i].arrived = 0;
    m.at_barrier = m.done = 0;
    while (true) {
        for (int i = 0; i < warps && !m.failed; i++) run_warp(m, backwards ? warps - 1 - i : i, backwards);
        if (m.failed || m.done == m.size) return;
        if (m.at_barrier < m.size) {
            m.failed = true;
            snprintf(m.why, sizeof m.why,
                     "threads wait for ever (block %u,%u,%u): %d of %d have ended, %d are at a "
                     "barrier, the others at a collective of their warp",
                     blockIdx.x, blockIdx.y, blockIdx.z, m.done, m.size, m.at_barrier);
            return;
        }
        m.at_barrier = 0;
        for (int i = 0; i < m.size; i++) m.fibers[i].state = READY;
    }
}

static Machine* idle = nullptr;
static char idle_lock = 0;

static Machine* take_machine() {
    while (__atomic_test_and_set(&idle_lock, __ATOMIC_ACQUIRE)) {}
    Machine* m = idle;
    if (m) idle = m->next;
    __atomic_clear(&idle_lock, __ATOMIC_RELEASE);
    if (!m) {
        m = static_cast<Machine*>(calloc(1, sizeof(Machine)));
        m->shared = static_cast<unsigned char*>(aligned_alloc(1024, SHARED_MEMORY));
    }
    return m;
}

static void give_machine(Machine* m) {
    while (__atomic_test_and_set(&idle_lock, __ATOMIC_ACQUIRE)) {}
    m->next = idle;
    idle = m;
    __atomic_clear(&idle_lock, __ATOMIC_RELEASE);
}

}  // namespace emulated

// Runs all blocks; 0 if all went well, else why not in `why`. Every second block runs its threads
// backwards, beginning with the first if `backwards`, so that a missing barrier shows.
extern "C" int emulated_run(const emulated::Kernel* kernel, void** arguments, const u32* grid,
                            u32 block, u32 shared, int backwards, char* why, size_t room) {
    using namespace emulated;
    Machine* m = take_machine();
    machine = m;
    m->size = static_cast<int>(block);
    m->call = kernel->call;
    m->arguments = arguments;
    m->failed = false;
    m->shared_bytes = shared;
    blockDim = {block, 1, 1};
    gridDim = {grid[0], grid[1], grid[2]};
    threadIdx = {0, 0, 0};
    for (u32 z = 0; z < grid[2] && !m->failed; z++)
        for (u32 y = 0; y < grid[1] && !m->failed; y++)
            for (u32 x = 0; x < grid[0] && !m->failed; x++) {
                blockIdx = {x, y, z};
                std::memset(m->shared, 0xff, shared);
                run_block(*m, ((x ^ y ^ z) & 1) != static_cast<u32>(backwards));
            }
    bool failed = m->failed;
    if (failed) snprintf(why, room, "%s", m->why);
    machine = nullptr;
    give_machine(m);
    return failed;
}

extern "C" u32 emulated_shared_memory() { return emulated::SHARED_MEMORY; }

// What the compiler's checks of alignment call (-fsanitize=alignment).
struct Mismatch {
    const char* file;
    u32 line, column;
};
extern "C" void __ubsan_handle_type_mismatch_v1(Mismatch* at, void* address) {
    const char* name = std::strrchr(at->file, '/');
    char why[256];
    snprintf(why, sizeof why, "%s:%u: an address that is not a multiple of what is accessed: %p",
             name ? name + 1 : at->file, at->line, address);
    emulated::fail(why);
}
