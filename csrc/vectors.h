#pragma once

#include <cstdint>
#include <string>
#include <type_traits>
#include <utility>

#include "arguments.h"
#include "cpu.h"

// Instruction sets. A vector's elements are floats; loads and stores convert as the element types do. The inner loops
// of a kernel are in a header that its source file includes once for each instruction set: in a namespace where
// `Vector` is one of these, and LESA_KERNEL lets a function use its instructions. Compilers inline no function into one
// that may use fewer instructions, so a template over the instruction set can't do this.
//
// A streamed store writes to memory without reading the cache line first, and leaves nothing in the caches. Its address
// is a multiple of the bytes that it writes. The stores to one line should follow each other. `kStreams` is false where
// two vectors are less than a line, or where there is no such instruction.

#define LESA_TARGET_PLAIN
#define LESA_TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))
#define LESA_TARGET_AVX512 __attribute__((target("avx512f,avx2,fma,f16c")))

// Before a loop whose array of registers would otherwise be in memory.
#ifdef __GNUC__
#define LESA_UNROLL _Pragma("GCC unroll 16")
#else
#define LESA_UNROLL
#endif

namespace lesa {

enum class Instructions { plain, avx2, avx512 };

// The widest instructions that the processor has, but none wider than those named: "avx512", "avx2" or "plain".
inline Instructions instructions_for([[maybe_unused]] const std::string& widest) {
#ifdef LESA_X86
  static const bool vector = has_avx2_and_f16c() && __builtin_cpu_supports("fma");
  static const bool wide = vector && __builtin_cpu_supports("avx512f");
  if (wide && widest == "avx512") return Instructions::avx512;
  if (vector && widest != "plain") return Instructions::avx2;
#endif
  return Instructions::plain;
}

inline void check_instructions(const std::string& widest) {
  if (widest != "avx512" && widest != "avx2" && widest != "plain") {
    refuse("instructions", "be one of avx512, avx2, plain", "'" + widest + "'", "Leave it out.");
  }
}

namespace plain {

struct Vector {
  static constexpr int64_t kLanes = 8;
  static constexpr int kRows = 6;  // rows of a block of a matrix product, two vectors wide, that stays in registers
  template <class Element>
  static constexpr bool kStreams = false;
  struct Register {
    float lane[kLanes];
  };

  template <class Element>
  static LESA_INLINE Register load(const typename Element::Bits* from) {
    Register value;
    for (int64_t i = 0; i < kLanes; ++i) value.lane[i] = Element::load(from[i]);
    return value;
  }
  template <class Element, bool = false>
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
  static LESA_INLINE void transpose(Register (&rows)[kLanes]) {
    for (int64_t i = 0; i < kLanes; ++i) {
      for (int64_t j = 0; j < i; ++j) std::swap(rows[i].lane[j], rows[j].lane[i]);
    }
  }
};

}  // namespace plain

#ifdef LESA_X86

namespace avx2 {

struct Vector {
  static constexpr int64_t kLanes = 8;
  static constexpr int kRows = 6;
  template <class Element>
  static constexpr bool kStreams = std::is_same_v<Element, Float32>;
  using Register = __m256;

  template <class Element>
  static LESA_INLINE LESA_TARGET_AVX2 Register load(const typename Element::Bits* from) {
    if constexpr (std::is_same_v<Element, Float32>) {
      return _mm256_loadu_ps(from);
    } else {
      const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
      if constexpr (std::is_same_v<Element, Float16>) return _mm256_cvtph_ps(bits);
      return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    }
  }
  template <class Element, bool kStreamed = false>
  static LESA_INLINE LESA_TARGET_AVX2 void store(typename Element::Bits* to, Register value) {
    static_assert(!kStreamed || kStreams<Element>);
    if constexpr (kStreamed) {
      _mm256_stream_ps(to, value);
    } else if constexpr (std::is_same_v<Element, Float32>) {
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
  static LESA_INLINE LESA_TARGET_AVX2 Register broadcast(float value) { return _mm256_set1_ps(value); }
  static LESA_INLINE LESA_TARGET_AVX2 Register add(Register a, Register b) { return _mm256_add_ps(a, b); }
  static LESA_INLINE LESA_TARGET_AVX2 Register subtract(Register a, Register b) { return _mm256_sub_ps(a, b); }
  static LESA_INLINE LESA_TARGET_AVX2 Register multiply_add(Register a, Register b, Register c) {
    return _mm256_fmadd_ps(a, b, c);
  }
  static LESA_INLINE LESA_TARGET_AVX2 float multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
  static LESA_INLINE LESA_TARGET_AVX2 void transpose(Register (&rows)[kLanes]) {
    Register pairs[8], quads[8];
    for (int i = 0; i < 8; i += 2) {
      pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
      pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
      for (int half = 0; half < 2; ++half) {
        quads[i + 2 * half] = _mm256_shuffle_ps(pairs[i + half], pairs[i + 2 + half], _MM_SHUFFLE(1, 0, 1, 0));
        quads[i + 2 * half + 1] = _mm256_shuffle_ps(pairs[i + half], pairs[i + 2 + half], _MM_SHUFFLE(3, 2, 3, 2));
      }
    }
    for (int i = 0; i < 4; ++i) {
      rows[i] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20);
      rows[i + 4] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31);
    }
  }
};

}  // namespace avx2

namespace avx512 {

struct Vector {
  static constexpr int64_t kLanes = 16;
  static constexpr int kRows = 12;
  template <class Element>
  static constexpr bool kStreams = true;
  using Register = __m512;

