// The third kernel, of a step of norm decay: writes the newest term of each layer's moving average down, and adds the
// average, all its terms, to the gradients. convnorm/momentum.py says what the terms are and where they are kept.
//
// Each block has a piece of a layer's slice, and a share of the channels that the layer's terms are slices of: so each
// element of a gradient is read and written once, by one thread, which adds all its terms up before, younger ones
// first.
//
// No block waits for another, and what one writes, no other reads: the newest term falls to the blocks of share 0, each
// element to the thread that has just formed it, and all find its channel where the second kernel left it. Only the
// clock goes on when the last block is done.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include "tiles.h"

namespace convnorm::cuda {

using torch::headeronly::ScalarType;

constexpr int kTermThreads = 256;
constexpr int kTermBlocks = 4;     // on a multiprocessor at a time, as shared memory permits
constexpr int kMostTerms = 1024;   // of a moving average
constexpr int kMostCounts = 1024;  // merged taps of a layer, or taps where none are merged
constexpr int kAxes = 3;

// In a matrix of group g, element (other, tap) of channel c's slice stands at g * group + c * channel + other * other +
// the tap's own steps along the axes.
struct Strides {
  int64_t group, channel, other, axes[kAxes];
};

// The slices of a layer, [others, taps] each: the columns of its matrices, with rows as the others, or the reverse.
struct Slices {
  const void* weight;
  void* grad;  // null: there is none, the newest term is written down all the same
  Strides weight_strides, grad_strides;
  int64_t first;           // of a term's elements, those of all layers, where this layer's begin
  int32_t length;          // others * taps
  int32_t per_group;       // channels of a group
  int32_t taps, sizes[2];  // all of them, and those of the last two axes
  int32_t windows;         // places in Decay::list_numbers(): the merged taps in each window,
  int32_t merged;          // the taps of each merged tap; -1: windows hold taps, and nothing merges
  int32_t holders;         // and the merged taps that have each tap
  ScalarType weight_dtype, grad_dtype;
};

// The argument, kSize bytes long. Its numbers are
//
//     first_block[layers + 1]     where the blocks of each layer begin: for each piece of its slice, all shares
//
// and the lists. `Momentum` in convnorm/momentum.py says what the state is that the first pointers name.
template <int kSize>
struct Decay {
  static constexpr int kBytes = kSize - 120;

  void* norms;
  int64_t* winners;
  void* signs;
  int64_t *channels, *clock;
  const void* new_norms;       // of all layers, from the second kernel; null: norms and winners are new already
  const int64_t* new_winners;  // of layer l at l * winner_step
  const double* rates;
  double momentum;
  int64_t length;  // of a term
  int32_t winner_step;
  int32_t terms;
  int32_t piece;                            // elements of a slice
  int32_t shares, share_terms;              // of the terms
  int32_t layers, first_layer, all_layers;  // those here are first_layer, first_layer + 1, ...
  bool norms_double, new_norms_double;      // or float
  bool signs_wide;                          // int32, or int8
  bool advances;                            // the clock
  alignas(8) unsigned char bytes[kBytes];   // Slices[layers], then the numbers

