#include "stream.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "vectors.h"

namespace lesa {
namespace {

constexpr int64_t kThreadBytes = int64_t{2} << 20;  // read and written for each further thread
constexpr int64_t kRankOfOneRead = 16;              // rank at which the residual takes as long as the rest
constexpr int64_t kChunkBytes = int64_t{1} << 17;   // of output that a thread takes at a time, without a residual
constexpr int64_t kResidualTokens = 24;             // the same with a residual
constexpr int64_t kHeadTokens = 12;                 // the same with an output head
constexpr int64_t kHeadChannels = 256;              // that are projected to outputs before their sum is added up
constexpr int64_t kChannels = 256;                  // that a thread prepares at a time
constexpr int64_t kGroup = 64;                      // channels that are projected together
constexpr int64_t kStep = 4;                        // of these, the channels between other work
constexpr int64_t kInputs = 4;                      // of a residual that are summed up together
constexpr int64_t kCacheLine = 64;                  // bytes
constexpr int64_t kStreamedBytes = int64_t{4} << 20;   // of output, from which on its stores are streamed
constexpr int64_t kRecycledBytes = int64_t{32} << 20;  // the largest memory that glibc's `malloc` keeps for another use

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Uninitialised memory that begins at a cache line.
class AlignedFloats {
 public:
  explicit AlignedFloats(int64_t size)
      : memory_(new float[sum("storage", size, kCacheLine / sizeof(float))]) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(memory_.get());
    begin_ = memory_.get() + (round_up(address, kCacheLine) - address) / sizeof(float);
  }
  float* begin() const { return begin_; }

 private:
  std::unique_ptr<float[]> memory_;
  float* begin_;
};

LESA_INLINE void prefetch([[maybe_unused]] const void* address) {
#ifdef __GNUC__
  __builtin_prefetch(address);
#endif
}

// Fetches into the second-level cache. Rows of features are often a multiple of 4 KB apart, so that those of one block
// of tokens have few sets of the first-level cache, and would push each other out of it.
LESA_INLINE void prefetch_far([[maybe_unused]] const void* address) {
#ifdef __GNUC__
  __builtin_prefetch(address, 0, 2);
#endif
}

LESA_INLINE void prefetch_to_write([[maybe_unused]] const void* address) {
#ifdef __GNUC__
  __builtin_prefetch(address, 1);
#endif
}

// What this thread stored is in memory before what it stores from now on, streamed stores included.
LESA_INLINE void finish_streamed_stores() {
#ifdef LESA_X86
  _mm_sfence();
#endif
}

// One feature that a residual reads, and its weight in each tap.
struct Input {
  int64_t anchor;
  std::vector<float> weights;  // [K - 1]

