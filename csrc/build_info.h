#pragma once

#include <string>

namespace lesa {

// What nvcc compiled: its toolkit's version ("13.0") and the architectures in this module ("800,900,...").
// Defined only in builds with CUDA (LESA_WITH_CUDA).
struct CudaBuildInfo {
  std::string version;
  std::string architectures;
};

CudaBuildInfo cuda_build_info();

}  // namespace lesa
