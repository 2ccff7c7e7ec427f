// CUDA C++ kernels on the CPU, for tests: a fiber for each CUDA thread, one block after another, one OS
// thread.
//
// What it finds, with the sanitizers: reads and writes out of bounds, of shared memory too, which is a heap
// buffer of the launch's exact size (ASan); misaligned vector accesses (UBSan); barriers and shuffles that
// not all threads reach (reported here as a deadlock); shared memory read before it is written (it starts as
// NaN bytes); and races, because threads run in the order SHIM_ORDER, forward, reverse or a number that seeds
// a random one, each as far as its next barrier or shuffle, and the blocks in that order too.
#pragma once

#include <cxxabi.h>
#include <dlfcn.h>
#include <sanitizer/common_interface_defs.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#define __global__ __attribute__((visibility("default")))  // so that dladdr knows their names
#define __device__
#define __launch_bounds__(...)
#define RK_UNROLL
#define RK_SHARED(T, name) T* const name = reinterpret_cast<T*>(shim::block().shared.get())

namespace shim {

constexpr size_t kStackBytes = 64 << 10;
constexpr unsigned kWarp = 32;

enum class State { kRuns, kAtBarrier, kAtShuffle, kDone };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  State state;
  unsigned mask;       // of the shuffle it waits at
  uint64_t values[2];  // given to this shuffle and to the one before, which others may still read
  unsigned shuffles;   // so far
};

struct Block {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::unique_ptr<unsigned char[]> shared;
  std::function<void()> kernel;
  unsigned threads = 0, current = 0, index = 0;
  ucontext_t scheduler;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
};

inline Block& block() {
  static Block block;
  return block;
}

[[noreturn]] inline void fail(const char* what, unsigned thread) {
  std::fprintf(stderr, "shim: %s, block %u, thread %u\n", what, block().index, thread);
  std::abort();
}

struct ThreadIndex {
  struct {
    operator unsigned() const { return block().current; }
  } x;
};
struct BlockIndex {
  struct {
    operator unsigned() const { return block().index; }
  } x;
};

// Back to the scheduler; returns when it lets this fiber go on.
inline void wait(State state) {
  Block& b = block();
  Fiber& fiber = *b.fibers[b.current];
  fiber.state = state;
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(state == State::kDone ? nullptr : &fake_stack, b.scheduler_stack,
                                 b.scheduler_stack_bytes);
  swapcontext(&fiber.context, &b.scheduler);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}

inline void enter() {
  Block& b = block();
  __sanitizer_finish_switch_fiber(nullptr, &b.scheduler_stack, &b.scheduler_stack_bytes);
  b.kernel();
  wait(State::kDone);
}

inline void start(Fiber& fiber) {
  fiber.state = State::kRuns;
  fiber.shuffles = 0;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, enter, 0);
}

inline void resume(unsigned thread) {
  Block& b = block();
  b.current = thread;
  Fiber& fiber = *b.fibers[thread];
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, fiber.stack.get(), kStackBytes);
  swapcontext(&b.scheduler, &fiber.context);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}

// Lets go on the warps' lanes whose shuffle all lanes of its mask have reached; whether there were any.
inline bool release_shuffles() {
  Block& b = block();
  std::vector<unsigned> released;
  for (unsigned t = 0; t < b.threads; ++t) {
    const Fiber& fiber = *b.fibers[t];
    if (fiber.state != State::kAtShuffle) continue;
    bool complete = true;
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      if (!(fiber.mask >> lane & 1)) continue;
      const unsigned other = t / kWarp * kWarp + lane;
      complete = complete && other < b.threads && b.fibers[other]->state == State::kAtShuffle &&
                 b.fibers[other]->mask == fiber.mask;
    }
    if (complete) released.push_back(t);
  }
  for (const unsigned t : released) b.fibers[t]->state = State::kRuns;
  return !released.empty();
}

