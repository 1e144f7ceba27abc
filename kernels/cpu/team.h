// Many short jobs in a row on one team of threads: each runs the same program, whose jobs are claimed piece by piece. A job
// begins when the one before is done, and nobody is waited for who has claimed nothing: a thread that comes late, or that the
// machine has no time for, costs nothing.
#pragma once
#include <atomic>
#include <thread>
#include <vector>

#include "pool.h"
#include "sizes.h"

namespace qkit {

// Of one run of a program with at most `jobs` jobs.
class Team {
  public:
    Team(int64_t jobs, int nthreads) : slots_((size_t)jobs), nthreads_(nthreads) {}

    // Runs program(member) on at most `nthreads` threads.
    template <class Program>
    void run(Program& program);

  private:
    friend class Member;
    struct alignas(64) Slot {
        std::atomic<int64_t> next{0}, done{0};
        std::atomic<bool> flag{false};
    };
    std::vector<Slot> slots_;
    const int nthreads_;
};

// A thread's place in the program. All threads make the same calls, with the same sizes.
class Member {
  public:
    explicit Member(Team& team) : team_(team) {}

    // body(begin, end) for pieces of [0, n), of at least `least_piece` but the last: large ones first, which are read in one
    // stream, then smaller ones, so that all threads end together. What body reads may be written by earlier jobs, and by
    // later ones.
    template <class Body>
    void each(int64_t n, int64_t least_piece, const Body& body) {
        Team::Slot& slot = team_.slots_[(size_t)at_++];
        if (slot.done.load(std::memory_order_acquire) >= n) return;
        for (int64_t begin = slot.next.load(std::memory_order_relaxed); begin < n;) {
            const int64_t end = std::min<int64_t>(begin + std::max<int64_t>(least_piece, (n - begin) / (2 * team_.nthreads_)), n);
            if (!slot.next.compare_exchange_weak(begin, end, std::memory_order_relaxed)) continue;
            body(begin, end);
            slot.done.fetch_add(end - begin, std::memory_order_acq_rel);
            begin = slot.next.load(std::memory_order_relaxed);
        }
        for (int i = 0; slot.done.load(std::memory_order_acquire) < n; ++i) {
            if (i < SPINS) relax();
            else std::this_thread::yield();
        }
    }

    // For what a job finds out: of the current job while it runs, and of the last one after it.
    void raise() { team_.slots_[(size_t)at_ - 1].flag.store(true, std::memory_order_relaxed); }
    bool raised() const { return team_.slots_[(size_t)at_ - 1].flag.load(std::memory_order_relaxed); }

  private:
    static constexpr int SPINS = 4000;  // longer than most jobs: whoever yields is late for the next one
    Team& team_;
    int64_t at_ = 0;
};

template <class Program>
void Team::run(Program& program) {
    auto body = [&](int64_t, int64_t) {
        Member member(*this);
        program(member);
    };
    parallel_for(nthreads_, 1, nthreads_, body);
}

}  // namespace qkit
