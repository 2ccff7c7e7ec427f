// Whether this binary runs beside this torch, and on the machine's GPUs. NVML is asked, not CUDA: a process
// that has started CUDA cannot fork any more, and importing the package must not take that away.
#pragma once

#include <dlfcn.h>
#include <stdint.h>

namespace rk {
namespace cuda {

enum class Refusal : int64_t { none, architecture, driver, torch };

// The library that a torch for this kind of GPU has, and the one that a torch for the other kind has.
#if defined(__HIPCC__)
constexpr bool kHip = true;
constexpr const char *kTorchLibrary = "libtorch_hip.so", *kOtherTorchLibrary = "libtorch_cuda.so";
#else
constexpr bool kHip = false;
constexpr const char *kTorchLibrary = "libtorch_cuda.so", *kOtherTorchLibrary = "libtorch_hip.so";
#endif

// A library that this process has loaded already, or null.
inline void* loaded(const char* library) { return dlopen(library, RTLD_NOLOAD | RTLD_LAZY); }

#if defined(__CUDA_ARCH_LIST__)  // nvcc's, of what it compiles for: 750,800,900

#  if !defined(RK_CUDA_PTX)
#    define RK_CUDA_PTX 0  // the architecture whose code a driver compiles for newer ones (setup.py)
#  endif

// Code runs on later GPUs of its generation, and what is there as PTX on every later one.
inline bool has_code_for(int major, int minor) {
  const int device = 100 * major + 10 * minor;
  constexpr int kCompiled[] = {__CUDA_ARCH_LIST__};
  for (const int compiled : kCompiled)
    if (compiled <= device && (compiled / 100 == major || compiled == RK_CUDA_PTX)) return true;
  return false;
}

inline Refusal find_refusal() {
  void* nvml = dlopen("libnvidia-ml.so.1", RTLD_LAZY | RTLD_LOCAL);
  if (!nvml) return Refusal::none;  // no driver, or one without it: CUDA will say
  const auto function = [&](auto* type, const char* name) {
    return reinterpret_cast<decltype(type)>(dlsym(nvml, name));
  };
  const auto start = function(static_cast<int (*)()>(nullptr), "nvmlInit_v2");
  const auto stop = function(static_cast<int (*)()>(nullptr), "nvmlShutdown");
  const auto get_version = function(static_cast<int (*)(int*)>(nullptr), "nvmlSystemGetCudaDriverVersion_v2");
  const auto get_count = function(static_cast<int (*)(unsigned*)>(nullptr), "nvmlDeviceGetCount_v2");
  const auto get_device =
      function(static_cast<int (*)(unsigned, void**)>(nullptr), "nvmlDeviceGetHandleByIndex_v2");
  const auto get_capability =
      function(static_cast<int (*)(void*, int*, int*)>(nullptr), "nvmlDeviceGetCudaComputeCapability");
  if (!start || !stop || !get_version || !get_count || !get_device || !get_capability || start() != 0)
    return Refusal::none;
  Refusal refusal = Refusal::none;
  unsigned count = 0;
  if (get_count(&count) != 0) count = 0;
  for (unsigned i = 0; i < count; ++i) {
    void* device = nullptr;
    int major = 0, minor = 0;
    if (get_device(i, &device) == 0 && get_capability(device, &major, &minor) == 0 &&
        !has_code_for(major, minor))
      refusal = Refusal::architecture;
  }
  int version = 0;  // of the newest CUDA that the driver runs: 12080 for 12.8, and all of 12
  if (count && get_version(&version) == 0 && version / 1000 < CUDART_VERSION / 1000)
    refusal = Refusal::driver;
  stop();
  return refusal;
}

#else

inline Refusal find_refusal() { return Refusal::none; }

#endif

inline Refusal refusal() {
  static const Refusal found = loaded(kOtherTorchLibrary) ? Refusal::torch : find_refusal();
  return found;
}

}  // namespace cuda
}  // namespace rk
