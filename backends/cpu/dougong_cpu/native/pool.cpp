// A small persistent thread pool and per-thread scratch memory. No OpenMP: torch ships its own copy of that runtime,
// and two of them in one process fight over the cores.
#include <pthread.h>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>
#include <vector>
#include "abi.h"

namespace {

// How long a thread looks for work, or for the others to finish, before it sleeps: a step has hundreds of short
// parallel regions a few microseconds apart, and waking a sleeper takes longer than most of them.
constexpr int kSpins = 2000;

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

struct Pool {
  std::mutex mutex, use;
  std::condition_variable start, done;
  std::atomic<int64_t> next{0};
  std::atomic<int> running{0};
  // Number of the region, and in the low 16 bits how many helpers take part: one word, so that a helper that is not
  // wanted never mixes two regions up. Those wanted are done before the next region starts.
  std::atomic<uint64_t> region{0};
  int64_t n = 0;
  void (*body)(void*, int64_t) = nullptr;
  void* ctx = nullptr;
  int threads = 0;

  void work() {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) body(ctx, i);
  }
  uint64_t await(uint64_t seen) {
    for (int i = 0; i < kSpins; i++, relax()) {
      const uint64_t now = region.load(std::memory_order_acquire);
      if (now != seen) return now;
    }
    std::unique_lock<std::mutex> lock(mutex);
    start.wait(lock, [&] { return region.load(std::memory_order_acquire) != seen; });
    return region.load(std::memory_order_acquire);
  }
  void loop(int id, uint64_t seen) {
    for (;;) {
      seen = await(seen);
      if (id >= (int)(seen & 0xffff)) continue;
      work();
      if (running.fetch_sub(1, std::memory_order_acq_rel) == 1) {
        std::lock_guard<std::mutex> lock(mutex);
        done.notify_one();
      }
    }
  }
  void run(int64_t count, int helpers, void (*f)(void*, int64_t), void* c) {
    std::lock_guard<std::mutex> one(use);  // one parallel region at a time
    {
      std::lock_guard<std::mutex> lock(mutex);
      const uint64_t seen = region.load(std::memory_order_relaxed);
      while (threads < helpers) {
        const int id = threads++;
        std::thread([this, id, seen] { loop(id, seen); }).detach();
      }
      n = count, body = f, ctx = c;
      next.store(0, std::memory_order_relaxed);
      running.store(helpers, std::memory_order_relaxed);
      region.store(((seen >> 16) + 1) << 16 | (uint64_t)helpers, std::memory_order_release);
    }
    start.notify_all();
    work();
    for (int i = 0; i < kSpins; i++, relax())
      if (running.load(std::memory_order_acquire) == 0) return;
    std::unique_lock<std::mutex> lock(mutex);
    done.wait(lock, [&] { return running.load(std::memory_order_acquire) == 0; });
  }
};

Pool* pool = nullptr;
std::once_flag once;
thread_local bool inside = false;

struct Buffers {
  void* at[4] = {};
  int64_t size[4] = {};
  ~Buffers() { for (void* p : at) free(p); }
};
thread_local Buffers buffers;

}  // namespace

void dg_parallel(int64_t n, int threads, void (*body)(void*, int64_t), void* ctx) {
  int64_t helpers = (n < threads ? n : threads) - 1;
  if (helpers > 1000) helpers = 1000;
  if (helpers <= 0 || inside) {
    for (int64_t i = 0; i < n; i++) body(ctx, i);
    return;
  }
  std::call_once(once, [] {
    pool = new Pool;
    // A forked child has none of the workers: it starts a pool of its own. The old one is left as it is.
    pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
  });
  inside = true;
  pool->run(n, (int)helpers, body, ctx);
  inside = false;
}

void* dg_scratch(int which, int64_t bytes) {
  Buffers& b = buffers;
  if (b.size[which] < bytes) {
    free(b.at[which]);
    b.size[which] = 0;
    bytes = (bytes + bytes / 2 + 63) / 64 * 64;
    b.at[which] = aligned_alloc(64, (size_t)bytes);
    if (!b.at[which]) throw std::bad_alloc();  // crosses a C boundary: the process ends with the reason on stderr
    b.size[which] = bytes;
  }
  return b.at[which];
}
