#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "build_info.h"
#include "newton_predict.h"
#include "ring_buffer.h"

namespace py = pybind11;

namespace {

// Tensors arrive as what `data_ptr()` returns, so that one build serves every version of torch.
template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void ring_push(uintptr_t storage, const std::string& storage_dtype, const std::array<int64_t, 4>& storage_sizes,
               uintptr_t scales, uintptr_t sigmas, uintptr_t cursor, uintptr_t count, uintptr_t features,
               const std::string& features_dtype, const std::array<int64_t, 3>& features_strides, uintptr_t sigma,
               float level, uintptr_t rows, int64_t samples, int device, uintptr_t stream, int threads) {
  const lesa::RingPush push{
      pointer<void>(storage),
      lesa::dtype_from_name("storage_dtype", storage_dtype, true),
      storage_sizes[0],
      storage_sizes[1],
      storage_sizes[2],
      storage_sizes[3],
      pointer<float>(scales),
      pointer<float>(sigmas),
      pointer<int32_t>(cursor),
      pointer<int32_t>(count),
      pointer<const void>(features),
      lesa::dtype_from_name("features_dtype", features_dtype),
      features_strides[0],
      features_strides[1],
      features_strides[2],
      pointer<const float>(sigma),
      level,
      pointer<const int64_t>(rows),
      samples,
      device,
      stream,
      threads,
  };
  lesa::check_ring_push(push);
  if (device < 0) {
    lesa::ring_push_cpu(push);
  } else {
    lesa::ring_push_cuda(push);
  }
}

void ring_gather(uintptr_t storage, const std::string& storage_dtype, const std::array<int64_t, 4>& storage_sizes,
                 uintptr_t scales, uintptr_t cursor, uintptr_t count, int64_t age, uintptr_t output, int device,
                 uintptr_t stream, int threads) {
  const lesa::RingGather gather{
      pointer<const void>(storage),
      lesa::dtype_from_name("storage_dtype", storage_dtype, true),
      storage_sizes[0],
      storage_sizes[1],
      storage_sizes[2],
      storage_sizes[3],
      pointer<const float>(scales),
      pointer<const int32_t>(cursor),
      pointer<const int32_t>(count),
      age,
      pointer<void>(output),
      device,
      stream,
      threads,
  };
  lesa::check_ring_gather(gather);
  if (device < 0) {
    lesa::ring_gather_cpu(gather);
  } else {
    lesa::ring_gather_cuda(gather);
  }
}

void newton_predict(uintptr_t storage, const std::string& storage_dtype, const std::array<int64_t, 4>& storage_sizes,
                    const std::array<int64_t, 3>& storage_strides, uintptr_t sigmas, uintptr_t cursor, uintptr_t count,
                    uintptr_t sigma, uintptr_t in_weight, uintptr_t in_bias, uintptr_t spline, uintptr_t out_weight,
                    uintptr_t out_bias, uintptr_t down, uintptr_t up, uintptr_t up_bias, int64_t hidden, int64_t rank,
                    std::vector<double> stage_bounds, std::vector<int64_t> history_length, int64_t grid_size,
                    int64_t spline_order, uintptr_t output, int threads, std::string instructions) {
  const lesa::NewtonPredict predict{
      pointer<const void>(storage),
      lesa::dtype_from_name("storage_dtype", storage_dtype),
      storage_sizes[0],
      storage_sizes[1],
      storage_sizes[2],
      storage_sizes[3],
      storage_strides[0],
      storage_strides[1],
      storage_strides[2],
      pointer<const float>(sigmas),
      pointer<const int32_t>(cursor),
      pointer<const int32_t>(count),
      pointer<const float>(sigma),
      pointer<const float>(in_weight),
      pointer<const float>(in_bias),
      pointer<const float>(spline),
      pointer<const float>(out_weight),
      pointer<const float>(out_bias),
      pointer<const float>(down),
      pointer<const float>(up),
      pointer<const float>(up_bias),
      hidden,
      rank,
      std::move(stage_bounds),
      std::move(history_length),
      grid_size,
      spline_order,
      pointer<void>(output),
      threads,
      std::move(instructions),
  };
  lesa::check_newton_predict(predict);
  lesa::newton_predict_cpu(predict);
}

std::string compiler() {
#if defined(__clang__)
  return "Clang " __clang_version__;
#elif defined(__GNUC__)
  return "GCC " __VERSION__;
#elif defined(_MSC_VER)
  return "MSVC " + std::to_string(_MSC_VER);
#else
  return "unknown";
#endif
}

py::dict build_info() {
  py::dict info;
  info["version"] = LESA_VERSION;
  info["compiler"] = compiler();
#ifdef LESA_WITH_CUDA
  const lesa::CudaBuildInfo cuda = lesa::cuda_build_info();
  info["cuda_version"] = cuda.version;
  info["cuda_archs"] = cuda.architectures;
#else
  info["cuda_version"] = py::none();
  info["cuda_archs"] = py::none();
#endif
  info["cpu_operations"] = std::vector<std::string>{"newton_predict", "ring_gather", "ring_push"};
  info["cuda_operations"] = info["cuda_version"].is_none() ? std::vector<std::string>{}
                                                           : std::vector<std::string>{"ring_gather", "ring_push"};
  info["hardware_threads"] = std::thread::hardware_concurrency();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled part of lesa_kernels. Takes raw pointers, sizes and strides: call it through lesa_kernels.";
  m.def("build_info", &build_info,
        "What this module was built with: version, compiler, cuda_version and cuda_archs (None without CUDA); what it "
        "can do: cpu_operations and cuda_operations; and the hardware_threads of this machine.");
  m.def("cuda_problem", &lesa::ring_cuda_problem, py::arg("device"),
        "Why the CUDA kernels can't run on the device of that index; empty if they can.");
  // By position, not by name, too: that takes less than half the time.
  m.def("ring_push", &ring_push, py::call_guard<py::gil_scoped_release>(), py::arg("storage"),
        py::arg("storage_dtype"), py::arg("storage_sizes"), py::arg("scales"), py::arg("sigmas"), py::arg("cursor"),
        py::arg("count"), py::arg("features"), py::arg("features_dtype"), py::arg("features_strides"),
        py::arg("sigma"), py::arg("level"), py::arg("rows"), py::arg("samples"), py::arg("device"), py::arg("stream"),
        py::arg("threads"),
        "Pushes one feature per sample into a ring; ValueError for what can't be right. See csrc/ring_buffer.h.");
  m.def("ring_gather", &ring_gather, py::call_guard<py::gil_scoped_release>(), py::arg("storage"),
        py::arg("storage_dtype"), py::arg("storage_sizes"), py::arg("scales"), py::arg("cursor"), py::arg("count"),
        py::arg("age"), py::arg("output"), py::arg("device"), py::arg("stream"), py::arg("threads"),
        "Reads one feature per row of a ring; ValueError for what can't be right. See csrc/ring_buffer.h.");
  m.def("newton_predict", &newton_predict, py::call_guard<py::gil_scoped_release>(), py::kw_only(), py::arg("storage"),
        py::arg("storage_dtype"), py::arg("storage_sizes"), py::arg("storage_strides"), py::arg("sigmas"),
        py::arg("cursor"), py::arg("count"), py::arg("sigma"), py::arg("in_weight"), py::arg("in_bias"),
        py::arg("spline"), py::arg("out_weight"), py::arg("out_bias"), py::arg("down"), py::arg("up"),
        py::arg("up_bias"), py::arg("hidden"), py::arg("rank"), py::arg("stage_bounds"), py::arg("history_length"),
        py::arg("grid_size"), py::arg("spline_order"), py::arg("output"), py::arg("threads"),
        py::arg("instructions") = "avx512",
        "Forecasts on the CPU from the anchors of a ring; ValueError for what can't be right. See "
        "csrc/newton_predict.h.");
}
