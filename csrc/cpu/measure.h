// The measurement of a network on the CPU.
#pragma once

#include <cmath>
#include <functional>
#include <vector>

#include "../matrix.h"
#include "accumulate.h"

namespace convnorm {

struct Best {
  double value = -1;
  int64_t channel = 0, window = 0;

  // Channels and windows are offered in order: the first of equals stays, and NaN beats every number.
  void offer(const Best& other) {
    if (other.value > value || (std::isnan(other.value) && !std::isnan(value))) *this = other;
  }
};

// What is asked for: one norm alone takes less than both.
enum class Norms { kL1, kLinf, kBoth };

// Of a layer whose l1 norm alone, or linf norm alone, was asked for, the other means nothing.
struct LayerNorms {
  Best l1, linf;
};

// Is told of each layer as soon as it is measured, by the thread that did, while others go on.
using Take = std::function<void(int64_t layer, const LayerNorms&)>;

void measure(const std::vector<Tensor>& weights, const Plan& plan, Norms norms, const Take& take);

// The same in another order of rows, and to other bits; with `steps`, one for each weight, each block of a weight is
// measured right after its step, while it is in the cache. For contiguous weights of float32 or float64.
void measure_in_order(const std::vector<Tensor>& weights, const Plan& plan, Norms norms, const Take& take,
                      const SgdStretch* steps);

}  // namespace convnorm
