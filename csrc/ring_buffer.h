#pragma once

#include <cstdint>
#include <string>

#include "arguments.h"
#include "elements.h"

namespace lesa {

// One push into a feature ring. Sizes and strides count elements; all pointers live on `device`.
struct RingPush {
  void* storage;  // [capacity, batch, tokens, dim], contiguous
  DType storage_dtype;
  int64_t capacity, batch, tokens, dim;
  float* scales;    // [capacity, batch, tokens], contiguous, where storage is float8_e4m3fn; else null
  float* sigmas;    // [capacity, batch], contiguous
  int32_t* cursor;  // [batch], slot of the next append
  int32_t* count;   // [batch], valid anchors

  const void* features;  // [samples, tokens, dim], any non-negative strides, no overlap with the ring
  DType features_dtype;  // not float8_e4m3fn
  int64_t sample_stride, token_stride, dim_stride;
  const float* sigma;   // [samples], contiguous; null: `level` for all
  float level;
  const int64_t* rows;  // [samples], the ring's row of each sample; null: sample i goes to row i
  int64_t samples;

  int device;        // -1: CPU, otherwise the index of a CUDA device
  uintptr_t stream;  // CUDA stream to enqueue on; 0 on the CPU
  int threads;       // most threads a CPU push may use
};

// One read of each row's `age`-th newest feature; `age` 0 is the newest. Beyond a row's count its oldest is read.
struct RingGather {
  const void* storage;  // as in RingPush, down to count
  DType storage_dtype;
  int64_t capacity, batch, tokens, dim;
  const float* scales;
  const int32_t* cursor;
  const int32_t* count;
  int64_t age;
  void* output;  // [batch, tokens, dim], contiguous, no overlap: of the storage's dtype, float32 for float8_e4m3fn

  int device;
  uintptr_t stream;
  int threads;
};

// Where a push goes in its row, and the row's state after it.
struct Placement {
  int32_t slot, cursor, count;
};

// Compares a sample's sigma with that of the newest anchor. A smaller one is appended (over the oldest anchor when the
// ring is full), an equal one replaces the newest, any other one, also NaN, starts a new history.
LESA_INLINE Placement place(int32_t cursor, int32_t count, int32_t capacity, float sigma, float newest_sigma) {
  if (count > 0 && sigma == newest_sigma) return {cursor == 0 ? capacity - 1 : cursor - 1, cursor, count};
  const bool extends = count > 0 && sigma < newest_sigma;
  return {cursor, cursor + 1 == capacity ? 0 : cursor + 1, !extends ? 1 : count < capacity ? count + 1 : capacity};
}

// The slot of a row's `age`-th newest anchor.
LESA_INLINE int64_t slot_of_age(int64_t cursor, int64_t count, int64_t capacity, int64_t age) {
  const int64_t oldest = count > 0 ? count - 1 : 0;
  const int64_t slot = cursor - 1 - (age < oldest ? age : oldest);
  return slot < 0 ? slot + capacity : slot;
}

// Check everything that can be checked without reading memory. Throw std::invalid_argument.
void check_ring_push(const RingPush& push);
void check_ring_gather(const RingGather& gather);

// Stores each sample's feature and sigma in the slot that `place` gives. Float8 is stored with a scale for each token:
// the largest magnitude over 448, one for zeros, NaN if a value is not finite. Values are divided by the scale and
// rounded to the nearest even. On the CPU, throws std::invalid_argument, before anything is written, for rows that are
// out of range or repeated and for a cursor or count that is out of range.
void ring_push_cpu(const RingPush& push);
// Enqueues one kernel, which may be captured into a graph. Rows that are out of range or repeated, and a cursor or
// count that is out of range, fail an assertion on the device. While the kernel runs, the upper half of a count is the
// number of the sample's blocks that have ended. If it was not zero before, or if two streams push into a row at the
// same time, a block other than the last may write the row's state. An assertion fails if another block began before
// that and ends after it. If all other blocks begin after it, nothing notices. Throws std::runtime_error if the kernel
// can't be launched. Both messages name the operation.
void ring_push_cuda(const RingPush& push);

// Copies the features, float8 times its scales; rows without an anchor are NaN. Errors are those of the pushes.
void ring_gather_cpu(const RingGather& gather);
void ring_gather_cuda(const RingGather& gather);

// Why the kernels can't run on a CUDA device, empty if they can. Loads all of them, so that they can be captured into a
// graph, where loading may fail.
std::string ring_cuda_problem(int device);

}  // namespace lesa
