#include <cuda_runtime.h>

#undef NDEBUG  // release builds, too, have the assertions of the device
#include <algorithm>
#include <cassert>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "ring_buffer.h"

// A fault that only the device can see, such as a row that is out of range, fails an assertion there. The message goes
// to the standard error, and the next call that waits for the device reports an error. It keeps no value alive, so it
// costs no registers.
#define LESA_DEMAND(condition, message) \
  if (!(condition)) {                   \
    assert(false && message);           \
    __builtin_unreachable();            \
  }

namespace lesa {
namespace {

constexpr int kThreads = 256;       // of a block
constexpr int kTokenThreads = 128;  // of a block with a token for each warp
constexpr int kWarp = 32;
constexpr int kTokens = kTokenThreads / kWarp;
constexpr int kHeldBytes = 64;            // of the source, that each thread has under way at a time
constexpr int kMostTokenThreads = 512;    // of a block that works on one token; two such blocks leave 64 registers
constexpr int kHeldOfToken = 96;          // bytes of a float8 token in each thread: 64 threads hold 3072 halves
constexpr int kResidentThreads = 1152;    // of a multiprocessor at the same time, with 56 registers each
constexpr int kResidentBlocks = 16;       // on the smallest GPUs
constexpr int kBlocksPerProcessor = 32;   // several waves, so that none waits long for the last
constexpr int64_t kMostPrograms = 0xffff;  // blocks of a sample: `count` counts them in 16 bits

// How a kernel's work is divided. A sample is `runs` pieces of memory of `length` adjacent elements in the ring. A
// block does the `programs`-th part of a sample, in rounds.
struct Work {
  uint32_t programs;
  int64_t rounds;
  int64_t runs, length, vectors;  // vectors of a run, with one for a ragged beginning
  bool aligned;                   // each run begins at 16 bytes in the ring, whatever its slot
};

// N adjacent elements in registers; moved 16 bytes at a time if possible.
template <class Element, int N>
struct Vector {
  using Bits = typename Element::Bits;
  static constexpr int kPerRegister = sizeof(uint32_t) / sizeof(Bits);
  static constexpr int kRegisters = N / kPerRegister;
  static_assert(kRegisters % 4 == 0, "a vector is whole words of 16 bytes");

  uint32_t registers[kRegisters];

  __device__ __forceinline__ Bits get(int i) const {
    if constexpr (kPerRegister == 1) {
      return float_of(registers[i]);
    } else {
      return static_cast<Bits>(registers[i / kPerRegister] >> i % kPerRegister * 8 * sizeof(Bits));
    }
  }

  // In the order of `i`, for all of them.
  __device__ __forceinline__ void set(int i, Bits value) {
    if constexpr (kPerRegister == 1) {
      registers[i] = bits_of(value);
    } else {
      const uint32_t before = i % kPerRegister == 0 ? 0 : registers[i / kPerRegister];
      registers[i / kPerRegister] = before | static_cast<uint32_t>(value) << i % kPerRegister * 8 * sizeof(Bits);
    }
  }

  // From element `first` of a run of `length` elements, `stride` apart; zero outside the run.
  __device__ __forceinline__ void load(const Bits* run, int64_t stride, int64_t length, int64_t first) {
    const Bits* from = run + first;
    const bool whole = stride == 1 && first >= 0 && first + N <= length;
    if (whole && reinterpret_cast<uintptr_t>(from) % sizeof(uint4) == 0) {
#pragma unroll
      for (int i = 0; i < kRegisters; i += 4) {
        const uint4 word = __ldg(reinterpret_cast<const uint4*>(from) + i / 4);
        registers[i] = word.x, registers[i + 1] = word.y, registers[i + 2] = word.z, registers[i + 3] = word.w;
      }
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const bool inside = first + i >= 0 && first + i < length;
        set(i, inside ? __ldg(run + (first + i) * stride) : Bits(0));
      }
    }
  }

  // To element `first` of a run of `length` elements, which is at 16 bytes where all of the vector is inside.
  __device__ __forceinline__ void store(Bits* run, int64_t length, int64_t first) const {
    if (first >= 0 && first + N <= length) {
#pragma unroll
      for (int i = 0; i < kRegisters; i += 4) {
        const uint4 word = make_uint4(registers[i], registers[i + 1], registers[i + 2], registers[i + 3]);
        __stcg(reinterpret_cast<uint4*>(run + first) + i / 4, word);  // compilers split a plain assignment
      }
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (first + i >= 0 && first + i < length) run[first + i] = get(i);
      }
    }
  }
};