  bool operator==(const Input& other) const { return anchor == other.anchor && weights == other.weights; }
};

// The matrices of a residual, for all samples with the same stage and inputs.
struct Matrices {
  int64_t stage;
  std::vector<Input> inputs;
  int64_t padded_rank;  // a multiple of the kernels' panel
  float* projections;   // [dim / kGroup, inputs, padded_rank / panel, kGroup, panel]
  float* up;            // [dim / panel, R, panel]
};

// One row of the batch.
struct Sample {
  int64_t anchors;                    // how many are read
  std::vector<const void*> features;  // [anchors], newest first: [tokens, dim]
  const float* weights;               // of the anchors
  const float* constants;             // [dim], or null: `constant` for all channels
  float constant;
  const Matrices* matrices;  // or null without a residual
  void* output;              // [tokens, dim], or [tokens, outputs] with a head
  bool streamed;             // whether its stores are, see vectors.h
  const float* scale;        // of the head, [tokens, dim] with its strides
  const float* shift;        // the same, or null
};

// The head's projection in the order in which it is read. Outputs are padded to a multiple of the kernels' panel.
struct Projection {
  float* weight;  // [outputs / panel, dim, panel]
  float* bias;    // [outputs]
};

using Pack = void (*)(const StreamForecast&, const Matrices&, int64_t begin, int64_t end);   // of channels
using Forecast = void (*)(const StreamForecast&, const Sample&, int64_t begin, int64_t end);  // of tokens
using PackHead = void (*)(const StreamForecast&, const StreamHead&, const Projection&, int64_t begin, int64_t end);
using Velocity = void (*)(const StreamForecast&, const StreamHead&, const Projection&, const Sample&, int64_t begin,
                          int64_t end);

struct Kernels {
  int64_t panel;
  Pack pack[3];  // of float32, float16 and bfloat16, as DType has them
  Forecast forecast[3];
  bool streams[3];
  PackHead pack_head;
  Velocity velocity;
};

namespace plain {
#define LESA_KERNEL LESA_TARGET_PLAIN
using Vector = lesa::plain::Vector;
#include "stream_tile.h"
#undef LESA_KERNEL
}  // namespace plain

#ifdef LESA_X86

namespace avx2 {
#define LESA_KERNEL LESA_TARGET_AVX2
using Vector = lesa::avx2::Vector;
#include "stream_tile.h"
#undef LESA_KERNEL
}  // namespace avx2

namespace avx512 {
#define LESA_KERNEL LESA_TARGET_AVX512
using Vector = lesa::avx512::Vector;
#include "stream_tile.h"
#undef LESA_KERNEL
}  // namespace avx512

#endif

const Kernels& kernels_for(const std::string& widest) {
#ifdef LESA_X86
  switch (instructions_for(widest)) {
    case Instructions::avx512: return avx512::kKernels;
    case Instructions::avx2: return avx2::kKernels;
    default: break;
  }
#endif
  return plain::kKernels;
}

// The features that the taps are made of. Taps whose weights add up to zero but for rounding are made of differences to
// the newest feature, and that feature itself does not count.
std::vector<Input> inputs_of(const StreamForecast& p, const float* taps, int64_t anchors) {
  std::vector<Input> inputs;
  std::vector<float> left_over(p.history - 1);
  bool any = false;
  for (int64_t j = 0; j < p.history - 1; ++j) {
    const float* weights = taps + j * p.history;
    double total = 0.0, magnitude = 0.0;
    for (int64_t k = 0; k < std::min(anchors, j + 2); ++k) {  // of the features that the tap is made of
      total += weights[k];
      magnitude += std::abs(weights[k]);
    }
    const double rounding = magnitude * static_cast<double>(anchors) * 0x1p-24;
    left_over[j] = std::abs(total) <= rounding ? 0.0f : static_cast<float>(total);  // NaN stays
    any = any || left_over[j] != 0.0f;
  }
  if (any) inputs.push_back({0, std::move(left_over)});
  for (int64_t k = 1; k < anchors; ++k) {
    Input input{k, {}};
    for (int64_t j = 0; j < p.history - 1; ++j) input.weights.push_back(k < j + 2 ? taps[j * p.history + k] : 0.0f);
    inputs.push_back(std::move(input));
  }
  return inputs;
}

bool has_residual(const StreamForecast& p) { return p.rank > 0 && p.history > 1; }

// Those of all samples, each once, and for each sample which one it has; -1 for none. Their memory is not set.
std::vector<int64_t> find_matrices(const StreamForecast& p, const std::vector<Sample>& samples,
                                   std::vector<Matrices>& matrices) {
  std::vector<int64_t> found(samples.size(), -1);
  if (!has_residual(p)) return found;
  for (int64_t b = 0; b < p.batch; ++b) {
    if (samples[b].anchors == 0) continue;
    Matrices m{};
    m.stage = p.stage[b * p.stage_stride];
    m.inputs = inputs_of(p, p.taps + b * p.taps_stride, samples[b].anchors);
    const auto same = [&](const Matrices& other) { return other.stage == m.stage && other.inputs == m.inputs; };
    found[b] = std::find_if(matrices.begin(), matrices.end(), same) - matrices.begin();
    if (found[b] == static_cast<int64_t>(matrices.size())) matrices.push_back(std::move(m));
  }
  return found;
}

Sample sample_at(const StreamForecast& p, const StreamHead* head, int64_t b) {
  Sample s{};
  const int64_t wanted = p.anchor_count[b * p.anchor_count_stride];
  s.anchors = wanted < 0 || wanted > p.count[b] ? 0 : std::min(wanted, p.history);
  for (int64_t k = 0; k < s.anchors; ++k) {
    const int64_t slot = (p.cursor[b] - 1 - k + p.capacity) % p.capacity;
    s.features.push_back(static_cast<const char*>(p.storage) +
                         (slot * p.slot_stride + b * p.sample_stride) * item_size(p.dtype));
  }
  s.weights = p.anchors + b * p.anchors_stride;
  if (p.constant != nullptr) {
    const float* constant = p.constant + b * p.constant_stride;
    if (p.constant_per_channel) s.constants = constant;
    if (!p.constant_per_channel) s.constant = *constant;
  }
  const int64_t width = head ? head->outputs : p.dim;
  s.output = static_cast<char*>(p.output) + b * p.tokens * width * item_size(p.dtype);
  if (head) {
    s.scale = head->scale + b * head->scale_sample_stride;
    s.shift = head->shift ? head->shift + b * head->shift_sample_stride : nullptr;
  }
  return s;
}

// Whether the output's stores are streamed. Then its lines are not read before they are written. A small output is
// still in the caches when its reader comes, so it stays there. A very large one usually has new pages, which the
// system has just cleared, so that their lines are in the caches already.
bool is_streamed(const StreamForecast& p) {
  const int64_t row = p.dim * item_size(p.dtype);
  const bool aligned = reinterpret_cast<uintptr_t>(p.output) % kCacheLine == 0 && row % kCacheLine == 0;
  const int64_t bytes = p.batch * p.tokens * row;
  return aligned && bytes >= kStreamedBytes && bytes <= kRecycledBytes;
}

void check_rows(const StreamForecast& p) {
  for (int64_t b = 0; b < p.batch; ++b) {
    if (p.cursor[b] < 0 || p.cursor[b] >= p.capacity || p.count[b] < 0 || p.count[b] > p.capacity) {
      refuse("cursor and count", "lie within the ring's capacity of " + std::to_string(p.capacity),
             std::to_string(p.cursor[b]) + " and " + std::to_string(p.count[b]), "Reset the ring.");
    }
    if (!has_residual(p)) continue;
    const int64_t stage = p.stage[b * p.stage_stride];
    if (stage < 0 || stage >= p.stages) {
      refuse("stage", "lie in [0, " + std::to_string(p.stages) + ")", std::to_string(stage),
             "Pass weights that were made for this residual.");
    }
  }
}

void check_array(const char* argument, const void* pointer, int64_t batch, int64_t stride, int64_t row,
                 int64_t item = sizeof(float)) {
  check_at_least(argument, stride, 0);
  product(argument, sum(argument, product(argument, std::max<int64_t>(0, batch - 1), stride), row), item);
  if (batch > 0 && row > 0) check_pointer(argument, pointer, item);
}

// Checks a forecast, or what is made of it. The output is [batch, tokens, width].
void check_stream(const StreamForecast& p, int64_t width) {
  check_at_least("capacity", p.capacity, 1);
  check_at_least("batch", p.batch, 0);
  check_at_least("tokens", p.tokens, 0);
  check_at_least("dim", p.dim, 0);
  check_at_least("storage_strides", std::min({p.slot_stride, p.sample_stride, p.token_stride}), 0);
  check_at_least("history", p.history, 1);
  if (p.history > p.capacity) {
    refuse("history", "be at most the ring's capacity of " + std::to_string(p.capacity), std::to_string(p.history),
           "Make the ring as large as the history.");
  }
  check_at_least("stages", p.stages, 0);
  check_at_least("rank", p.rank, 0);
  check_at_least("threads", p.threads, 1);
  check_instructions(p.instructions);

  check_array("cursor", p.cursor, p.batch, 1, 1);
  check_array("count", p.count, p.batch, 1, 1);
  const int64_t weights = product("anchors", p.history, p.anchors_per_channel ? p.dim : 1);
  check_array("anchors", p.anchors, p.batch, p.anchors_stride, weights);
  check_array("anchor_count", p.anchor_count, p.batch, p.anchor_count_stride, 1);
  if (p.constant != nullptr) {
    check_array("constant", p.constant, p.batch, p.constant_stride, p.constant_per_channel ? p.dim : 1);
  }
  if (has_residual(p)) {
    check_array("taps", p.taps, p.batch, p.taps_stride, product("taps", p.history - 1, p.history));
    check_array("stage", p.stage, p.batch, p.stage_stride, 1);
    const int64_t item = item_size(p.residual_dtype);
    const int64_t row = product("down", p.history - 1, p.dim);
    check_array("down", p.down, p.stages, 0, product("down", product("down", p.stages, p.rank), row), item);
    check_array("up", p.up, p.stages, 0, product("up", product("up", p.stages, p.dim), p.rank), item);
  }
  const int64_t elements = product("output", p.batch, product("output", p.tokens, width));
  product("output", elements, item_size(p.dtype));
  if (elements == 0) return;
  int64_t last = product("storage", p.capacity - 1, p.slot_stride);
  last = sum("storage", last, product("storage", p.batch - 1, p.sample_stride));
  last = sum("storage", last, product("storage", p.tokens - 1, p.token_stride));
  product("storage", sum("storage", last, p.dim), item_size(p.dtype));
  check_pointer("storage", p.storage);
  check_pointer("output", p.output);
}

void check_modulation(const char* argument, const StreamForecast& p, const float* pointer, int64_t sample_stride,
                      int64_t token_stride) {
  check_at_least(argument, token_stride, 0);
  const int64_t last = product(argument, std::max<int64_t>(0, p.tokens - 1), token_stride);
  check_array(argument, pointer, p.batch, sample_stride, p.tokens > 0 ? sum(argument, last, p.dim) : 0);
}

// The forecast, or with a head what it makes of it.
void run_stream(const StreamForecast& p, const StreamHead* head) {
  check_rows(p);
  if (p.batch == 0 || p.tokens == 0 || (head ? head->outputs : p.dim) == 0) return;

  const Kernels& kernels = kernels_for(p.instructions);
  std::vector<Sample> samples;
  const bool streamed = !head && kernels.streams[static_cast<int>(p.dtype)] && is_streamed(p);
  for (int64_t b = 0; b < p.batch; ++b) {
    samples.push_back(sample_at(p, head, b));
    samples[b].streamed = streamed;
  }
  std::vector<Matrices> matrices;
  const std::vector<int64_t> found = find_matrices(p, samples, matrices);
  const int64_t padded_dim = round_up(p.dim, kGroup);
  const int64_t padded_rank = round_up(p.rank, kernels.panel);
  // All sizes are multiples of a vector, so that all parts stay aligned.
  const int64_t projection_size = product("down", padded_dim, padded_rank);
  const int64_t up_size = product("up", padded_dim, p.rank);
  int64_t scratch_size = product("up", static_cast<int64_t>(matrices.size()), up_size);
  for (const Matrices& m : matrices) {
    const int64_t inputs = static_cast<int64_t>(m.inputs.size());
    scratch_size = sum("down", scratch_size, product("down", inputs, projection_size));
  }
  const int64_t padded_outputs = head ? round_up(head->outputs, kernels.panel) : 0;
  scratch_size = sum("head.weight", scratch_size, product("head.weight", padded_outputs, sum("dim", p.dim, 1)));
  const AlignedFloats scratch(scratch_size);
  float* next = scratch.begin();
  for (Matrices& m : matrices) {
    m.padded_rank = padded_rank;
    m.projections = next;
    m.up = next + m.inputs.size() * projection_size;
    next = m.up + up_size;
    std::fill(next - kGroup * p.rank, next, 0.0f);  // the last panels may not be full
  }
  for (int64_t b = 0; b < p.batch; ++b) samples[b].matrices = found[b] < 0 ? nullptr : &matrices[found[b]];
  const Projection projection{next, next + padded_outputs * p.dim};
  if (head) {
    std::fill_n(projection.bias, padded_outputs, 0.0f);
    if (head->bias) std::copy_n(head->bias, head->outputs, projection.bias);
  }

  const Forecast forecast = kernels.forecast[static_cast<int>(p.dtype)];
  const Pack pack = kernels.pack[static_cast<int>(p.residual_dtype)];
  const int64_t token_bytes = p.dim * item_size(p.dtype);
  const double moved = static_cast<double>(p.batch * p.tokens * token_bytes) * static_cast<double>(p.history + 1);
  const int64_t columns = (matrices.empty() ? 0 : p.rank) + (head ? head->outputs / p.history : 0);
  const double work = moved * (1.0 + static_cast<double>(columns) / kRankOfOneRead);
  const auto threads = static_cast<int64_t>(std::min<double>(p.threads, 1.0 + work / kThreadBytes));
  const int64_t whole = matrices.empty() ? std::max<int64_t>(1, kChunkBytes / token_bytes) : kResidualTokens;
  const int64_t chunk = head ? kHeadTokens : whole;
  // First what all tokens of a sample share, then the tokens. Items are taken in this order, so a thread that waits for
  // the first kind waits for threads that are working on it.
  const int64_t channel_items = (p.dim + kChannels - 1) / kChannels;
  const int64_t token_items = (p.tokens + chunk - 1) / chunk;
  const int64_t maps = static_cast<int64_t>(matrices.size()) * channel_items;
  const int64_t preparations = maps + (head ? channel_items : 0);
  std::atomic<int64_t> prepared{0};
  parallel_chunks(preparations + p.batch * token_items, 1, threads, [&](int64_t item, int64_t) {
    if (item < preparations) {
      const int64_t begin = item % channel_items * kChannels;
      const int64_t end = std::min(begin + kChannels, p.dim);
      if (item < maps) {
        pack(p, matrices[item / channel_items], begin, end);
      } else {
        kernels.pack_head(p, *head, projection, begin, end);
      }
      prepared.fetch_add(1, std::memory_order_release);
      return;
    }
    while (prepared.load(std::memory_order_acquire) < preparations) std::this_thread::yield();
    const int64_t begin = (item - preparations) % token_items * chunk;
    const int64_t end = std::min(begin + chunk, p.tokens);
    const Sample& sample = samples[(item - preparations) / token_items];
    if (head) {
      kernels.velocity(p, *head, projection, sample, begin, end);
    } else {
      forecast(p, sample, begin, end);
      if (streamed) finish_streamed_stores();
    }
  });
}

}  // namespace

