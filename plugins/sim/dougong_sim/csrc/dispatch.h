// The fallback for every operator: the kernel of the CPU runs on the device's own memory, without a copy. Tensors are
// passed as CPU tensors over the same addresses; what comes back becomes the caller's tensor again (in place, out=), a
// view of the same storage, or a new device tensor.
#pragma once
#include <ATen/EmptyTensor.h>
#include <ATen/core/enum_tag.h>
#include <ATen/core/List.h>
#include <c10/util/SmallVector.h>

#include "graph.h"

namespace sim {

inline std::atomic<int64_t> kernel_calls{0};

inline bool on_device(const at::Tensor& t) { return t.defined() && t.device().type() == kSim; }

// The CPU tensors of one call. Tensors that share a storage share it here too, so that kernels see their overlap.
class Aliases {
 public:
  struct Entry {
    at::Tensor original, alias;
    bool written;
  };

  at::Tensor of(const at::Tensor& t, bool written = false) {
    auto* source = t.storage().unsafeGetStorageImpl();
    c10::Storage* storage = nullptr;
    for (auto& [known, made] : storages_)
      if (known.unsafeGetStorageImpl() == source) storage = &made;
    if (storage == nullptr) {
      // Resizable, with the CPU's allocator: a kernel may grow an out= tensor, and `settle` then brings that home.
      storages_.emplace_back(t.storage(), c10::Storage(c10::make_intrusive<c10::StorageImpl>(
          c10::StorageImpl::use_byte_size_t(), source->nbytes(),
          c10::DataPtr(t.storage().mutable_data(), c10::Device(c10::kCPU)), c10::GetCPUAllocator(), true)));
      storage = &storages_.back().second;
      if (auto* graph = Graph::active()) graph->uses(t.storage());
    }
    auto alias = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(*storage),
                                                          c10::DispatchKeySet(c10::DispatchKey::CPU), t.dtype());
    alias.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
    entries_.push_back({t, alias, written});
    return alias;
  }

  // After the kernel: written tensors take over a new size, or memory that the kernel had to grow.
  bool settle() {
    bool changed = false;
    for (auto& [device_storage, cpu_storage] : storages_) {
      auto* impl = device_storage.unsafeGetStorageImpl();
      if (cpu_storage.data() == impl->data() && cpu_storage.nbytes() == impl->nbytes()) continue;
      resize_storage(*impl, cpu_storage.nbytes());
      if (impl->nbytes() > 0) std::memcpy(impl->mutable_data(), cpu_storage.data(), impl->nbytes());
      changed = true;
    }
    for (auto& e : entries_) {
      auto *from = e.alias.unsafeGetTensorImpl(), *to = e.original.unsafeGetTensorImpl();
      if (!e.written || (from->sizes().equals(to->sizes()) && from->strides().equals(to->strides()) &&
                         from->storage_offset() == to->storage_offset()))
        continue;
      to->set_sizes_and_strides(from->sizes(), from->strides(), from->storage_offset());
      changed = true;
    }
    return changed;
  }

  // The caller's tensor if `result` is one of the call's arguments; a view if it shares its memory; else undefined.
  at::Tensor original(const at::Tensor& result) const {
    for (const auto& e : entries_)
      if (e.alias.is_same(result)) return e.original;
    for (const auto& e : entries_) {
      if (e.alias.storage().unsafeGetStorageImpl() != result.storage().unsafeGetStorageImpl()) continue;
      auto view = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(e.original.storage()),
                                                           e.original.key_set(), result.dtype());
      view.unsafeGetTensorImpl()->set_sizes_and_strides(result.sizes(), result.strides(), result.storage_offset());
      return view;
    }
    return {};
  }

 private:
  c10::SmallVector<std::pair<c10::Storage, c10::Storage>, 8> storages_;  // device, CPU
  c10::SmallVector<Entry, 8> entries_;
};

struct DeviceSwitch {
  explicit DeviceSwitch(int index) : old(std::exchange(current_device, index)) {}
  ~DeviceSwitch() { current_device = old; }
  int old;
};

inline at::Tensor empty_strided_on(int index, at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType dtype) {
  DeviceSwitch to(index);
  return at::detail::empty_strided_generic(sizes, strides, &device_allocator,
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), dtype);
}

// A device tensor with the contents of a kernel's new output.
inline at::Tensor take(const at::Tensor& result, int index) {
  auto storage = result.storage();
  const bool sole = result.use_count() == 1 && storage.use_count() == 2;  // nobody but the caller and this function
  if (!capture_pool && sole && storage.nbytes() > 0 && storage.allocator() != nullptr) {
    c10::Storage mine(c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), storage.nbytes(),
                                                            adopt(storage, index), &device_allocator, true));
    auto out = at::detail::make_tensor<c10::TensorImpl>(std::move(mine),
                                                        c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), result.dtype());
    out.unsafeGetTensorImpl()->set_sizes_and_strides(result.sizes(), result.strides(), result.storage_offset());
    return out;
  }
  auto out = empty_strided_on(index, result.sizes(), result.strides(), result.scalar_type());
  if (result.numel() > 0) Aliases().of(out).copy_(result);
  return out;
}

[[noreturn]] inline void refuse_devices(const c10::FunctionSchema& schema, const std::string& argument, c10::Device a,
                                        c10::Device b) {
  TORCH_CHECK(false, "Expected all tensors to be on the same device, but found at least two devices, ", a, " and ", b,
              "! (argument ", argument, " of ", schema.operator_name(), ")");
}