// How many elements `address` is past 16 bytes.
template <class Bits>
__device__ __forceinline__ int64_t past_alignment(const Bits* address) {
  return reinterpret_cast<uintptr_t>(address) % sizeof(uint4) / sizeof(Bits);
}

// Where a block's sample goes; thread 0 finds this for all threads.
struct Entry {
  int64_t row, target;  // `target` counts samples of the storage
  uint32_t counted;     // the row's count, with the blocks that had left
  Placement placed;
  float sigma;
};

// Reads the state of a sample's row. Every thread of a block calls it once, and `leave` at the end. The entry is there
// for all threads after the next barrier.
__device__ __forceinline__ void enter(const RingPush& p, int64_t sample, uint32_t programs, Entry& entry) {
  if (p.rows) {  // two samples in one row would count their blocks together
    for (int64_t other = threadIdx.x; other < sample; other += blockDim.x) {
      LESA_DEMAND(p.rows[other] != p.rows[sample], "lesa_kernels.ring_push: the rows must be distinct");
    }
  }
  if (threadIdx.x == 0) {
    const int64_t row = p.rows ? p.rows[sample] : sample;
    LESA_DEMAND(row >= 0 && row < p.batch, "lesa_kernels.ring_push: the rows must lie in the ring's batch");
    const int32_t cursor = p.cursor[row];
    const auto counted = static_cast<uint32_t>(p.count[row]);  // in the upper half, blocks that have left
    const auto count = static_cast<int32_t>(counted & 0xffffu);
    // Without a branch between them, the second load does not wait for the first.
    const bool right = bool((cursor >= 0) & (cursor < p.capacity) & (count <= p.capacity) & (counted >> 16 < programs));
    LESA_DEMAND(right, "lesa_kernels.ring_push: the ring's cursor and count must be in range");
    const int64_t newest = cursor == 0 ? p.capacity - 1 : cursor - 1;
    entry.row = row;
    entry.counted = counted;
    entry.sigma = p.sigma ? p.sigma[sample] : p.level;
    entry.placed =
        place(cursor, count, static_cast<int32_t>(p.capacity), entry.sigma, p.sigmas[newest * p.batch + row]);
    entry.target = entry.placed.slot * p.batch + row;
  }
}

// `enter`, and the sample of the storage that is written.
__device__ __forceinline__ int64_t enter_now(const RingPush& p, int64_t sample, uint32_t programs, Entry& entry) {
  enter(p, sample, programs, entry);
  __syncthreads();
  return entry.target;
}

// Writes the state of a sample's row once all of its blocks have read the old one: the last to arrive here does. Until
// then the count grows by the blocks that leave, and by nothing else. If the launch found some left over in it, the
// state is written too early, and the blocks that are under way see it here: the count has become less than what they
// found. A block that begins only after that can't distinguish what it finds from the state before the push.
__device__ __forceinline__ void leave(const RingPush& p, uint32_t programs, const Entry& entry) {
  if (threadIdx.x != 0) return;
  __threadfence();
  auto* count = reinterpret_cast<unsigned*>(p.count + entry.row);
  const uint32_t counted = atomicAdd(count, 0x10000u);
  LESA_DEMAND(counted >= entry.counted && (counted & 0xffffu) == (entry.counted & 0xffffu),
              "lesa_kernels.ring_push: the ring's count must not change while a push is under way");
  if (counted >> 16 == programs - 1) {
    __threadfence();
    p.sigmas[entry.target] = entry.sigma;
    p.cursor[entry.row] = entry.placed.cursor;
    p.count[entry.row] = entry.placed.count;
  }
}

