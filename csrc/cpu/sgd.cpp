// sgd_native on the CPU: a step of norm decay and one of stochastic gradient descent. Block by block each layer's
// weight is stepped and its norm is taken, so that it is read once for both.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "terms.h"

namespace convnorm {
namespace {

constexpr int64_t kParallelStep = 1 << 15;  // elements: with fewer, one thread is faster

// lr, momentum, dampening, weight decay, nesterov, maximize: of a group of parameters
constexpr size_t kRates = 6;

std::vector<SgdStretch> steps_of(const std::vector<Tensor>& weights, const std::vector<Tensor>& grads,
                                 const std::vector<Tensor>& buffers, const std::vector<bool>& first,
                                 const std::vector<int64_t>& groups, const std::vector<double>& group_rates) {
  const size_t count = weights.size();
  STD_TORCH_CHECK(grads.size() == count && buffers.size() == count && first.size() == count && groups.size() == count,
                  "convnorm: there must be as many gradients, momenta and groups as weights");
  std::vector<SgdStretch> steps;
  for (size_t i = 0; i < count; ++i) {
    const bool has_momentum = buffers[i].numel() > 0;
    const ScalarType dtype = weights[i].scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
                    "convnorm: weight must be float32 or float64");
    for (const Tensor* tensor : {&weights[i], &grads[i], &buffers[i]})
      if (tensor != &buffers[i] || has_momentum)
        STD_TORCH_CHECK(
            tensor->is_contiguous() && tensor->numel() == weights[i].numel() && tensor->scalar_type() == dtype,
            "convnorm: weight, gradient and momentum must be contiguous and alike");
    STD_TORCH_CHECK(groups[i] >= 0 && (groups[i] + 1) * kRates <= group_rates.size(),
                    "convnorm: a weight is of a group that there is not");
    const double* rates = &group_rates[groups[i] * kRates];
    steps.push_back({weights[i].mutable_data_ptr(), grads[i].const_data_ptr(),
                     has_momentum ? buffers[i].mutable_data_ptr() : nullptr, weights[i].numel(), rates[0], rates[1],
                     rates[2], rates[3], rates[4] != 0, rates[5] != 0, first[i]});
  }
  return steps;
}

// The newest terms that a step adds were written down by the step before, as soon as it had made the weights, and are
// `known` if nothing came between.
template <class Term>
void step(const std::vector<Tensor>& weights, const std::vector<Tensor>& grads, const Plan& plan, const State& state,
          const std::vector<SgdStretch>& steps, bool known) {
  const std::vector<Tensor> layers(weights.begin(), weights.begin() + plan.size());
  Terms<Term> terms(layers, grads, plan, state);
  const auto look = [&](const SgdStretch* before) {
    const auto write = [&](int64_t i, const LayerNorms& norms) {
      terms.take(i, norms);
      terms.write(i);
    };
    measure_in_order(layers, plan, state.linf ? Norms::kLinf : Norms::kL1, write, before);
  };
  if (known)
    terms.check_winners();
  else
    look(nullptr);
  terms.each([&](int64_t i) {
    terms.fetch(i);
    terms.add(i);
  });
  terms.advance();
  look(steps.data());
  for (size_t i = plan.size(); i < weights.size(); ++i) {
    const bool wide = weights[i].scalar_type() == ScalarType::Double;
    torch::stable::parallel_for(0, steps[i].length, kParallelStep, [&](int64_t begin, int64_t end) {
      kernels().sgd[wide](steps[i].part(begin, end - begin, wide ? 8 : 4));
    });
  }
}

// The first weights are those of the layers.
void sgd_cpu(const std::vector<Tensor>& weights, const std::vector<Tensor>& grads, const std::vector<Tensor>& buffers,
             const std::vector<bool>& first, const std::vector<int64_t>& groups, const std::vector<double>& group_rates,
             const Tensor& norms, const Tensor& winners, Tensor& signs, Tensor& channels, Tensor& clock,
             const Tensor& rates, double momentum, const std::string& text, bool linf, bool known) {
  const auto plan = read_plan(text);
  const auto steps = steps_of(weights, grads, buffers, first, groups, group_rates);
  STD_TORCH_CHECK(plan->size() <= weights.size(), "convnorm: the state is that of other weights");
  const State state{norms, winners, signs, channels, clock, rates, momentum, linf};
  const auto run = signs.scalar_type() == ScalarType::Char ? step<int8_t> : step<int32_t>;
  run(weights, grads, *plan, state, steps, known);
}

}  // namespace
}  // namespace convnorm

STABLE_TORCH_LIBRARY_IMPL(convnorm, CPU, m) {
  m.impl("sgd_native", TORCH_BOX(&convnorm::sgd_cpu));
}
