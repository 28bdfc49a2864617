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
#include "stream.h"

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

// The addresses of the parameters in the order of the struct, and the sizes dim, hidden, rank, grid_size and
// spline_order.
lesa::NewtonExperts newton_experts(const std::array<uintptr_t, 8>& parameters, const std::array<int64_t, 5>& sizes,
                                   std::vector<double> stage_bounds, std::vector<int64_t> history_length) {
  return {
      pointer<const float>(parameters[0]),
      pointer<const float>(parameters[1]),
      pointer<const float>(parameters[2]),
      pointer<const float>(parameters[3]),
      pointer<const float>(parameters[4]),
      pointer<const float>(parameters[5]),
      pointer<const float>(parameters[6]),
      pointer<const float>(parameters[7]),
      sizes[0],
      sizes[1],
      sizes[2],
      std::move(stage_bounds),
      std::move(history_length),
      sizes[3],
      sizes[4],
  };
}

void newton_predict(uintptr_t storage, const std::string& storage_dtype, const std::array<int64_t, 3>& storage_sizes,
                    const std::array<int64_t, 3>& storage_strides, uintptr_t sigmas, uintptr_t cursor, uintptr_t count,
                    uintptr_t sigma, const std::array<uintptr_t, 8>& parameters, const std::array<int64_t, 5>& sizes,
                    std::vector<double> stage_bounds, std::vector<int64_t> history_length, uintptr_t output,
                    int threads, std::string instructions) {
  const lesa::NewtonPredict predict{
      pointer<const void>(storage),
      lesa::dtype_from_name("storage_dtype", storage_dtype),
      storage_sizes[0],
      storage_sizes[1],
      storage_sizes[2],
      storage_strides[0],
      storage_strides[1],
      storage_strides[2],
      pointer<const float>(sigmas),
      pointer<const int32_t>(cursor),
      pointer<const int32_t>(count),
      pointer<const float>(sigma),
      newton_experts(parameters, sizes, std::move(stage_bounds), std::move(history_length)),
      pointer<void>(output),
      threads,
      std::move(instructions),
  };
  lesa::check_newton_predict(predict);
  lesa::newton_predict_cpu(predict);
}

void newton_coefficients(uintptr_t sigmas, uintptr_t count, uintptr_t sigma, int64_t forecasts,
                         const std::array<uintptr_t, 8>& parameters, const std::array<int64_t, 5>& sizes,
                         std::vector<double> stage_bounds, std::vector<int64_t> history_length, uintptr_t anchors,
                         uintptr_t anchor_count, uintptr_t constant, uintptr_t taps, uintptr_t stage, int threads,
                         std::string instructions) {
  const lesa::NewtonCoefficients coefficients{
      pointer<const float>(sigmas),
      pointer<const int32_t>(count),
      pointer<const float>(sigma),
      forecasts,
      newton_experts(parameters, sizes, std::move(stage_bounds), std::move(history_length)),
      pointer<float>(anchors),
      pointer<int32_t>(anchor_count),
      pointer<float>(constant),
      pointer<float>(taps),
      pointer<int32_t>(stage),
      threads,
      std::move(instructions),
  };
  lesa::check_newton_coefficients(coefficients);
  lesa::newton_coefficients_cpu(coefficients);
}

// `weights` are the addresses of anchors, count, constant, taps and stage, and `weights_strides` their strides between
// samples.
lesa::StreamForecast stream_of(uintptr_t storage, const std::string& storage_dtype,
                               const std::array<int64_t, 4>& storage_sizes,
                               const std::array<int64_t, 3>& storage_strides, uintptr_t cursor, uintptr_t count,
                               int64_t history, const std::array<uintptr_t, 5>& weights,
                               const std::array<int64_t, 5>& weights_strides, bool anchors_per_channel,
                               bool constant_per_channel, int64_t stages, int64_t rank, uintptr_t down, uintptr_t up,
                               const std::string& residual_dtype, uintptr_t output, int threads,
                               std::string instructions) {
  return {
      pointer<const void>(storage),
      lesa::dtype_from_name("storage_dtype", storage_dtype),
      storage_sizes[0],
      storage_sizes[1],
      storage_sizes[2],
      storage_sizes[3],
      storage_strides[0],
      storage_strides[1],
      storage_strides[2],
      pointer<const int32_t>(cursor),
      pointer<const int32_t>(count),
      history,
      pointer<const float>(weights[0]),
      weights_strides[0],
      anchors_per_channel,
      pointer<const int32_t>(weights[1]),
      weights_strides[1],
      pointer<const float>(weights[2]),
      weights_strides[2],
      constant_per_channel,
      stages,
      rank,
      pointer<const float>(weights[3]),
      weights_strides[3],
      pointer<const int32_t>(weights[4]),
      weights_strides[4],
      pointer<const void>(down),
      pointer<const void>(up),
      lesa::dtype_from_name("residual_dtype", residual_dtype),
      pointer<void>(output),
      threads,
      std::move(instructions),
  };
}