template <class Source, class Target>
__global__ void __launch_bounds__(kThreads) ring_push_kernel(const RingPush p, const Work work) {
  using From = typename Source::Bits;
  using To = typename Target::Bits;
  constexpr int N = sizeof(uint4) / (sizeof(From) < sizeof(To) ? sizeof(From) : sizeof(To));
  constexpr int kHeld = kHeldBytes / (N * sizeof(From));
  __shared__ Entry entry;
  const int64_t sample = blockIdx.x / work.programs;
  const uint32_t program = blockIdx.x % work.programs;
  const From* source = static_cast<const From*>(p.features) + sample * p.sample_stride;
  To* storage = static_cast<To*>(p.storage);

  // If runs begin at 16 bytes, loads need not wait for the state.
  int64_t target = 0;
  bool entered = !work.aligned || program >= work.rounds;
  if (entered) target = enter_now(p, sample, work.programs, entry);
  for (int64_t round = program; round < work.rounds; round += work.programs) {
    Vector<Source, N> held[kHeld];
    const int64_t begin = round * (kThreads * kHeld) + threadIdx.x;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int64_t vector = begin + i * kThreads;
      const int64_t run = work.runs == 1 ? 0 : vector / work.vectors;
      if (run >= work.runs) continue;
      const To* to = storage + (target * work.runs + run) * work.length;
      const int64_t shift = work.aligned ? 0 : past_alignment(to);
      const int64_t first = (vector - run * work.vectors) * N - shift;
      held[i].load(source + run * p.token_stride, p.dim_stride, work.length, first);
    }
    if (!entered) target = enter_now(p, sample, work.programs, entry);
    entered = true;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int64_t vector = begin + i * kThreads;
      const int64_t run = work.runs == 1 ? 0 : vector / work.vectors;
      if (run >= work.runs) continue;
      To* to = storage + (target * work.runs + run) * work.length;
      const int64_t shift = work.aligned ? 0 : past_alignment(to);
      const int64_t first = (vector - run * work.vectors) * N - shift;
      if constexpr (std::is_same_v<Source, Target>) {
        held[i].store(to, work.length, first);
      } else {
        Vector<Target, N> converted;
#pragma unroll
        for (int k = 0; k < N; ++k) converted.set(k, Target::store(Source::load(held[i].get(k))));
        converted.store(to, work.length, first);
      }
    }
  }
  leave(p, work.programs, entry);
}

// Divides by the scale of a token.
class Divisor {
 public:
  // Where the scale is very small or very large, it and the values are multiplied by a power of two, so that nothing
  // below underflows that would count. A value that itself underflows then is zero in float8, too.
  __device__ __forceinline__ explicit Divisor(float scale) {
    factor_ = scale < 0x1p-80f ? 0x1p100f : scale > 0x1p80f ? 0x1p-100f : 1.0f;
    scale_ = __fmul_rn(scale, factor_);
    reciprocal_ = __frcp_rn(scale_);
  }

  // A quotient that float8 rounds as it does the one which IEEE defines. The first quotient is off by one and a half
  // units in the last place at most. After a correction (Markstein), what is rounded is off by less than 2^-22 units, so
  // the result is that of IEEE unless the exact quotient is that close to the middle between two numbers of float32.
  // For float8 that counts only where one of these numbers is in the middle between two of float8. Such scales have the
  // bits c 2^20 + d, with |d| <= 6; tests/support/ring_fuzz.py tries all of them. Zeros keep their sign.
  __device__ __forceinline__ float operator()(float value) const {
    const float scaled = __fmul_rn(value, factor_);
    const float first = __fmul_rn(scaled, reciprocal_);
    return __fmaf_rn(-__fmaf_rn(first, scale_, -scaled), reciprocal_, first);
  }

 private:
  float factor_, scale_, reciprocal_;
};

// Two values as float8, the first in the lower byte; both are below 1024, and not NaN.
__device__ __forceinline__ uint32_t float8_pair(float first, float second) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= (CUDART_VERSION >= 12010 ? 890 : 900)  // CUDA 12.0 has it on sm_90 only
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(second), "f"(first));
  return pair;
#else
  return Float8::store(first) | uint32_t{Float8::store(second)} << 8;
#endif
}

// 16 bytes of a token.
template <class Source>
struct Piece {
  using Bits = typename Source::Bits;
  static constexpr int kElements = sizeof(uint4) / sizeof(Bits);
  static constexpr bool kHalf = sizeof(Bits) == 2;

  uint32_t words[4];

  __device__ __forceinline__ void load(const uint4* from) {
    const uint4 word = __ldg(from);
    words[0] = word.x, words[1] = word.y, words[2] = word.z, words[3] = word.w;
  }

  // Magnitudes have the order of their bits, Inf and NaN above all; of two halves in a word each by itself.
  __device__ __forceinline__ uint32_t largest_magnitude(uint32_t largest) const {
#pragma unroll
    for (const uint32_t word : words) {
      largest = kHalf ? __vmaxu2(largest, word & 0x7fff7fffu) : max(largest, word & 0x7fffffffu);
    }
    return largest;
  }

