#include "newton_predict.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu.h"

namespace lesa {
namespace {

constexpr double kOffsetScale = 5.0;                // of the KAN's inputs, as in the torch form
constexpr int64_t kThreadBytes = int64_t{2} << 20;  // read and written for each further thread
constexpr int64_t kRankOfOneRead = 16;              // rank at which the residual takes as long as the rest
constexpr int64_t kChunkBytes = int64_t{1} << 17;   // of output that a thread takes at a time
constexpr int64_t kResidualTokens = 24;             // the same with a residual; its matrices are read once for these
constexpr int64_t kChannels = 256;                  // that a thread prepares at a time
constexpr int64_t kCacheLine = 64;                  // bytes

// One row of the batch.
struct Sample {
  int64_t stage;
  int64_t anchors;                    // how many are read
  int64_t taps;                       // of the stage; those that need a missing anchor have zero weights
  std::vector<const void*> features;  // [anchors], newest first: [tokens, dim]
  std::vector<float> newton;          // [taps, anchors], the weight of each anchor in each tap
  std::vector<float> hidden;          // [M]
  int64_t padded_dim, padded_rank;    // multiples of the kernels' panel
  float* weights;                     // [anchors, padded_dim]
  float* projections;                 // [anchors - 1, dim, padded_rank], from an anchor to the residual's input
  float* up;                          // [padded_dim / panel, 1 + R, panel], up_bias and then up
  float* residual;                    // [tokens, padded_rank], the residual's input
  void* output;                       // [tokens, dim]
};

using Kernel = void (*)(const NewtonPredict&, const Sample&, int64_t begin, int64_t end);

struct Kernels {
  int64_t panel;
  Kernel prepare;                                                // of channels [begin, end)
  Kernel forecast_float32, forecast_float16, forecast_bfloat16;  // of tokens [begin, end)
};

// Features that are needed soon, of some tokens: of one anchor, and perhaps of the newest.
struct Ahead {
  const void* feature;
  const void* newest;          // or null
  int64_t rows, stride, item;  // tokens, and the bytes from one to the next and of an element

  LESA_INLINE void fetch(int64_t first, int64_t n) const {
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t at = first * item; at < (first + n) * item; at += kCacheLine) {
        prefetch(static_cast<const char*>(feature) + row * stride + at);
        if (newest != nullptr) prefetch(static_cast<const char*>(newest) + row * stride + at);
      }
    }
  }

  static LESA_INLINE void prefetch([[maybe_unused]] const char* address) {
#ifdef __GNUC__
    __builtin_prefetch(address, 0, 2);  // into the second-level cache
#endif
  }
};

// Instruction sets. A vector's elements are floats; loads and stores convert as the element types do.

namespace plain {

struct Vector {
  static constexpr int64_t kLanes = 8;
  struct Register {
    float lane[kLanes];
  };

  template <class Element>
  static LESA_INLINE Register load(const typename Element::Bits* from) {
    Register value;
    for (int64_t i = 0; i < kLanes; ++i) value.lane[i] = Element::load(from[i]);
    return value;
  }
  template <class Element>
  static LESA_INLINE void store(typename Element::Bits* to, const Register& value) {
    for (int64_t i = 0; i < kLanes; ++i) to[i] = Element::store(value.lane[i]);
  }
  static LESA_INLINE Register broadcast(float value) {
    Register result;
    for (int64_t i = 0; i < kLanes; ++i) result.lane[i] = value;
    return result;
  }
  static LESA_INLINE Register add(Register a, const Register& b) {
    for (int64_t i = 0; i < kLanes; ++i) a.lane[i] += b.lane[i];
    return a;
  }
  static LESA_INLINE Register subtract(Register a, const Register& b) {
    for (int64_t i = 0; i < kLanes; ++i) a.lane[i] -= b.lane[i];
    return a;
  }
  static LESA_INLINE Register multiply_add(const Register& a, const Register& b, Register c) {
    for (int64_t i = 0; i < kLanes; ++i) c.lane[i] += a.lane[i] * b.lane[i];
    return c;
  }
  static LESA_INLINE float multiply_add(float a, float b, float c) { return a * b + c; }
};

#define LESA_KERNEL
#include "newton_predict_tile.h"
#undef LESA_KERNEL

}  // namespace plain

