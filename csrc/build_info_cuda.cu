#include <cuda_runtime_api.h>

#include "build_info.h"

#define LESA_TEXT_OF(...) #__VA_ARGS__
#define LESA_TEXT(...) LESA_TEXT_OF(__VA_ARGS__)

namespace lesa {

CudaBuildInfo cuda_build_info() {
  return {std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10),
          LESA_TEXT(__CUDA_ARCH_LIST__)};
}

}  // namespace lesa
