// decay_native on a GPU, but for the launching itself, as in measure.h: after the measurement one launch for all layers
// of all dtypes, or a few, where they do not fit into one argument or some have the same gradient.
#pragma once

#include <torch/csrc/stable/library.h>

#include "../state.h"
#include "describe.h"
#include "terms.h"

namespace convnorm::cuda {

// How finely to cut. (Tests cut otherwise.)
struct TermCut {
  int64_t blocks;           // so many the device can hold at a time
  int64_t share_terms = 8;  // of a moving average, for each of the blocks that share it
};

// A layer that has no places for its lists yet.
struct DescribedSlices {
  Slices slices;
  Numbers windows, merged, holders;
};

inline Strides strides_of(const Tensor& tensor, const LayerPlan& plan, bool columns) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  Strides all{
      sizes[0] / plan.groups * strides[0], columns ? strides[1] : strides[0], columns ? strides[0] : strides[1], {}};
  for (size_t i = 2; i < sizes.size(); ++i) all.axes[kAxes + i - sizes.size()] = strides[i];
  return all;
}

inline void check_layer(const Tensor& weight, const Tensor& grad, const LayerPlan& plan) {
  const auto sizes = weight.sizes(), grad_sizes = grad.sizes();
  bool fits = sizes.size() == plan.kernel.size() + 2 && plan.groups > 0 && sizes[0] % plan.groups == 0;
  for (size_t i = 0; fits && i < plan.kernel.size(); ++i) fits = sizes[i + 2] == plan.kernel[i];
  STD_TORCH_CHECK(fits, "convnorm: the plan is of another weight");
  STD_TORCH_CHECK(weight.numel() > 0, "convnorm: weight is empty");
  const bool same = std::equal(sizes.begin(), sizes.end(), grad_sizes.begin(), grad_sizes.end());
  STD_TORCH_CHECK(same || grad.numel() == 0, "convnorm: the gradient is of another weight");
  check_apart(grad);
  for (const Tensor* tensor : {&weight, &grad}) {
    const ScalarType dtype = tensor->scalar_type();
    const bool floating = dtype == ScalarType::Double || dtype == ScalarType::Float || dtype == ScalarType::Half ||
                          dtype == ScalarType::BFloat16;
    STD_TORCH_CHECK(floating || tensor->numel() == 0,
                    "convnorm: weight and gradient must be float64, float32, float16 or bfloat16");
  }
}

// None where the slice is too large for the kernel.
inline std::optional<DescribedSlices> describe_slices(const Tensor& weight, const Tensor& grad, const LayerPlan& plan,
                                                      bool columns) {
  check_layer(weight, grad, plan);
  const auto sizes = weight.sizes();
  int64_t taps = 1;
  for (int64_t k : plan.kernel) taps *= k;
  const int64_t rows = sizes[0] / plan.groups, others = columns ? rows : sizes[1],
                per_group = columns ? sizes[1] : rows;
  const Lists& windows = columns ? plan.inputs : plan.outputs;
  STD_TORCH_CHECK(!windows.empty(), "convnorm: the plan is empty");
  const auto counts = plan.merges ? static_cast<int64_t>(plan.merged.size()) : taps;
  if (counts > kMostCounts || others >= kMostNumbers / taps || plan.groups >= kMostNumbers / per_group)
    return std::nullopt;

  DescribedSlices described{};
  Slices& slices = described.slices;
  slices.weight = weight.const_data_ptr();
  slices.weight_dtype = weight.scalar_type();
  slices.weight_strides = strides_of(weight, plan, columns);
  slices.length = static_cast<int32_t>(others * taps);
  slices.per_group = static_cast<int32_t>(per_group);
  slices.taps = static_cast<int32_t>(taps);
  const size_t axes = plan.kernel.size();
  slices.sizes[0] = axes > 1 ? static_cast<int32_t>(plan.kernel[axes - 2]) : 1;
  slices.sizes[1] = axes > 0 ? static_cast<int32_t>(plan.kernel[axes - 1]) : 1;
  if (grad.numel() > 0) {
    slices.grad = grad.mutable_data_ptr();
    slices.grad_dtype = grad.scalar_type();
    slices.grad_strides = strides_of(grad, plan, columns);
  }

  if (plan.merges) {
    Lists holders(static_cast<size_t>(taps));
    for (size_t a = 0; a < plan.merged.size(); ++a)
      for (int32_t tap : plan.merged[a]) holders[tap].push_back(static_cast<int32_t>(a));
    described.windows = pack(windows);
    described.merged = pack(plan.merged);
    described.holders = pack(holders);
  } else {
    Lists of_taps = windows;
    for (auto& window : of_taps)
      for (int32_t& a : window) a = plan.merged[a][0];
    described.windows = pack(of_taps);
  }
  return described;
}

