#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "elements.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define LESA_X86
#include <cpuid.h>
#include <immintrin.h>
#endif

// What the CPU kernels have in common: what the processor can do, and threads.

namespace lesa {

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