// As release_shuffles, for the barrier; threads that have returned count as being there.
inline bool release_barrier() {
  Block& b = block();
  bool any = false;
  for (unsigned t = 0; t < b.threads; ++t) {
    if (b.fibers[t]->state == State::kAtShuffle) return false;
    any = any || b.fibers[t]->state == State::kAtBarrier;
  }
  for (unsigned t = 0; t < b.threads; ++t)
    if (b.fibers[t]->state == State::kAtBarrier) b.fibers[t]->state = State::kRuns;
  return any;
}

inline std::vector<unsigned> ordered(unsigned n) {
  std::vector<unsigned> order(n);
  std::iota(order.begin(), order.end(), 0u);
  const char* name = std::getenv("SHIM_ORDER");
  if (!name || !std::strcmp(name, "forward")) return order;
  if (!std::strcmp(name, "reverse"))
    std::reverse(order.begin(), order.end());
  else
    std::shuffle(order.begin(), order.end(), std::mt19937(std::atoi(name)));
  return order;
}

inline void say_launch(void* address) {
  Dl_info found{};
  dladdr(address, &found);
  char* name = abi::__cxa_demangle(found.dli_sname, nullptr, nullptr, nullptr);
  const char* without_type = name ? std::strstr(name, "rk::cuda::") : nullptr;
  std::printf("launch of %s\n", without_type ? without_type : "a kernel without a name");
  std::fflush(stdout);
  std::free(name);
}

// `address`: the kernel's, which `kernel` calls.
inline void launch(void* address, unsigned blocks, unsigned threads, size_t shared_bytes,
                   std::function<void()> kernel) {
  if (std::getenv("SHIM_SAY_LAUNCHES")) say_launch(address);
  Block& b = block();
  b.kernel = std::move(kernel);
  b.threads = threads;
  while (b.fibers.size() < threads) b.fibers.push_back(std::make_unique<Fiber>());
  const std::vector<unsigned> thread_order = ordered(threads);
  for (const unsigned index : ordered(blocks)) {
    b.index = index;
    b.shared.reset(new unsigned char[shared_bytes]);
    std::memset(b.shared.get(), 0xff, shared_bytes);
    for (unsigned t = 0; t < threads; ++t) start(*b.fibers[t]);
    do {
      for (const unsigned t : thread_order)
        if (b.fibers[t]->state == State::kRuns) resume(t);
    } while (release_shuffles() || release_barrier());
    for (unsigned t = 0; t < threads; ++t)
      if (b.fibers[t]->state != State::kDone)
        fail("deadlock: a barrier or shuffle that not all threads reach", t);
  }
}

}  // namespace shim

static const shim::ThreadIndex threadIdx;
static const shim::BlockIndex blockIdx;

inline void __syncthreads() { shim::wait(shim::State::kAtBarrier); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int offset, int width) {
  static_assert(sizeof(T) <= 8, "a shuffle moves 4 or 8 bytes");
  shim::Block& b = shim::block();
  const unsigned me = b.current, lane = me % shim::kWarp, source = lane ^ offset;
  shim::Fiber& fiber = *b.fibers[me];
  if (!(mask >> lane & 1)) shim::fail("a lane is not in the mask of its own shuffle", me);
  if (source / width != lane / width || !(mask >> source & 1))
    shim::fail("a shuffle reads a lane that is not in its mask", me);
  const unsigned slot = fiber.shuffles++ % 2;
  std::memcpy(&fiber.values[slot], &value, sizeof(T));
  fiber.mask = mask;
  shim::wait(shim::State::kAtShuffle);
  std::memcpy(&value, &b.fibers[me - lane + source]->values[slot], sizeof(T));
  return value;
}

inline void __syncwarp(unsigned mask) { __shfl_xor_sync(mask, 0, 0, 32); }

template <class T>
T atomicCAS(T* p, T expected, T value) {
  const T before = *p;
  if (before == expected) *p = value;
  return before;
}

template <class T>
T atomicMin(T* p, T value) {
  const T before = *p;
  *p = std::min(before, value);
  return before;
}
