#include "ring_buffer.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#if defined(__GNUC__)
#define LESA_INLINE inline __attribute__((always_inline))
#else
#define LESA_INLINE inline
#endif

#if defined(__x86_64__) && defined(__GNUC__)
#define LESA_AVX2 __attribute__((target("avx2,f16c")))
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace lesa {
namespace {

constexpr int64_t kThreadBytes = int64_t{8} << 20;  // bytes of a push for each further thread
constexpr int64_t kChunkBytes = int64_t{1} << 18;   // what a thread takes at a time

// Element types. Conversions are branch-free on bits, so that compilers vectorise the loops over them.

LESA_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

LESA_INLINE float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

struct Float32 {
  using Bits = float;
  static LESA_INLINE float load(Bits value) { return value; }
  static LESA_INLINE Bits store(float value) { return value; }
};

struct BFloat16 {
  using Bits = uint16_t;
  static LESA_INLINE float load(Bits value) { return float_of(uint32_t{value} << 16); }
  static LESA_INLINE Bits store(float value) {
    const uint32_t bits = bits_of(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // ties to even
    return static_cast<Bits>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
  }
};

struct Float16 {
  using Bits = uint16_t;

  static LESA_INLINE float load(Bits value) {
    const uint32_t magnitude = uint32_t{value} & 0x7fffu;
    const uint32_t normal = (magnitude << 13) + (112u << 23);  // rebias the exponent: 127 - 15
    const uint32_t special = (magnitude << 13) | 0x7f800000u;  // Inf and NaN
    // A subnormal is a multiple of 2^-24: written into the mantissa of 2^-14, which is then taken off again.
    const uint32_t subnormal = bits_of(float_of((magnitude << 13) + (113u << 23)) - float_of(113u << 23));
    const uint32_t finite = magnitude < 0x0400u ? subnormal : normal;
    return float_of((magnitude >= 0x7c00u ? special : finite) | (uint32_t{value} & 0x8000u) << 16);
  }

  static LESA_INLINE Bits store(float value) {
    const uint32_t bits = bits_of(value);
    const uint32_t magnitude = bits & 0x7fffffffu;
    // Ties to even; a carry out of the mantissa raises the exponent, up to Inf from 65520 on.
    const uint32_t normal = (magnitude - (112u << 23) + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
    // Adding 0.5, whose unit in the last place is 2^-24, lets the FPU round to the multiples of 2^-24.
    const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
    return static_cast<Bits>((magnitude >= (143u << 23) ? special : finite) | (bits & 0x80000000u) >> 16);
  }
};

// Copies `n` elements from `source`, `stride` apart, to contiguous `target`.

using CopyRun = void (*)(const void* source, int64_t stride, void* target, int64_t n);

template <class Source, class Target>
LESA_INLINE void convert(const typename Source::Bits* from, int64_t stride, typename Target::Bits* to, int64_t n) {
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) to[i] = Target::store(Source::load(from[i]));
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = Target::store(Source::load(from[i * stride]));
  }
}

template <class Source, class Target>
void convert_run(const void* source, int64_t stride, void* target, int64_t n) {
  convert<Source, Target>(static_cast<const typename Source::Bits*>(source), stride,
                          static_cast<typename Target::Bits*>(target), n);
}

#ifdef LESA_AVX2

constexpr int64_t kTile = 1024;  // floats between two conversions; stays in the first-level cache

LESA_AVX2 void widen_float16(const uint16_t* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  }
  for (; i < n; ++i) to[i] = Float16::load(from[i]);
}

LESA_AVX2 void narrow_float16(const float* from, uint16_t* to, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), halves);
  }
  for (; i < n; ++i) to[i] = Float16::store(from[i]);
}

// As convert_run; compilers turn all of it into vector code but float16, which has instructions of its own.
template <class Source, class Target>
LESA_AVX2 void convert_run_avx2(const void* source, int64_t stride, void* target, int64_t n) {
  const auto* from = static_cast<const typename Source::Bits*>(source);
  auto* to = static_cast<typename Target::Bits*>(target);
  constexpr bool from_half = std::is_same_v<Source, Float16>;
  constexpr bool to_half = std::is_same_v<Target, Float16>;
  if constexpr (from_half || to_half) {
    if (stride == 1) {
      float tile[kTile];
      for (int64_t i = 0; i < n; i += kTile) {
        const int64_t m = std::min(kTile, n - i);
        if constexpr (from_half && std::is_same_v<Target, Float32>) {
          widen_float16(from + i, to + i, m);
        } else if constexpr (from_half) {
          widen_float16(from + i, tile, m);
          convert<Float32, Target>(tile, 1, to + i, m);
        } else if constexpr (std::is_same_v<Source, Float32>) {
          narrow_float16(from + i, to + i, m);
        } else {
          convert<Source, Float32>(from + i, 1, tile, m);
          narrow_float16(tile, to + i, m);
        }
      }
      return;
    }
  }
  convert<Source, Target>(from, stride, to, n);
}

