// The operators that cannot fall back (they make or move memory), and the registrations. One translation unit: it
// compiles in well under a minute. No Python header is included, so that one build serves every Python version.
#include <ATen/InferSize.h>
#include <ATen/TensorUtils.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/view_cpu_dispatch.h>
#include <torch/library.h>

#include "dispatch.h"

namespace sim {
namespace {

using at::Tensor;

Tensor empty(at::IntArrayRef sizes, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device> where, std::optional<bool> pin, std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(!pin.value_or(false), "only host memory can be pinned");
  DeviceSwitch to(where ? index_or_current(*where) : current_device);
  return at::detail::empty_generic(sizes, &device_allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   dtype.value_or(at::get_default_dtype_as_scalartype()), format);
}

Tensor empty_strided(at::IntArrayRef sizes, at::IntArrayRef strides, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<at::Device> where, std::optional<bool> pin) {
  TORCH_CHECK(!pin.value_or(false), "only host memory can be pinned");
  return empty_strided_on(where ? index_or_current(*where) : current_device, sizes, strides,
                          dtype.value_or(at::get_default_dtype_as_scalartype()));
}

// Copies of every direction. In a capture only what a device could do later on its own: between device tensors, and
// from or to pinned host memory without waiting.
Tensor copy_from(const Tensor& src, const Tensor& dst, bool non_blocking) {
  auto* graph = Graph::active();
  for (const auto& host : {src, dst}) {
    if (!graph || on_device(host)) continue;
    if (!non_blocking || !is_pinned(host.storage().data()))
      refuse_in_capture("a copy to or from the host that is not both non_blocking and of pinned memory");
  }
  const bool to_host = !on_device(dst), from_host = !on_device(src);
  const bool late = !graph && non_blocking && late_transfers && is_pinned((to_host ? dst : src).storage().data());
  if (!graph && (late ? from_host && on_its_way_to(src) : to_host || from_host)) finish_transfers();
  Aliases aliases;
  auto from = on_device(src) ? aliases.of(src) : src;
  auto to = on_device(dst) ? aliases.of(dst) : dst;
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  if (late && to_host && dst.numel() > 0) {
    begin_transfer(dst, from.to(dst.scalar_type(), /*non_blocking=*/false, /*copy=*/true).expand(dst.sizes()), true);
    if (dst.is_contiguous()) std::memset(dst.data_ptr(), 0xFF, dst.nbytes());
    return dst;
  }
  to.copy_(from);
  if (late && from_host && src.numel() > 0) begin_transfer(src, src.contiguous().clone(), false);
  if (graph) {
    static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("aten::copy_", "");
    graph->add({op, {to, from, false}, {}});
  }
  return dst;
}

Tensor copy_from_and_resize(const Tensor& src, const Tensor& dst) {
  if (!dst.sizes().equals(src.sizes())) dst.resize_(src.sizes());
  return copy_from(src, dst, false);
}

at::Scalar read_scalar(const Tensor& t) {
  wait("reading a value on the host (item(), int(), bool(), if ...)");
  return Aliases().of(t).item();
}

const Tensor& resize(const Tensor& t, c10::SymIntArrayRef sizes, std::optional<at::MemoryFormat> format) {
  auto* impl = t.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(C10_AS_INTARRAYREF_SLOW(sizes));
  if (format && *format != at::MemoryFormat::Preserve) impl->empty_tensor_restride(*format);
  size_t need = t.numel() == 0 ? 0 : (t.storage_offset() + t.numel()) * t.itemsize();
  if (t.storage().nbytes() < need) resize_storage(*t.storage().unsafeGetStorageImpl(), need);
  return t;
}

Tensor& set_storage(Tensor& t, at::Storage storage, int64_t offset, at::IntArrayRef sizes, at::IntArrayRef strides) {
  auto* impl = t.unsafeGetTensorImpl();
  TORCH_CHECK(storage.device() == t.device(), "set_: the tensor is on ", t.device(), ", the storage on ", storage.device());
  size_t need = at::detail::computeStorageNbytes(sizes, strides, t.itemsize(), offset);
  if (storage.nbytes() < need) resize_storage(*storage.unsafeGetStorageImpl(), need);
  impl->set_storage_keep_dtype(std::move(storage));
  impl->set_sizes_and_strides(sizes, strides, offset);
  return t;
}

Tensor& set_tensor(Tensor& t, const Tensor& source) {
  return set_storage(t, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

Tensor& set_whole_storage(Tensor& t, at::Storage storage) {
  auto count = static_cast<int64_t>(storage.nbytes() / t.itemsize());
  return set_storage(t, std::move(storage), 0, {count}, {1});
}

Tensor& set_empty(Tensor& t) {
  auto fresh = empty_strided_on(t.device().index(), {0}, {1}, t.scalar_type());
  return set_tensor(t, fresh);
}

// A tensor over the same memory that does not keep it alive: what a recorded task remembers of its arguments.
Tensor unowned(const Tensor& t) {
  auto storage = c10::Storage(c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), t.storage().nbytes(), c10::DataPtr(t.storage().mutable_data(), t.device()),
      &device_allocator, false));
  auto out = at::detail::make_tensor<c10::TensorImpl>(std::move(storage),
                                                      c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), t.dtype());
  out.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
  return out;
}

Tensor reshape_alias(const Tensor& t, at::IntArrayRef sizes, at::IntArrayRef strides) {
  return at::cpu::as_strided(t, sizes, strides, t.storage_offset());
}

TORCH_LIBRARY_IMPL(dougong_sim, PrivateUse1, m) { m.impl("unowned", &unowned); }

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &read_scalar);
  m.impl("resize_", &resize);
  m.impl("set_", &set_empty);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("set_.source_Storage", &set_whole_storage);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  // Views only compute sizes and strides: the CPU's functions serve any device, and save the fallback's work.
  m.impl("view", &at::cpu::view);
  m.impl("as_strided", &at::cpu::as_strided);
  m.impl("_reshape_alias", &reshape_alias);
}

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

