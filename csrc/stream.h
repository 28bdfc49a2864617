#pragma once

#include <cstdint>
#include <string>

#include "arguments.h"

namespace lesa {

// The forecast of one step on the CPU: a weighted sum of the newest features of a ring, a constant, and a low-rank
// residual. Sizes and strides count elements; strides of samples may be zero. With K anchors, S stages and rank R:
struct StreamForecast {
  const void* storage;  // [capacity, batch, tokens, dim], dim contiguous, other strides not negative
  DType dtype;          // of storage and output
  int64_t capacity, batch, tokens, dim;
  int64_t slot_stride, sample_stride, token_stride;
  const int32_t* cursor;  // [batch], slot of the next append
  const int32_t* count;   // [batch], features that the ring has

  int64_t history;        // K
  const float* anchors;   // [batch, K] or [batch, K, dim], the weights of the features, newest first
  int64_t anchors_stride;
  bool anchors_per_channel;
  const int32_t* anchor_count;  // [batch], how many features are read
  int64_t anchor_count_stride;
  const float* constant;  // [batch] or [batch, dim], added to the sum; or null
  int64_t constant_stride;
  bool constant_per_channel;

  int64_t stages, rank;   // no residual if the rank is 0 or K is 1; then all that follow may be null
  const float* taps;      // [batch, K - 1, K], the weights of the features in the residual's inputs; tap j, from 0 on,
                          // is made of the j + 2 newest ones, and its other weights are not used
  int64_t taps_stride;
  const int32_t* stage;   // [batch], which maps a sample uses
  int64_t stage_stride;
  const void* down;       // [S, R, K - 1, dim], contiguous
  const void* up;         // [S, dim, R], contiguous
  DType residual_dtype;   // of down and up

  void* output;  // [batch, tokens, dim], contiguous, no overlap with anything else
  int threads;   // most threads to use
  std::string instructions;  // the widest to use if the processor has them: "avx512", "avx2" or "plain"
};

// What an output head divides the features of a token by: nothing; the root of their mean square; or, after the mean is
// subtracted, the root of their variance.
enum class Norm { none, rms, layer };

// "none", "rms" or "layer". Throws std::invalid_argument.
Norm norm_from_name(const char* argument, const std::string& name);

// The output head on the CPU: a norm, a modulation, then a projection to O outputs. Strides count elements, and may be
// zero.
struct StreamHead {
  int64_t outputs;      // O
  const float* weight;  // [O, dim], contiguous
  const float* bias;    // [O], or null
  const float* scale;   // [batch, tokens, dim], dim contiguous; the normalised features are multiplied by 1 + scale
  int64_t scale_sample_stride, scale_token_stride;
  const float* shift;  // the same, added to that; or null
  int64_t shift_sample_stride, shift_token_stride;
  float eps;  // added to the variance or the mean square
  Norm norm;
};

// Checks everything that can be checked without reading memory. Throws std::invalid_argument.
void check_stream_forecast(const StreamForecast& stream);

// Writes the forecast. A row is NaN if no feature is to be read, or more than the ring has. Other features are not
// read. If the weights of a tap add up to zero but for rounding, the tap is computed from the differences between
// features and the newest one. Computes in float32 and gives the same bytes on any number of threads. Throws
// std::invalid_argument, before anything is written, for a cursor, count or stage that is out of range.
void stream_forecast_cpu(const StreamForecast& stream);

// The same for a forecast of float32 features and the output head that is applied to it. `stream.output` is that of the
// head: [batch, tokens, O]. The forecast of a few tokens at a time stays in the caches.
void check_stream_velocity(const StreamForecast& stream, const StreamHead& head);
void stream_velocity_cpu(const StreamForecast& stream, const StreamHead& head);

}  // namespace lesa