// Operators whose result the host must see before it can go on.
inline void refuse_host_reads(const c10::OperatorHandle& op, const torch::jit::Stack& stack, size_t first) {
  const auto& schema = op.schema();
  bool reads = op.hasTag(at::Tag::data_dependent_output);
  if (op.hasTag(at::Tag::dynamic_output_shape)) {
    reads = true;
    if (schema.name() == "aten::index") reads = false;  // judged by its indices, below
    if (schema.name() == "aten::repeat_interleave") reads = stack.back().isNone();  // no output_size given
  }
  for (const auto& ret : schema.returns())
    reads |= ret.type()->kind() != c10::TypeKind::TensorType && ret.type()->kind() != c10::TypeKind::ListType;
  for (size_t i = first; i < stack.size(); i++)  // indexing by a mask: the number of elements depends on it
    if (stack[i].isOptionalTensorList())
      for (const auto& t : stack[i].toOptionalTensorVector())
        reads |= t && t->defined() && (t->scalar_type() == at::kBool || t->scalar_type() == at::kByte);
  if (reads) refuse_in_capture((schema.name() + " reads the device's data on the host, which").c_str());
}

inline void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  kernel_calls++;
  const auto& schema = op.schema();
  const auto& arguments = schema.arguments();
  const size_t first = stack->size() - arguments.size();
  auto* graph = Graph::active();
  if (graph) refuse_host_reads(op, *stack, first);

  Aliases aliases;
  std::optional<int> index;
  bool has_generator = false;
  std::optional<c10::Device> host;  // where a tensor lives that must not be mixed with device tensors
  size_t host_argument = 0;
  const bool aten = schema.name().rfind("aten::", 0) == 0;
  c10::SmallVector<size_t, 4> written;

  auto see = [&](const at::Tensor& t, size_t i, bool writes, bool may_be_host) -> at::Tensor {
    if (!t.defined()) return t;
    if (!on_device(t)) {
      if (aten && (writes || (t.dim() > 0 && !may_be_host))) host = t.device(), host_argument = i;
      return graph ? t.clone() : t;  // a capture bakes host values in
    }
    if (!index) index = t.device().index();
    if (*index != t.device().index()) refuse_devices(schema, arguments[i].name(), device(*index), t.device());
    return aliases.of(t, writes);
  };

  for (size_t i = 0; i < arguments.size(); i++) {
    auto& value = (*stack)[first + i];
    const auto* info = arguments[i].alias_info();
    const bool writes = info && info->isWrite();
    if (value.isTensor()) {
      value = see(value.toTensor(), i, writes, false);
      if (writes) written.push_back(i);
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& t : value.toTensorVector()) list.push_back(see(t, i, writes, false));
      value = std::move(list);
      if (writes) written.push_back(i);
    } else if (value.isOptionalTensorList()) {  // indices: these may live on the host
      c10::List<std::optional<at::Tensor>> list;
      for (const auto& t : value.toOptionalTensorVector())
        list.push_back(t ? std::optional<at::Tensor>(see(*t, i, false, true)) : std::nullopt);
      value = std::move(list);
    } else if (value.isDevice() && value.toDevice().type() == kSim) {
      index = index_or_current(value.toDevice());
      value = c10::Device(c10::kCPU);
    } else if (value.isGenerator()) {
      if (auto g = value.toGenerator(); g.defined() && g.device().type() == kSim)
        value = g.get<Generator>()->inner, has_generator = true;
    }
  }
  if (!index) index = current_device;
  if (host) refuse_devices(schema, arguments[host_argument].name(), device(*index), *host);
  if (!has_generator)
    for (size_t i = 0; i < arguments.size(); i++)  // no generator given: the device's own, not the CPU's
      if (arguments[i].name() == "generator" && (*stack)[first + i].isNone())
        (*stack)[first + i] = default_generator(*index).get<Generator>()->inner;

  std::vector<c10::IValue> args;
  if (graph) args.assign(stack->begin() + static_cast<int64_t>(first), stack->end());
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);

  if (!written.empty() && aliases.settle() && graph) {
    // A tensor was resized: the recorded argument must be a tensor over its memory of now.
    Aliases fresh;
    auto renew = [&](const at::Tensor& alias) {
      auto t = alias.defined() ? aliases.original(alias) : at::Tensor();
      return t.defined() ? fresh.of(t) : alias;
    };
    for (size_t i : written) {
      if (args[i].isTensor()) {
        args[i] = renew(args[i].toTensor());
      } else {
        c10::List<at::Tensor> list;
        for (const at::Tensor& t : args[i].toTensorVector()) list.push_back(renew(t));
        args[i] = std::move(list);
      }
    }
  }

  std::vector<Output> outputs;
  const size_t returns = schema.returns().size();
  const size_t first_return = stack->size() - returns;
  auto give = [&](const at::Tensor& result, size_t position, int64_t element) -> at::Tensor {
    if (!result.defined() || !result.device().is_cpu()) return result;
    if (auto mine = aliases.original(result); mine.defined()) return mine;
    auto made = take(result, *index);
    if (graph) outputs.push_back({position, element, Aliases().of(made)});
    return made;
  };
  for (size_t i = 0; i < returns; i++) {
    auto& value = (*stack)[first_return + i];
    if (value.isTensor()) {
      auto result = value.toTensor();
      value = c10::IValue();  // drop the stack's reference, so that the storage can be taken over
      value = give(result, i, -1);
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      int64_t element = 0;
      auto results = value.toTensorVector();
      value = c10::IValue();
      for (const at::Tensor& t : results) list.push_back(give(t, i, element++));
      value = std::move(list);
    }
  }
  const bool only_views = written.empty() && outputs.empty();
  if (graph && !only_views) graph->add({op, std::move(args), std::move(outputs)});
}

}  // namespace sim
