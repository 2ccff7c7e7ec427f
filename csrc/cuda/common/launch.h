// Devices, streams and launches.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cuda/common/device.cuh"
#include "cuda/common/driver.h"
#include "stable/check.h"

namespace rk {
namespace cuda {

using torch::stable::Tensor;

inline bool on_device(const Tensor& t) { return t.is_cuda(); }

inline void check(RK_RUNTIME(Error_t) error) {
  RK_CHECK(error == RK_RUNTIME(Success), "rankkernels: GPU error: ", RK_RUNTIME(GetErrorString)(error));
}

// torch's current stream. The function is in a library that only a CUDA build of torch has, and has loaded by
// now: it is looked up there, so that this extension links, and is imported, beside every build of torch.
inline RK_RUNTIME(Stream_t) current_stream(int32_t device) {
  using GetStream = AOTITorchError (*)(int32_t, void**);
  static const GetStream get_stream = [] {
    void* library = loaded(kTorchLibrary);
    return library ? reinterpret_cast<GetStream>(dlsym(library, "aoti_torch_get_current_cuda_stream"))
                   : nullptr;
  }();
  RK_CHECK(get_stream, "rankkernels: this build of torch has no GPU");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(get_stream(device, &stream));
  return static_cast<RK_RUNTIME(Stream_t)>(stream);
}

// The device of a tensor, made torch's and this library's current one as long as this lives, and its stream.
class Device {
 public:
  explicit Device(const Tensor& like) : guard_(like.get_device_index()) {
    check(RK_RUNTIME(SetDevice)(like.get_device_index()));
    stream_ = current_stream(like.get_device_index());
  }

  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t blocks, int64_t shared_bytes,
              Arguments&&... arguments) const {
    RK_CHECK(blocks <= INT32_MAX, "rankkernels: too much work for one launch, ", blocks, " blocks");
    if (blocks == 0) return;
    kernel<<<static_cast<unsigned>(blocks), kThreads, shared_bytes, stream_>>>(
        std::forward<Arguments>(arguments)...);
    check(RK_RUNTIME(GetLastError)());
  }

  // Copies the n values at `p` when all that was launched before is done; waits for it.
  template <class T>
  void read(const T* p, size_t n, T* to) const {
    check(RK_RUNTIME(MemcpyAsync)(to, p, n * sizeof(T), RK_RUNTIME(MemcpyDeviceToHost), stream_));
    check(RK_RUNTIME(StreamSynchronize)(stream_));
  }
  template <class T>
  T read(const T* p) const {
    T value;
    read(p, 1, &value);
    return value;
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  RK_RUNTIME(Stream_t) stream_;
};

}  // namespace cuda
}  // namespace rk
