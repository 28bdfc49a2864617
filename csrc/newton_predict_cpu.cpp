#include "newton_predict.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "stream.h"
#include "vectors.h"

namespace lesa {
namespace {

constexpr double kOffsetScale = 5.0;               // of the KAN's inputs, as in the torch form
constexpr int64_t kThreadWork = int64_t{1} << 19;  // multiplications for each further thread
constexpr int64_t kChannels = 256;                 // that a thread takes at a time, a multiple of a vector

// One forecast.
struct Row {
  int64_t stage;
  int64_t count;               // how many anchors are read
  int64_t taps;                // of the stage; those that need a missing anchor have zero weights
  std::vector<float> newton;   // [K - 1, K], the weight of each anchor in each tap
  std::vector<float> hidden;   // [M]
  float* anchors;              // [K, dim]
};

using Kernel = void (*)(const NewtonCoefficients&, const Row&, int64_t begin, int64_t end);

namespace plain {
#define LESA_KERNEL LESA_TARGET_PLAIN
using Vector = lesa::plain::Vector;
#include "newton_predict_tile.h"
#undef LESA_KERNEL
}  // namespace plain

#ifdef LESA_X86

namespace avx2 {
#define LESA_KERNEL LESA_TARGET_AVX2
using Vector = lesa::avx2::Vector;
#include "newton_predict_tile.h"
#undef LESA_KERNEL
}  // namespace avx2

namespace avx512 {
#define LESA_KERNEL LESA_TARGET_AVX512
using Vector = lesa::avx512::Vector;
#include "newton_predict_tile.h"
#undef LESA_KERNEL
}  // namespace avx512

#endif

Kernel kernel_for(const std::string& widest) {
#ifdef LESA_X86
  switch (instructions_for(widest)) {
    case Instructions::avx512: return avx512::weigh_anchors;
    case Instructions::avx2: return avx2::weigh_anchors;
    default: break;
  }
#endif
  return plain::weigh_anchors;
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

void evaluate_kan(const NewtonExperts& e, const std::vector<double>& inputs, Row& row) {
  const int64_t width = static_cast<int64_t>(inputs.size());
  const int64_t coefficients = e.grid_size + e.spline_order;
  std::vector<double> bases;
  row.hidden.resize(e.hidden);
  for (int64_t m = 0; m < e.hidden; ++m) {
    const int64_t unit = row.stage * e.hidden + m;
    double u = e.in_bias[unit];
    for (int64_t i = 0; i < width; ++i) u += e.in_weight[unit * width + i] * inputs[i];
    u = std::tanh(u);
    const double spline = spline_at(u, e.spline + unit * coefficients, e.grid_size, e.spline_order, bases);
    row.hidden[m] = static_cast<float>(spline + u / (1.0 + std::exp(-u)));
  }
}

// tap_j = sum_k newton[j - 1, k] * g_k, from divided differences; taps that need a missing anchor are zero.
void newton_weights(const float* levels, int64_t longest, double target, Row& row) {
  row.newton.assign((longest - 1) * longest, 0.0f);
  double numerator = 1.0;
  for (int64_t j = 1; j < row.count; ++j) {
    numerator *= target - levels[j - 1];
    for (int64_t k = 0; k <= j; ++k) {
      double denominator = 1.0;
      for (int64_t q = 0; q <= j; ++q) {
        if (q != k) denominator *= static_cast<double>(levels[k]) - levels[q];
      }
      row.newton[(j - 1) * longest + k] = static_cast<float>(numerator / denominator);
    }
  }
}

Row row_at(const NewtonCoefficients& c, int64_t i) {
  const NewtonExperts& e = c.experts;
  const int64_t longest = e.longest_history();
  const float* levels = c.sigmas + i * longest;
  Row row{};
  for (const double bound : e.stage_bounds) row.stage += c.sigma[i] <= static_cast<float>(bound);
  const int64_t length = e.history_length[row.stage];
  row.count = std::min<int64_t>(length, c.count[i]);
  row.taps = length - 1;
  row.anchors = c.anchors + i * longest * e.dim;
  const double target = c.sigma[i];
  std::vector<double> inputs(longest + 1, 0.0);
  for (int64_t k = 0; k < row.count; ++k) inputs[k] = (target - levels[k]) * kOffsetScale;
  inputs.back() = 2.0 * target - 1.0;
  evaluate_kan(e, inputs, row);
  newton_weights(levels, longest, target, row);
  return row;
}

void check_buffer(const char* argument, const void* pointer, int64_t elements) {
  product(argument, elements, sizeof(float));
  if (elements > 0) check_pointer(argument, pointer);
}

void check_experts(const NewtonExperts& e) {
  check_at_least("dim", e.dim, 0);
  check_at_least("hidden", e.hidden, 0);
  check_at_least("rank", e.rank, 0);
  check_at_least("grid_size", e.grid_size, 1);
  check_at_least("spline_order", e.spline_order, 0);
  if (e.history_length.size() != e.stage_bounds.size() + 1) {
    refuse("history_length", "have one entry more than `stage_bounds`",
           std::to_string(e.history_length.size()) + " and " + std::to_string(e.stage_bounds.size()),
           "Pass one length per stage.");
  }
  for (const int64_t length : e.history_length) check_at_least("history_length", length, 1);
  const int64_t stages = static_cast<int64_t>(e.history_length.size());
  const int64_t longest = e.longest_history();
  const int64_t units = product("hidden", stages, e.hidden);
  const int64_t outputs = product("out_bias", product("out_bias", stages, longest - 1), e.dim);
  check_buffer("in_weight", e.in_weight, product("in_weight", units, sum("in_weight", longest, 1)));
  check_buffer("in_bias", e.in_bias, units);
  check_buffer("spline", e.spline, product("spline", units, sum("spline", e.grid_size, e.spline_order)));
  check_buffer("out_weight", e.out_weight, product("out_weight", outputs, e.hidden));
  check_buffer("out_bias", e.out_bias, outputs);
  if (e.rank > 0) {
    check_buffer("down", e.down, product("down", outputs, e.rank));
    check_buffer("up", e.up, product("up", product("up", stages, e.dim), e.rank));
    check_buffer("up_bias", e.up_bias, product("up_bias", stages, e.dim));
  }
}

void check_rows(const NewtonPredict& p) {
  for (int64_t b = 0; b < p.batch; ++b) {
    if (p.cursor[b] < 0 || p.cursor[b] >= p.capacity || p.count[b] < 0 || p.count[b] > p.capacity) {
      refuse("cursor and count", "lie within the ring's capacity of " + std::to_string(p.capacity),
             std::to_string(p.cursor[b]) + " and " + std::to_string(p.count[b]), "Reset the ring.");
    }
  }
}

// The noise levels of the newest anchors: [batch, K]. Beyond the count they are zero.
std::vector<float> newest_levels(const NewtonPredict& p) {
  const int64_t longest = p.experts.longest_history();
  std::vector<float> levels(product("sigmas", p.batch, longest), 0.0f);
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t k = 0; k < std::min<int64_t>(longest, p.count[b]); ++k) {
      const int64_t slot = (p.cursor[b] - 1 - k + p.capacity) % p.capacity;
      levels[b * longest + k] = p.sigmas[slot * p.batch + b];
    }
  }
  return levels;
}

// The forecast with weights that have no values yet.
StreamForecast stream_of(const NewtonPredict& p) {
  const NewtonExperts& e = p.experts;
  const int64_t longest = e.longest_history();
  StreamForecast stream{};
  stream.storage = p.storage;
  stream.dtype = p.dtype;
  stream.capacity = p.capacity;
  stream.batch = p.batch;
  stream.tokens = p.tokens;
  stream.dim = e.dim;
  stream.slot_stride = p.slot_stride;
  stream.sample_stride = p.sample_stride;
  stream.token_stride = p.token_stride;
  stream.cursor = p.cursor;
  stream.count = p.count;
  stream.history = longest;
  stream.anchors_stride = product("anchors", longest, e.dim);
  stream.anchors_per_channel = true;
  stream.anchor_count_stride = 1;
  stream.constant_stride = e.dim;
  stream.constant_per_channel = true;
  stream.stages = static_cast<int64_t>(e.history_length.size());
  stream.rank = e.rank;
  stream.taps_stride = product("taps", longest - 1, longest);
  stream.stage_stride = 1;
  stream.down = e.down;
  stream.up = e.up;
  stream.residual_dtype = DType::float32;
  stream.output = p.output;
  stream.threads = p.threads;
  stream.instructions = p.instructions;
  return stream;
}

}  // namespace

