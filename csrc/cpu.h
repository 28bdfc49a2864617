#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>

#include "elements.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define LESA_X86
#include <cpuid.h>
#include <immintrin.h>
#endif

#if defined(__unix__) || defined(__APPLE__)
#define LESA_POSIX
#include <pthread.h>
#endif

// Shared by the CPU kernels: the features of the processor, and threads.

namespace lesa {

#ifdef LESA_X86

inline bool has_avx2_and_f16c() {
  unsigned eax, ebx, ecx = 0, edx;
  return __builtin_cpu_supports("avx2") && __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}

#endif

// Threads that are kept between calls, because starting one takes as long as copying a megabyte.
class Helpers {
 public:
  static Helpers& get() {
#ifdef LESA_POSIX
    // A forked process has none of the threads, and another thread may have held the mutexes at the fork.
    static const int at_fork = pthread_atfork(nullptr, nullptr, [] { instance() = new Helpers; });
    static_cast<void>(at_fork);
#endif
    return *instance();
  }

  // Runs `work` in this thread and in up to `count` others. `work` takes its items from a common store, so a thread
  // that starts after all items are taken finds nothing to do, and this thread does not wait for it.
  void run(int64_t count, const std::function<void()>& work) {
    if (count < 1) return work();
    const std::unique_lock<std::mutex> alone(caller_, std::try_to_lock);
    if (!alone.owns_lock()) return work();  // the helpers are helping another caller
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      try {
        while (static_cast<int64_t>(threads_) < count) {
          std::thread([this] { help(); }).detach();
          ++threads_;
        }
      } catch (...) {
        // The system has no further thread, or no memory for one: the threads that run share the work.
      }
      work_ = &work;
      wanted_ = std::min<int64_t>(count, threads_);
    }
    come_.notify_all();
    std::exception_ptr failure;
    try {
      work();
    } catch (...) {
      failure = std::current_exception();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    wanted_ = 0;
    lock.unlock();
    spin([this] { return running_ == 0; });
    lock.lock();
    left_.wait(lock, [this] { return running_ == 0; });
    if (!failure) failure = failure_;
    failure_ = nullptr;
    if (failure) std::rethrow_exception(failure);
  }

 private:
  // Never deleted: at the end of a process its threads may still wait.
  static Helpers*& instance() {
    static Helpers* helpers = new Helpers;
    return helpers;
  }

  // Waits for a short time until `done`, without the system's help: to be woken up may take as long as copying a
  // megabyte.
  template <class Done>
  static void spin(const Done& done) {
    const auto end = std::chrono::steady_clock::now() + kSpin;
    while (!done() && std::chrono::steady_clock::now() < end) {
#ifdef LESA_X86
      _mm_pause();
#else
      std::this_thread::yield();
#endif
    }
  }

  void help() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      lock.unlock();
      spin([this] { return wanted_ > 0; });
      lock.lock();
      come_.wait(lock, [this] { return wanted_ > 0; });
      --wanted_;
      ++running_;
      const std::function<void()>& work = *work_;
      lock.unlock();
      std::exception_ptr failure;
      try {
        work();
      } catch (...) {
        failure = std::current_exception();
      }
      lock.lock();
      if (failure) failure_ = failure;
      if (--running_ == 0) left_.notify_one();
    }
  }

  static constexpr std::chrono::microseconds kSpin{50};

  std::mutex caller_;  // held by the one caller that is being helped
  std::mutex mutex_;   // of all that follows
  std::condition_variable come_, left_;
  const std::function<void()>* work_ = nullptr;
  std::atomic<int64_t> wanted_{0}, running_{0};  // changed under the mutex only
  int64_t threads_ = 0;
  std::exception_ptr failure_;
};

// Calls body(begin, end) until [0, total) is covered in chunks, on up to `threads` threads, the caller's included.
template <class Body>
void parallel_chunks(int64_t total, int64_t chunk, int64_t threads, const Body& body) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t begin; (begin = next.fetch_add(chunk)) < total;) body(begin, std::min(begin + chunk, total));
  };
  const int64_t chunks = (total + chunk - 1) / chunk;
  Helpers::get().run(std::min(threads, chunks) - 1, work);
}

}  // namespace lesa
