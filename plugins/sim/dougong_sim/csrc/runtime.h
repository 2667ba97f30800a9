// What torch asks of any accelerator: current device, streams, events, generators. Kernels run at once on the calling
// thread, whatever the stream; only transfers are late. What a capture must not do is refused.
#pragma once
#include <array>
#include <chrono>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/version.h>

#include "transfers.h"

namespace sim {

inline thread_local int streams_in_use[kMaxDevices] = {};  // current stream id per device; 0 is the default stream
inline std::atomic<int> next_stream{1};

inline void refuse_in_capture(const char* what) {
  TORCH_CHECK(!capture_pool, c10::get_privateuse1_backend(), ": ", what,
              " is not possible while a graph is being captured: the device runs nothing until the graph is replayed. ",
              "Move it before the capture or after the replay");
}

inline void wait(const char* what, int64_t number = INT64_MAX) {
  refuse_in_capture(what);
  finish_transfers(number);
}

struct EventState {
  bool recorded = false;
  int64_t transfers = 0;  // begun before the event
  std::chrono::steady_clock::time_point when;
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kSim; }
  c10::Device exchangeDevice(c10::Device d) const override {
    auto old = getDevice();
    setDevice(d);
    return old;
  }
  c10::Device getDevice() const override { return device(current_device); }
  void setDevice(c10::Device d) const override { current_device = index_or_current(d); }
  void uncheckedSetDevice(c10::Device d) const noexcept override {
    if (d.has_index()) current_device = d.index();
  }
  c10::DeviceIndex deviceCount() const noexcept override { return static_cast<c10::DeviceIndex>(device_count); }
  void synchronizeDevice(const c10::DeviceIndex) const override { wait("synchronising the device"); }

  static c10::Stream stream(int index, int id) { return c10::Stream(c10::Stream::UNSAFE, device(index), id); }
  c10::Stream getStream(c10::Device d) const override {
    int i = index_or_current(d);
    return stream(i, streams_in_use[i]);
  }
  c10::Stream getDefaultStream(c10::Device d) const override { return stream(index_or_current(d), 0); }
  c10::Stream getNewStream(c10::Device d, int) const override { return stream(index_or_current(d), next_stream++); }
  c10::Stream getStreamFromGlobalPool(c10::Device d, bool) const override { return getNewStream(d, 0); }
  c10::Stream exchangeStream(c10::Stream s) const override {
    auto old = getStream(s.device());
    streams_in_use[s.device().index()] = static_cast<int>(s.id());
    return old;
  }
  bool queryStream(const c10::Stream&) const override {
    refuse_in_capture("querying a stream");
    return !finish_transfers();  // "not yet" once, as a device that is about to be done
  }
  void synchronizeStream(const c10::Stream&) const override { wait("synchronising a stream"); }
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 13  // the hook is new in torch 2.13
  bool isStreamCapturing(const c10::Stream&) const override { return capture_pool != nullptr; }
#endif

  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    if (*event == nullptr) *event = new EventState;
    auto* e = static_cast<EventState*>(*event);
    e->recorded = true, e->when = std::chrono::steady_clock::now(), e->transfers = transfers_so_far();
  }
  void block(void*, const c10::Stream&) const override {}  // kernels run in the order of their calls
  bool queryEvent(void* event) const override {
    refuse_in_capture("querying an event");
    return event == nullptr || !finish_transfers(static_cast<EventState*>(event)->transfers);
  }
  void synchronizeEvent(void* event) const override {
    wait("waiting for an event on the host", event ? static_cast<EventState*>(event)->transfers : 0);
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override { delete static_cast<EventState*>(event); }
  double elapsedTime(void* from, void* to, const c10::DeviceIndex) const override {
    auto *a = static_cast<EventState*>(from), *b = static_cast<EventState*>(to);
    TORCH_CHECK(a && b && a->recorded && b->recorded, "elapsed_time: both events must have been recorded");
    return std::chrono::duration<double, std::milli>(b->when - a->when).count();
  }
};

// A generator of the device: its own state, the CPU's algorithm. Kernels receive the inner generator.
struct Generator final : c10::GeneratorImpl {
  explicit Generator(int index, uint64_t seed = c10::default_rng_seed_val)
      : GeneratorImpl(sim::device(index), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)),
        inner(at::detail::createCPUGenerator(seed)) {}
  c10::GeneratorImpl& impl() const { return *inner.unsafeGetGeneratorImpl(); }
  void set_current_seed(uint64_t seed) override { impl().set_current_seed(seed); }
  uint64_t current_seed() const override { return impl().current_seed(); }
  uint64_t seed() override { return impl().seed(); }
  void set_offset(uint64_t offset) override { impl().set_offset(offset); }
  uint64_t get_offset() const override { return impl().get_offset(); }
  void set_state(const c10::TensorImpl& state) override { impl().set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return impl().get_state(); }
  Generator* clone_impl() const override {
    auto* copy = new Generator(device_.index());
    copy->inner = inner.clone();
    return copy;
  }
  at::Generator inner;
};

inline const at::Generator& default_generator(int index) {
  static std::array<at::Generator, kMaxDevices> all = [] {
    std::array<at::Generator, kMaxDevices> made;
    for (int i = 0; i < kMaxDevices; i++) made[i] = at::make_generator<Generator>(i);
    return made;
  }();
  return all[index < 0 ? current_device : index];
}

inline void resize_storage(c10::StorageImpl& storage, size_t bytes) {
  auto grown = allocate(bytes, storage.device().index(), capture_pool);
  if (size_t common = std::min(bytes, storage.nbytes())) std::memcpy(grown.get(), storage.data(), common);
  storage.set_data_ptr_noswap(std::move(grown));
  storage.set_nbytes(bytes);
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return device_count > 0; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return static_cast<c10::DeviceIndex>(device_count); }
  c10::DeviceIndex getCurrentDevice() const override { return static_cast<c10::DeviceIndex>(current_device); }
  void setCurrentDevice(c10::DeviceIndex i) const override { current_device = check_index(i); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex i) const override {
    return std::exchange(current_device, check_index(i));
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex i) const override {
    return i < 0 ? getCurrentDevice() : exchangeDevice(i);
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex i) const override { return default_generator(i); }
  at::Generator getNewGenerator(c10::DeviceIndex i) const override {
    return at::make_generator<Generator>(i < 0 ? current_device : check_index(i));
  }
  at::Device getDeviceFromPtr(void* p) const override {
    int index = device_of_pointer(p);
    TORCH_CHECK(index >= 0, "the pointer is not memory of a ", c10::get_privateuse1_backend(), " device");
    return device(index);
  }
  bool isPinnedPtr(const void* p) const override { return is_pinned(p); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    resize_storage(*storage.unsafeGetStorageImpl(), bytes);
  }
};

}  // namespace sim
