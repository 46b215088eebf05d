// The second kernel: adds up what the first left behind, over tiles and the taps of each window, and finds the largest.
#pragma once

#include "tiles.h"

namespace convnorm::cuda {

// One side of a layer as the second kernel sees it: each channel's sum over a window has a term for each tap of the
// window and each of the `others`, which are tiles, or where there was no first stage the channels of the other side.
struct Terms {
  int32_t channels, per_group;
  int64_t group_step, channel_step;
  int32_t others;
  int64_t other_step;

  __device__ int64_t offset(int32_t channel) const {
    return channel / per_group * group_step + channel % per_group * channel_step;
  }
};

__device__ inline Terms terms_of(const Layer& layer, int side) {
  const int32_t per_group = side == kColumns ? layer.columns : layer.rows;
  const int32_t channels = layer.groups * per_group;
  if (layer.path == Path::kSmall) {
    if (side == kColumns)
      return {channels, per_group, layer.group_stride, layer.column_stride, layer.rows, layer.row_stride};
    return {channels, per_group, layer.group_stride, layer.row_stride, layer.columns, layer.column_stride};
  }
  if (side == kColumns)
    return {channels,          per_group,       layer.length,
            layer.column_step, layer.row_tiles, static_cast<int64_t>(layer.groups) * layer.length};
  return {channels, per_group, per_group, 1, layer.column_tiles, static_cast<int64_t>(layer.row_taps) * channels};
}

// A term, of which a thread loads `kAtOnce` before it adds them up: a number of a table,
template <class Sum>
struct TableTerm {
  static constexpr int kAtOnce = 8;
  const Sum* table;
  int64_t tap_step;

  __device__ Sum operator()(int64_t offset, int32_t tap) const { return table[offset + tap * tap_step]; }
};

// the absolute value of a weight,
template <class Weight>
struct WeightTerm {
  static constexpr int kAtOnce = 8;
  const Weight* data;
  const int32_t* offsets;  // of each tap

  __device__ SumOf<Weight> operator()(int64_t offset, int32_t tap) const {
    return absolute<SumOf<Weight>>(data[offset + offsets[tap]]);
  }
};

// or that of a sum of weights.
template <class Weight>
struct MergedTerm {
  static constexpr int kAtOnce = 1;
  const Weight* data;
  PackedLists merged;

