// Row ranges over threads: those of the OpenMP runtime that torch uses, once `use_openmp` has found it (a second pool would
// fight its threads, which spin for a while after their work), else a small pool of our own, started on first use, grown to
// what a caller asks for, never stopped.
#pragma once
#include <cstdint>

namespace qkit {

// library: file name of a runtime this process has loaded. False where it is not loaded or has no GOMP_parallel.
bool use_openmp(const char* library);

// While one lives, its thread's work goes to the pool of our own. For many short jobs in a row with nothing of torch's between
// them: OpenMP waits at the end of each for every thread of its team, for milliseconds where another process has its core.
struct OwnThreads {
    OwnThreads();
    ~OwnThreads();
    OwnThreads(const OwnThreads&) = delete;
    bool before;
};

typedef void (*RangeFn)(void* context, int64_t begin, int64_t end);

// Tells the processor that this is a waiting loop.
inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Calls fn over [0, n) in pieces of `piece`, on at most `nthreads` threads, the caller's among them. Runs in the
// caller alone where there is one piece, where another thread holds the pool, or where no thread can be started.
// Safe after fork(): the child starts a pool of its own.
// A job that is itself run on the pool runs in its caller alone.
void parallel_for(int64_t n, int64_t piece, int nthreads, RangeFn fn, void* context);

// The same for a lambda body(begin, end), which must not throw.
template <class Body>
void parallel_for(int64_t n, int64_t piece, int nthreads, Body& body) {
    parallel_for(n, piece, nthreads, [](void* b, int64_t begin, int64_t end) { (*(Body*)b)(begin, end); }, &body);
}

}  // namespace qkit
