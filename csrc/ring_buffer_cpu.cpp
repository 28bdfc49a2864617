#include "ring_buffer.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "cpu.h"

#ifdef LESA_X86
#define LESA_AVX2 __attribute__((target("avx2,f16c")))
#endif

namespace lesa {
namespace {

constexpr int64_t kThreadBytes = int64_t{1} << 20;  // bytes of a push for each further thread
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

// Like convert_run. Compilers vectorise all of it except float16, which has instructions of its own.
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

// Stores one token, its `n` elements `stride` apart, as float8 at `target` and its scale at `scale`. `wide` has room
// for n floats.

using QuantiseToken = void (*)(const void* source, int64_t stride, int64_t n, float* wide, uint8_t* target,
                               float* scale);

// From adjacent float32 values.
LESA_INLINE void quantise(const float* from, int64_t n, uint8_t* __restrict to, float* scale_of_token) {
  uint32_t largest = 0;  // magnitudes have the order of their bits, Inf and NaN above all
  for (int64_t i = 0; i < n; ++i) largest = std::max(largest, bits_of(from[i]) & 0x7fffffffu);
  const float scale = *scale_of_token = float8_scale(largest);
  if (std::isnan(scale)) {
    std::fill_n(to, n, Float8::kNan);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = Float8::store(from[i] / scale);
  }
}

template <class Source>
void quantise_token(const void* source, int64_t stride, int64_t n, float* wide, uint8_t* target, float* scale) {
  convert_run<Source, Float32>(source, stride, wide, n);
  quantise(wide, n, target, scale);
}

// Multiplies one token, whose elements are adjacent, by its scale.
using DequantiseToken = void (*)(const uint8_t* source, float scale, float* target, int64_t n);

LESA_INLINE void dequantise(const uint8_t* __restrict from, float scale, float* __restrict to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = Float8::load(from[i]) * scale;
}

void dequantise_token(const uint8_t* source, float scale, float* target, int64_t n) {
  dequantise(source, scale, target, n);
}

#ifdef LESA_AVX2

template <class Source>
LESA_AVX2 void quantise_token_avx2(const void* source, int64_t stride, int64_t n, float* wide, uint8_t* target,
                                   float* scale) {
  const bool in_place = std::is_same_v<Source, Float32> && stride == 1;
  if (!in_place) convert_run_avx2<Source, Float32>(source, stride, wide, n);
  quantise(in_place ? static_cast<const float*>(source) : wide, n, target, scale);
}

LESA_AVX2 void dequantise_token_avx2(const uint8_t* source, float scale, float* target, int64_t n) {
  dequantise(source, scale, target, n);
}

#endif

template <class Source>
QuantiseToken quantiser() {
#ifdef LESA_AVX2
  static const bool vector = has_avx2_and_f16c();
  if (vector) return quantise_token_avx2<Source>;
#endif
  return quantise_token<Source>;
}

QuantiseToken quantiser_for(DType source) {
  switch (source) {
    case DType::float32: return quantiser<Float32>();
    case DType::float16: return quantiser<Float16>();
    default: return quantiser<BFloat16>();
  }
}

DequantiseToken dequantiser() {
#ifdef LESA_AVX2
  static const bool vector = has_avx2_and_f16c();
  if (vector) return dequantise_token_avx2;
#endif
  return dequantise_token;
}

// Calls body(begin, end) for ranges of `total` items of `item_bytes` each, on as many threads as pay.
template <class Body>
void in_parallel(int64_t total, int64_t item_bytes, int64_t most_threads, const Body& body) {
  if (total == 0) return;
  const int64_t threads = std::min<int64_t>(most_threads, 1 + total * item_bytes / kThreadBytes);
  const int64_t chunk = threads == 1 ? total : std::max<int64_t>(1, kChunkBytes / item_bytes);
  parallel_chunks(total, chunk, threads, body);
}

// In the dtype of a gather from storage of `dtype`.
void fill_nan(DType dtype, void* target, int64_t n) {
  const bool half = dtype == DType::float16 || dtype == DType::bfloat16;
  if (half) std::fill_n(static_cast<uint16_t*>(target), n, dtype == DType::float16 ? Float16::kNan : BFloat16::kNan);
  if (!half) std::fill_n(static_cast<float*>(target), n, Float32::kNan);
}

void check_row_state(int64_t cursor, int64_t count, int64_t capacity) {
  if (cursor < 0 || cursor >= capacity || count < 0 || count > capacity) {
    refuse("cursor and count", "lie within the ring's capacity of " + std::to_string(capacity),
           std::to_string(cursor) + " and " + std::to_string(count), "Reset the ring.");
  }
}

// The checks that `check_ring_push` and `check_ring_gather` share.
template <class Ring>
void check_ring(const Ring& r) {
  check_at_least("capacity", r.capacity, 1);
  check_at_least("batch", r.batch, 1);
  check_at_least("tokens", r.tokens, 0);
  check_at_least("dim", r.dim, 0);
  check_at_least("threads", r.threads, 1);
  check_at_least("device", r.device, -1);
  // A kernel counts its blocks in the upper half of `count`, so only the lower half is left for the anchors.
  const int64_t most = r.device < 0 ? std::numeric_limits<int32_t>::max() : std::numeric_limits<uint16_t>::max();
  if (r.capacity > most) {
    refuse("capacity", "be at most " + std::to_string(most), std::to_string(r.capacity), "Use a shorter ring.");
  }
  const int64_t slots = product("storage", r.capacity, r.batch);
  const int64_t feature = product("storage", r.tokens, r.dim);
  product("storage", product("storage", slots, feature), item_size(r.storage_dtype));
  product("sigmas", slots, static_cast<int64_t>(sizeof(float)));
  product("scales", product("scales", slots, r.tokens), static_cast<int64_t>(sizeof(float)));
  check_pointer("cursor", r.cursor, alignof(int32_t));
  check_pointer("count", r.count, alignof(int32_t));
  if (feature > 0) check_pointer("storage", r.storage, item_size(r.storage_dtype));
  const bool scaled = r.storage_dtype == DType::float8_e4m3fn;
  if (scaled && r.tokens > 0) check_pointer("scales", r.scales, alignof(float));
  if (!scaled && r.scales != nullptr) {
    refuse("scales", "be a null pointer for this dtype of `storage`", "an address", "Scales belong to float8_e4m3fn.");
  }
}

}  // namespace

void check_ring_push(const RingPush& p) {
  check_ring(p);
  check_at_least("samples", p.samples, 0);
  check_at_least("features_strides", std::min({p.sample_stride, p.token_stride, p.dim_stride}), 0);
  if (p.features_dtype == DType::float8_e4m3fn) {
    refuse("features_dtype", "be one of float32, float16, bfloat16", "'float8_e4m3fn'", "Convert the features.");
  }
  if (p.rows == nullptr && p.samples != p.batch) {
    refuse("samples", "equal `batch` where no `rows` are given",
           std::to_string(p.samples) + " for a batch of " + std::to_string(p.batch), "Pass `rows`.");
  }
  if (p.samples > p.batch) {
    refuse("samples", "be at most `batch`", std::to_string(p.samples) + " for a batch of " + std::to_string(p.batch),
           "Push each row at most once.");
  }
  if (p.samples > 0 && p.tokens > 0 && p.dim > 0) {
    int64_t last = product("features", p.samples - 1, p.sample_stride);
    last = sum("features", last, product("features", p.tokens - 1, p.token_stride));
    last = sum("features", last, product("features", p.dim - 1, p.dim_stride));
    const int64_t features = product("features", sum("features", last, 1), item_size(p.features_dtype));
    check_pointer("features", p.features, item_size(p.features_dtype));
    const auto storage_at = reinterpret_cast<uintptr_t>(p.storage);
    const auto features_at = reinterpret_cast<uintptr_t>(p.features);
    const int64_t storage = p.capacity * p.batch * p.tokens * p.dim * item_size(p.storage_dtype);
    if (features_at < storage_at + storage && storage_at < features_at + features) {
      refuse("features", "share no memory with the ring", "a view of `storage`", "Pass a copy, `features.clone()`.");
    }
  }
  check_pointer("sigmas", p.sigmas, alignof(float));
  if (p.sigma != nullptr) check_pointer("sigma", p.sigma, alignof(float));
  if (p.rows != nullptr) check_pointer("rows", p.rows, alignof(int64_t));
}

void check_ring_gather(const RingGather& g) {
  check_ring(g);
  check_at_least("age", g.age, 0);
  if (g.age >= g.capacity) {
    refuse("age", "be less than the ring's capacity of " + std::to_string(g.capacity), std::to_string(g.age),
           "0 is the newest feature.");
  }
  const bool scaled = g.storage_dtype == DType::float8_e4m3fn;
  const int64_t output_size = scaled ? static_cast<int64_t>(sizeof(float)) : item_size(g.storage_dtype);
  product("output", product("output", g.batch, g.tokens * g.dim), output_size);
  if (g.tokens > 0 && g.dim > 0) check_pointer("output", g.output, output_size);
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
    check_row_state(p.cursor[row], p.count[row], p.capacity);
  }