  __host__ __device__ const Slices& slices(int32_t i) const { return reinterpret_cast<const Slices*>(bytes)[i]; }
  __host__ __device__ const int32_t* first_block() const {
    return reinterpret_cast<const int32_t*>(bytes + layers * sizeof(Slices));
  }
  __host__ __device__ const int32_t* list_numbers() const { return first_block() + layers + 1; }
  __host__ __device__ PackedLists lists(int32_t at) const { return {list_numbers() + at}; }
};
static_assert(sizeof(Decay<kSmallNetwork>) == kSmallNetwork && sizeof(Decay<kLargeNetwork>) == kLargeNetwork);

__device__ inline int64_t channel_offset(const Slices& slices, const Strides& strides, int32_t channel) {
  return channel / slices.per_group * strides.group + channel % slices.per_group * strides.channel;
}

__device__ inline int64_t tap_offset(const Slices& slices, const Strides& strides, int32_t tap) {
  const int32_t slow = tap / slices.sizes[1];
  return slow / slices.sizes[0] * strides.axes[0] + slow % slices.sizes[0] * strides.axes[1] +
         tap % slices.sizes[1] * strides.axes[2];
}

// The steps so far. While a kernel runs, the upper half of the clock counts the blocks that are done.
__device__ inline uint32_t steps_of(int64_t clock) {
  return static_cast<uint32_t>(clock);
}

// One step on, when all blocks have come here: until then, some may still have to look.
__device__ inline void advance(int64_t* clock, int32_t blocks) {
  auto* ticket = reinterpret_cast<unsigned long long*>(clock);
  const auto before = static_cast<int64_t>(atomicAdd(ticket, 1ull << 32));
  if (before >> 32 == blocks - 1) *clock = steps_of(before) + int64_t{1};
}

// Where the term of each age is kept: 0 is the newest.
struct Ring {
  int32_t terms, newest;

