// decay_native on the CPU: measures one norm of every layer, writes the newest terms down, and adds what they and the
// older ones sum up to to the gradients. Each layer by one thread, in one order: the same bits for any number of
// threads. convnorm/momentum.py says what the state is.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <type_traits>

#include "../matrix.h"
#include "accumulate.h"
#include "measure.h"

namespace convnorm {
namespace {

constexpr int64_t kMostFetched = 2048, kAhead = 8;  // rows
constexpr int64_t kParallelStep = 1 << 15;          // elements: with fewer, one thread is faster

// Calls for a line of memory, into the second level of the cache. The empty instruction is for GCC, which takes what
// only prefetches for a function without effect, and leaves out its calls.
inline void prefetch(const void* at) {
  asm volatile("");
  __builtin_prefetch(at, 0, 2);
}

// The column, or row, of a channel: element (other, tap) at data[other * step + tap_offsets[tap]].
template <class Number>
struct Slice {
  Number* data;
  int64_t others, step;
  int64_t first, last;  // of tap_offsets

  Slice(const Matrix& matrix, int64_t channel, bool column)
      : others(column ? matrix.rows : matrix.columns),
        step(column ? matrix.row_stride : matrix.column_stride),
        first(matrix.tap_offsets.front()),
        last(matrix.tap_offsets.back()) {
    const int64_t channels = column ? matrix.columns : matrix.rows;
    const int64_t channel_step = column ? matrix.column_stride : matrix.row_stride;
    data = static_cast<Number*>(const_cast<void*>(matrix.data)) + channel / channels * matrix.group_stride +
           channel % channels * channel_step;
  }

  // Rows that are a power of two apart would drive each other out of the first level of the cache.
  void fetch(int64_t other) const {
    if (other >= others) return;
    prefetch(data + other * step + first);
    prefetch(data + other * step + last);
  }
  // Calls for all at once: they lie scattered in memory, and one after another every read would be waited for.
  void fetch() const {
    for (int64_t other = 0; other < std::min(others, kMostFetched); ++other) fetch(other);
  }
};

int64_t slice_length(const Matrix& matrix, bool column) {
  return (column ? matrix.rows : matrix.columns) * matrix.taps;
}

template <class Visit>
void with_number(ScalarType type, const Visit& visit) {
  switch (type) {
    case ScalarType::Float:
      return visit(float{});
    case ScalarType::Double:
      return visit(double{});
    case ScalarType::Half:
      return visit(torch::headeronly::Half{});
    case ScalarType::BFloat16:
      return visit(torch::headeronly::BFloat16{});
    default:
      STD_TORCH_CHECK(false, "convnorm: weight and gradient must be float64, float32, float16 or bfloat16");
  }
}

template <class Number>
int sign(Number number) {
  return (number > 0) - (number < 0);
}

// term[other][tap] = the sum, over the merged taps of the window that the tap is in, of sign(their weights' sum)
template <class Weight, class Term>
void write_term(const Matrix& matrix, const LayerPlan& plan, const Best& winner, bool column, Term* term) {
  using Number = std::conditional_t<std::is_same_v<Weight, double>, double, float>;
  const Slice<const Weight> slice(matrix, winner.channel, column);
  const auto& window = (column ? plan.inputs : plan.outputs)[winner.window];
  const int64_t* offsets = matrix.tap_offsets.data();
  std::vector<int32_t> taps;  // those that count, of a window that merges none
  for (int32_t merged : window) taps.push_back(plan.merged[merged][0]);
  std::fill(term, term + slice.others * matrix.taps, Term(0));
  for (int64_t other = 0; other < slice.others; ++other, term += matrix.taps) {
    const Weight* at = slice.data + other * slice.step;
    if (!plan.merges) {
      for (int32_t tap : taps) term[tap] = static_cast<Term>(term[tap] + sign(static_cast<Number>(at[offsets[tap]])));
      continue;
    }
    for (int32_t merged : window) {
      double sum = 0;
      for (int32_t tap : plan.merged[merged]) sum += static_cast<double>(at[offsets[tap]]);
      for (int32_t tap : plan.merged[merged]) term[tap] = static_cast<Term>(term[tap] + sign(sum));
    }
  }
}

// The terms of one layer.
template <class Term>
struct Ring {
  Term* signs;  // [terms][stride]
  int64_t stride;
  int64_t* channels;  // [terms][layers]
  int64_t layers, terms, newest;