  __device__ double operator()(int64_t offset, int32_t tap) const {
    double sum = 0;
    for (const int32_t* at = merged.begin(tap); at != merged.end(tap); ++at)
      sum += static_cast<double>(data[offset + *at]);
    return std::fabs(sum);
  }
};

// The terms of one sum that fall to one of the `lanes` threads that share it.
template <class Term>
__device__ auto sum_terms(const Term& term, const Terms& terms, int64_t offset, const int32_t* taps, int32_t tap_count,
                          int32_t lane, int32_t lanes) {
  using Sum = decltype(term(0, 0));
  constexpr int kAtOnce = Term::kAtOnce;
  Sum sums[kAtOnce] = {};
  const int32_t taps_on = lanes / terms.others, others_on = lanes % terms.others;
  int32_t tap = lane / terms.others, other = lane % terms.others;
  const int64_t count = static_cast<int64_t>(tap_count) * terms.others;
  for (int64_t i = lane; i < count;) {
    Sum loaded[kAtOnce];
#pragma unroll
    for (int t = 0; t < kAtOnce; ++t, i += lanes) {
      loaded[t] = i < count ? term(offset + other * terms.other_step, taps[tap]) : Sum(0);
      tap += taps_on;
      other += others_on;
      if (other >= terms.others) {
        other -= terms.others;
        ++tap;
      }
    }
#pragma unroll
    for (int t = 0; t < kAtOnce; ++t) sums[t] += loaded[t];
  }
#pragma unroll
  for (int width = kAtOnce / 2; width > 0; width /= 2)
#pragma unroll
    for (int t = 0; t < width; ++t) sums[t] += sums[t + width];
  return sums[0];
}

// The best of a share of the sums: of each channel over each window, channels side by side for the sake of the loads.
template <class Term>
__device__ Best best_of_part(const Term& term, const Terms& terms, const PackedLists& windows, int32_t lanes,
                             int32_t part, int32_t parts) {
  const int32_t sums = terms.channels * windows.count();
  const int32_t share = (sums + parts - 1) / parts, first = part * share, end = min(first + share, sums);
  const int32_t slots = kWinnerThreads / lanes, slot = threadIdx.x / lanes, lane = threadIdx.x % lanes;
  Best best = Best::none();
  for (int32_t at = first; at < end; at += slots) {  // the same for all threads, since they shuffle
    const int32_t i = at + slot, window = i / terms.channels, channel = i % terms.channels;
    decltype(term(0, 0)) sum = 0;
    if (i < end) {
      const int32_t* taps = windows.begin(window);
      const auto tap_count = static_cast<int32_t>(windows.end(window) - taps);
      sum = sum_terms(term, terms, terms.offset(channel), taps, tap_count, lane, lanes);
    }
    for (int distance = lanes / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
    if (i < end) best.offer({static_cast<double>(sum), static_cast<int64_t>(channel) * windows.count() + window});
  }
  return best;
}

template <class Weight, int kSize>
__device__ Best best_of_part(const Network<kSize>& network, const Layer& layer, int side, int32_t part, int32_t parts) {
  using Sum = SumOf<Weight>;
  const Terms terms = terms_of(layer, side);
  const PackedLists windows = network.lists(layer.windows[side]);
  const auto best = [&](const auto& term) {
    return best_of_part(term, terms, windows, layer.lanes[side], part, parts);
  };
  if (layer.path == Path::kSmall) {
    const auto* data = static_cast<const Weight*>(layer.data);
    const PackedLists merged = network.lists(layer.merged);
    return layer.merges ? best(MergedTerm<Weight>{data, merged}) : best(WeightTerm<Weight>{data, merged.entries()});
  }
  const char* table = network.scratch + (side == kColumns ? layer.column_sums : layer.row_sums);
  const int64_t tap_step = side == kColumns ? layer.tap_step : terms.channels;
  return layer.merges ? best(TableTerm<double>{reinterpret_cast<const double*>(table), tap_step})
                      : best(TableTerm<Sum>{reinterpret_cast<const Sum*>(table), tap_step});
}

// The best of all threads, in the first of them.
__device__ inline Best best_of_block(Best best, Best* of_warps) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const auto best_of_warp = [&] {
#pragma unroll 1
    for (int distance = kWarp / 2; distance > 0; distance /= 2)
      best.offer({__shfl_xor_sync(kAllLanes, best.value, distance), __shfl_xor_sync(kAllLanes, best.place, distance)});
  };
  best_of_warp();
  if (lane == 0) of_warps[warp] = best;
  __syncthreads();
  if (warp == 0) {
    best = lane < kWinnerThreads / kWarp ? of_warps[lane] : Best::none();
    best_of_warp();
  }
  return best;
}

template <int kSize>
__device__ void write_best(const Network<kSize>& network, const Layer& layer, int side, const Best& best) {
  const int norm = (side == kColumns) != layer.swaps ? 0 : 1;
  const int32_t windows = network.lists(layer.windows[side]).count();
  if (network.norms_double)
    static_cast<double*>(network.norms[norm])[layer.result] = best.value;
  else
    static_cast<float*>(network.norms[norm])[layer.result] = static_cast<float>(best.value);
  int64_t* winner = network.winners + 4 * static_cast<int64_t>(layer.result) + 2 * norm;
  winner[0] = best.place / windows;
  winner[1] = best.place % windows;
}

// Each block searches one side of a layer, or a part of it: then the last to finish compares what the parts have found.
template <class Weight, int kSize>
__global__ void __launch_bounds__(kWinnerThreads, 2)
    find_winners_kernel(const __grid_constant__ Network<kSize> network) {
  __shared__ Best of_warps[kWinnerThreads / kWarp];
  __shared__ bool is_last;
  const auto block = static_cast<int32_t>(blockIdx.x);
  const int32_t *first_part = network.first_part(), i = find(first_part, network.layers * kSides, block);
  const int32_t parts = first_part[i + 1] - first_part[i];
  const Layer& layer = network.layer(i / kSides);
  const int side = i % kSides;
  allow_next_kernel();
  await_previous_kernel();
  Best best = best_of_part<Weight>(network, layer, side, block - first_part[i], parts);
  best = best_of_block(best, of_warps);
  if (parts > 1) {
    if (threadIdx.x == 0) {
      network.bests()[block] = best;
      __threadfence();
      is_last = atomicAdd(network.counters() + i, 1) == parts - 1;
    }
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    best = Best::none();
    for (int32_t p = threadIdx.x; p < parts; p += kWinnerThreads) {
      const Best* found = network.bests() + first_part[i] + p;
      best.offer({__ldcg(&found->value), __ldcg(&found->place)});  // past this multiprocessor's own cache
    }
    best = best_of_block(best, of_warps);
  }
  if (threadIdx.x == 0) write_best(network, layer, side, best);
}

}  // namespace convnorm::cuda
