#include "pool.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>
#include <exception>
#include <thread>

namespace qkit {
namespace {

struct Job {
    RangeFn fn = nullptr;
    void* context = nullptr;
    int64_t n = 0, piece = 1;
    std::atomic<int64_t> next{0};

    void work() {
        for (;;) {
            const int64_t begin = next.fetch_add(piece, std::memory_order_relaxed);
            if (begin >= n) return;
            fn(context, begin, begin + piece < n ? begin + piece : n);
        }
    }
};

// About as long as the work between two products of a small model: a worker that is still looking for work takes it within
// a fraction of a microsecond, one that sleeps needs some fifty to wake.
constexpr int SPINS = 2000;

struct Pool {
    std::mutex busy;  // held by the caller whose job runs
    Job job;
    std::atomic<int> seats{0};     // workers that may still join the job
    std::atomic<int> finished{0};  // of those that joined
    std::mutex mutex;              // for sleeping only
    std::condition_variable wake;
    std::atomic<int> sleepers{0};
    int workers = 0;

    bool join() {
        int left = seats.load();
        while (left > 0)
            if (seats.compare_exchange_weak(left, left - 1)) return true;
        return false;
    }

    void loop() {
        for (;;) {
            bool joined = false;
            for (int i = 0; i < SPINS && !(joined = join()); ++i) relax();
            if (!joined) {
                std::unique_lock<std::mutex> lock(mutex);
                sleepers.fetch_add(1);
                wake.wait(lock, [this, &joined] { return joined = join(); });
                sleepers.fetch_sub(1);
            }
            job.work();
            finished.fetch_add(1);
        }
    }

    void grow(int wanted) {
        while (workers < wanted) {
            try {
                std::thread([this] { loop(); }).detach();
            } catch (const std::exception&) {
                return;  // a limit on threads or memory: go on with those there are
            }
            ++workers;
        }
    }

    // Nobody is waited for who has not joined: a worker that the machine has no time for costs nothing.
    void run(int64_t n, int64_t piece, int helpers, RangeFn fn, void* context) {
        grow(helpers);
        job.fn = fn;
        job.context = context;
        job.n = n;
        job.piece = piece;
        job.next.store(0);
        finished.store(0);
        seats.store(helpers);
        if (sleepers.load() > 0) {
            std::lock_guard<std::mutex> lock(mutex);
            wake.notify_all();
        }
        job.work();
        const int joined = helpers - seats.exchange(0);
        for (int i = 0; finished.load() < joined; ++i) {
            if (i < SPINS) relax();
            else std::this_thread::yield();
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

static thread_local bool own = false;

OwnThreads::OwnThreads() : before(own) { own = true; }
OwnThreads::~OwnThreads() { own = before; }

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
    if (helpers > 0 && parallel && !own && !forked.load(std::memory_order_relaxed)) {
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

    p->run(n, piece, helpers, fn, context);
}

}  // namespace qkit
