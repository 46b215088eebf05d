// The first kernel: each block reads one tile of one layer, once, and leaves its absolute sums along both sides.
//
// The lanes of a warp stand side by side along the columns, and its rows pass by, four at a time: sums along columns
// stay in registers until the tile is done, sums along rows are formed by shuffles. Every sum has one fixed order.
#pragma once

#include <cmath>
#include <type_traits>

#include "network.h"

namespace convnorm::cuda {

constexpr int kTileBlocks = 3;  // on a multiprocessor at a time, with up to 80 registers a thread
constexpr int kTileWarps = kTileThreads / kWarp;
constexpr int kRowsAtOnce = 4;
constexpr int kLeastTileRows = kTileWarps * kRowsAtOnce;
constexpr int kLaneBytes = 16;  // of a dense row, for each lane
constexpr unsigned kAllLanes = 0xffffffff;
constexpr int kTileShared = 8192;  // bytes

template <class Weight>
using SumOf = std::conditional_t<std::is_same_v<Weight, double>, double, float>;

// How many columns a lane has, and so how wide a tile is.
__host__ __device__ constexpr int lane_columns(Path path, size_t weight_bytes) {
  if (path == Path::kAligned) return kLaneBytes / static_cast<int>(weight_bytes);
  return path == Path::kDense ? (weight_bytes == 8 ? 2 : 4) : 1;
}

template <class Sum, class Number>
__device__ Sum absolute(Number number) {
  return std::fabs(static_cast<Sum>(number));
}

// Where the hardware can, a kernel may begin while the one before it in the stream still runs: the earlier allows it,
__device__ inline void allow_next_kernel() {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

// and the later one waits, before it touches memory, until the earlier is done and all that it wrote can be read.
__device__ inline void await_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

// Four rows of a dense layer, as one lane sees them: neighbouring columns, all inside the tile or all outside.
template <class Weight>
struct AlignedRows {
  using Sum = SumOf<Weight>;
  static constexpr int kColumns = lane_columns(Path::kAligned, sizeof(Weight));
  struct alignas(kLaneBytes) Entries {
    Weight of[kColumns];
  };
  const Weight* data;  // the first of the lane's columns in row 0
  int64_t row_stride;
  int32_t columns_left;  // from the lane's first to the end of the row

  static __device__ int column(int lane, int i) { return lane * kColumns + i; }

  __device__ void load(const Weight* from, int32_t rows_left, Entries (&entries)[kRowsAtOnce]) const {
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r, from += row_stride) {
      uint4 bits{0, 0, 0, 0};
      if (r < rows_left && columns_left > 0) bits = *reinterpret_cast<const uint4*>(from);
      memcpy(&entries[r], &bits, sizeof bits);
    }
  }
};

// The same with columns a warp apart, so that what a warp loads at once is one stretch of memory.
template <class Weight>
struct DenseRows {
  using Sum = SumOf<Weight>;
  static constexpr int kColumns = lane_columns(Path::kDense, sizeof(Weight));
  struct Entries {
    Weight of[kColumns];
  };
  const Weight* data;
  int64_t row_stride;
  int32_t columns_left;

  static __device__ int column(int lane, int i) { return lane + i * kWarp; }

  __device__ void load(const Weight* from, int32_t rows_left, Entries (&entries)[kRowsAtOnce]) const {
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r, from += row_stride)
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        entries[r].of[i] = Weight{};
        if (r < rows_left && i * kWarp < columns_left) entries[r].of[i] = from[i * kWarp];
      }
  }
};

// Four rows of one merged tap, the sum of the weights at its offsets.
template <class Weight, class Sum_>
struct MergedRows {
  using Sum = Sum_;
  static constexpr int kColumns = lane_columns(Path::kStrided, sizeof(Weight));
  struct Entries {
    Sum of[1];
  };
  const Weight* data;
  int64_t row_stride;
  int32_t columns_left;
  const int32_t *offsets, *offsets_end;

  static __device__ int column(int lane, int) { return lane; }

  __device__ void load(const Weight* from, int32_t rows_left, Entries (&entries)[kRowsAtOnce]) const {
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) entries[r].of[0] = 0;
    if (columns_left <= 0) return;
#pragma unroll 1
    for (const int32_t* offset = offsets; offset != offsets_end; ++offset)
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r)
        if (r < rows_left) entries[r].of[0] += static_cast<Sum>(from[r * row_stride + *offset]);
  }
};

