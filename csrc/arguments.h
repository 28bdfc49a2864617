#pragma once

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

// Shared by the compiled functions: the dtypes of their arguments, and their checks, which throw
// std::invalid_argument.

namespace lesa {

[[noreturn]] inline void refuse(const std::string& argument, const std::string& must, const std::string& got,
                                const std::string& remedy) {
  throw std::invalid_argument("`" + argument + "` must " + must + ", but got " + got + ". " + remedy);
}

inline void check_at_least(const char* argument, int64_t value, int64_t minimum) {
  if (value < minimum) {
    refuse(argument, "be at least " + std::to_string(minimum), std::to_string(value), "Pass the tensor's own size.");
  }
}

// `alignment` is that of an element, a power of two.
inline void check_pointer(const char* argument, const void* pointer, int64_t alignment = 1) {
  if (pointer == nullptr) refuse(argument, "not be a null pointer", "0", "Pass the tensor's `data_ptr()`.");
  if (reinterpret_cast<uintptr_t>(pointer) % alignment != 0) {
    refuse(argument, "be aligned to its elements of " + std::to_string(alignment) + " bytes",
           "an address that is not", "Pass the tensor's `data_ptr()`.");
  }
}

// a * b for non-negative factors; throws if the product leaves int64.
inline int64_t product(const char* argument, int64_t a, int64_t b) {
  if (b != 0 && a > std::numeric_limits<int64_t>::max() / b) {
    refuse(argument, "address at most 2^63 - 1 bytes", std::to_string(a) + " x " + std::to_string(b),
           "Check its sizes and strides.");
  }
  return a * b;
}

inline int64_t sum(const char* argument, int64_t a, int64_t b) {
  if (a > std::numeric_limits<int64_t>::max() - b) {
    refuse(argument, "address at most 2^63 - 1 bytes", std::to_string(a) + " + " + std::to_string(b),
           "Check its sizes and strides.");
  }
  return a + b;
}

enum class DType { float32, float16, bfloat16, float8_e4m3fn };

// Bytes of one element.
inline int64_t item_size(DType dtype) {
  return dtype == DType::float32 ? 4 : dtype == DType::float8_e4m3fn ? 1 : 2;
}

// The dtype named "float32", "float16" or "bfloat16"; for the storage of a ring "float8_e4m3fn" too. Throws
// std::invalid_argument, which names `argument`, for any other name.
inline DType dtype_from_name(const std::string& argument, const std::string& name, bool stored = false) {
  if (name == "float32") return DType::float32;
  if (name == "float16") return DType::float16;
  if (name == "bfloat16") return DType::bfloat16;
  if (stored && name == "float8_e4m3fn") return DType::float8_e4m3fn;
  refuse(argument, std::string("be one of float32, float16, bfloat16") + (stored ? ", float8_e4m3fn" : ""),
         "'" + name + "'", "Convert the tensor with `.to(dtype)`.");
}

}  // namespace lesa
