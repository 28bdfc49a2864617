// Builds without CUDA compile this instead of ring_buffer_cuda.cu.

#include <stdexcept>
#include <string>

#include "ring_buffer.h"

namespace lesa {

std::string ring_cuda_problem(int) {
  return "lesa_kernels was built without CUDA; install the CUDA toolkit and build it again with LESA_CUDA=1";
}

void ring_push_cuda(const RingPush& push) {
  throw std::runtime_error("lesa_kernels.ring_push on CUDA device " + std::to_string(push.device) +
                           " failed: " + ring_cuda_problem(push.device) + ".");
}

void ring_gather_cuda(const RingGather& gather) {
  throw std::runtime_error("lesa_kernels.ring_gather on CUDA device " + std::to_string(gather.device) +
                           " failed: " + ring_cuda_problem(gather.device) + ".");
}

}  // namespace lesa
