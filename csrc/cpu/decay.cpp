// decay_native on the CPU: measures one norm of every layer, writes the newest terms down, and adds what they and the
// older ones sum up to to the gradients.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "terms.h"

namespace convnorm {
namespace {

// Each layer as soon as its winner is found, while some of its weights are in the cache.
template <class Term>
void step(const std::vector<Tensor>& weights, const std::vector<Tensor>& grads, const Plan& plan, const State& state,
          bool measured) {
  Terms<Term> terms(weights, grads, plan, state);
  const auto step_one = [&](int64_t i) {
    terms.fetch(i);
    terms.write(i);
    terms.add(i);
  };
  if (measured) {
    terms.check_winners();
    terms.each(step_one);
  } else {
    measure(weights, plan, state.linf ? Norms::kLinf : Norms::kL1, [&](int64_t i, const LayerNorms& norms) {
      terms.take(i, norms);
      step_one(i);
    });
  }
  terms.advance();
}

void decay_cpu(const std::vector<Tensor>& weights, const std::vector<Tensor>& grads, const Tensor& norms,
               const Tensor& winners, Tensor& signs, Tensor& channels, Tensor& clock, const Tensor& rates,
               double momentum, const std::string& text, bool linf, bool measured) {
  const auto plan = read_plan(text);
  STD_TORCH_CHECK(plan->size() == weights.size() && grads.size() == weights.size(),
                  "convnorm: the state is that of other weights");
  const State state{norms, winners, signs, channels, clock, rates, momentum, linf};
  const auto run = signs.scalar_type() == ScalarType::Char ? step<int8_t> : step<int32_t>;
  run(weights, grads, *plan, state, measured);
}

}  // namespace
}  // namespace convnorm

STABLE_TORCH_LIBRARY_IMPL(convnorm, CPU, m) {
  m.impl("decay_native", TORCH_BOX(&convnorm::decay_cpu));
}