  int64_t of_age(int64_t age) const { return age <= newest ? newest - age : newest - age + terms; }
  int64_t channel(int64_t slot) const { return channels[slot * layers]; }
  void fetch(int64_t length) const {
    if (length * terms > kMostFetched * 128) return;
    for (int64_t slot = 0; slot < terms; ++slot)
      for (int64_t i = 0; i < length; i += 64 / sizeof(Term)) prefetch(signs + slot * stride + i);
  }
};

// What is added to one channel of a gradient: its terms, summed up.
template <class Number, class Sum>
struct Addition {
  Slice<Number> to;
  const Sum* sum;  // [others][taps]
};

// grad += rate h. All terms of a channel are added up before they meet the gradient: it is rounded once.
template <class Grad, class Term>
void add_terms(const Matrix& grad, const Ring<Term>& ring, bool column, double rate,
               const std::vector<double>& shares) {
  using Sum = std::conditional_t<std::is_same_v<Grad, double>, double, float>;
  const int64_t length = slice_length(grad, column);
  std::vector<int64_t> found;  // channels
  for (int64_t age = 0; age < ring.terms; ++age) {
    const int64_t channel = ring.channel(ring.of_age(age));
    if (channel >= 0 && std::find(found.begin(), found.end(), channel) == found.end()) found.push_back(channel);
  }
  thread_local std::vector<Sum> sums;
  sums.resize(found.size() * padded(length));
  std::vector<Addition<Grad, Sum>> additions;
  std::vector<const void*> terms;
  std::vector<double> coefficients;
  for (int64_t channel : found) {
    terms.clear();
    coefficients.clear();
    for (int64_t age = 0; age < ring.terms; ++age)
      if (const int64_t slot = ring.of_age(age); ring.channel(slot) == channel) {
        terms.push_back(ring.signs + slot * ring.stride);
        coefficients.push_back(rate * shares[age]);
      }
    Sum* sum = sums.data() + additions.size() * padded(length);
    kernels().sum_terms[sizeof(Term) > 1][std::is_same_v<Sum, double>](
        {terms.data(), coefficients.data(), static_cast<int64_t>(terms.size()), length, sum});
    additions.push_back({Slice<Grad>(grad, channel, column), sum});
  }
  // In the order of the memory: the channels of a row are near each other.
  const int64_t taps = grad.taps, others = length / taps;
  const int64_t* offsets = grad.tap_offsets.data();
  const bool together =
      std::is_sorted(grad.tap_offsets.begin(), grad.tap_offsets.end()) && offsets[taps - 1] == taps - 1;
  for (int64_t other = 0; other < others; ++other)
    for (Addition<Grad, Sum>& addition : additions) {
      if (additions.size() > 1) addition.to.fetch(other + kAhead);  // one alone was called for by step_layer
      Grad* row = addition.to.data + other * addition.to.step;
      const Sum* h = addition.sum + other * taps;
      if (together)
        for (int64_t t = 0; t < taps; ++t) row[t] = static_cast<Grad>(static_cast<Sum>(row[t]) + h[t]);
      else
        for (int64_t t = 0; t < taps; ++t)
          row[offsets[t]] = static_cast<Grad>(static_cast<Sum>(row[offsets[t]]) + h[t]);
    }
}

template <class Term>
void step_layer(const Matrix& weight, const Matrix* grad, const LayerPlan& plan, const Best& winner,
                const Ring<Term>& ring, bool column, double rate, const std::vector<double>& shares) {
  const auto fetch = [&](const Matrix& of) {
    with_number(of.dtype, [&](auto number) { Slice<const decltype(number)>(of, winner.channel, column).fetch(); });
  };
  fetch(weight);
  if (grad) fetch(*grad);
  ring.fetch(slice_length(weight, column));
  with_number(weight.dtype, [&](auto number) {
    write_term<decltype(number)>(weight, plan, winner, column, ring.signs + ring.newest * ring.stride);
  });
  if (grad)
    with_number(grad->dtype, [&](auto number) { add_terms<decltype(number)>(*grad, ring, column, rate, shares); });
}

// Where the norms and the winners of each layer go.
struct Found {
  Tensor norms, winners;
  bool linf;