// The sums over the warp of four numbers of each lane, of which lane l gets number kept_row(l).
template <class Sum>
__device__ Sum sum_over_warp(const Sum (&numbers)[kRowsAtOnce], int lane) {
  static_assert(kRowsAtOnce == 4);
  const bool last_two = lane & 1, odd = lane & 2;
  Sum even_row = last_two ? numbers[2] : numbers[0], odd_row = last_two ? numbers[3] : numbers[1];
  even_row += __shfl_xor_sync(kAllLanes, last_two ? numbers[0] : numbers[2], 1);
  odd_row += __shfl_xor_sync(kAllLanes, last_two ? numbers[1] : numbers[3], 1);
  Sum sum = (odd ? odd_row : even_row) + __shfl_xor_sync(kAllLanes, odd ? even_row : odd_row, 2);
#pragma unroll
  for (int distance = 4; distance < kWarp; distance *= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
  return sum;
}
__device__ inline int kept_row(int lane) {
  return 2 * (lane & 1) + (lane >> 1 & 1);
}

// Rows [first_row, end_row) of a group, and what their sums go to.
template <class Sum>
struct Tile {
  int32_t first_row, end_row;
  int32_t first_column, columns;
  Sum* column_sums;  // [columns]
  Sum* row_sums;     // [windows][window_step], of which row r of the group is the r-th
  int32_t windows;   // of a row
  int64_t window_step;
};

// `masks` has, for each column of the tile, the set of windows that count it; null where there is one that counts all.
template <class Rows, class Sum = typename Rows::Sum>
__device__ void sum_tile(const Rows& rows, const Tile<Sum>& tile, const uint32_t* masks, char* shared) {
  constexpr int kColumns = Rows::kColumns;
  static_assert(kColumns * kWarp <= kTileThreads && sizeof(Sum) * kColumns * kTileThreads <= kTileShared);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  Sum across[kColumns] = {};
  int32_t row = tile.first_row + warp * kRowsAtOnce;
  const auto* from = rows.data + row * rows.row_stride;
  typename Rows::Entries next[kRowsAtOnce];
  rows.load(from, tile.end_row - row, next);
  for (; row < tile.end_row; row += kLeastTileRows) {
    typename Rows::Entries entries[kRowsAtOnce];
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) entries[r] = next[r];
    from += kLeastTileRows * rows.row_stride;
    rows.load(from, tile.end_row - row - kLeastTileRows, next);  // on its way while the others are added up
    const auto write_row_sums = [&](const Sum(&along)[kRowsAtOnce], int32_t window) {
      const Sum sum = sum_over_warp(along, lane);
      const int32_t kept = row + kept_row(lane);
      if (lane < kRowsAtOnce && kept < tile.end_row) tile.row_sums[window * tile.window_step + kept] = sum;
    };
    if (!masks) {
      Sum along[kRowsAtOnce] = {};
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r)
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
          const Sum entry = absolute<Sum>(entries[r].of[i]);
          across[i] += entry;
          along[r] += entry;
        }
      write_row_sums(along, 0);
      continue;
    }
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r)
#pragma unroll
      for (int i = 0; i < kColumns; ++i) across[i] += absolute<Sum>(entries[r].of[i]);
#pragma unroll 1
    for (int32_t window = 0; window < tile.windows; ++window) {
      Sum along[kRowsAtOnce] = {};
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        const bool counts = masks[Rows::column(lane, i)] >> window & 1;
#pragma unroll
        for (int r = 0; r < kRowsAtOnce; ++r)
          along[r] += counts ? absolute<Sum>(entries[r].of[i]) : Sum(0);  // not times 0: it may be NaN
      }
      write_row_sums(along, window);
    }
  }

  Sum* of_warps = reinterpret_cast<Sum*>(shared);  // [kTileWarps][kColumns * kWarp]
#pragma unroll
  for (int i = 0; i < kColumns; ++i) of_warps[warp * kColumns * kWarp + Rows::column(lane, i)] = across[i];
  __syncthreads();
  const int column = static_cast<int>(threadIdx.x);
  if (column < tile.columns) {
    Sum sum = 0;
#pragma unroll
    for (int w = 0; w < kTileWarps; ++w) sum += of_warps[w * kColumns * kWarp + column];
    tile.column_sums[column] = sum;
  }
  __syncthreads();  // before the next tile uses the memory again
}

// Which of its layer's tiles a block has.
struct Place {
  int32_t group, row_tile, column_tile;

  __device__ Place(const Layer& layer, int32_t tile)
      : group(tile / layer.column_tiles / layer.row_tiles),
        row_tile(tile / layer.column_tiles % layer.row_tiles),
        column_tile(tile % layer.column_tiles) {}
};