const bool registered = [] {
  c10::SetAllocator(kSim, &device_allocator);
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  return true;
}();

// What Python sees, as torch.ops.dougong_sim.* and torch.classes.dougong_sim.*.
TORCH_LIBRARY(dougong_sim, m) {
  m.def("set_device_count(int count) -> ()", [](int64_t n) {
    TORCH_CHECK(n >= 1 && n <= kMaxDevices, "1 to ", kMaxDevices, " devices, not ", n);
    device_count = static_cast<int>(n);
  });
  m.def("device_count() -> int", []() -> int64_t { return device_count; });
  m.def("current_device() -> int", []() -> int64_t { return current_device; });
  m.def("set_device(int index) -> ()", [](int64_t i) { current_device = check_index(static_cast<int>(i)); });
  m.def("set_capacity(int index, int bytes) -> ()", [](int64_t i, int64_t bytes) {
    TORCH_CHECK(bytes > 0, "a capacity is a positive number of bytes, not ", bytes);
    std::lock_guard<std::mutex> lock(memory_mutex);
    counters[check_index(static_cast<int>(i))].capacity = bytes;
  });
  m.def("memory(int index) -> int[]", [](int64_t i) {
    std::lock_guard<std::mutex> lock(memory_mutex);
    const auto& c = counters[check_index(static_cast<int>(i))];
    return std::vector<int64_t>{c.capacity, c.allocated, c.peak_allocated, c.reserved, c.peak_reserved,
                                c.allocations, c.frees, c.ooms};
  });
  m.def("reset_peak(int index) -> ()", [](int64_t i) { device_allocator.resetPeakStats(static_cast<c10::DeviceIndex>(i)); });
  m.def("set_poison(bool on) -> ()", [](bool on) { poison_new_memory = on; });
  m.def("set_late_transfers(bool on) -> ()", [](bool on) { late_transfers = on; });
  m.def("kernel_calls() -> int", []() -> int64_t { return kernel_calls; });
  m.def("is_capturing() -> bool", []() { return capture_pool != nullptr; });
  m.def("synchronize() -> ()", [] { wait("synchronising the device"); });
  m.def("seed(int index, int seed) -> ()", [](int64_t i, int64_t seed) {
    default_generator(check_index(static_cast<int>(i))).get<Generator>()->set_current_seed(static_cast<uint64_t>(seed));
  });
  m.def("rng_state(int index) -> Tensor", [](int64_t i) {
    return Tensor(default_generator(check_index(static_cast<int>(i))).get<Generator>()->get_state());
  });
  m.def("set_rng_state(int index, Tensor state) -> ()", [](int64_t i, const Tensor& state) {
    default_generator(check_index(static_cast<int>(i))).get<Generator>()->set_state(*state.unsafeGetTensorImpl());
  });
  m.def("unowned(Tensor tensor) -> Tensor");

  m.class_<GraphPool>("GraphPool").def(torch::init<int64_t>());
  m.class_<Graph>("Graph")
      .def(torch::init<>())
      .def("capture_begin", &Graph::capture_begin)
      .def("capture_end", &Graph::capture_end)
      .def("abort", &Graph::abort)
      .def("group_begin", &Graph::group_begin)
      .def("group_end", &Graph::group_end)
      .def("update_begin", &Graph::update_begin)
      .def("update_end", &Graph::update_end)
      .def("replay", &Graph::replay)
      .def("num_calls", &Graph::num_calls);
}

}  // namespace
}  // namespace sim