void check_newton_coefficients(const NewtonCoefficients& c) {
  check_at_least("forecasts", c.forecasts, 0);
  check_at_least("threads", c.threads, 1);
  check_instructions(c.instructions);
  check_experts(c.experts);
  const int64_t longest = c.experts.longest_history();
  const int64_t levels = product("sigmas", c.forecasts, longest);
  check_buffer("sigmas", c.sigmas, levels);
  check_buffer("count", c.count, c.forecasts);
  check_buffer("sigma", c.sigma, c.forecasts);
  check_buffer("anchors", c.anchors, product("anchors", levels, c.experts.dim));
  check_buffer("anchor_count", c.anchor_count, c.forecasts);
  if (c.experts.up_bias != nullptr) {
    check_buffer("constant", c.constant, product("constant", c.forecasts, c.experts.dim));
  }
  if (!c.experts.has_residual()) return;
  check_buffer("taps", c.taps, product("taps", levels, longest - 1));
  check_buffer("stage", c.stage, c.forecasts);
}

void newton_coefficients_cpu(const NewtonCoefficients& c) {
  const NewtonExperts& e = c.experts;
  for (int64_t i = 0; i < c.forecasts; ++i) {
    if (c.count[i] < 0) refuse("count", "be at least 0", std::to_string(c.count[i]), "Reset the ring.");
  }
  const Kernel kernel = kernel_for(c.instructions);
  const int64_t longest = e.longest_history();
  std::vector<Row> rows;
  for (int64_t i = 0; i < c.forecasts; ++i) {
    rows.push_back(row_at(c, i));
    const Row& row = rows.back();
    c.anchor_count[i] = static_cast<int32_t>(row.count);
    if (e.up_bias != nullptr) std::copy_n(e.up_bias + row.stage * e.dim, e.dim, c.constant + i * e.dim);
    if (!e.has_residual()) continue;
    std::copy(row.newton.begin(), row.newton.end(), c.taps + i * (longest - 1) * longest);
    c.stage[i] = static_cast<int32_t>(row.stage);
  }
  // All forecasts of some channels one after the other: the parameters of these channels stay in the cache.
  const int64_t channel_items = (e.dim + kChannels - 1) / kChannels;
  const double work = static_cast<double>(c.forecasts * (longest - 1)) * static_cast<double>(e.dim * (e.hidden + 8));
  const auto threads = static_cast<int64_t>(std::min<double>(c.threads, 1.0 + work / kThreadWork));
  parallel_chunks(channel_items, 1, threads, [&](int64_t item, int64_t) {
    const int64_t begin = item * kChannels;
    for (const Row& row : rows) kernel(c, row, begin, std::min(begin + kChannels, e.dim));
  });
}

