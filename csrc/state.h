// What norm decay remembers between steps, and what a step is told beside it.
#pragma once

#include <array>
#include <utility>

#include "matrix.h"

namespace convnorm {

struct State {
  Tensor norms, winners, signs, channels, clock;  // `Momentum` in convnorm/momentum.py says what they are
  Tensor rates;                                   // what is added to a gradient is so many times the average
  double momentum;
  bool linf;

  int64_t terms() const { return signs.size(0); }

  // `length` is that of a term: of the slices of all layers together.
  void check(int64_t layers, int64_t length) const {
    const ScalarType norm = norms.scalar_type(), sign = signs.scalar_type();
    bool fits = signs.dim() == 2 && terms() > 0 && rates.scalar_type() == ScalarType::Double;
    fits &= norm == ScalarType::Float || norm == ScalarType::Double;
    fits &= sign == ScalarType::Char || sign == ScalarType::Int;
    for (const Tensor* longs : {&winners, &channels, &clock}) fits &= longs->scalar_type() == ScalarType::Long;
    const std::array<std::pair<const Tensor*, int64_t>, 6> sizes{{{&norms, layers},
                                                                  {&winners, 2 * layers},
                                                                  {&signs, terms() * length},
                                                                  {&channels, terms() * layers},
                                                                  {&clock, 1},
                                                                  {&rates, layers}}};
    for (const auto& [tensor, size] : sizes) fits &= tensor->numel() == size && tensor->is_contiguous();
    STD_TORCH_CHECK(fits, "convnorm: the state of norm decay is of other weights");
  }
};

}  // namespace convnorm
