// Copies between pinned memory and the device that do not wait, as late as a device may make them. What comes to the
// host arrives when the host waits for it, and is 0xFF until then; what goes to the device must still be unchanged when
// the host learns that it has been read. A missing event or synchronize shows.
#pragma once
#include <deque>

#include <ATen/core/LegacyTypeDispatch.h>

#include "memory.h"

namespace sim {

struct Transfer {
  int64_t number;
  at::Tensor host;   // pinned; held here, so that its memory is not used again before
  at::Tensor value;  // to the host: what will arrive; from the host: what was read
  bool to_host;
};

inline std::atomic<bool> late_transfers{true};
inline std::mutex transfers_mutex;
inline std::deque<Transfer> transfers;  // by number, under transfers_mutex
inline int64_t transfers_begun = 0;

constexpr size_t kMaxTransfers = 4096;  // then the oldest are finished: a program may never wait at all

inline void finish(const Transfer& t) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  if (t.to_host) {
    t.host.copy_(t.value);
    return;
  }
  const auto now = t.host.contiguous();
  TORCH_CHECK(std::memcmp(now.data_ptr(), t.value.data_ptr(), now.nbytes()) == 0, c10::get_privateuse1_backend(),
              ": pinned memory of shape ", t.host.sizes(), " was changed after a non_blocking copy from it began and "
              "before the host waited for the copy: the device may have read either value. Record an event after the ",
              "copy and wait for it before the buffer is used again");
}

// Finishes what began up to `number`; says whether there was anything.
inline bool finish_transfers(int64_t number = INT64_MAX) {
  bool any = false;
  while (true) {
    Transfer next;
    {
      std::lock_guard<std::mutex> lock(transfers_mutex);
      if (transfers.empty() || transfers.front().number > number) return any;
      next = std::move(transfers.front());
      transfers.pop_front();
    }
    any = true;
    finish(next);
  }
}

inline void begin_transfer(const at::Tensor& host, at::Tensor value, bool to_host) {
  size_t waiting;
  int64_t oldest;
  {
    std::lock_guard<std::mutex> lock(transfers_mutex);
    transfers.push_back({++transfers_begun, host, std::move(value), to_host});
    waiting = transfers.size(), oldest = transfers.front().number;
  }
  if (waiting > kMaxTransfers) finish_transfers(oldest);
}

inline bool on_its_way_to(const at::Tensor& host) {  // a copy in the device's order must see what arrives before it
  std::lock_guard<std::mutex> lock(transfers_mutex);
  for (const auto& t : transfers)
    if (t.to_host && t.host.is_alias_of(host)) return true;
  return false;
}

inline int64_t transfers_so_far() {
  std::lock_guard<std::mutex> lock(transfers_mutex);
  return transfers_begun;
}

}  // namespace sim