  __device__ __forceinline__ float get(int i) const {
    if constexpr (kHalf) {
      return Source::load(static_cast<Bits>(words[i / 2] >> i % 2 * 16));
    } else {
      return Source::load(float_of(words[i]));
    }
  }

  // As float8, four elements in a word.
  __device__ __forceinline__ void store(uint8_t* to, const Divisor& divide, bool finite) const {
    uint32_t stored[kElements / 4];
#pragma unroll
    for (int i = 0; i < kElements; i += 4) {
      const uint32_t low = float8_pair(divide(get(i)), divide(get(i + 1)));
      const uint32_t high = float8_pair(divide(get(i + 2)), divide(get(i + 3)));
      stored[i / 4] = finite ? low | high << 16 : Float8::kNan * 0x01010101u;
    }
    if constexpr (kHalf) {
      __stcg(reinterpret_cast<uint2*>(to), make_uint2(stored[0], stored[1]));
    } else {
      __stcg(reinterpret_cast<uint32_t*>(to), stored[0]);
    }
  }
};

// A block for each token, which is read once: its threads keep it in registers until its largest magnitude is known.
// Each token is whole pieces, at 16 bytes, and each block has at least one token.
template <class Source>
__global__ void __launch_bounds__(kMostTokenThreads, 2)
    ring_push_float8_kernel(const RingPush p, const Work work) {
  using From = typename Source::Bits;
  constexpr int kPieces = kHeldOfToken / sizeof(uint4);
  constexpr int N = Piece<Source>::kElements;
  __shared__ Entry entry;
  __shared__ uint32_t largest_of_warp[2][kMostTokenThreads / kWarp];
  const int64_t sample = blockIdx.x / work.programs;
  const uint32_t program = blockIdx.x % work.programs;
  const unsigned lane = threadIdx.x % kWarp;
  const From* source = static_cast<const From*>(p.features) + sample * p.sample_stride;
  uint8_t* storage = static_cast<uint8_t*>(p.storage);

  int turn = 0;
  for (int64_t token = program; token < p.tokens; token += work.programs) {
    const auto* from = reinterpret_cast<const uint4*>(source + token * p.token_stride) + threadIdx.x;
    const int left = static_cast<int>(work.vectors) - static_cast<int>(threadIdx.x);
    Piece<Source> held[kPieces] = {};
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      if (i * static_cast<int>(blockDim.x) < left) held[i].load(from + i * blockDim.x);
    }
    if (token == program) enter(p, sample, work.programs, entry);  // while the loads are under way
    uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) largest = held[i].largest_magnitude(largest);
    if constexpr (Piece<Source>::kHalf) largest = max(largest >> 16, largest & 0xffffu);
    largest = __reduce_max_sync(0xffffffffu, largest);
    if (lane == 0) largest_of_warp[turn][threadIdx.x / kWarp] = largest;
    __syncthreads();
    largest = __reduce_max_sync(0xffffffffu, lane < blockDim.x / kWarp ? largest_of_warp[turn][lane] : 0);
    turn ^= 1;  // no thread comes back to this turn's numbers before all have read them
    if constexpr (Piece<Source>::kHalf) largest = bits_of(Source::load(static_cast<From>(largest))) & 0x7fffffffu;

    const float scale = float8_scale(largest);
    const Divisor divide(scale);
    const int64_t at = entry.target * p.tokens + token;
    if (threadIdx.x == 0) p.scales[at] = scale;
    uint8_t* to = storage + at * p.dim + threadIdx.x * N;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int piece = i * static_cast<int>(blockDim.x);
      if (piece < left) held[i].store(to + piece * N, divide, scale == scale);
    }
  }
  leave(p, work.programs, entry);
}