Norm norm_from_name(const char* argument, const std::string& name) {
  if (name == "none") return Norm::none;
  if (name == "rms") return Norm::rms;
  if (name == "layer") return Norm::layer;
  refuse(argument, "be one of none, rms, layer", "'" + name + "'", "Name the norm of the head.");
}

void check_stream_forecast(const StreamForecast& stream) { check_stream(stream, stream.dim); }

void check_stream_velocity(const StreamForecast& stream, const StreamHead& head) {
  check_at_least("head.outputs", head.outputs, 0);
  check_at_least("dim", stream.dim, 1);  // the mean of no channels is not defined
  check_stream(stream, head.outputs);
  if (stream.dtype != DType::float32) {
    refuse("storage_dtype", "be float32 for an output head", "another one", "Forecast first, then apply the head.");
  }
  check_array("head.weight", head.weight, 1, 0, product("head.weight", head.outputs, stream.dim));
  if (head.bias != nullptr) check_array("head.bias", head.bias, 1, 0, head.outputs);
  check_modulation("head.scale", stream, head.scale, head.scale_sample_stride, head.scale_token_stride);
  if (head.shift != nullptr) {
    check_modulation("head.shift", stream, head.shift, head.shift_sample_stride, head.shift_token_stride);
  }
}

void stream_forecast_cpu(const StreamForecast& stream) { run_stream(stream, nullptr); }

void stream_velocity_cpu(const StreamForecast& stream, const StreamHead& head) { run_stream(stream, &head); }

}  // namespace lesa