  template <class Element>
  static LESA_INLINE LESA_TARGET_AVX512 Register load(const typename Element::Bits* from) {
    if constexpr (std::is_same_v<Element, Float32>) {
      return _mm512_loadu_ps(from);
    } else {
      const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
      if constexpr (std::is_same_v<Element, Float16>) return _mm512_cvtph_ps(bits);
      return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }
  }
  template <bool kStreamed>
  static LESA_INLINE LESA_TARGET_AVX512 void store_half(void* to, __m256i value) {
    if constexpr (kStreamed) {
      _mm256_stream_si256(static_cast<__m256i*>(to), value);
    } else {
      _mm256_storeu_si256(static_cast<__m256i*>(to), value);
    }
  }
  template <class Element, bool kStreamed = false>
  static LESA_INLINE LESA_TARGET_AVX512 void store(typename Element::Bits* to, Register value) {
    if constexpr (std::is_same_v<Element, Float32>) {
      if constexpr (kStreamed) {
        _mm512_stream_ps(to, value);
      } else {
        _mm512_storeu_ps(to, value);
      }
    } else if constexpr (std::is_same_v<Element, Float16>) {
      store_half<kStreamed>(to, _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
    } else {
      const __m512i bits = _mm512_castps_si512(value);
      const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
      const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
      const __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
      const __m512i chosen = _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), is_nan, _mm512_set1_epi32(0x7fc0));
      store_half<kStreamed>(to, _mm512_cvtepi32_epi16(chosen));
    }
  }
  static LESA_INLINE LESA_TARGET_AVX512 Register broadcast(float value) { return _mm512_set1_ps(value); }
  static LESA_INLINE LESA_TARGET_AVX512 Register add(Register a, Register b) { return _mm512_add_ps(a, b); }
  static LESA_INLINE LESA_TARGET_AVX512 Register subtract(Register a, Register b) { return _mm512_sub_ps(a, b); }
  static LESA_INLINE LESA_TARGET_AVX512 Register multiply_add(Register a, Register b, Register c) {
    return _mm512_fmadd_ps(a, b, c);
  }
  static LESA_INLINE LESA_TARGET_AVX512 float multiply_add(float a, float b, float c) {
    return __builtin_fmaf(a, b, c);
  }
  static LESA_INLINE LESA_TARGET_AVX512 void transpose(Register (&rows)[kLanes]) {
    Register pairs[16], quads[16], halves[16];
    LESA_UNROLL for (int i = 0; i < 16; i += 2) {
      pairs[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
      pairs[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
    }
    LESA_UNROLL for (int i = 0; i < 16; i += 4) {
      for (int half = 0; half < 2; ++half) {
        quads[i + 2 * half] = _mm512_shuffle_ps(pairs[i + half], pairs[i + 2 + half], _MM_SHUFFLE(1, 0, 1, 0));
        quads[i + 2 * half + 1] = _mm512_shuffle_ps(pairs[i + half], pairs[i + 2 + half], _MM_SHUFFLE(3, 2, 3, 2));
      }
    }
    // Column c of rows 4 i ... 4 i + 3 is in the lanes 4 (c / 4) ... of quads[4 i + c % 4].
    for (int c = 0; c < 4; ++c) {
      for (int i = 0; i < 2; ++i) {
        halves[8 * i + c] = _mm512_shuffle_f32x4(quads[8 * i + c], quads[8 * i + 4 + c], 0x88);
        halves[8 * i + 4 + c] = _mm512_shuffle_f32x4(quads[8 * i + c], quads[8 * i + 4 + c], 0xdd);
      }
    }
    for (int c = 0; c < 4; ++c) {
      rows[c] = _mm512_shuffle_f32x4(halves[c], halves[8 + c], 0x88);
      rows[8 + c] = _mm512_shuffle_f32x4(halves[c], halves[8 + c], 0xdd);
      rows[4 + c] = _mm512_shuffle_f32x4(halves[4 + c], halves[12 + c], 0x88);
      rows[12 + c] = _mm512_shuffle_f32x4(halves[4 + c], halves[12 + c], 0xdd);
    }
  }
};

}  // namespace avx512

#endif

}  // namespace lesa
