// Device memory of the simulated accelerator: host memory behind a byte limit per device, with statistics, private
// pools for graphs, and pinned host memory. Everything that a tensor of the device owns is one `Block`.
#pragma once
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <set>

#include <ATen/core/Tensor.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/DeviceType.h>
#include <c10/core/StorageImpl.h>
#include <c10/util/Exception.h>

namespace sim {

constexpr auto kSim = c10::DeviceType::PrivateUse1;
constexpr int kMaxDevices = 16;
constexpr size_t kAlign = 64;

inline std::atomic<int> device_count{2};
inline thread_local int current_device = 0;

inline c10::Device device(int index) { return c10::Device(kSim, static_cast<c10::DeviceIndex>(index)); }

inline int check_index(int index) {
  TORCH_CHECK(index >= 0 && index < device_count, c10::get_privateuse1_backend(), ": there is no device ", index,
              "; this process has ", device_count.load(), " (0 to ", device_count - 1, ")");
  return index;
}

inline int index_or_current(c10::Device d) { return d.has_index() ? check_index(d.index()) : current_device; }

// What one device counts, in bytes. `reserved` is what stands against the limit: live tensors and whole graph pools.
struct Counters {
  int64_t capacity = int64_t{4} << 30;
  int64_t allocated = 0, peak_allocated = 0, reserved = 0, peak_reserved = 0;
  int64_t allocations = 0, frees = 0, ooms = 0;
};

inline std::mutex memory_mutex;
inline Counters counters[kMaxDevices];
inline std::atomic<bool> poison_new_memory{false};

// Memory set aside for graphs. A block freed during a capture goes back to the pool and may be given out again within
// it, as on a real device; the memory itself lives until the last graph and the last tensor of the pool are gone.
struct Pool {
  explicit Pool(int index) : device_index(index) {}
  ~Pool() {
    std::lock_guard<std::mutex> lock(memory_mutex);
    for (auto& [ptr, bytes] : segments) {
      counters[device_index].reserved -= static_cast<int64_t>(bytes);
      std::free(ptr);
    }
  }
  bool holds(const void* p) const {
    auto it = segments.upper_bound(const_cast<void*>(p));
    if (it == segments.begin()) return false;
    --it;
    return static_cast<const char*>(p) < static_cast<char*>(it->first) + it->second;
  }
  // After a capture nothing of it has been computed yet. 0xFF is NaN to every float type. Memory that other graphs of
  // the pool hold is left alone.
  void poison() {
    for (void* ptr : handed_out) std::memset(ptr, 0xFF, segments.at(ptr));
    handed_out.clear();
  }
  int device_index;
  int64_t live = 0;                      // blocks that a tensor holds right now
  std::map<void*, size_t> segments;      // address -> bytes
  std::multimap<size_t, void*> unused;   // bytes -> segment that no tensor holds
  std::set<void*> handed_out;            // since the capture began
};

struct Block {
  void* ptr;
  size_t bytes;
  int device_index;
  std::shared_ptr<Pool> pool;  // empty: not of a pool
  c10::Storage adopted;        // the output of a CPU kernel that was taken over without a copy
};

inline std::map<void*, Block*> live_blocks;  // by address, under memory_mutex

inline void free_block(void* context) {
  std::unique_ptr<Block> block(static_cast<Block*>(context));
  {
    std::lock_guard<std::mutex> lock(memory_mutex);
    auto& c = counters[block->device_index];
    live_blocks.erase(block->ptr);
    c.allocated -= static_cast<int64_t>(block->bytes);
    c.frees++;
    if (block->pool) {
      block->pool->live--;
      block->pool->unused.emplace(block->bytes, block->ptr);
    } else {
      c.reserved -= static_cast<int64_t>(block->bytes);
    }
  }
  if (!block->pool && !block->adopted) std::free(block->ptr);
}  // the pool, or the adopted storage, may be destroyed here, outside the lock

inline std::string mebibytes(int64_t bytes) {
  char text[32];
  std::snprintf(text, sizeof text, "%.2f MiB", static_cast<double>(bytes) / (1 << 20));
  return text;
}

// Counts `bytes` against the limit; throws torch.OutOfMemoryError. Called under memory_mutex.
inline void reserve(int index, size_t bytes) {
  auto& c = counters[index];
  if (c.reserved + static_cast<int64_t>(bytes) > c.capacity) {
    c.ooms++;
    TORCH_CHECK_WITH(OutOfMemoryError, false, c10::get_privateuse1_backend(), " out of memory. Tried to allocate ",
                     mebibytes(bytes), ". Device ", index, " has a total capacity of ", mebibytes(c.capacity),
                     " of which ", mebibytes(c.capacity - c.reserved), " is free; ", mebibytes(c.allocated),
                     " is held by tensors and ", mebibytes(c.reserved - c.allocated), " by unused parts of graph pools.");
  }
  c.reserved += static_cast<int64_t>(bytes);
  c.peak_reserved = std::max(c.peak_reserved, c.reserved);
}

inline c10::DataPtr hand_out(std::unique_ptr<Block> block) {  // called under memory_mutex
  auto& c = counters[block->device_index];
  c.allocated += static_cast<int64_t>(block->bytes);
  c.peak_allocated = std::max(c.peak_allocated, c.allocated);
  c.allocations++;
  live_blocks[block->ptr] = block.get();
  void* ptr = block->ptr;
  auto where = device(block->device_index);
  return {ptr, block.release(), &free_block, where};
}

inline c10::DataPtr allocate(size_t bytes, int index, const std::shared_ptr<Pool>& pool) {
  if (bytes == 0) return {nullptr, device(index)};
  size_t rounded = (bytes + kAlign - 1) / kAlign * kAlign;
  std::lock_guard<std::mutex> lock(memory_mutex);
  if (pool) {
    TORCH_CHECK(pool->device_index == index, "graph capture: an allocation on ", device(index), " is outside the pool of ",
                "the capture, which is on ", device(pool->device_index), "; capture each device on its own");
    auto fit = pool->unused.lower_bound(rounded);
    if (fit != pool->unused.end() && fit->first <= rounded * 2) {  // a far larger segment is kept for a larger tensor
      auto block = std::make_unique<Block>(Block{fit->second, fit->first, index, pool, {}});
      pool->unused.erase(fit);
      pool->handed_out.insert(block->ptr);
      pool->live++;
      return hand_out(std::move(block));
    }
  }
  reserve(index, rounded);
  void* ptr = std::aligned_alloc(kAlign, rounded);
  if (ptr == nullptr) {
    counters[index].reserved -= static_cast<int64_t>(rounded);
    TORCH_CHECK_WITH(OutOfMemoryError, false, "the host has no memory for ", mebibytes(rounded), " of simulated memory");
  }
  if (poison_new_memory) std::memset(ptr, 0xFF, rounded);
  if (pool) {
    pool->segments.emplace(ptr, rounded);
    pool->handed_out.insert(ptr);
    pool->live++;
  }
  return hand_out(std::make_unique<Block>(Block{ptr, rounded, index, pool, {}}));
}

// Takes over memory that a CPU kernel allocated for its output, so that it counts as device memory without a copy.
inline c10::DataPtr adopt(c10::Storage storage, int index) {
  size_t bytes = storage.nbytes();
  void* ptr = storage.mutable_data();
  std::lock_guard<std::mutex> lock(memory_mutex);
  reserve(index, bytes);
  return hand_out(std::make_unique<Block>(Block{ptr, bytes, index, nullptr, std::move(storage)}));
}

inline int device_of_pointer(const void* p) {  // -1: not device memory
  std::lock_guard<std::mutex> lock(memory_mutex);
  auto it = live_blocks.upper_bound(const_cast<void*>(p));
  if (it == live_blocks.begin()) return -1;
  --it;
  Block* b = it->second;
  return static_cast<const char*>(p) < static_cast<char*>(b->ptr) + b->bytes ? b->device_index : -1;
}

// Set by the capture that runs on this thread: allocations then come from its pool.
inline thread_local std::shared_ptr<Pool> capture_pool;

struct DeviceAllocator final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t bytes) override { return sim::allocate(bytes, current_device, capture_pool); }
  void copy_data(void* dst, const void* src, size_t n) const override { default_copy_data(dst, src, n); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t = {0, 0}) override {}  // nothing is cached outside graph pools
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex index) override {
    std::lock_guard<std::mutex> lock(memory_mutex);
    auto& c = counters[check_index(index)];
    return {static_cast<size_t>(std::max<int64_t>(0, c.capacity - c.reserved)), static_cast<size_t>(c.capacity)};
  }
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex index) override {
    std::lock_guard<std::mutex> lock(memory_mutex);
    auto& c = counters[check_index(index)];
    c10::CachingDeviceAllocator::DeviceStats stats;
    auto set = [](auto& stat, int64_t current, int64_t peak) { stat[0].current = current, stat[0].peak = peak; };
    set(stats.allocated_bytes, c.allocated, c.peak_allocated);
    set(stats.requested_bytes, c.allocated, c.peak_allocated);
    set(stats.active_bytes, c.allocated, c.peak_allocated);
    set(stats.reserved_bytes, c.reserved, c.peak_reserved);
    stats.allocation[0].current = c.allocations - c.frees;
    stats.allocation[0].allocated = c.allocations;
    stats.allocation[0].freed = c.frees;
    stats.num_ooms = c.ooms;
    return stats;
  }
  void resetAccumulatedStats(c10::DeviceIndex index) override {
    std::lock_guard<std::mutex> lock(memory_mutex);
    counters[check_index(index)].ooms = 0;
  }
  void resetPeakStats(c10::DeviceIndex index) override {
    std::lock_guard<std::mutex> lock(memory_mutex);
    auto& c = counters[check_index(index)];
    c.peak_allocated = c.allocated, c.peak_reserved = c.reserved;
  }
};
inline DeviceAllocator device_allocator;

