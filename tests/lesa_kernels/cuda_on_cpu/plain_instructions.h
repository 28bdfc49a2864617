// Included before ring_buffer_cpu.cpp: with LESA_PLAIN_INSTRUCTIONS in the environment, it takes the processor for one
// without vector instructions, and the code for other processors can be tested.
#pragma once

#include <cstdlib>

#define __builtin_cpu_supports(name) (std::getenv("LESA_PLAIN_INSTRUCTIONS") == nullptr && __builtin_cpu_supports(name))
