// As much of CUDA as csrc/ uses, on a CPU: with this folder on the include path a C++ compiler takes the .cu files as
// they are, and kernels run without a GPU. A block's threads are fibers that run in random order from one barrier to the
// next; blocks run one after the other, in random order too, except that the first one waits at its first memory fence
// until all others have ended. So a kernel that relies on an order which CUDA does not promise gives wrong results, and
// the sanitizers of the compiler see every access to memory.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <set>
#include <thread>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define CUDART_VERSION 0
#define __CUDA_ARCH_LIST__ emulated
#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static thread_local  // the block that waits has a thread of its own
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct alignas(8) uint2 {
  unsigned x, y;
};

inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }

inline thread_local dim3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace cuda_on_cpu {

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 64 << 10;

[[noreturn]] inline void stop(const char* reason) {
  std::fprintf(stderr, "cuda_on_cpu: %s\n", reason);
  std::abort();
}

class Block {
 public:
  // Runs `body` once for every thread.
  void run(unsigned threads, const std::function<void()>& body) {
    body_ = &body;
    fibers_.resize(threads);
    exchanged_.assign(threads, 0);
    for (auto& fiber : fibers_) {
      if (!fiber.stack) fiber.stack.reset(new char[kStack]);
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, &Block::enter, 0);
      fiber.waits = Waits::no;
      fiber.done = false;
    }
    std::vector<unsigned> order(threads);
    std::iota(order.begin(), order.end(), 0u);
    while (true) {
      std::shuffle(order.begin(), order.end(), random());
      for (const unsigned i : order) {
        if (!fibers_[i].done && fibers_[i].waits == Waits::no) resume(i);
      }
      if (std::all_of(fibers_.begin(), fibers_.end(), [](const Fiber& f) { return f.done; })) return;
      release();
    }
  }

  void wait_for_block() { pause(Waits::block); }

  unsigned exchange(unsigned value, unsigned distance) {
    const unsigned self = current_;
    exchanged_[self] = value;
    pause(Waits::warp);
    const unsigned other = exchanged_[self ^ distance];
    pause(Waits::warp);
    return other;
  }

  static std::mt19937& random() {
    static std::mt19937 generator;
    return generator;
  }

 private:
  enum class Waits { no, block, warp };

  struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    void* fake_stack = nullptr;  // of AddressSanitizer
    Waits waits;
    bool done;
  };

  void resume(unsigned i) {
    current_ = i;
    threadIdx = dim3(i);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&fake_stack_, fibers_[i].stack.get(), kStack);
#endif
    swapcontext(&scheduler_, &fibers_[i].context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#endif
  }

  void pause(Waits waits) {
    Fiber& fiber = fibers_[current_];
    fiber.waits = waits;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(fiber.done ? nullptr : &fiber.fake_stack, bottom_, size_);
#endif
    swapcontext(&fiber.context, &scheduler_);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fiber.fake_stack, &bottom_, &size_);
#endif
  }

  static void enter();

  // Lets those go on that wait for each other and are all there.
  void release() {
    bool released = false;
    for (size_t begin = 0; begin < fibers_.size(); begin += kWarp) {
      const size_t end = std::min(begin + kWarp, fibers_.size());
      const auto waits = [&](const Fiber& f) { return !f.done && f.waits == Waits::warp; };
      if (std::all_of(fibers_.begin() + begin, fibers_.begin() + end, waits)) {
        for (size_t i = begin; i < end; ++i) fibers_[i].waits = Waits::no;
        released = true;
      }
    }
    if (released) return;
    for (const auto& fiber : fibers_) {
      if (fiber.done || fiber.waits != Waits::block) stop("some threads of a block wait where others never come");
    }
    for (auto& fiber : fibers_) fiber.waits = Waits::no;
  }

  const std::function<void()>* body_ = nullptr;
  std::vector<Fiber> fibers_;
  std::vector<unsigned> exchanged_;
  ucontext_t scheduler_;
  unsigned current_ = 0;
  void* fake_stack_ = nullptr;
  const void* bottom_ = nullptr;  // of the stack of whoever runs the block
  size_t size_ = 0;
};

// Memory for the threads' stacks is kept from launch to launch.
inline Block first_block, other_blocks;
inline thread_local Block* block = nullptr;
inline std::function<void()> run_others;  // until the first block has come to a fence

