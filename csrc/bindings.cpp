#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <thread>

#include "build_info.h"
#include "ring_buffer.h"

namespace py = pybind11;

namespace {

// Tensors arrive as what `data_ptr()` returns, so that one build serves every version of torch.
template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void ring_push(uintptr_t storage, const std::string& storage_dtype, const std::array<int64_t, 4>& storage_sizes,
               uintptr_t sigmas, uintptr_t cursor, uintptr_t count, uintptr_t features,
               const std::string& features_dtype, const std::array<int64_t, 3>& features_strides, uintptr_t sigma,
               uintptr_t rows, int64_t samples, int device, uintptr_t stream, int threads) {
  const lesa::RingPush push{
      pointer<void>(storage),
      lesa::dtype_from_name("storage_dtype", storage_dtype),
      storage_sizes[0],
      storage_sizes[1],
      storage_sizes[2],
      storage_sizes[3],
      pointer<float>(sigmas),
      pointer<int32_t>(cursor),
      pointer<int32_t>(count),
      pointer<const void>(features),
      lesa::dtype_from_name("features_dtype", features_dtype),
      features_strides[0],
      features_strides[1],
      features_strides[2],
      pointer<const float>(sigma),
      pointer<const int64_t>(rows),
      samples,
      device,
      stream,
      threads,
  };
  lesa::check_ring_push(push);
  if (device >= 0) {
    throw std::runtime_error("The compiled ring buffer runs on the CPU only, but the tensors are on CUDA device " +
                             std::to_string(device) + ". Pass backend=\"auto\" or backend=\"torch\".");
  }
  lesa::ring_push_cpu(push);
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
  info["hardware_threads"] = std::thread::hardware_concurrency();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled part of lesa_kernels. Takes raw pointers, sizes and strides: call it through lesa_kernels.";
  m.def("build_info", &build_info,
        "What this module was built with: version, compiler, cuda_version and cuda_archs (None without CUDA), and the "
        "hardware_threads of this machine.");
  m.def("ring_push", &ring_push, py::call_guard<py::gil_scoped_release>(), py::kw_only(), py::arg("storage"),
        py::arg("storage_dtype"), py::arg("storage_sizes"), py::arg("sigmas"), py::arg("cursor"), py::arg("count"),
        py::arg("features"), py::arg("features_dtype"), py::arg("features_strides"), py::arg("sigma"), py::arg("rows"),
        py::arg("samples"), py::arg("device"), py::arg("stream"), py::arg("threads"),
        "Pushes one feature per sample into a ring; ValueError for what can't be right. See csrc/ring_buffer.h.");
}
