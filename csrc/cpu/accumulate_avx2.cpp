#if defined(__x86_64__)
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "accumulate.h"

// Only what follows may use AVX2: the headers above are shared with code that runs everywhere.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC target("avx2")
#endif
#define CONVNORM_VECTOR_BYTES 32
#include "lanes.h"
// (the bodies come after what they need)
#include "accumulate.inc"

namespace convnorm {
Kernels kernels_avx2() {
  return compiled_kernels();
}
}  // namespace convnorm

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