  const int64_t feature = p.tokens * p.dim;
  const int64_t source_size = item_size(p.features_dtype);
  const int64_t target_size = item_size(p.storage_dtype);
  std::vector<const char*> sources(p.samples);
  std::vector<int64_t> targets(p.samples);  // counted in samples of the storage
  for (int64_t i = 0; i < p.samples; ++i) {
    const int64_t row = p.rows ? p.rows[i] : i;
    const int32_t cursor = p.cursor[row];
    const int64_t newest = (cursor == 0 ? p.capacity : cursor) - 1;
    const float sigma = p.sigma ? p.sigma[i] : p.level;
    const Placement placed =
        place(cursor, p.count[row], static_cast<int32_t>(p.capacity), sigma, p.sigmas[newest * p.batch + row]);
    p.cursor[row] = placed.cursor;
    p.count[row] = placed.count;
    targets[i] = placed.slot * p.batch + row;
    p.sigmas[targets[i]] = sigma;
    if (feature > 0) sources[i] = static_cast<const char*>(p.features) + i * p.sample_stride * source_size;
  }

  if (p.storage_dtype == DType::float8_e4m3fn) {
    const QuantiseToken quantise_one = quantiser_for(p.features_dtype);
    const auto quantise_range = [&](int64_t begin, int64_t end) {
      std::vector<float> wide(p.dim);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t sample = i / p.tokens, token = i % p.tokens;
        const int64_t at = targets[sample] * p.tokens + token;
        const char* source = p.dim == 0 ? nullptr : sources[sample] + token * p.token_stride * source_size;
        quantise_one(source, p.dim_stride, p.dim, wide.data(), static_cast<uint8_t*>(p.storage) + at * p.dim,
                     p.scales + at);
      }
    };
    in_parallel(p.samples * p.tokens, std::max<int64_t>(1, p.dim * source_size), p.threads, quantise_range);
    return;
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
      copy(source, p.dim_stride, static_cast<char*>(p.storage) + (targets[sample] * feature + offset) * target_size, n);
      begin += n;
    }
  };
  in_parallel(p.samples * feature, target_size, p.threads, copy_range);
}

