#include "ring_buffer.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "cpu_elements.h"

#ifdef LESA_X86
#define LESA_AVX2 __attribute__((target("avx2,f16c")))
#endif

namespace lesa {
namespace {

constexpr int64_t kThreadBytes = int64_t{8} << 20;  // bytes of a push for each further thread
constexpr int64_t kChunkBytes = int64_t{1} << 18;   // what a thread takes at a time

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

}  // namespace

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
