// Graphs that record and go stale. A capture writes down every kernel call on the device: the operator, the addresses,
// and by value all that came from the host (numbers, lists, host tensors). A replay runs the same calls on the same
// addresses. What the host baked in stays as it was until the group of calls is recorded again (`update_begin`).
#pragma once
#include <unordered_map>
#include <vector>

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/custom_class.h>

#include "runtime.h"

namespace sim {

struct Output {  // the part of a call's result that has an address of its own
  size_t position;  // which return value
  int64_t element;  // which tensor of a list; -1: the value is a tensor
  at::Tensor target;  // a CPU tensor over the recorded address
};

struct Call {
  c10::OperatorHandle op;
  std::vector<c10::IValue> args;  // tensors are CPU tensors over recorded addresses, without ownership
  std::vector<Output> outputs;
};

struct External {  // memory from outside the graph's pool: it must still be there at every replay
  c10::weak_intrusive_ptr<c10::StorageImpl> storage;
  void* ptr;
};

struct Group {  // calls that are recorded again together
  std::vector<Call> calls;
  std::shared_ptr<Pool> pool;  // temporaries of an update; empty: those of the capture
  std::vector<External> externals;
  std::unordered_map<c10::StorageImpl*, void*> known;  // what is already in `externals`
};

struct GraphPool : torch::CustomClassHolder {
  explicit GraphPool(int64_t index) : pool(std::make_shared<Pool>(check_index(static_cast<int>(index)))) {}
  std::shared_ptr<Pool> pool;
};

inline void run_call(const Call& call, torch::jit::Stack& stack) {
  stack.assign(call.args.begin(), call.args.end());
  call.op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &stack);
  size_t first = stack.size() - call.op.schema().returns().size();
  for (const auto& out : call.outputs) {
    const auto& value = stack[first + out.position];
    const auto result = out.element < 0 ? value.toTensor() : value.toTensorList().get(out.element);
    TORCH_CHECK(result.sizes().equals(out.target.sizes()), "graph replay: ", call.op.schema().operator_name(),
                " gave shape ", result.sizes(), " where the capture had ", out.target.sizes());
    out.target.copy_(result);
  }
}

struct Graph : torch::CustomClassHolder {
  std::vector<Group> groups;
  std::shared_ptr<Pool> pool;
  bool captured = false, updating = false;
  size_t target = 0;  // the group that calls go to
  bool strict = false;
  Group previous;  // during an update: what the group held before

  static Graph*& active() {  // the graph that this thread records into
    static thread_local Graph* graph = nullptr;
    return graph;
  }

  void capture_begin(const c10::intrusive_ptr<GraphPool>& from) {
    TORCH_CHECK(active() == nullptr, "graph capture: this thread is already capturing a graph");
    TORCH_CHECK(!captured, "graph capture: this graph already holds a capture; make a new one");
    TORCH_CHECK(from->pool->device_index == current_device, "graph capture: the pool is on ",
                device(from->pool->device_index), " but the current device is ", device(current_device));
    pool = from->pool;
    groups.assign(1, {});
    target = 0;
    pool->handed_out.clear();
    active() = this;
    capture_pool = pool;
  }

  void capture_end() {
    TORCH_CHECK(active() == this && !updating, "graph capture: capture_end without capture_begin");
    stop();
    captured = true;
    pool->poison();
  }

  void abort() {  // after an error in a capture or an update: nothing half-recorded can be replayed
    if (active() != this) return;
    stop();
    if (updating) {
      groups[target] = std::move(previous);
      updating = false;
    } else {
      groups.clear();
    }
  }

  int64_t group_begin() {
    TORCH_CHECK(active() == this && !updating, "graph capture: a group begins only inside a capture");
    groups.emplace_back();
    target = groups.size() - 1;
    return static_cast<int64_t>(target);
  }

  void group_end() {
    TORCH_CHECK(active() == this && !updating, "graph capture: a group ends only inside a capture");
    groups.emplace_back();
    target = groups.size() - 1;
  }

  // Records the calls of one group again. `same_calls`: refuse unless they are the same operators in the same order,
  // as a device does that rewrites the parameters of tasks but cannot add tasks.
  void update_begin(int64_t handle, bool same_calls) {
    TORCH_CHECK(active() == nullptr, "graph update: this thread is already capturing or updating a graph");
    TORCH_CHECK(captured, "graph update: nothing has been captured");
    TORCH_CHECK(handle > 0 && handle < static_cast<int64_t>(groups.size()), "graph update: no group ", handle);
    target = static_cast<size_t>(handle);
    strict = same_calls;
    previous = std::move(groups[target]);
    groups[target] = Group{{}, std::make_shared<Pool>(pool->device_index), {}, {}};
    updating = true;
    active() = this;
    capture_pool = groups[target].pool;
  }

  void update_end() {
    TORCH_CHECK(active() == this && updating, "graph update: update_end without update_begin");
    auto& group = groups[target];
    bool same = group.calls.size() == previous.calls.size();
    for (size_t i = 0; same && i < group.calls.size(); i++)
      same = group.calls[i].op.schema().operator_name() == previous.calls[i].op.schema().operator_name();
    const auto live = group.pool->live;
    const auto before = previous.calls.size(), after = group.calls.size();
    if ((strict && !same) || live > 0) abort();
    TORCH_CHECK(!strict || same, "graph update: the group held ", before, " calls, the update made ", after,
                " or others; a task's operator cannot change");
    TORCH_CHECK(live == 0, "graph update: ", live, " tensors of the update are still held after it. The calls after the ",
                "group read the addresses of the capture: write results into tensors given as out=");
    stop();
    updating = false;
    previous = {};
  }

  void replay() {
    TORCH_CHECK(captured, "graph replay: nothing has been captured");
    refuse_in_capture("replaying another graph");
    for (const auto& group : groups)
      for (const auto& e : group.externals) {
        auto storage = e.storage.lock();
        TORCH_CHECK(storage && storage->data() == e.ptr, "graph replay: a tensor that the graph uses was ",
                    storage ? "moved" : "freed", " after the capture; tensors made before a capture and used in it ",
                    "must outlive the graph and keep their address");
      }
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    torch::jit::Stack stack;
    for (const auto& group : groups)
      for (const auto& call : group.calls) run_call(call, stack);
  }

  int64_t num_calls() const {
    size_t n = 0;
    for (const auto& group : groups) n += group.calls.size();
    return static_cast<int64_t>(n);
  }

  // Called by the dispatch of every kernel while this graph records.
  void add(Call call) { groups[target].calls.push_back(std::move(call)); }
  void uses(const c10::Storage& storage) {
    auto* impl = storage.unsafeGetStorageImpl();
    void* ptr = storage.mutable_data();
    if (ptr == nullptr || pool->holds(ptr) || (capture_pool && capture_pool->holds(ptr))) return;
    auto& group = groups[target];
    auto [it, fresh] = group.known.emplace(impl, ptr);
    if (!fresh && it->second == ptr) return;
    it->second = ptr;
    group.externals.push_back({c10::weak_intrusive_ptr<c10::StorageImpl>(
                             c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(impl)), ptr});
  }

  ~Graph() override {
    if (active() == this) stop();
  }

 private:
  static void stop() {
    active() = nullptr;
    capture_pool.reset();
  }
};

}  // namespace sim