// Any tokens. A warp for each, which reads it twice.
template <class Source>
__global__ void __launch_bounds__(kTokenThreads) ring_push_any_float8_kernel(const RingPush p, const Work work) {
  using From = typename Source::Bits;
  constexpr int N = sizeof(uint4);
  __shared__ Entry entry;
  const int64_t sample = blockIdx.x / work.programs;
  const uint32_t program = blockIdx.x % work.programs;
  const int lane = threadIdx.x % kWarp;
  const From* source = static_cast<const From*>(p.features) + sample * p.sample_stride;
  uint8_t* storage = static_cast<uint8_t*>(p.storage);

  const int64_t target = enter_now(p, sample, work.programs, entry);
  for (int64_t round = program; round < work.rounds; round += work.programs) {
    const int64_t token = round * kTokens + threadIdx.x / kWarp;
    if (token >= p.tokens) continue;  // with its warp
    const From* from = source + token * p.token_stride;
    uint8_t* to = storage + (target * p.tokens + token) * p.dim;
    const int64_t shift = past_alignment(to);
    uint32_t largest = 0;
    for (int64_t vector = lane; vector < work.vectors; vector += kWarp) {
      Vector<Source, N> values;
      values.load(from, p.dim_stride, p.dim, vector * N - shift);
#pragma unroll
      for (int i = 0; i < N; ++i) largest = max(largest, bits_of(Source::load(values.get(i))) & 0x7fffffffu);
    }
    largest = __reduce_max_sync(0xffffffffu, largest);
    const float scale = float8_scale(largest);
    const Divisor divide(scale);
    if (lane == 0) p.scales[target * p.tokens + token] = scale;
    for (int64_t vector = lane; vector < work.vectors; vector += kWarp) {
      Vector<Source, N> values;
      values.load(from, p.dim_stride, p.dim, vector * N - shift);
      Vector<Float8, N> quantised;
#pragma unroll
      for (int i = 0; i < N; i += 2) {
        const uint32_t pair = float8_pair(divide(Source::load(values.get(i))), divide(Source::load(values.get(i + 1))));
        const uint32_t bits = scale == scale ? pair : Float8::kNan * 0x0101u;
        quantised.set(i, static_cast<uint8_t>(bits));
        quantised.set(i + 1, static_cast<uint8_t>(bits >> 8));
      }
      quantised.store(to, p.dim, vector * N - shift);
    }
  }
  leave(p, work.programs, entry);
}

// A row's slot, counted in samples of the storage, and whether the row has an anchor.
struct Found {
  int64_t source;
  bool any;
};

__device__ __forceinline__ Found find(const RingGather& g, int64_t row) {
  const int32_t cursor = g.cursor[row], count = g.count[row];
  LESA_DEMAND(cursor >= 0 && cursor < g.capacity && count >= 0 && count <= g.capacity,
              "lesa_kernels.ring_gather: the ring's cursor and count must be in range");
  return {slot_of_age(cursor, count, g.capacity, g.age) * g.batch + row, count > 0};
}

template <class Element>
__global__ void __launch_bounds__(kThreads) ring_gather_kernel(const RingGather g, const Work work) {
  using Bits = typename Element::Bits;
  constexpr int N = sizeof(uint4) / sizeof(Bits);
  const int64_t row = blockIdx.x / work.programs;
  const Found found = find(g, row);
  const Bits* from = static_cast<const Bits*>(g.storage) + found.source * work.length;
  Bits* to = static_cast<Bits*>(g.output) + row * work.length;
  const int64_t shift = past_alignment(to);
  for (int64_t round = blockIdx.x % work.programs; round < work.rounds; round += work.programs) {
    const int64_t vector = round * kThreads + threadIdx.x;
    if (vector >= work.vectors) continue;
    Vector<Element, N> values;
    values.load(from, 1, work.length, vector * N - shift);
    if (!found.any) {
#pragma unroll
      for (int i = 0; i < N; ++i) values.set(i, Element::kNan);
    }
    values.store(to, work.length, vector * N - shift);
  }
}

// A warp for each token.
__global__ void __launch_bounds__(kTokenThreads) ring_gather_float8_kernel(const RingGather g, const Work work) {
  constexpr int N = sizeof(uint4);
  const int64_t row = blockIdx.x / work.programs;
  const int lane = threadIdx.x % kWarp;
  const Found found = find(g, row);
  for (int64_t round = blockIdx.x % work.programs; round < work.rounds; round += work.programs) {
    const int64_t token = round * kTokens + threadIdx.x / kWarp;
    if (token >= g.tokens) continue;
    const int64_t at = found.source * g.tokens + token;
    const uint8_t* from = static_cast<const uint8_t*>(g.storage) + at * g.dim;
    const float scale = found.any ? g.scales[at] : Float32::kNan;
    float* to = static_cast<float*>(g.output) + (row * g.tokens + token) * g.dim;
    const int64_t shift = past_alignment(to);
    for (int64_t vector = lane; vector < work.vectors; vector += kWarp) {
      Vector<Float8, N> stored;
      stored.load(from, 1, g.dim, vector * N - shift);
      Vector<Float32, N> values;
#pragma unroll
      for (int i = 0; i < N; ++i) values.set(i, __fmul_rn(Float8::load(stored.get(i)), scale));
      values.store(to, g.dim, vector * N - shift);
    }
  }
}