void check_newton_predict(const NewtonPredict& p) {
  check_experts(p.experts);
  const int64_t longest = p.experts.longest_history();
  if (longest > p.capacity && p.capacity > 0) {
    refuse("history_length", "be at most the ring's capacity of " + std::to_string(p.capacity), std::to_string(longest),
           "Make the ring as large as the longest history.");
  }
  // What is made within the call stands for its own memory.
  StreamForecast stream = stream_of(p);
  const float made[1] = {};
  const int32_t counts[1] = {};
  stream.anchors = stream.constant = stream.taps = made;
  stream.anchor_count = stream.stage = counts;
  check_stream_forecast(stream);
  check_buffer("sigmas", p.sigmas, product("sigmas", p.capacity, p.batch));
  check_buffer("sigma", p.sigma, p.batch);
}

void newton_predict_cpu(const NewtonPredict& p) {
  check_rows(p);
  const NewtonExperts& e = p.experts;
  const std::vector<float> levels = newest_levels(p);
  StreamForecast stream = stream_of(p);
  std::vector<float> anchors(p.batch * stream.anchors_stride), taps(p.batch * stream.taps_stride);
  std::vector<float> constant(e.up_bias == nullptr ? 0 : p.batch * e.dim);
  std::vector<int32_t> count(p.batch), stage(p.batch);
  newton_coefficients_cpu({levels.data(), p.count, p.sigma, p.batch, e, anchors.data(), count.data(), constant.data(),
                           taps.data(), stage.data(), p.threads, p.instructions});
  stream.anchors = anchors.data();
  stream.anchor_count = count.data();
  if (e.up_bias != nullptr) stream.constant = constant.data();
  stream.taps = taps.data();
  stream.stage = stage.data();
  stream_forecast_cpu(stream);
}

}  // namespace lesa
