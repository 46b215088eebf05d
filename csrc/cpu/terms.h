// The moving averages of norm decay on the CPU: a layer's newest term is written down, and what all of its terms sum up
// to is added to its gradient. convnorm/momentum.py says what the state is.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <type_traits>

#include "../state.h"
#include "accumulate.h"
#include "measure.h"

namespace convnorm {

constexpr int64_t kAhead = 128;            // rows: many more would drive each other out of the cache
constexpr int64_t kMostFetched = 1 << 18;  // terms of a layer

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

  void fetch(int64_t other) const {
    if (other >= others) return;
    prefetch(data + other * step + first);
    prefetch(data + other * step + last);
  }
  // Calls for the first rows. They lie scattered in memory: one after another every read would be waited for.
  void fetch() const {
    for (int64_t other = 0; other < kAhead; ++other) fetch(other);
  }
};

inline int64_t slice_length(const Matrix& matrix, bool column) {
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
inline int sign(Number number) {
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
    slice.fetch(other + kAhead);
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
    if (length * terms > kMostFetched) return;
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
  const int64_t ahead = kAhead / std::max<int64_t>(1, additions.size());
  for (int64_t other = 0; other < others; ++other)
    for (Addition<Grad, Sum>& addition : additions) {
      addition.to.fetch(other + ahead);
      Grad* row = addition.to.data + other * addition.to.step;
      const Sum* h = addition.sum + other * taps;
      if (together)
        for (int64_t t = 0; t < taps; ++t) row[t] = static_cast<Grad>(static_cast<Sum>(row[t]) + h[t]);
      else
        for (int64_t t = 0; t < taps; ++t)
          row[offsets[t]] = static_cast<Grad>(static_cast<Sum>(row[offsets[t]]) + h[t]);
    }
}

// The terms of all layers. Each layer by one thread, in one order: the same bits for any number of threads.
template <class Term>
class Terms {
 public:
  Terms(const std::vector<Tensor>& weights, const std::vector<Tensor>& grads, const Plan& plan, const State& state)
      : plan_(plan), state_(state), grads_(weights.size()) {
    const int64_t layers = static_cast<int64_t>(weights.size()), terms = state.terms();
    Apart memory;
    std::vector<int64_t> begins{0};  // where the slice of each layer begins in a term
    for (int64_t i = 0; i < layers; ++i) {
      weights_.push_back(as_matrix(weights[i], plan[i]));
      if (grads[i].numel()) {
        grads_[i] = as_matrix(grads[i], plan[i]);
        STD_TORCH_CHECK(grads[i].size(0) == weights[i].size(0) && grads[i].size(1) == weights[i].size(1),
                        "convnorm: a gradient is that of another weight");
        check_apart(grads[i]);
        grads_apart_ &= memory.add(grads[i]);
      }
      begins.push_back(begins[i] + slice_length(weights_[i], column(i)));
    }
    state.check(layers, begins[layers]);
    const int64_t now = *static_cast<const int64_t*>(state.clock.const_data_ptr());
    STD_TORCH_CHECK(now >= 0, "convnorm: the state of norm decay is of other weights");
    auto* signs = static_cast<Term*>(state.signs.mutable_data_ptr());
    auto* channels = static_cast<int64_t*>(state.channels.mutable_data_ptr());
    for (int64_t i = 0; i < layers; ++i) {
      rings_.push_back({signs + begins[i], begins[layers], channels + i, layers, terms, now % terms});
      for (int64_t slot = 0; slot < terms; ++slot)  // a slice of a channel that there is not would be other memory
        STD_TORCH_CHECK(rings_[i].channel(slot) < channels_of(i),
                        "convnorm: the state of norm decay is of other weights");
    }
    for (int64_t age = 0; age < terms; ++age)
      shares_.push_back((1 - state.momentum) * std::pow(state.momentum, static_cast<double>(age)));
  }

  // Of the winners that the state brings along.
  void check_winners() const {
    for (size_t i = 0; i < weights_.size(); ++i) {
      const Best winner = winner_of(i);
      const int64_t windows = (column(i) ? plan_[i].inputs : plan_[i].outputs).size();
      STD_TORCH_CHECK(
          winner.channel >= 0 && winner.channel < channels_of(i) && winner.window >= 0 && winner.window < windows,
          "convnorm: winners are those of other weights");
    }
  }

  // The norm that was measured, and where it is attained.
  void take(int64_t i, const LayerNorms& measured) const {
    const Best& best = state_.linf ? measured.linf : measured.l1;
    write_number(state_.norms, i, best.value);
    auto* place = static_cast<int64_t*>(state_.winners.mutable_data_ptr()) + 2 * i;
    place[0] = best.channel;
    place[1] = best.window;
  }

  // Calls for what add() will touch.
  void fetch(int64_t i) const {
    fetch_slice(grads_[i], i);
    rings_[i].fetch(slice_length(weights_[i], column(i)));
  }

  // The newest term, of the winner that was found.
  void write(int64_t i) const {
    const Ring<Term>& ring = rings_[i];
    const Best winner = winner_of(i);
    ring.channels[ring.newest * ring.layers] = winner.channel;
    fetch_slice(weights_[i], i);
    with_number(weights_[i].dtype, [&](auto number) {
      write_term<decltype(number)>(weights_[i], plan_[i], winner, column(i), ring.signs + ring.newest * ring.stride);
    });
  }

  // All terms, to the gradient, if there is one. To gradients that share memory advance() adds, to one after another.
  void add(int64_t i) const {
    if (grads_apart_) add_now(i);
  }

  // The next step begins.
  void advance() {
    if (!grads_apart_)
      for (size_t i = 0; i < grads_.size(); ++i) add_now(i);
    const int64_t now = ++*static_cast<int64_t*>(state_.clock.mutable_data_ptr());
    for (Ring<Term>& ring : rings_) ring.newest = now % ring.terms;
  }

  // Calls work with each layer, from as many threads as there are.
  template <class Work>
  void each(const Work& work) const {
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1, [&](int64_t, int64_t) {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < static_cast<int64_t>(weights_.size());)
        work(i);
    });
  }

 private:
  const Plan& plan_;
  const State& state_;
  std::vector<Matrix> weights_, grads_;
  bool grads_apart_ = true;
  std::vector<Ring<Term>> rings_;
  std::vector<double> shares_;  // of a term in h, by its age

  void add_now(int64_t i) const {
    if (!grads_[i].data) return;
    const double rate = static_cast<const double*>(state_.rates.const_data_ptr())[i];
    with_number(grads_[i].dtype,
                [&](auto number) { add_terms<decltype(number)>(grads_[i], rings_[i], column(i), rate, shares_); });
  }
  void fetch_slice(const Matrix& of, int64_t i) const {
    if (!of.data) return;
    with_number(of.dtype,
                [&](auto number) { Slice<const decltype(number)>(of, winner_of(i).channel, column(i)).fetch(); });
  }
  Best winner_of(int64_t i) const {
    const auto* place = static_cast<const int64_t*>(state_.winners.const_data_ptr()) + 2 * i;
    return {0, place[0], place[1]};
  }
  bool column(int64_t i) const { return state_.linf == plan_[i].transposed; }
  int64_t channels_of(int64_t i) const {
    return weights_[i].groups * (column(i) ? weights_[i].columns : weights_[i].rows);
  }
};

}  // namespace convnorm
