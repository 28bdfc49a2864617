#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__CUDACC__)
#define LESA_INLINE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define LESA_INLINE inline __attribute__((always_inline))
#else
#define LESA_INLINE inline
#endif

namespace lesa {

// Element types, the same on the CPU and on a GPU, so that both give the same bytes. Conversions are branch-free on
// bits, so that compilers vectorise the loops over them; where a GPU has an instruction for one, it gives the same bits
// for all values but NaN.

LESA_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

LESA_INLINE float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

struct Float32 {
  using Bits = float;
  static constexpr Bits kNan = std::numeric_limits<float>::quiet_NaN();
  static LESA_INLINE float load(Bits value) { return value; }
  static LESA_INLINE Bits store(float value) { return value; }
};

struct BFloat16 {
  using Bits = uint16_t;
  static constexpr Bits kNan = 0x7fc0;

  static LESA_INLINE float load(Bits value) { return float_of(uint32_t{value} << 16); }
  static LESA_INLINE Bits store(float value) {
    const uint32_t bits = bits_of(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // ties to even
    return static_cast<Bits>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
  }
};

struct Float16 {
  using Bits = uint16_t;
  static constexpr Bits kNan = 0x7e00;

  static LESA_INLINE float load(Bits value) {
#if defined(__CUDA_ARCH__)
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value));
    return wide;
#else
    const uint32_t magnitude = uint32_t{value} & 0x7fffu;
    const uint32_t normal = (magnitude << 13) + (112u << 23);  // rebias the exponent: 127 - 15
    const uint32_t special = (magnitude << 13) | 0x7f800000u;  // Inf and NaN
    // A subnormal is a multiple of 2^-24: written into the mantissa of 2^-14, which is then taken off again.
    const uint32_t subnormal = bits_of(float_of((magnitude << 13) + (113u << 23)) - float_of(113u << 23));
    const uint32_t finite = magnitude < 0x0400u ? subnormal : normal;
    return float_of((magnitude >= 0x7c00u ? special : finite) | (uint32_t{value} & 0x8000u) << 16);
#endif
  }

  static LESA_INLINE Bits store(float value) {
#if defined(__CUDA_ARCH__)
    Bits rounded;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(rounded) : "f"(value));
    return rounded;
#else
    const uint32_t bits = bits_of(value);
    const uint32_t magnitude = bits & 0x7fffffffu;
    // Ties to even; a carry out of the mantissa raises the exponent, up to Inf from 65520 on.
    const uint32_t normal = (magnitude - (112u << 23) + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
    // Adding 0.5, whose unit in the last place is 2^-24, lets the FPU round to the multiples of 2^-24.
    const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
    return static_cast<Bits>((magnitude >= (143u << 23) ? special : finite) | (bits & 0x80000000u) >> 16);
#endif
  }
};

// e4m3 without infinities; its values go up to 448.
struct Float8 {
  using Bits = uint8_t;
  static constexpr Bits kNan = 0x7f;

  static LESA_INLINE float load(Bits value) {
    const uint32_t magnitude = uint32_t{value} & 0x7fu;
    const uint32_t normal = (magnitude << 20) + (120u << 23);  // rebias the exponent: 127 - 7
    // A subnormal is a multiple of 2^-9: written into the mantissa of 2^-6, which is then taken off again.
    const uint32_t subnormal = bits_of(float_of((magnitude << 20) + (121u << 23)) - float_of(121u << 23));
    const uint32_t finite = magnitude < 0x08u ? subnormal : normal;
    return float_of((magnitude == 0x7fu ? 0x7fc00000u : finite) | (uint32_t{value} & 0x80u) << 24);
  }

  // Saturates. NaN would give 448, but no caller passes NaN.
  static LESA_INLINE Bits store(float value) {
    const uint32_t bits = bits_of(value);
    const uint32_t unbounded = bits & 0x7fffffffu;
    const uint32_t magnitude = unbounded < 0x43e00000u ? unbounded : 0x43e00000u;  // 448
    // Ties to even; a carry out of the mantissa raises the exponent.
    const uint32_t normal = (magnitude - (120u << 23) + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20;
    // Adding 2^14, whose unit in the last place is 2^-9, lets the FPU round to the multiples of 2^-9.
    const uint32_t subnormal = bits_of(float_of(magnitude) + 16384.0f) - bits_of(16384.0f);
    return static_cast<Bits>((magnitude < (121u << 23) ? subnormal : normal) | (bits & 0x80000000u) >> 24);
  }
};

// The scale of a float8 token whose largest magnitude has the given bits.
LESA_INLINE float float8_scale(uint32_t largest) {
  if (largest > 0x7f7fffffu) return Float32::kNan;
  const float scale = float_of(largest) / 448.0f;
  return scale == 0.0f ? 1.0f : scale;
}

}  // namespace lesa
