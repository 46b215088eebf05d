// What every processor of the platform has: SSE2 on x86-64, NEON on ARM. Also chooses among the widths.
#include <cstdlib>

#include "accumulate.h"

#define CONVNORM_VECTOR_BYTES 16
#include "lanes.h"
// (the bodies come after what they need)
#include "accumulate.inc"

namespace convnorm {

Kernels kernels_baseline() {
  return compiled_kernels();
}

const Kernels& kernels() {
  static const Kernels chosen = [] {
    const char* limit = std::getenv("CONVNORM_VECTOR_BYTES");  // so that one machine can test what others run
    [[maybe_unused]] const int widest = limit ? std::atoi(limit) : 64;
#if defined(__x86_64__)
    if (widest >= 64 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
      return kernels_avx512();
    if (widest >= 32 && __builtin_cpu_supports("avx2")) return kernels_avx2();
#endif
    return kernels_baseline();
  }();
  return chosen;
}

}  // namespace convnorm