  __device__ int32_t slot(int32_t age) const { return newest - age + (age > newest ? terms : 0); }
};

// A term as it is added to a gradient.
struct Term {
  int64_t from;  // where it begins in `signs`
  int64_t to;    // where its slice begins in the gradient; -1: another term of the channel follows
  double coefficient;
};

// A layer's terms.
struct Groups {
  Term terms[kMostTerms];        // those of a channel side by side, younger ones first
  int32_t channels[kMostTerms];  // of the term of each age; -1: no term yet
  int16_t youngest[kMostTerms];  // and the least age of those of the same channel; past all where there is no term
  int32_t first, end;            // the block's share: the channels whose terms begin in its part of the places
};

__device__ inline double power(double base, int32_t exponent) {
  double result = 1;
  for (; exponent > 0; exponent /= 2, base *= base)
    if (exponent % 2) result *= base;
  return result;
}

// The channels of all terms but the newest, which is not known yet, and the youngest of each.
__device__ inline void read_channels(Groups& groups, const Ring& ring, const int64_t* channels, int32_t layers) {
  for (int32_t age = 1 + static_cast<int32_t>(threadIdx.x); age < ring.terms; age += kTermThreads)
    groups.channels[age] = static_cast<int32_t>(channels[static_cast<int64_t>(ring.slot(age)) * layers]);
  __syncthreads();
  for (int32_t age = 1 + static_cast<int32_t>(threadIdx.x); age < ring.terms; age += kTermThreads) {
    int32_t youngest = groups.channels[age] < 0 ? ring.terms : 1;
    while (youngest < age && groups.channels[youngest] != groups.channels[age]) ++youngest;
    groups.youngest[age] = static_cast<int16_t>(youngest);
  }
}

// Adds the newest term to the group of its channel.
__device__ inline void add_newest(Groups& groups, int32_t terms, int32_t channel) {
  for (int32_t age = threadIdx.x; age < terms; age += kTermThreads)
    if (age == 0 || groups.channels[age] == channel) groups.youngest[age] = 0;
  if (threadIdx.x > 0) return;
  groups.channels[0] = channel;
  groups.first = terms;
  groups.end = 0;
}

template <int kSize>
__device__ void group(Groups& groups, const Decay<kSize>& decay, const Slices& slices, const Ring& ring, int32_t share,
                      double rate) {
  for (int32_t age = threadIdx.x; age < ring.terms; age += kTermThreads) {
    const int32_t youngest = groups.youngest[age], channel = groups.channels[age];
    int32_t begin = 0, younger = 0, size = 0;
    for (int32_t other = 0; other < ring.terms; ++other) {
      begin += groups.youngest[other] < youngest;
      younger += groups.youngest[other] == youngest && other < age;
      size += groups.youngest[other] == youngest;
    }
    Term& term = groups.terms[begin + younger];
    term.from = ring.slot(age) * decay.length;
    term.to = younger == size - 1 ? channel_offset(slices, slices.grad_strides, channel) : -1;
    term.coefficient = rate * (1 - decay.momentum) * power(decay.momentum, age);
    if (channel >= 0 && younger == 0 && begin / decay.share_terms == share) {
      atomicMin(&groups.first, begin);
      atomicMax(&groups.end, begin + size);
    }
  }
}

// -1, 0 or 1 for a weight, or a sum of weights; 0 for NaN.
__device__ inline int32_t sign(double number) {
  return (number > 0) - (number < 0);
}

__device__ inline double number_at(const void* data, ScalarType dtype, int64_t at) {
  switch (dtype) {
    case ScalarType::Double:
      return static_cast<const double*>(data)[at];
    case ScalarType::Float:
      return static_cast<const float*>(data)[at];
    case ScalarType::Half:
      return static_cast<const torch::headeronly::Half*>(data)[at];
    default:
      return static_cast<const torch::headeronly::BFloat16*>(data)[at];
  }
}

// An element of the subgradient: the signs of the merged taps that have its tap, times their counts.
template <int kSize>
__device__ int32_t newest_term(const Decay<kSize>& decay, const Slices& slices, const int32_t* counts, int64_t offset,
                               int32_t tap) {
  const auto weight = [&](int32_t of_tap) {
    const int64_t at = offset + tap_offset(slices, slices.weight_strides, of_tap);
    return number_at(slices.weight, slices.weight_dtype, at);
  };
  if (slices.merged < 0) return counts[tap] * sign(weight(tap));
  const PackedLists merged = decay.lists(slices.merged), holders = decay.lists(slices.holders);
  int32_t term = 0;
  for (const int32_t* a = holders.begin(tap); a != holders.end(tap); ++a) {
    double sum = 0;
    for (const int32_t* of_tap = merged.begin(*a); of_tap != merged.end(*a); ++of_tap) sum += weight(*of_tap);
    term += counts[*a] * sign(sum);
  }
  return term;
}

template <int kSize>
__device__ int32_t sign_at(const Decay<kSize>& decay, int64_t at) {
  return decay.signs_wide ? static_cast<const int32_t*>(decay.signs)[at] : static_cast<const int8_t*>(decay.signs)[at];
}

template <int kSize>
__device__ void write_sign(const Decay<kSize>& decay, int64_t at, int32_t sign) {
  if (decay.signs_wide)
    static_cast<int32_t*>(decay.signs)[at] = sign;
  else
    static_cast<int8_t*>(decay.signs)[at] = static_cast<int8_t>(sign);
}

// To the gradient's element at `offset` in the slices of all channels of the block's share, their terms, which have it
// as their element `at`.
template <class Grad, int kSize>
__device__ void add_terms(const Decay<kSize>& decay, const Slices& slices, const Groups& groups, int64_t at,
                          int64_t offset) {
  using Sum = SumOf<Grad>;
  constexpr int kAtOnce = 8;
  Grad* const grad = static_cast<Grad*>(slices.grad) + offset;
  Sum sum = 0;
  for (int32_t first = groups.first; first < groups.end; first += kAtOnce) {
    int32_t signs[kAtOnce];
    Grad before[kAtOnce];
#pragma unroll
    for (int t = 0; t < kAtOnce; ++t) {  // all on their way before the first is used
      signs[t] = 0;
      before[t] = Grad{};
      if (first + t >= groups.end) continue;
      const Term& term = groups.terms[first + t];
      signs[t] = sign_at(decay, term.from + at);
      if (term.to >= 0) before[t] = grad[term.to];
    }
#pragma unroll
    for (int t = 0; t < kAtOnce; ++t) {
      if (first + t >= groups.end) break;
      const Term& term = groups.terms[first + t];
      sum += static_cast<Sum>(term.coefficient) * static_cast<Sum>(signs[t]);
      if (term.to < 0) continue;
      grad[term.to] = static_cast<Grad>(static_cast<Sum>(before[t]) + sum);
      sum = 0;
    }
  }
}

template <int kSize, class... Rest>
__device__ void add_terms(ScalarType grad_dtype, const Decay<kSize>& decay, const Rest&... rest) {
  switch (grad_dtype) {
    case ScalarType::Double:
      return add_terms<double>(decay, rest...);
    case ScalarType::Float:
      return add_terms<float>(decay, rest...);
    case ScalarType::Half:
      return add_terms<torch::headeronly::Half>(decay, rest...);
    default:
      return add_terms<torch::headeronly::BFloat16>(decay, rest...);
  }
}

template <int kSize>
__device__ void write_state(const Decay<kSize>& decay, int32_t layer, int32_t slot, const int64_t* winner) {
  decay.channels[static_cast<int64_t>(slot) * decay.all_layers + layer] = winner[0];
  if (!decay.new_norms) return;
  decay.winners[2 * layer] = winner[0];
  decay.winners[2 * layer + 1] = winner[1];
  const double norm = decay.new_norms_double ? static_cast<const double*>(decay.new_norms)[layer]
                                             : static_cast<const float*>(decay.new_norms)[layer];
  if (decay.norms_double)
    static_cast<double*>(decay.norms)[layer] = norm;
  else
    static_cast<float*>(decay.norms)[layer] = static_cast<float>(norm);
}

template <int kSize>
__global__ void __launch_bounds__(kTermThreads, kTermBlocks)
    add_terms_kernel(const __grid_constant__ Decay<kSize> decay) {
  __shared__ Groups groups;
  __shared__ int32_t counts[kMostCounts];
  const int32_t *first_block = decay.first_block(), block = static_cast<int32_t>(blockIdx.x);
  const int32_t i = find(first_block, decay.layers, block), layer = decay.first_layer + i;
  const Slices& slices = decay.slices(i);
  const int32_t piece = (block - first_block[i]) / decay.shares, share = (block - first_block[i]) % decay.shares;
  const Ring ring{decay.terms, static_cast<int32_t>(steps_of(*decay.clock) % static_cast<uint32_t>(decay.terms))};

  // What the measurement does not touch is read while it may still run,
  const double rate = decay.rates[layer];
  if (slices.grad) read_channels(groups, ring, decay.channels + layer, decay.all_layers);
  const int32_t merged_taps = slices.merged < 0 ? slices.taps : decay.lists(slices.merged).count();
  for (int32_t a = threadIdx.x; a < merged_taps; a += kTermThreads) counts[a] = 0;
  __syncthreads();
  await_previous_kernel();  // and the winner after it.
  const int64_t* winner = decay.new_winners + static_cast<int64_t>(layer) * decay.winner_step;
  const auto channel = static_cast<int32_t>(winner[0]), window = static_cast<int32_t>(winner[1]);
  if (slices.grad) add_newest(groups, decay.terms, channel);
  const PackedLists windows = decay.lists(slices.windows);
  for (const int32_t* a = windows.begin(window) + threadIdx.x; a < windows.end(window); a += kTermThreads)
    atomicAdd(counts + *a, 1);
  __syncthreads();
  if (slices.grad) group(groups, decay, slices, ring, share, rate);
  __syncthreads();

  const int32_t end = min((piece + 1) * decay.piece, slices.length);
  for (int32_t element = piece * decay.piece + static_cast<int32_t>(threadIdx.x); element < end;
       element += kTermThreads) {
    const int32_t other = element / slices.taps, tap = element % slices.taps;
    const int64_t at = slices.first + element;
    if (share == 0) {
      const Strides& strides = slices.weight_strides;
      const int64_t offset = channel_offset(slices, strides, channel) + other * strides.other;
      write_sign(decay, ring.newest * decay.length + at, newest_term(decay, slices, counts, offset, tap));
    }
    const int64_t offset = other * slices.grad_strides.other + tap_offset(slices, slices.grad_strides, tap);
    if (slices.grad) add_terms(slices.grad_dtype, decay, slices, groups, at, offset);
  }
  if (piece == 0 && share == 0 && threadIdx.x == 0) write_state(decay, layer, ring.newest, winner);
  if (decay.advances && threadIdx.x == 0) advance(decay.clock, first_block[decay.layers]);
}

}  // namespace convnorm::cuda