bool has_avx2_and_f16c() {
  unsigned eax, ebx, ecx = 0, edx;
  return __builtin_cpu_supports("avx2") && __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}

#endif

template <class Bits>
void copy_run(const void* source, int64_t stride, void* target, int64_t n) {
  if (stride == 1) {
    std::memcpy(target, source, n * sizeof(Bits));
  } else {
    for (int64_t i = 0; i < n; ++i) static_cast<Bits*>(target)[i] = static_cast<const Bits*>(source)[i * stride];
  }
}

template <class Source, class Target>
CopyRun converter() {
#ifdef LESA_AVX2
  static const bool vector = has_avx2_and_f16c();
  if (vector) return convert_run_avx2<Source, Target>;
#endif
  return convert_run<Source, Target>;
}

template <class Source>
CopyRun converter_from(DType target) {
  switch (target) {
    case DType::float32: return converter<Source, Float32>();
    case DType::float16: return converter<Source, Float16>();
    default: return converter<Source, BFloat16>();
  }
}

CopyRun run_for(DType source, DType target) {
  if (source == target) return source == DType::float32 ? copy_run<uint32_t> : copy_run<uint16_t>;
  switch (source) {
    case DType::float32: return converter_from<Float32>(target);
    case DType::float16: return converter_from<Float16>(target);
    default: return converter_from<BFloat16>(target);
  }
}

// Calls body(begin, end) until [0, total) is covered in chunks, on up to `threads` threads, the caller's included.
template <class Body>
void parallel_chunks(int64_t total, int64_t chunk, int64_t threads, const Body& body) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t begin; (begin = next.fetch_add(chunk)) < total;) body(begin, std::min(begin + chunk, total));
  };
  std::vector<std::thread> helpers;
  try {
    while (static_cast<int64_t>(helpers.size()) + 1 < threads) helpers.emplace_back(work);
  } catch (...) {
    // The system grants no further thread, or no memory for one: those that run share the work.
  }
  work();
  for (auto& helper : helpers) helper.join();
}

[[noreturn]] void refuse(const std::string& argument, const std::string& must, const std::string& got,
                         const std::string& remedy) {
  throw std::invalid_argument("`" + argument + "` must " + must + ", but got " + got + ". " + remedy);
}

void check_at_least(const char* argument, int64_t value, int64_t minimum) {
  if (value < minimum) {
    refuse(argument, "be at least " + std::to_string(minimum), std::to_string(value), "Pass the tensor's own size.");
  }
}

void check_pointer(const char* argument, const void* pointer) {
  if (pointer == nullptr) refuse(argument, "not be a null pointer", "0", "Pass the tensor's `data_ptr()`.");
}

// a * b for non-negative factors; throws if the product leaves int64.
int64_t product(const char* argument, int64_t a, int64_t b) {
  if (b != 0 && a > std::numeric_limits<int64_t>::max() / b) {
    refuse(argument, "address at most 2^63 - 1 bytes", std::to_string(a) + " x " + std::to_string(b),
           "Check its sizes and strides.");
  }
  return a * b;
}

int64_t sum(const char* argument, int64_t a, int64_t b) {
  if (a > std::numeric_limits<int64_t>::max() - b) {
    refuse(argument, "address at most 2^63 - 1 bytes", std::to_string(a) + " + " + std::to_string(b),
           "Check its sizes and strides.");
  }
  return a + b;
}

}  // namespace

