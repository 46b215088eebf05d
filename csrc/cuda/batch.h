// Layers of one dtype that are measured together: cut into the tiles of the first kernel and the parts of the second.
#pragma once

#include "describe.h"

namespace convnorm::cuda {

// How finely to cut. (Tests cut otherwise.)
struct Cut {
  int64_t tiles;               // of dense layers: so few that the device can hold them all at a time
  int64_t part_terms = 32768;  // 64 for each thread of a block of the second kernel
};
constexpr int64_t kMostTileRows = 1024;   // of a dense layer: then a float adds up no more than 128 weights
constexpr int64_t kStridedTileRows = 64;  // a tile's weights then stay in the first-level cache while its taps are read

class Batch {
 public:
  explicit Batch(ScalarType dtype) : dtype(dtype) {}

  // False, and nothing is added, where the layer has no room in the kernels' argument beside the others.
  bool add(const Described& described) {
    Layer layer = described.layer;
    const auto& [columns, rows] = described.windows;
    const size_t more = lists_.growth({&columns, &rows, &described.merged, &described.masks});
    if (bytes(layers_.size() + 1, lists_.numbers().size() + more) > Network<kLargeNetwork>::kBytes) return false;
    layer.windows[kColumns] = lists_.place(columns);
    layer.windows[kRows] = lists_.place(rows);
    layer.merged = lists_.place(described.merged);
    layer.masks = lists_.place(described.masks);
    layers_.push_back(layer);
    return true;
  }

  // Once all layers are there.
  void cut(const Cut& cut);

  template <int kSize>
  bool fits() const {
    return bytes(layers_.size(), lists_.numbers().size()) <= Network<kSize>::kBytes;
  }

  template <int kSize>
  void pack(Network<kSize>& network) const {
    network.layers = static_cast<int32_t>(layers_.size());
    network.parts = parts();
    append(append(append(append(network.bytes, layers_), first_tile_), first_part_), lists_.numbers());
  }

  bool empty() const { return layers_.empty(); }
  int32_t tiles() const { return first_tile_.back(); }
  int32_t parts() const { return first_part_.back(); }
  bool compares_parts() const { return parts() > static_cast<int32_t>(kSides * layers_.size()); }
  int64_t scratch_bytes() const { return scratch_bytes_; }

  const ScalarType dtype;

 private:
  static int64_t bytes(size_t layers, size_t lists) {
    return static_cast<int64_t>(layers * sizeof(Layer) + ((kSides + 1) * layers + 2 + lists) * sizeof(int32_t));
  }
  int64_t tile_columns(const Layer& layer) const {
    return kWarp * lane_columns(layer.path, static_cast<size_t>(size_of(dtype)));
  }
  int64_t tiles_of(const Layer& layer, int64_t rows_per_tile) const {
    if (layer.path == Path::kSmall) return 0;
    const int64_t columns = layer.path == Path::kStrided ? layer.columns : layer.length;
    return layer.groups * ceil_div(layer.rows, rows_per_tile) * ceil_div(columns, tile_columns(layer));
  }
  int64_t rows_per_tile(const Cut& cut) const;
  int64_t cut_side(Layer& layer, int side, const Cut& cut) const;
  int64_t reserve(int64_t bytes) { return std::exchange(scratch_bytes_, scratch_bytes_ + ceil_div(bytes, 16) * 16); }

  std::vector<Layer> layers_;
  SharedLists lists_;
  Numbers first_tile_, first_part_;
  int64_t scratch_bytes_ = 0;
};

// As few as leave no more tiles than wanted: small tiles are soon read, large ones leave fewer sums to add up.
inline int64_t Batch::rows_per_tile(const Cut& cut) const {
  for (int64_t rows = kLeastTileRows;; rows += kLeastTileRows) {
    int64_t tiles = 0;
    for (const Layer& layer : layers_) tiles += layer.path == Path::kStrided ? 0 : tiles_of(layer, rows);
    if (tiles <= cut.tiles || rows >= kMostTileRows) return rows;
  }
}

// How many blocks search a side, and how many threads share a sum.
inline int64_t Batch::cut_side(Layer& layer, int side, const Cut& cut) const {
  const bool small = layer.path == Path::kSmall, columns = side == kColumns;
  const int64_t channels = int64_t{layer.groups} * (columns ? layer.columns : layer.rows);
  const int64_t others =
      small ? (columns ? layer.rows : layer.columns) : (columns ? layer.row_tiles : layer.column_tiles);
  const PackedLists windows{lists_.numbers().data() + layer.windows[side]};
  const int64_t sums = channels * windows.count(), all_taps = windows.end(windows.count() - 1) - windows.entries();
  int64_t longest = 1;
  for (int32_t w = 0; w < windows.count(); ++w)
    longest = std::max<int64_t>(longest, (windows.end(w) - windows.begin(w)) * others);
  // Weights come from further away than a table that was just written: then more blocks, each with less to load.
  const int64_t part_terms = std::max<int64_t>(1, small ? cut.part_terms / 8 : cut.part_terms);
  const int64_t parts = std::clamp<int64_t>(ceil_div(channels * all_taps * others, part_terms), 1, sums);
  const int64_t most_lanes = std::min({int64_t{kWarp}, longest, kWinnerThreads / ceil_div(sums, parts)});
  layer.lanes[side] = 1;
  while (2 * layer.lanes[side] <= most_lanes) layer.lanes[side] *= 2;
  return parts;
}

inline void Batch::cut(const Cut& cut) {
  const int64_t dense_rows = rows_per_tile(cut);
  int64_t tiles = 0, parts = 0;
  first_tile_ = first_part_ = {0};
  for (Layer& layer : layers_) {
    const bool strided = layer.path == Path::kStrided;
    // As many tiles as tiles of the full height would be, but all about equally high.
    const int64_t even = ceil_div(layer.rows, ceil_div(layer.rows, strided ? kStridedTileRows : dense_rows));
    const int64_t rows = ceil_div(even, kLeastTileRows) * kLeastTileRows;
    layer.rows_per_tile = static_cast<int32_t>(rows);
    layer.row_tiles = static_cast<int32_t>(ceil_div(layer.rows, rows));
    layer.column_tiles = static_cast<int32_t>(ceil_div(strided ? layer.columns : layer.length, tile_columns(layer)));
    tiles += tiles_of(layer, rows);
    STD_TORCH_CHECK(tiles <= INT32_MAX, "convnorm: weights too large for one launch");
    first_tile_.push_back(static_cast<int32_t>(tiles));
    for (int side : {kColumns, kRows}) {
      parts += cut_side(layer, side, cut);
      STD_TORCH_CHECK(parts <= INT32_MAX, "convnorm: weights too large for one launch");
      first_part_.push_back(static_cast<int32_t>(parts));
    }
  }
  scratch_bytes_ = 0;
  reserve(parts * static_cast<int64_t>(sizeof(Best)) + kSides * static_cast<int64_t>(layers_.size() * sizeof(int)));
  for (Layer& layer : layers_) {
    if (layer.path == Path::kSmall) continue;
    const int64_t sum_bytes = layer.merges || dtype == ScalarType::Double ? 8 : 4, groups = layer.groups;
    layer.column_sums = reserve(sum_bytes * layer.row_tiles * groups * layer.length);
    layer.row_sums = reserve(sum_bytes * layer.column_tiles * layer.row_taps * groups * layer.rows);
  }
}

}  // namespace convnorm::cuda