#ifdef LESA_X86

namespace avx2 {

#define LESA_KERNEL __attribute__((target("avx2,fma,f16c")))

struct Vector {
  static constexpr int64_t kLanes = 8;
  using Register = __m256;

  template <class Element>
  static LESA_INLINE LESA_KERNEL Register load(const typename Element::Bits* from) {
    if constexpr (std::is_same_v<Element, Float32>) {
      return _mm256_loadu_ps(from);
    } else {
      const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
      if constexpr (std::is_same_v<Element, Float16>) return _mm256_cvtph_ps(bits);
      return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    }
  }
  template <class Element>
  static LESA_INLINE LESA_KERNEL void store(typename Element::Bits* to, Register value) {
    if constexpr (std::is_same_v<Element, Float32>) {
      _mm256_storeu_ps(to, value);
    } else if constexpr (std::is_same_v<Element, Float16>) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
    } else {
      const __m256i bits = _mm256_castps_si256(value);
      const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
      const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
      const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
      const __m256i chosen = _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7fc0), is_nan);
      const __m128i low = _mm256_castsi256_si128(chosen), high = _mm256_extracti128_si256(chosen, 1);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_packus_epi32(low, high));
    }
  }
  static LESA_INLINE LESA_KERNEL Register broadcast(float value) { return _mm256_set1_ps(value); }
  static LESA_INLINE LESA_KERNEL Register add(Register a, Register b) { return _mm256_add_ps(a, b); }
  static LESA_INLINE LESA_KERNEL Register subtract(Register a, Register b) { return _mm256_sub_ps(a, b); }
  static LESA_INLINE LESA_KERNEL Register multiply_add(Register a, Register b, Register c) {
    return _mm256_fmadd_ps(a, b, c);
  }
  static LESA_INLINE LESA_KERNEL float multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
};

#include "newton_predict_tile.h"
#undef LESA_KERNEL

}  // namespace avx2

namespace avx512 {

#define LESA_KERNEL __attribute__((target("avx512f,avx2,fma,f16c")))

struct Vector {
  static constexpr int64_t kLanes = 16;
  using Register = __m512;

  template <class Element>
  static LESA_INLINE LESA_KERNEL Register load(const typename Element::Bits* from) {
    if constexpr (std::is_same_v<Element, Float32>) {
      return _mm512_loadu_ps(from);
    } else {
      const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
      if constexpr (std::is_same_v<Element, Float16>) return _mm512_cvtph_ps(bits);
      return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }
  }
  template <class Element>
  static LESA_INLINE LESA_KERNEL void store(typename Element::Bits* to, Register value) {
    if constexpr (std::is_same_v<Element, Float32>) {
      _mm512_storeu_ps(to, value);
    } else if constexpr (std::is_same_v<Element, Float16>) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
    } else {
      const __m512i bits = _mm512_castps_si512(value);
      const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
      const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
      const __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
      const __m512i chosen = _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), is_nan, _mm512_set1_epi32(0x7fc0));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(chosen));
    }
  }
  static LESA_INLINE LESA_KERNEL Register broadcast(float value) { return _mm512_set1_ps(value); }
  static LESA_INLINE LESA_KERNEL Register add(Register a, Register b) { return _mm512_add_ps(a, b); }
  static LESA_INLINE LESA_KERNEL Register subtract(Register a, Register b) { return _mm512_sub_ps(a, b); }
  static LESA_INLINE LESA_KERNEL Register multiply_add(Register a, Register b, Register c) {
    return _mm512_fmadd_ps(a, b, c);
  }
  static LESA_INLINE LESA_KERNEL float multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
};

#include "newton_predict_tile.h"
#undef LESA_KERNEL

}  // namespace avx512

#endif