  void take(int64_t layer, const LayerNorms& measured) const {
    const Best& best = linf ? measured.linf : measured.l1;
    if (norms.scalar_type() == ScalarType::Double)
      static_cast<double*>(norms.mutable_data_ptr())[layer] = best.value;
    else
      static_cast<float*>(norms.mutable_data_ptr())[layer] = static_cast<float>(best.value);
    auto* place = static_cast<int64_t*>(winners.mutable_data_ptr()) + 2 * layer;
    place[0] = best.channel;
    place[1] = best.window;
  }
  Best winner(int64_t layer) const {
    const auto* place = static_cast<const int64_t*>(winners.const_data_ptr()) + 2 * layer;
    return {0, place[0], place[1]};
  }
};

// A step of all layers, each as soon as its winner is found, while some of its weights are in the cache.
template <class Term>
void step(const std::vector<Tensor>& weights, const std::vector<Tensor>& grads, const Plan& plan, const Found& found,
          Tensor& signs, Tensor& channels, Tensor& clock, const Tensor& rates, double momentum, bool measured) {
  const int64_t layers = static_cast<int64_t>(weights.size()), terms = signs.size(0), length = signs.size(1);
  auto* ring_channels = static_cast<int64_t*>(channels.mutable_data_ptr());
  auto* ring_signs = static_cast<Term*>(signs.mutable_data_ptr());
  auto* layer_rates = static_cast<const double*>(rates.const_data_ptr());
  int64_t& now = *static_cast<int64_t*>(clock.mutable_data_ptr());
  STD_TORCH_CHECK(terms > 0 && now >= 0, "convnorm: the state is that of other weights");
  const int64_t newest = now % terms;

  std::vector<double> shares;  // of a term in h, by its age
  for (int64_t age = 0; age < terms; ++age)
    shares.push_back((1 - momentum) * std::pow(momentum, static_cast<double>(age)));

  std::vector<Matrix> weight_matrices, grad_matrices(layers);
  std::vector<int64_t> begin{0};
  for (int64_t i = 0; i < layers; ++i) {
    weight_matrices.push_back(as_matrix(weights[i], plan[i]));
    if (grads[i].numel()) {
      grad_matrices[i] = as_matrix(grads[i], plan[i]);
      STD_TORCH_CHECK(grads[i].size(0) == weights[i].size(0) && grads[i].size(1) == weights[i].size(1),
                      "convnorm: a gradient is that of another weight");
      check_apart(grads[i]);
    }
    const bool column = found.linf == plan[i].transposed;
    begin.push_back(begin.back() + slice_length(weight_matrices[i], column));
    const int64_t windows = (column ? plan[i].inputs : plan[i].outputs).size();
    const int64_t most = weight_matrices[i].groups * (column ? weight_matrices[i].columns : weight_matrices[i].rows);
    const Best winner = found.winner(i);
    STD_TORCH_CHECK(
        !measured || (winner.channel >= 0 && winner.channel < most && winner.window >= 0 && winner.window < windows),
        "convnorm: winners are those of other weights");
    for (int64_t slot = 0; slot < terms; ++slot)  // a slice of a channel that there is not would be other memory
      STD_TORCH_CHECK(slot == newest || ring_channels[slot * layers + i] < most,
                      "convnorm: the state is that of other weights");
  }
  STD_TORCH_CHECK(begin.back() == length, "convnorm: the state is that of other weights");

  const auto step_one = [&](int64_t i) {
    const Best winner = found.winner(i);
    const Ring<Term> ring{ring_signs + begin[i], length, ring_channels + i, layers, terms, newest};
    ring.channels[newest * layers] = winner.channel;
    step_layer(weight_matrices[i], grads[i].numel() ? &grad_matrices[i] : nullptr, plan[i], winner, ring,
               found.linf == plan[i].transposed, layer_rates[i], shares);
  };
  if (measured) {
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1, [&](int64_t, int64_t) {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < layers;) step_one(i);
    });
  } else {
    measure(weights, plan, found.linf ? Norms::kLinf : Norms::kL1, [&](int64_t i, const LayerNorms& norms) {
      found.take(i, norms);
      step_one(i);
    });
  }
  ++now;
}