template <class Sum>
__device__ Tile<Sum> tile_at(const Layer& layer, const Place& place, int32_t row_length, int32_t tile_columns,
                             char* scratch) {
  const int64_t all_rows = static_cast<int64_t>(layer.groups) * layer.rows;
  const int64_t table_row = static_cast<int64_t>(place.row_tile) * layer.groups + place.group;
  Tile<Sum> tile;
  tile.first_row = place.row_tile * layer.rows_per_tile;
  tile.end_row = min(tile.first_row + layer.rows_per_tile, layer.rows);
  tile.first_column = place.column_tile * tile_columns;
  tile.columns = min(row_length - tile.first_column, tile_columns);
  tile.column_sums = reinterpret_cast<Sum*>(scratch + layer.column_sums) + table_row * layer.length + tile.first_column;
  tile.row_sums = reinterpret_cast<Sum*>(scratch + layer.row_sums) +
                  static_cast<int64_t>(place.column_tile) * layer.row_taps * all_rows +
                  static_cast<int64_t>(place.group) * layer.rows;
  tile.windows = layer.row_taps;
  tile.window_step = all_rows;
  return tile;
}

// A tile of rows that are one stretch of memory: of columns and taps alike.
template <class Rows, class Weight, int kSize>
__device__ void sum_dense_tile(const Network<kSize>& network, const Layer& layer, const Place& place, char* shared) {
  const auto tile = tile_at<typename Rows::Sum>(layer, place, layer.length, Rows::kColumns * kWarp, network.scratch);
  uint32_t* masks = nullptr;
  if (layer.masks >= 0) {
    const int32_t *of_taps = network.list_numbers() + layer.masks, taps = layer.length / layer.columns;
    masks = reinterpret_cast<uint32_t*>(shared + kTileShared);
    const int32_t column = tile.first_column + static_cast<int32_t>(threadIdx.x);
    if (threadIdx.x < Rows::kColumns * kWarp)
      masks[threadIdx.x] = static_cast<uint32_t>(of_taps[column / layer.tap_step % taps]);
    __syncthreads();
  }
  const int32_t column = tile.first_column + Rows::column(threadIdx.x % kWarp, 0);
  const Weight* data = static_cast<const Weight*>(layer.data) + place.group * layer.group_stride + column;
  sum_tile(Rows{data, layer.row_stride, layer.length - column}, tile, masks, shared);
}

// A tile of rows and columns that may lie anywhere, for one merged tap after another.
template <class Sum, class Weight, int kSize>
__device__ void sum_strided_tile(const Network<kSize>& network, const Layer& layer, const Place& place, char* shared) {
  auto tile = tile_at<Sum>(layer, place, layer.columns, kWarp, network.scratch);
  tile.windows = 1;
  const int32_t column = tile.first_column + static_cast<int32_t>(threadIdx.x % kWarp);
  const Weight* data = static_cast<const Weight*>(layer.data) + place.group * layer.group_stride;
  const PackedLists merged = network.lists(layer.merged);
  for (int32_t tap = 0; tap < layer.row_taps; ++tap) {
    const MergedRows<Weight, Sum> rows{data + column * layer.column_stride, layer.row_stride, layer.columns - column,
                                       merged.begin(tap), merged.end(tap)};
    sum_tile(rows, tile, nullptr, shared);
    tile.column_sums += layer.tap_step;
    tile.row_sums += tile.window_step;
  }
}

template <class Weight, int kSize>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks)
    sum_tiles_kernel(const __grid_constant__ Network<kSize> network) {
  alignas(16) __shared__ char shared[kTileShared + kTileThreads * sizeof(uint32_t)];
  allow_next_kernel();
  if (blockIdx.x == 0)
    for (int i = threadIdx.x; i < network.layers * kSides; i += kTileThreads) network.counters()[i] = 0;
  const auto block = static_cast<int32_t>(blockIdx.x);
  if (block >= network.first_tile()[network.layers]) return;  // none has tiles: this one block is here for the above
  const int32_t i = find(network.first_tile(), network.layers, block);
  const Layer& layer = network.layer(i);
  const Place place(layer, block - network.first_tile()[i]);
  if (layer.path == Path::kAligned)
    sum_dense_tile<AlignedRows<Weight>, Weight>(network, layer, place, shared);
  else if (layer.path == Path::kDense)
    sum_dense_tile<DenseRows<Weight>, Weight>(network, layer, place, shared);
  else if (layer.merges)
    sum_strided_tile<double, Weight>(network, layer, place, shared);
  else
    sum_strided_tile<SumOf<Weight>, Weight>(network, layer, place, shared);
}

}  // namespace convnorm::cuda