const Kernels& kernels_for(const std::string& widest) {
#ifdef LESA_X86
  static const bool vector = has_avx2_and_f16c() && __builtin_cpu_supports("fma");
  static const bool wide = vector && __builtin_cpu_supports("avx512f");
  if (wide && widest == "avx512") return avx512::kKernels;
  if (vector && widest != "plain") return avx2::kKernels;
#endif
  return plain::kKernels;
}

// The KAN and the Newton weights are a few hundred numbers, so they can afford double precision.

double spline_at(double u, const float* coefficients, int64_t grid_size, int64_t order, std::vector<double>& bases) {
  if (std::isnan(u)) return u;
  // u is a tanh, so it lies on the grid; at its upper end the last basis, which has no coefficient, is zero.
  const double position = (u + 1.0) * (static_cast<double>(grid_size) / 2.0);
  const double interval = std::floor(position);
  const double f = position - interval;
  const int64_t first = static_cast<int64_t>(interval);
  // Cox-de Boor on a uniform grid, in place, from the last basis down.
  bases.assign(order + 1, 0.0);
  bases[0] = 1.0;
  for (int64_t d = 1; d <= order; ++d) {
    for (int64_t k = d; k >= 0; --k) {
      const double rising = k > 0 ? (f + static_cast<double>(d - k)) * bases[k - 1] : 0.0;
      const double falling = k < d ? (static_cast<double>(k + 1) - f) * bases[k] : 0.0;
      bases[k] = (rising + falling) / static_cast<double>(d);
    }
  }
  double sum = 0.0;
  for (int64_t k = 0; k <= order && first + k < grid_size + order; ++k) sum += bases[k] * coefficients[first + k];
  return sum;
}

void evaluate_kan(const NewtonPredict& p, const std::vector<double>& inputs, Sample& s) {
  const int64_t width = static_cast<int64_t>(inputs.size());
  const int64_t coefficients = p.grid_size + p.spline_order;
  std::vector<double> bases;
  s.hidden.resize(p.hidden);
  for (int64_t m = 0; m < p.hidden; ++m) {
    const int64_t unit = s.stage * p.hidden + m;
    double u = p.in_bias[unit];
    for (int64_t i = 0; i < width; ++i) u += p.in_weight[unit * width + i] * inputs[i];
    u = std::tanh(u);
    const double spline = spline_at(u, p.spline + unit * coefficients, p.grid_size, p.spline_order, bases);
    s.hidden[m] = static_cast<float>(spline + u / (1.0 + std::exp(-u)));
  }
}

// tap_j = sum_k newton[j - 1, k] * g_k, from divided differences; taps that need a missing anchor are zero.
void newton_weights(const std::vector<double>& levels, double target, Sample& s) {
  s.newton.assign(s.taps * s.anchors, 0.0f);
  double numerator = 1.0;
  for (int64_t j = 1; j < s.anchors; ++j) {
    numerator *= target - levels[j - 1];
    for (int64_t k = 0; k <= j; ++k) {
      double denominator = 1.0;
      for (int64_t q = 0; q <= j; ++q) {
        if (q != k) denominator *= levels[k] - levels[q];
      }
      s.newton[(j - 1) * s.anchors + k] = static_cast<float>(numerator / denominator);
    }
  }
}

Sample sample_at(const NewtonPredict& p, int64_t b) {
  Sample s{};
  for (const double bound : p.stage_bounds) s.stage += p.sigma[b] <= static_cast<float>(bound);
  const int64_t length = p.history_length[s.stage];
  s.anchors = std::min<int64_t>(length, p.count[b]);
  s.taps = length - 1;
  const double target = p.sigma[b];
  std::vector<double> levels(s.anchors), inputs(p.longest_history() + 1, 0.0);
  for (int64_t k = 0; k < s.anchors; ++k) {
    const int64_t slot = (p.cursor[b] - 1 - k + p.capacity) % p.capacity;
    s.features.push_back(static_cast<const char*>(p.storage) +
                         (slot * p.slot_stride + b * p.sample_stride) * item_size(p.dtype));
    levels[k] = p.sigmas[slot * p.batch + b];
    inputs[k] = (target - levels[k]) * kOffsetScale;
  }
  inputs.back() = 2.0 * target - 1.0;
  evaluate_kan(p, inputs, s);
  newton_weights(levels, target, s);
  s.output = static_cast<char*>(p.output) + b * p.tokens * p.dim * item_size(p.dtype);
  return s;
}

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

