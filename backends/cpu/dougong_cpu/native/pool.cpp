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

struct Pool {
  std::mutex mutex, use;
  std::condition_variable start, done;
  std::atomic<int64_t> next{0};
  int64_t n = 0;
  void (*body)(void*, int64_t) = nullptr;
  void* ctx = nullptr;
  uint64_t generation = 0;
  int wanted = 0, running = 0, threads = 0;

  void work() {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) body(ctx, i);
  }
  void loop(int id, uint64_t seen) {
    for (;;) {
      {
        std::unique_lock<std::mutex> lock(mutex);
        start.wait(lock, [&] { return generation != seen; });
        seen = generation;
        if (id >= wanted) continue;
      }
      work();
      std::lock_guard<std::mutex> lock(mutex);
      if (--running == 0) done.notify_one();
    }
  }
  void run(int64_t count, int helpers, void (*f)(void*, int64_t), void* c) {
    std::lock_guard<std::mutex> one(use);  // one parallel region at a time
    {
      std::lock_guard<std::mutex> lock(mutex);
      while (threads < helpers) {
        const int id = threads++;
        const uint64_t seen = generation;
        std::thread([this, id, seen] { loop(id, seen); }).detach();
      }
      n = count, body = f, ctx = c;
      next.store(0, std::memory_order_relaxed);
      wanted = running = helpers;
      generation++;
    }
    start.notify_all();
    work();
    std::unique_lock<std::mutex> lock(mutex);
    done.wait(lock, [&] { return running == 0; });
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
  const int helpers = (int)((n < threads ? n : threads) - 1);
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
  pool->run(n, helpers, body, ctx);
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