// Layers that one launch can serve.
class TermBatch {
 public:
  explicit TermBatch(int32_t first_layer) : first_layer_(first_layer) {}

  // False, and nothing is added, where there is no room in the argument, or another layer here has the same gradient.
  bool add(const DescribedSlices& described, const Tensor& grad) {
    const size_t more = lists_.growth({&described.windows, &described.merged, &described.holders});
    if (bytes(layers_.size() + 1, lists_.numbers().size() + more) > Decay<kLargeNetwork>::kBytes) return false;
    if (described.slices.grad && !grads_.add(grad)) return false;
    Slices slices = described.slices;
    slices.windows = lists_.place(described.windows);
    slices.merged = lists_.place(described.merged);
    slices.holders = lists_.place(described.holders);
    layers_.push_back(slices);
    return true;
  }

  template <int kSize>
  bool fits() const {
    return bytes(layers_.size(), lists_.numbers().size()) <= Decay<kSize>::kBytes;
  }

  int64_t elements() const {
    int64_t elements = 0;
    for (const Slices& slices : layers_) elements += slices.length;
    return elements;
  }

  template <int kSize>
  void pack(Decay<kSize>& decay) const {
    decay.layers = static_cast<int32_t>(layers_.size());
    decay.first_layer = first_layer_;
    Numbers first_block{0};
    for (const Slices& slices : layers_)
      first_block.push_back(first_block.back() +
                            static_cast<int32_t>(ceil_div(slices.length, decay.piece)) * decay.shares);
    append(append(append(decay.bytes, layers_), first_block), lists_.numbers());
  }

 private:
  static int64_t bytes(size_t layers, size_t lists) {
    return static_cast<int64_t>(layers * sizeof(Slices) + (layers + 1 + lists) * sizeof(int32_t));
  }

  const int32_t first_layer_;
  std::vector<Slices> layers_;
  SharedLists lists_;
  Apart grads_;
};

// None where a layer is too much for the kernel. `length` becomes that of a term.
inline std::optional<std::vector<TermBatch>> term_batches(const std::vector<Tensor>& weights,
                                                          const std::vector<Tensor>& grads, const Plan& plan, bool linf,
                                                          int64_t& length) {
  std::vector<TermBatch> batches;
  length = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    auto described = describe_slices(weights[i], grads[i], plan[i], linf == plan[i].transposed);
    if (!described) return std::nullopt;
    described->slices.first = length;
    length += described->slices.length;
    if (!batches.empty() && batches.back().add(*described, grads[i])) continue;
    batches.emplace_back(static_cast<int32_t>(i));
    if (!batches.back().add(*described, grads[i])) return std::nullopt;
  }
  return batches;
}