void decay_cpu(const std::vector<Tensor>& weights, const std::vector<Tensor>& grads, const Tensor& norms,
               const Tensor& winners, Tensor& signs, Tensor& channels, Tensor& clock, const Tensor& rates,
               double momentum, const std::string& text, bool linf, bool measured) {
  const auto plan = read_plan(text);
  const int64_t layers = static_cast<int64_t>(weights.size());
  STD_TORCH_CHECK(plan->size() == weights.size() && grads.size() == weights.size() && norms.numel() == layers &&
                      winners.numel() == 2 * layers && channels.numel() == signs.size(0) * layers &&
                      rates.numel() == layers && rates.scalar_type() == ScalarType::Double,
                  "convnorm: the state is that of other weights");
  for (const Tensor& tensor : {norms, winners, signs, channels, rates})
    STD_TORCH_CHECK(tensor.is_contiguous(), "convnorm: the state must be contiguous");
  const auto run = signs.scalar_type() == ScalarType::Char ? step<int8_t> : step<int32_t>;
  run(weights, grads, *plan, {norms, winners, linf}, signs, channels, clock, rates, momentum, measured);
}

// A step of all weights. The first are those of the layers: block by block each is stepped and its norms are taken, so
// that it is read once for both.
void sgd_cpu(const std::vector<Tensor>& weights, const std::vector<Tensor>& grads, const std::vector<Tensor>& buffers,
             const Tensor& norms, const Tensor& winners, const std::vector<double>& rates,
             const std::vector<int64_t>& flags, const std::string& text, bool linf) {
  const auto plan = read_plan(text);
  const size_t count = weights.size(), layers = plan->size();
  STD_TORCH_CHECK(layers <= count && grads.size() == count && buffers.size() == count &&
                      norms.numel() == static_cast<int64_t>(layers) && winners.numel() == 2 * norms.numel() &&
                      rates.size() == 4 * count && flags.size() == count,
                  "convnorm: the state is that of other weights");
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
    const double* rate = &rates[4 * i];
    steps.push_back({weights[i].mutable_data_ptr(), grads[i].const_data_ptr(),
                     has_momentum ? buffers[i].mutable_data_ptr() : nullptr, weights[i].numel(), rate[0], rate[1],
                     rate[2], rate[3], (flags[i] & 1) != 0, (flags[i] & 2) != 0, (flags[i] & 4) != 0});
  }
  const Found found{norms, winners, linf};
  const auto take = [&](int64_t layer, const LayerNorms& measured) { found.take(layer, measured); };
  measure({weights.begin(), weights.begin() + layers}, *plan, linf ? Norms::kLinf : Norms::kL1, take, steps.data());
  for (size_t i = layers; i < count; ++i) {
    const bool wide = weights[i].scalar_type() == ScalarType::Double;
    torch::stable::parallel_for(0, steps[i].length, kParallelStep, [&](int64_t begin, int64_t end) {
      kernels().sgd[wide](steps[i].part(begin, end - begin, wide ? 8 : 4));
    });
  }
}

}  // namespace
}  // namespace convnorm

STABLE_TORCH_LIBRARY_IMPL(convnorm, CPU, m) {
  m.impl("decay_native", TORCH_BOX(&convnorm::decay_cpu));
  m.impl("sgd_native", TORCH_BOX(&convnorm::sgd_cpu));
}