int64_t item_size(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

DType dtype_from_name(const std::string& argument, const std::string& name) {
  if (name == "float32") return DType::float32;
  if (name == "float16") return DType::float16;
  if (name == "bfloat16") return DType::bfloat16;
  refuse(argument, "be one of float32, float16, bfloat16", "'" + name + "'", "Convert the tensor with `.to(dtype)`.");
}

void check_ring_push(const RingPush& p) {
  check_at_least("capacity", p.capacity, 1);
  check_at_least("batch", p.batch, 1);
  check_at_least("tokens", p.tokens, 0);
  check_at_least("dim", p.dim, 0);
  check_at_least("samples", p.samples, 0);
  check_at_least("threads", p.threads, 1);
  check_at_least("device", p.device, -1);
  check_at_least("features_strides", std::min({p.sample_stride, p.token_stride, p.dim_stride}), 0);
  if (p.capacity > std::numeric_limits<int32_t>::max()) {
    refuse("capacity", "fit into int32", std::to_string(p.capacity), "Use a shorter ring.");
  }
  if (p.rows == nullptr && p.samples != p.batch) {
    refuse("samples", "equal `batch` where no `rows` are given",
           std::to_string(p.samples) + " for a batch of " + std::to_string(p.batch), "Pass `rows`.");
  }
  if (p.samples > p.batch) {
    refuse("samples", "be at most `batch`", std::to_string(p.samples) + " for a batch of " + std::to_string(p.batch),
           "Push each row at most once.");
  }

  const int64_t slots = product("storage", p.capacity, p.batch);
  const int64_t feature = product("storage", p.tokens, p.dim);
  product("storage", product("storage", slots, feature), item_size(p.storage_dtype));
  product("sigmas", slots, static_cast<int64_t>(sizeof(float)));
  const bool copies = p.samples > 0 && feature > 0;
  if (copies) {
    int64_t last = product("features", p.samples - 1, p.sample_stride);
    last = sum("features", last, product("features", p.tokens - 1, p.token_stride));
    last = sum("features", last, product("features", p.dim - 1, p.dim_stride));
    product("features", sum("features", last, 1), item_size(p.features_dtype));
    check_pointer("storage", p.storage);
    check_pointer("features", p.features);
  }
  check_pointer("sigmas", p.sigmas);
  check_pointer("cursor", p.cursor);
  check_pointer("count", p.count);
  if (p.samples > 0) check_pointer("sigma", p.sigma);
}

void ring_push_cpu(const RingPush& p) {
  std::vector<bool> taken(p.batch, false);
  for (int64_t i = 0; i < p.samples; ++i) {
    const int64_t row = p.rows ? p.rows[i] : i;
    if (row < 0 || row >= p.batch) {
      refuse("rows", "lie in [0, " + std::to_string(p.batch) + ")", std::to_string(row),
             "Pass indices of the ring's batch.");
    }
    if (taken[row]) refuse("rows", "be distinct", std::to_string(row) + " twice", "Push each row at most once.");
    taken[row] = true;
    if (p.cursor[row] < 0 || p.cursor[row] >= p.capacity || p.count[row] < 0 || p.count[row] > p.capacity) {
      refuse("cursor and count", "lie within the ring's capacity of " + std::to_string(p.capacity),
             std::to_string(p.cursor[row]) + " and " + std::to_string(p.count[row]), "Reset the ring.");
    }
  }

  const int64_t feature = p.tokens * p.dim;
  const int64_t source_size = item_size(p.features_dtype);
  const int64_t target_size = item_size(p.storage_dtype);
  std::vector<const char*> sources(p.samples);
  std::vector<char*> targets(p.samples);
  for (int64_t i = 0; i < p.samples; ++i) {
    const int64_t row = p.rows ? p.rows[i] : i;
    int32_t& cursor = p.cursor[row];
    int32_t& count = p.count[row];
    const int32_t newest = (cursor == 0 ? static_cast<int32_t>(p.capacity) : cursor) - 1;
    const float newest_sigma = p.sigmas[newest * p.batch + row];
    int32_t slot = cursor;
    if (count > 0 && p.sigma[i] == newest_sigma) {
      slot = newest;
    } else {
      const bool extends = count > 0 && p.sigma[i] < newest_sigma;  // false for NaN: it starts a history
      count = extends ? static_cast<int32_t>(std::min<int64_t>(int64_t{count} + 1, p.capacity)) : 1;
      cursor = slot + 1 == p.capacity ? 0 : slot + 1;
    }
    p.sigmas[slot * p.batch + row] = p.sigma[i];
    sources[i] = static_cast<const char*>(p.features) + i * p.sample_stride * source_size;
    targets[i] = static_cast<char*>(p.storage) + (slot * p.batch + row) * feature * target_size;
  }
  if (p.samples == 0 || feature == 0) return;

  // Tokens that follow each other without a gap are one long run.
  const bool dense = p.token_stride == p.dim * p.dim_stride;
  const int64_t run = dense ? feature : p.dim;
  const CopyRun copy = run_for(p.features_dtype, p.storage_dtype);
  const auto copy_range = [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t sample = begin / feature;
      const int64_t offset = begin % feature;
      const int64_t token = offset / run;
      const int64_t first = offset % run;
      const int64_t n = std::min(run - first, end - begin);
      const char* source = sources[sample] + (token * p.token_stride + first * p.dim_stride) * source_size;
      copy(source, p.dim_stride, targets[sample] + offset * target_size, n);
      begin += n;
    }
  };
  const int64_t total = p.samples * feature;
  const int64_t threads = std::min<int64_t>(p.threads, 1 + total * target_size / kThreadBytes);
  parallel_chunks(total, threads == 1 ? total : kChunkBytes / target_size, threads, copy_range);
}

}  // namespace lesa
