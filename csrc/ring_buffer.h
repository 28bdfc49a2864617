#pragma once

#include <cstdint>

#include "arguments.h"

namespace lesa {

// One push into a feature ring. Sizes and strides count elements; all pointers live on `device`.
struct RingPush {
  void* storage;  // [capacity, batch, tokens, dim], contiguous
  DType storage_dtype;
  int64_t capacity, batch, tokens, dim;
  float* sigmas;    // [capacity, batch], contiguous
  int32_t* cursor;  // [batch], slot of the next append
  int32_t* count;   // [batch], valid anchors

  const void* features;  // [samples, tokens, dim], any non-negative strides, no overlap with the ring
  DType features_dtype;
  int64_t sample_stride, token_stride, dim_stride;
  const float* sigma;   // [samples], contiguous
  const int64_t* rows;  // [samples], the ring's row of each sample; null: sample i goes to row i
  int64_t samples;

  int device;        // -1: CPU, otherwise the index of a CUDA device
  uintptr_t stream;  // CUDA stream to enqueue on; 0 on the CPU
  int threads;       // most threads a CPU push may use
};

// Checks everything that can be checked without reading memory. Throws std::invalid_argument.
void check_ring_push(const RingPush& push);

// Stores each sample's feature and sigma, per sample by its sigma against the newest anchor's: smaller is appended
// (over the oldest when the ring is full), equal replaces the newest, anything else starts a new history.
// Throws std::invalid_argument, before anything is written, for rows that are out of range or repeated and for a
// cursor or count that is out of range.
void ring_push_cpu(const RingPush& push);

}  // namespace lesa