template <class... Arguments>
void stream_forecast(const Arguments&... arguments) {
  const lesa::StreamForecast stream = stream_of(arguments...);
  lesa::check_stream_forecast(stream);
  lesa::stream_forecast_cpu(stream);
}

// `head` are the addresses of weight, bias, scale and shift. `head_strides` are those of scale and shift, between
// samples and between tokens.
template <class... Arguments>
void stream_velocity(int64_t outputs, const std::array<uintptr_t, 4>& head, const std::array<int64_t, 4>& head_strides,
                     float eps, const std::string& norm, const Arguments&... arguments) {
  const lesa::StreamForecast stream = stream_of(arguments...);
  const lesa::StreamHead output_head{
      outputs,         pointer<const float>(head[0]), pointer<const float>(head[1]), pointer<const float>(head[2]),
      head_strides[0], head_strides[1],               pointer<const float>(head[3]), head_strides[2],
      head_strides[3], eps,                           lesa::norm_from_name("head.norm", norm),
  };
  lesa::check_stream_velocity(stream, output_head);
  lesa::stream_velocity_cpu(stream, output_head);
}

// Both with the arguments of `stream_of`, defined once as `m.def` needs them.
template <class... Arguments>
void define_streams(py::module_& m, lesa::StreamForecast (*)(Arguments...)) {
  const auto define = [&](const char* name, auto function, const char* doc, const auto&... first) {
    m.def(name, function, py::call_guard<py::gil_scoped_release>(), first..., py::arg("storage"),
          py::arg("storage_dtype"), py::arg("storage_sizes"), py::arg("storage_strides"), py::arg("cursor"),
          py::arg("count"), py::arg("history"), py::arg("weights"), py::arg("weights_strides"),
          py::arg("anchors_per_channel"), py::arg("constant_per_channel"), py::arg("stages"), py::arg("rank"),
          py::arg("down"), py::arg("up"), py::arg("residual_dtype"), py::arg("output"), py::arg("threads"),
          py::arg("instructions") = "avx512", doc);
  };
  define("stream_forecast", &stream_forecast<Arguments...>,
         "Forecasts on the CPU with given weights; ValueError for what can't be right. See csrc/stream.h.");
  define("stream_velocity", &stream_velocity<Arguments...>,
         "Forecasts on the CPU and applies the output head; ValueError for what can't be right. See csrc/stream.h.",
         py::arg("outputs"), py::arg("head"), py::arg("head_strides"), py::arg("eps"),
         py::arg("norm"));
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
  info["cpu_operations"] = std::vector<std::string>{"newton_coefficients", "newton_predict", "ring_gather",
                                                          "ring_push", "stream_forecast", "stream_velocity"};
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
  m.def("newton_predict", &newton_predict, py::call_guard<py::gil_scoped_release>(), py::arg("storage"),
        py::arg("storage_dtype"), py::arg("storage_sizes"), py::arg("storage_strides"), py::arg("sigmas"),
        py::arg("cursor"), py::arg("count"), py::arg("sigma"), py::arg("parameters"), py::arg("sizes"),
        py::arg("stage_bounds"), py::arg("history_length"), py::arg("output"), py::arg("threads"),
        py::arg("instructions") = "avx512",
        "Forecasts on the CPU from the anchors of a ring; ValueError for what can't be right. See "
        "csrc/newton_predict.h.");
  m.def("newton_coefficients", &newton_coefficients, py::call_guard<py::gil_scoped_release>(), py::arg("sigmas"),
        py::arg("count"), py::arg("sigma"), py::arg("forecasts"), py::arg("parameters"), py::arg("sizes"),
        py::arg("stage_bounds"), py::arg("history_length"), py::arg("anchors"), py::arg("anchor_count"),
        py::arg("constant"), py::arg("taps"), py::arg("stage"), py::arg("threads"), py::arg("instructions") = "avx512",
        "Computes the weights of forecasts on the CPU; ValueError for what can't be right. See csrc/newton_predict.h.");
  define_streams(m, &stream_of);
}