// Errors of CUDA

std::string describe(cudaError_t error) {
  return std::string(cudaGetErrorString(error)) + " (" + cudaGetErrorName(error) + ")";
}

[[noreturn]] void fail(const char* operation, int device, cudaError_t error) {
  throw std::runtime_error(std::string("lesa_kernels.") + operation + " on CUDA device " + std::to_string(device) +
                           " failed: " + describe(error) +
                           ". If it is an error of work that was enqueued before, CUDA_LAUNCH_BLOCKING=1 shows whose.");
}

void check(const char* operation, int device, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // the error is reported here, so the next caller must not see it
  fail(operation, device, error);
}

// Makes a device the current one of this thread until the end of the scope.
class OnDevice {
 public:
  OnDevice(const char* operation, int device) {
    check(operation, device, cudaGetDevice(&before_));
    if (before_ == device) return;
    check(operation, device, cudaSetDevice(device));
    changed_ = true;
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// Launches

// The work of `samples` samples in rounds that a block can do, where each needs `rounds`.
Work divide_work(const char* operation, int device, const char* argument, int64_t samples, int64_t rounds,
                 int64_t blocks_per_processor = kBlocksPerProcessor) {
  int processors = 0;
  check(operation, device, cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  if (samples > std::numeric_limits<int32_t>::max()) {
    refuse(argument, "be at most 2^31 - 1 on a GPU", std::to_string(samples), "Divide them among several rings.");
  }
  const int64_t share = std::max<int64_t>(1, blocks_per_processor * processors / samples);
  Work work{};
  work.rounds = rounds;
  work.programs = static_cast<uint32_t>(std::max<int64_t>(1, std::min({rounds, share, kMostPrograms})));
  return work;
}

template <class Arguments>
void launch(const char* operation, void (*kernel)(const Arguments, const Work), const Arguments& arguments,
            const Work& work, int64_t samples, int threads) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<uint32_t>(samples * work.programs));
  config.blockDim = dim3(threads);
  config.stream = reinterpret_cast<cudaStream_t>(arguments.stream);
  check(operation, arguments.device, cudaLaunchKernelEx(&config, kernel, arguments, work));
  check(operation, arguments.device, cudaGetLastError());
}

int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool begins_aligned(const void* address, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(address) % sizeof(uint4) == 0 && bytes % sizeof(uint4) == 0;
}

template <class Source, class Target>
void push(const RingPush& p) {
  constexpr int64_t from = sizeof(typename Source::Bits), to = sizeof(typename Target::Bits);
  constexpr int64_t N = sizeof(uint4) / std::min(from, to);
  constexpr int64_t round = kThreads * (kHeldBytes / (N * from));
  // Tokens that follow each other without a gap are one long run.
  const bool dense = p.tokens == 0 || p.dim == 0 || p.token_stride == p.dim * p.dim_stride;
  const int64_t runs = dense ? 1 : p.tokens;
  const int64_t length = dense ? p.tokens * p.dim : p.dim;
  const bool aligned = begins_aligned(p.storage, length * to);
  const int64_t vectors = length == 0 ? 0 : divided_up(length + (aligned ? 0 : N - 1), N);
  Work work = divide_work("ring_push", p.device, "samples", p.samples, divided_up(runs * vectors, round));
  work.runs = runs, work.length = length, work.vectors = vectors, work.aligned = aligned;
  launch("ring_push", ring_push_kernel<Source, Target>, p, work, p.samples, kThreads);
}

template <class Source>
void push_float8(const RingPush& p) {
  constexpr int64_t size = sizeof(typename Source::Bits), N = Piece<Source>::kElements;
  const bool aligned = reinterpret_cast<uintptr_t>(p.storage) % N == 0 && p.dim % N == 0;
  const bool whole = aligned && (p.dim_stride == 1 || p.dim == 0) && begins_aligned(p.features, p.token_stride * size) &&
                     (p.samples == 1 || p.sample_stride * size % sizeof(uint4) == 0);
  const int64_t threads = std::max<int64_t>(1, divided_up(p.dim * size, kHeldOfToken * kWarp)) * kWarp;
  if (whole && p.tokens > 0 && threads <= kMostTokenThreads) {
    // As many blocks as run at the same time, or a few less, so that each has the same number of tokens.
    const int64_t resident = std::min<int64_t>(kResidentBlocks, kResidentThreads / threads);
    Work work = divide_work("ring_push", p.device, "samples", p.samples, p.tokens, resident);
    const int64_t each = divided_up(p.tokens, work.programs);
    work.programs = static_cast<uint32_t>(divided_up(p.tokens, each));
    work.vectors = p.dim / N;
    launch("ring_push", ring_push_float8_kernel<Source>, p, work, p.samples, static_cast<int>(threads));
  } else {
    constexpr int64_t most = sizeof(uint4);  // elements of a vector
    Work work = divide_work("ring_push", p.device, "samples", p.samples, divided_up(p.tokens, kTokens));
    work.vectors = p.dim == 0 ? 0 : divided_up(p.dim + most - 1, most);
    launch("ring_push", ring_push_any_float8_kernel<Source>, p, work, p.samples, kTokenThreads);
  }
}

template <class Source>
void push_from(const RingPush& p) {
  switch (p.storage_dtype) {
    case DType::float32: return push<Source, Float32>(p);
    case DType::float16: return push<Source, Float16>(p);
    case DType::bfloat16: return push<Source, BFloat16>(p);
    case DType::float8_e4m3fn: return push_float8<Source>(p);
  }
}

template <class Element>
void gather(const RingGather& g) {
  constexpr int64_t N = sizeof(uint4) / sizeof(typename Element::Bits);
  const int64_t length = g.tokens * g.dim;
  const int64_t vectors = divided_up(length + N - 1, N);
  Work work = divide_work("ring_gather", g.device, "batch", g.batch, divided_up(vectors, kThreads));
  work.length = length, work.vectors = vectors;
  launch("ring_gather", ring_gather_kernel<Element>, g, work, g.batch, kThreads);
}

void gather_float8(const RingGather& g) {
  constexpr int64_t N = sizeof(uint4);
  Work work = divide_work("ring_gather", g.device, "batch", g.batch, divided_up(g.tokens, kTokens));
  work.vectors = divided_up(g.dim + N - 1, N);
  launch("ring_gather", ring_gather_float8_kernel, g, work, g.batch, kTokenThreads);
}

// CUDA loads a kernel when it is first used, which may fail while a graph is captured. This loads them all.

template <class... Kernels>
cudaError_t load(Kernels*... kernels) {
  cudaError_t error = cudaSuccess;
  cudaFuncAttributes attributes;
  static_cast<void>(((error = cudaFuncGetAttributes(&attributes, kernels), error == cudaSuccess) && ...));
  return error;
}

template <class Source>
cudaError_t load_pushes_from() {
  return load(ring_push_kernel<Source, Float32>, ring_push_kernel<Source, Float16>, ring_push_kernel<Source, BFloat16>,
              ring_push_float8_kernel<Source>, ring_push_any_float8_kernel<Source>);
}

cudaError_t load_all() {
  for (const auto load_some : {load_pushes_from<Float32>, load_pushes_from<Float16>, load_pushes_from<BFloat16>}) {
    if (const cudaError_t error = load_some(); error != cudaSuccess) return error;
  }
  return load(ring_gather_kernel<Float32>, ring_gather_kernel<Float16>, ring_gather_kernel<BFloat16>,
              ring_gather_float8_kernel);
}

}  // namespace

void ring_push_cuda(const RingPush& p) {
  if (p.samples == 0) return;
  const OnDevice guard("ring_push", p.device);
  switch (p.features_dtype) {
    case DType::float32: return push_from<Float32>(p);
    case DType::float16: return push_from<Float16>(p);
    default: return push_from<BFloat16>(p);
  }
}

void ring_gather_cuda(const RingGather& g) {
  if (g.tokens * g.dim == 0) return;
  const OnDevice guard("ring_gather", g.device);
  switch (g.storage_dtype) {
    case DType::float32: return gather<Float32>(g);
    case DType::float16: return gather<Float16>(g);
    case DType::bfloat16: return gather<BFloat16>(g);
    case DType::float8_e4m3fn: return gather_float8(g);
  }
}

std::string ring_cuda_problem(int device) {
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error == cudaSuccess) error = load_all();
  cudaSetDevice(before);
  cudaGetLastError();
  return error == cudaSuccess ? "" : describe(error);
}

}  // namespace lesa
