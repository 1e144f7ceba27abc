#include "pool.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

namespace qkit {
namespace {

struct Job {
    RangeFn fn;
    void* context;
    int64_t n, piece;
    int seats;  // workers that may still join
    std::atomic<int64_t> next{0};

    void work() {
        for (;;) {
            const int64_t begin = next.fetch_add(piece, std::memory_order_relaxed);
            if (begin >= n) return;
            fn(context, begin, begin + piece < n ? begin + piece : n);
        }
    }
};

struct Pool {
    std::mutex busy;  // held by the caller whose job runs
    std::mutex mutex;
    std::condition_variable wake, done;
    Job* job = nullptr;
    int active = 0, workers = 0;

    void loop() {
        std::unique_lock<std::mutex> lock(mutex);
        for (;;) {
            wake.wait(lock, [this] { return job && job->seats > 0; });
            Job* mine = job;
            --mine->seats;
            ++active;
            lock.unlock();
            mine->work();
            lock.lock();
            if (--active == 0) done.notify_one();
        }
    }

    void grow(int wanted) {
        while (workers < wanted) {
            try {
                std::thread([this] { loop(); }).detach();
            } catch (const std::system_error&) {
                return;  // a limit on threads: go on with those there are
            }
            ++workers;
        }
    }
};

// Never freed: its threads may outlive static destructors. After fork() the child has none of the threads and
// perhaps a locked mutex, so it forgets the pool.
std::atomic<Pool*> current{nullptr};

Pool* pool() {
    static const int registered = pthread_atfork(nullptr, nullptr, [] { current.store(nullptr); });
    (void)registered;
    Pool* p = current.load();
    if (p) return p;
    Pool* fresh = new (std::nothrow) Pool;
    if (!fresh) return nullptr;
    if (current.compare_exchange_strong(p, fresh)) return fresh;
    delete fresh;
    return p;
}

}  // namespace

namespace {

// GOMP_parallel of the OpenMP runtime that torch uses, in this process; null where there is none.
typedef void (*Parallel)(void (*fn)(void*), void* context, unsigned threads, unsigned flags);
std::atomic<Parallel> openmp{nullptr};
std::atomic<bool> forked{false};  // OpenMP's threads do not survive a fork, and its runtime does not notice

}  // namespace

bool use_openmp(const char* library) {
    void* handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
    if (!handle) return false;
    const Parallel found = (Parallel)dlsym(handle, "GOMP_parallel");
    if (!found) return false;
    static const int registered = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });
    (void)registered;
    openmp.store(found);
    return true;
}

void parallel_for(int64_t n, int64_t piece, int nthreads, RangeFn fn, void* context) {
    if (n <= 0) return;
    const int64_t pieces = (n + piece - 1) / piece;
    const int helpers = (int)(pieces < nthreads ? pieces : nthreads) - 1;
    const Parallel parallel = openmp.load(std::memory_order_relaxed);
    if (helpers > 0 && parallel && !forked.load(std::memory_order_relaxed)) {
        Job job;
        job.fn = fn;
        job.context = context;
        job.n = n;
        job.piece = piece;
        // The whole team even where there are fewer pieces: a team of another size would be built anew.
        parallel([](void* j) { ((Job*)j)->work(); }, &job, (unsigned)nthreads, 0);
        return;
    }
    Pool* p = helpers > 0 ? pool() : nullptr;
    std::unique_lock<std::mutex> mine;
    if (p) mine = std::unique_lock<std::mutex>(p->busy, std::try_to_lock);
    if (!mine.owns_lock()) return fn(context, 0, n);

    p->grow(helpers);
    Job job;
    job.fn = fn;
    job.context = context;
    job.n = n;
    job.piece = piece;
    job.seats = helpers;
    {
        std::lock_guard<std::mutex> lock(p->mutex);
        p->job = &job;
    }
    p->wake.notify_all();
    job.work();
    std::unique_lock<std::mutex> lock(p->mutex);
    p->job = nullptr;  // nobody joins from here on
    p->done.wait(lock, [p] { return p->active == 0; });
}

}  // namespace qkit