// Pinned host memory: ordinary host memory that the device can name. A capture may copy from and to nothing else.
inline std::map<void*, size_t> pinned_blocks;  // under memory_mutex
struct PinnedAllocator final : c10::Allocator {
  static void free_pinned(void* p) {
    {
      std::lock_guard<std::mutex> lock(memory_mutex);
      pinned_blocks.erase(p);
    }
    std::free(p);
  }
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, c10::Device(c10::kCPU)};
    void* p = std::aligned_alloc(kAlign, (bytes + kAlign - 1) / kAlign * kAlign);
    TORCH_CHECK(p != nullptr, "the host has no memory for ", bytes, " pinned bytes");
    std::lock_guard<std::mutex> lock(memory_mutex);
    pinned_blocks[p] = bytes;
    return {p, p, &free_pinned, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_pinned; }
  void copy_data(void* dst, const void* src, size_t n) const override { default_copy_data(dst, src, n); }
};
inline PinnedAllocator pinned_allocator;

inline bool is_pinned(const void* p) {
  std::lock_guard<std::mutex> lock(memory_mutex);
  auto it = pinned_blocks.upper_bound(const_cast<void*>(p));
  if (it == pinned_blocks.begin()) return false;
  --it;
  return static_cast<const char*>(p) < static_cast<char*>(it->first) + it->second;
}

}  // namespace sim