void check_buffer(const char* argument, const void* pointer, int64_t elements) {
  product(argument, elements, sizeof(float));
  if (elements > 0) check_pointer(argument, pointer);
}

}  // namespace

void check_newton_predict(const NewtonPredict& p) {
  check_at_least("capacity", p.capacity, 1);
  check_at_least("batch", p.batch, 0);
  check_at_least("tokens", p.tokens, 0);
  check_at_least("dim", p.dim, 0);
  check_at_least("storage_strides", std::min({p.slot_stride, p.sample_stride, p.token_stride}), 0);
  check_at_least("hidden", p.hidden, 0);
  check_at_least("rank", p.rank, 0);
  check_at_least("grid_size", p.grid_size, 1);
  check_at_least("spline_order", p.spline_order, 0);
  check_at_least("threads", p.threads, 1);
  if (p.instructions != "avx512" && p.instructions != "avx2" && p.instructions != "plain") {
    refuse("instructions", "be one of avx512, avx2, plain", "'" + p.instructions + "'", "Leave it out.");
  }
  if (p.history_length.size() != p.stage_bounds.size() + 1) {
    refuse("history_length", "have one entry more than `stage_bounds`",
           std::to_string(p.history_length.size()) + " and " + std::to_string(p.stage_bounds.size()),
           "Pass one length per stage.");
  }
  for (const int64_t length : p.history_length) {
    check_at_least("history_length", length, 1);
    if (length > p.capacity) {
      refuse("history_length", "be at most the ring's capacity of " + std::to_string(p.capacity),
             std::to_string(length), "Make the ring as large as the longest history.");
    }
  }

  const int64_t stages = static_cast<int64_t>(p.history_length.size());
  const int64_t longest = p.longest_history();
  const int64_t units = product("hidden", stages, p.hidden);
  const int64_t outputs = product("out_bias", product("out_bias", stages, longest - 1), p.dim);
  check_buffer("sigmas", p.sigmas, product("sigmas", p.capacity, p.batch));
  check_buffer("cursor", p.cursor, p.batch);
  check_buffer("count", p.count, p.batch);
  check_buffer("sigma", p.sigma, p.batch);
  check_buffer("in_weight", p.in_weight, product("in_weight", units, sum("in_weight", longest, 1)));
  check_buffer("in_bias", p.in_bias, units);
  check_buffer("spline", p.spline, product("spline", units, sum("spline", p.grid_size, p.spline_order)));
  check_buffer("out_weight", p.out_weight, product("out_weight", outputs, p.hidden));
  check_buffer("out_bias", p.out_bias, outputs);
  if (p.rank > 0) {
    check_buffer("down", p.down, product("down", outputs, p.rank));
    check_buffer("up", p.up, product("up", product("up", stages, p.dim), p.rank));
    check_buffer("up_bias", p.up_bias, product("up_bias", stages, p.dim));
  }
  const int64_t feature = product("output", p.tokens, p.dim);
  const int64_t elements = product("output", p.batch, feature);
  product("output", elements, item_size(p.dtype));
  if (elements == 0) return;
  int64_t last = product("storage", p.capacity - 1, p.slot_stride);
  last = sum("storage", last, product("storage", p.batch - 1, p.sample_stride));
  last = sum("storage", last, product("storage", p.tokens - 1, p.token_stride));
  product("storage", sum("storage", last, p.dim), item_size(p.dtype));
  check_pointer("storage", p.storage);
  check_pointer("output", p.output);
}