template <int kSize, class Device>
void launch_terms(const TermBatch& batch, const State& state, const Result* result, const TermCut& cut, bool last,
                  bool follows, const Device& device) {
  Decay<kSize> decay;
  decay.norms = state.norms.mutable_data_ptr();
  decay.winners = static_cast<int64_t*>(state.winners.mutable_data_ptr());
  decay.signs = state.signs.mutable_data_ptr();
  decay.channels = static_cast<int64_t*>(state.channels.mutable_data_ptr());
  decay.clock = static_cast<int64_t*>(state.clock.mutable_data_ptr());
  decay.new_norms = result ? (state.linf ? result->linf : result->l1).const_data_ptr() : nullptr;
  decay.new_winners =
      result ? static_cast<const int64_t*>(result->winners.const_data_ptr()) + (state.linf ? 2 : 0) : decay.winners;
  decay.winner_step = result ? 4 : 2;
  decay.rates = static_cast<const double*>(state.rates.const_data_ptr());
  decay.momentum = state.momentum;
  decay.terms = static_cast<int32_t>(state.terms());
  decay.length = state.signs.size(1);
  decay.all_layers = static_cast<int32_t>(state.norms.numel());
  decay.norms_double = state.norms.scalar_type() == ScalarType::Double;
  decay.new_norms_double = result && result->l1.scalar_type() == ScalarType::Double;
  decay.signs_wide = state.signs.scalar_type() == ScalarType::Int;
  decay.advances = last;
  decay.share_terms = static_cast<int32_t>(cut.share_terms);
  decay.shares = static_cast<int32_t>(ceil_div(decay.terms, cut.share_terms));
  const int64_t rounds = ceil_div(batch.elements() * decay.shares, cut.blocks * kTermThreads);
  decay.piece = static_cast<int32_t>(std::min(rounds * kTermThreads, kMostNumbers));
  batch.pack(decay);
  device.launch(add_terms_kernel<kSize>, decay.first_block()[decay.layers], kTermThreads, decay, follows);
}

// Plain PyTorch, for what is too much for the kernels.
inline void decay_reference(const std::vector<Tensor>& weights, const std::vector<Tensor>& grads, const State& state,
                            bool measured, const std::string& plan) {
  namespace stable = torch::stable::detail;
  std::array<StableIValue, 12> stack{
      stable::from(weights),       stable::from(grads),       stable::from(state.norms),
      stable::from(state.winners), stable::from(state.signs), stable::from(state.channels),
      stable::from(state.clock),   stable::from(state.rates), stable::from(state.momentum),
      stable::from(plan),          stable::from(state.linf),  stable::from(measured)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("convnorm::decay_reference", "", stack.data(), TORCH_ABI_VERSION));
}

// measure(weights, plan, result) is measure_batches(), on the device.
template <class Measure, class Device>
void decay(const std::vector<Tensor>& weights, const std::vector<Tensor>& grads, const State& state, bool measured,
           const std::string& text, const TermCut& cut, const Measure& measure, const Device& device) {
  const auto plan = read_plan(text);
  STD_TORCH_CHECK(!weights.empty() && plan->size() == weights.size() && grads.size() == weights.size(),
                  "convnorm: the plan or the gradients are of other weights");
  const auto layers = static_cast<int64_t>(weights.size());
  int64_t length = 0;
  const auto batches = term_batches(weights, grads, *plan, state.linf, length);
  if (!batches || state.terms() > kMostTerms) return decay_reference(weights, grads, state, measured, text);
  state.check(layers, length);
  std::optional<Result> result;
  if (!measured) {
    result = new_result(weights, *plan);
    if (!measure(weights, *plan, *result)) return decay_reference(weights, grads, state, measured, text);
  }
  for (const TermBatch& batch : *batches) {
    const bool first = &batch == &batches->front(), last = &batch == &batches->back();
    const auto launch =
        batch.fits<kSmallNetwork>() ? launch_terms<kSmallNetwork, Device> : launch_terms<kLargeNetwork, Device>;
    launch(batch, state, result ? &*result : nullptr, cut, last, first && result, device);
  }
}

}  // namespace convnorm::cuda