inline void Block::enter() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &block->bottom_, &block->size_);
#endif
  (*block->body_)();
  block->fibers_[block->current_].done = true;
  block->pause(Waits::no);
}

}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::block->wait_for_block(); }
inline void __threadfence() {
  if (const auto others = std::exchange(cuda_on_cpu::run_others, nullptr)) std::thread(others).join();
}
using std::max;
inline unsigned __reduce_max_sync(unsigned, unsigned value) {
  for (unsigned distance = cuda_on_cpu::kWarp / 2; distance > 0; distance /= 2) {
    value = max(value, cuda_on_cpu::block->exchange(value, distance));
  }
  return value;
}
inline unsigned __vmaxu2(unsigned a, unsigned b) {  // of each half
  return max(a & 0xffff0000u, b & 0xffff0000u) | max(a & 0xffffu, b & 0xffffu);
}
inline unsigned atomicAdd(unsigned* address, unsigned value) {
  const unsigned before = *address;
  *address += value;
  return before;
}
template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
void __stcg(T* address, T value) {
  *address = value;
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidDevice, cudaErrorInvalidResourceHandle, cudaErrorInvalidConfiguration };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
struct cudaFuncAttributes {};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

// What tests look at through ctypes.
extern "C" {
#define LESA_FOR_TESTS inline __attribute__((visibility("default"), used))
LESA_FOR_TESTS int cuda_on_cpu_device = 0;          // the current one
LESA_FOR_TESTS int cuda_on_cpu_launch_device = -1;  // of the last launch, as are its blocks
LESA_FOR_TESTS int cuda_on_cpu_launch_blocks = 0;
LESA_FOR_TESTS int cuda_on_cpu_kernels_loaded = 0;  // on all devices
LESA_FOR_TESTS int cuda_on_cpu_launches_of_not_loaded = 0;
#undef LESA_FOR_TESTS
}

namespace cuda_on_cpu {

constexpr int kDevices = 2;
inline const cudaStream_t kBadStream = reinterpret_cast<cudaStream_t>(uintptr_t{0xbad});

inline cudaError_t last_error = cudaSuccess;

inline cudaError_t result(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

}  // namespace cuda_on_cpu

inline const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorInvalidResourceHandle: return "cudaErrorInvalidResourceHandle";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    default: return "cudaSuccess";
  }
}
inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorInvalidResourceHandle: return "invalid resource handle";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    default: return "no error";
  }
}
inline cudaError_t cudaGetLastError() { return std::exchange(cuda_on_cpu::last_error, cudaSuccess); }
inline cudaError_t cudaGetDevice(int* device) {
  *device = cuda_on_cpu_device;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= cuda_on_cpu::kDevices) return cuda_on_cpu::result(cudaErrorInvalidDevice);
  cuda_on_cpu_device = device;
  return cudaSuccess;
}
// Differs from call to call, so that the blocks of a sample have more or less to do.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 1 + cuda_on_cpu::Block::random()() % 4;
  return cudaSuccess;
}
inline std::set<std::pair<int, const void*>> loaded_kernels;  // by device
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel* kernel) {
  loaded_kernels.emplace(cuda_on_cpu_device, reinterpret_cast<const void*>(kernel));
  cuda_on_cpu_kernels_loaded = static_cast<int>(loaded_kernels.size());
  return cudaSuccess;
}
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  if (config->stream == cuda_on_cpu::kBadStream) return cuda_on_cpu::result(cudaErrorInvalidResourceHandle);
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  if (gridDim.x == 0 || gridDim.x > 0x7fffffff || blockDim.x == 0 || blockDim.x > 1024) {
    return cuda_on_cpu::result(cudaErrorInvalidConfiguration);
  }
  cuda_on_cpu_launch_device = cuda_on_cpu_device;
  cuda_on_cpu_launch_blocks = gridDim.x;
  cuda_on_cpu_launches_of_not_loaded += !loaded_kernels.count({cuda_on_cpu_device, reinterpret_cast<void*>(kernel)});
  std::vector<unsigned> order(gridDim.x);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), cuda_on_cpu::Block::random());
  const auto run = [&](cuda_on_cpu::Block& block, unsigned index) {
    cuda_on_cpu::block = &block;
    blockIdx = dim3(index);
    block.run(blockDim.x, [&] { kernel(arguments...); });
  };
  cuda_on_cpu::run_others = [&] {
    std::for_each(order.begin() + 1, order.end(), [&](unsigned index) { run(cuda_on_cpu::other_blocks, index); });
  };
  run(cuda_on_cpu::first_block, order.front());
  if (const auto others = std::exchange(cuda_on_cpu::run_others, nullptr)) others();  // a kernel without a fence
  return cudaSuccess;
}