void ring_gather_cpu(const RingGather& g) {
  for (int64_t row = 0; row < g.batch; ++row) check_row_state(g.cursor[row], g.count[row], g.capacity);
  const bool scaled = g.storage_dtype == DType::float8_e4m3fn;
  const int64_t stored_size = g.dim * item_size(g.storage_dtype);  // of a token
  const int64_t output_size = scaled ? g.dim * static_cast<int64_t>(sizeof(float)) : stored_size;
  if (g.tokens * g.dim == 0) return;
  const DequantiseToken dequantise_one = dequantiser();
  const auto gather_range = [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t row = begin / g.tokens, token = begin % g.tokens;
      const int64_t n = std::min(g.tokens - token, end - begin);
      const int64_t slot = slot_of_age(g.cursor[row], g.count[row], g.capacity, g.age);
      const int64_t at = (slot * g.batch + row) * g.tokens + token;
      const char* source = static_cast<const char*>(g.storage) + at * stored_size;
      char* target = static_cast<char*>(g.output) + begin * output_size;
      begin += n;
      if (g.count[row] == 0) {
        fill_nan(g.storage_dtype, target, n * g.dim);
      } else if (!scaled) {
        std::memcpy(target, source, n * stored_size);
      } else {
        for (int64_t i = 0; i < n; ++i) {
          dequantise_one(reinterpret_cast<const uint8_t*>(source + i * stored_size), g.scales[at + i],
                         reinterpret_cast<float*>(target + i * output_size), g.dim);
        }
      }
    }
  };
  in_parallel(g.batch * g.tokens, output_size, g.threads, gather_range);
}

}  // namespace lesa
