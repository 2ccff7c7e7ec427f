// Takes the place of csrc/cuda/launch.h: the device is the CPU, a launch runs the kernel under the shim at
// once.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "device.cuh"
#include "shim.h"

namespace rk {
namespace cuda {

using torch::stable::Tensor;

inline bool on_device(const Tensor& t) { return t.is_cpu(); }

class Device {
 public:
  explicit Device(const Tensor&) {}

  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t blocks, int64_t shared_bytes,
              Arguments&&... arguments) const {
    if (blocks == 0) return;
    shim::launch(reinterpret_cast<void*>(kernel), blocks, kThreads, shared_bytes,
                 [&] { kernel(arguments...); });
  }

  template <class T>
  void read(const T* p, size_t n, T* to) const {
    std::copy_n(p, n, to);
  }
  template <class T>
  T read(const T* p) const {
    return *p;
  }
};

}  // namespace cuda
}  // namespace rk
