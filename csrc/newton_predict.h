#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "arguments.h"

namespace lesa {

// The parameters of forecasts by KAN-modulated Newton extrapolation. All arrays are contiguous. With S stages,
// K = max(history_length), M hidden units, G + p spline coefficients and rank R:
struct NewtonExperts {
  const float* in_weight;   // [S, M, K + 1]
  const float* in_bias;     // [S, M]
  const float* spline;      // [S, M, G + p]
  const float* out_weight;  // [S, K - 1, dim, M]
  const float* out_bias;    // [S, K - 1, dim]
  const float* down;        // [S, R, K - 1, dim]; may be null like the next two if R is 0
  const float* up;          // [S, dim, R]
  const float* up_bias;     // [S, dim]
  int64_t dim, hidden, rank;
  std::vector<double> stage_bounds;     // S - 1, falling; compared in float32
  std::vector<int64_t> history_length;  // S
  int64_t grid_size, spline_order;

  // K
  int64_t longest_history() const { return *std::max_element(history_length.begin(), history_length.end()); }
  bool has_residual() const { return rank > 0 && longest_history() > 1; }
};

// The weights of N forecasts on the CPU, as `StreamForecast` takes them.
struct NewtonCoefficients {
  const float* sigmas;   // [N, K], the noise levels of the newest features, newest first
  const int32_t* count;  // [N], how many there are
  const float* sigma;    // [N], the noise level to forecast
  int64_t forecasts;     // N
  NewtonExperts experts;

  float* anchors;         // [N, K, dim]
  int32_t* anchor_count;  // [N]
  float* constant;        // [N, dim]; null if up_bias is
  float* taps;            // [N, K - 1, K]; null like the next without a residual
  int32_t* stage;         // [N]
  int threads;            // most threads to use
  std::string instructions;  // the widest to use if the processor has them: "avx512", "avx2" or "plain"
};

// Checks everything that can be checked without reading memory. Throws std::invalid_argument.
void check_newton_coefficients(const NewtonCoefficients& coefficients);

// Gives the same bytes on any number of threads. Throws std::invalid_argument, before anything is written, for a
// negative count.
void newton_coefficients_cpu(const NewtonCoefficients& coefficients);

// One forecast on the CPU: `newton_coefficients_cpu` and `stream_forecast_cpu`. Sizes and strides count elements.
struct NewtonPredict {
  const void* storage;  // [capacity, batch, tokens, dim], dim contiguous, other strides not negative
  DType dtype;          // of storage and output
  int64_t capacity, batch, tokens;
  int64_t slot_stride, sample_stride, token_stride;
  const float* sigmas;    // [capacity, batch], contiguous like all that follow
  const int32_t* cursor;  // [batch], slot of the next append
  const int32_t* count;   // [batch], valid anchors
  const float* sigma;     // [batch], the noise level to forecast
  NewtonExperts experts;

  void* output;  // [batch, tokens, dim], contiguous, no overlap with anything else
  int threads;   // most threads to use
  std::string instructions;  // the widest to use if the processor has them: "avx512", "avx2" or "plain"
};

// Checks everything that can be checked without reading memory. Throws std::invalid_argument.
void check_newton_predict(const NewtonPredict& predict);

// Writes the forecast; rows that have no anchor are NaN. Anchors beyond a row's count are not read. Computes in float32
// and gives the same bytes on any number of threads. Throws std::invalid_argument, before anything is written, for a
// cursor or count that is out of range.
void newton_predict_cpu(const NewtonPredict& predict);

}  // namespace lesa