void newton_predict_cpu(const NewtonPredict& p) {
  for (int64_t b = 0; b < p.batch; ++b) {
    if (p.cursor[b] < 0 || p.cursor[b] >= p.capacity || p.count[b] < 0 || p.count[b] > p.capacity) {
      refuse("cursor and count", "lie within the ring's capacity of " + std::to_string(p.capacity),
             std::to_string(p.cursor[b]) + " and " + std::to_string(p.count[b]), "Reset the ring.");
    }
  }
  if (p.batch == 0 || p.tokens == 0 || p.dim == 0) return;

  const Kernels& kernels = kernels_for(p.instructions);
  const int64_t padded_dim = round_up(p.dim, kernels.panel);
  const int64_t padded_rank = round_up(p.rank, kernels.panel);
  const int64_t longest = p.longest_history();
  // All sizes are multiples of a vector, so that all parts stay aligned.
  const int64_t weights_size = product("storage", longest, padded_dim);
  const int64_t projections_size = product("down", product("down", longest - 1, p.dim), padded_rank);
  const int64_t up_size = p.rank == 0 ? 0 : product("up", padded_dim, sum("up", p.rank, 1));
  const int64_t residual_size = product("storage", p.tokens, padded_rank);
  const int64_t sample_size =
      sum("storage", sum("storage", weights_size, projections_size), sum("storage", up_size, residual_size));
  const int64_t scratch_size = sum("storage", product("storage", p.batch, sample_size), kCacheLine);
  const std::unique_ptr<float[]> scratch(new float[scratch_size]);
  const uintptr_t address = reinterpret_cast<uintptr_t>(scratch.get());
  float* next = scratch.get() + (round_up(address, kCacheLine) - address) / sizeof(float);
  std::vector<Sample> samples;
  for (int64_t b = 0; b < p.batch; ++b) {
    Sample s = sample_at(p, b);
    s.padded_dim = padded_dim;
    s.padded_rank = padded_rank;
    s.weights = next;
    s.projections = s.weights + weights_size;
    s.up = s.projections + projections_size;
    s.residual = s.up + up_size;
    std::fill(s.residual - up_size / padded_dim * kernels.panel, s.residual, 0.0f);  // the last panel may not be full
    next += sample_size;
    samples.push_back(std::move(s));
  }

  const Kernel forecast = p.dtype == DType::float32   ? kernels.forecast_float32
                          : p.dtype == DType::float16 ? kernels.forecast_float16
                                                      : kernels.forecast_bfloat16;
  const int64_t token_bytes = p.dim * item_size(p.dtype);
  const double moved = static_cast<double>(p.batch * p.tokens * token_bytes) * static_cast<double>(longest + 1);
  const double work = moved * (1.0 + static_cast<double>(p.rank) / kRankOfOneRead);
  const auto threads = static_cast<int64_t>(std::min<double>(p.threads, 1.0 + work / kThreadBytes));
  const int64_t chunk = p.rank == 0 ? std::max<int64_t>(1, kChunkBytes / token_bytes) : kResidualTokens;
  // First what all tokens of a sample share, then the tokens. Items are taken in this order, so a thread that waits for
  // the first kind waits for threads that are working on it.
  const int64_t channel_items = (p.dim + kChannels - 1) / kChannels;
  const int64_t token_items = (p.tokens + chunk - 1) / chunk;
  const int64_t preparations = p.batch * channel_items;
  std::atomic<int64_t> prepared{0};
  parallel_chunks(preparations + p.batch * token_items, 1, threads, [&](int64_t item, int64_t) {
    if (item < preparations) {
      const int64_t begin = item % channel_items * kChannels;
      kernels.prepare(p, samples[item / channel_items], begin, std::min(begin + kChannels, p.dim));
      prepared.fetch_add(1, std::memory_order_release);
      return;
    }
    while (prepared.load(std::memory_order_acquire) < preparations) std::this_thread::yield();
    const int64_t begin = (item - preparations) % token_items * chunk;
    forecast(p, samples[(item - preparations) / token_items], begin, std::min(begin + chunk, p.tokens));
  });
}

}  // namespace lesa
