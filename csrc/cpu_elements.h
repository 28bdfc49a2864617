#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#if defined(__GNUC__)
#define LESA_INLINE inline __attribute__((always_inline))
#else
#define LESA_INLINE inline
#endif

#if defined(__x86_64__) && defined(__GNUC__)
#define LESA_X86
#include <cpuid.h>
#include <immintrin.h>
#endif

// What the CPU kernels have in common: element types, what the processor can do, and threads.

namespace lesa {

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

#ifdef LESA_X86

inline bool has_avx2_and_f16c() {
  unsigned eax, ebx, ecx = 0, edx;
  return __builtin_cpu_supports("avx2") && __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}

#endif

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

}  // namespace lesa
