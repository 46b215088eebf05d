// A layer in the kernels' terms: which path it takes, and the lists of its windows.
#pragma once

#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <optional>
#include <utility>
#include <vector>

#include "../matrix.h"
#include "tiles.h"

namespace convnorm::cuda {

constexpr int32_t kSmallGroup = 8;         // most rows and columns of a group that is not worth a tile
constexpr size_t kMaskBits = 32;           // windows in a mask
constexpr int64_t kMostNumbers = 1 << 30;  // of whatever the kernels count in 32 bits

using Numbers = std::vector<int32_t>;

// The layer has no places for its lists yet, and is not cut into tiles.
struct Described {
  Layer layer;
  ScalarType dtype;
  std::array<Numbers, kSides> windows;
  Numbers merged, masks;  // empty where the layer has none
};

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// As PackedLists reads them.
inline Numbers pack(const Lists& lists) {
  Numbers numbers{static_cast<int32_t>(lists.size()), 0};
  for (const auto& list : lists) numbers.push_back(numbers.back() + static_cast<int32_t>(list.size()));
  for (const auto& list : lists) numbers.insert(numbers.end(), list.begin(), list.end());
  return numbers;
}

// Packed lists, one after another. Many layers have the same: they share it.
class SharedLists {
 public:
  // How many numbers more there would be with these, at most.
  size_t growth(std::initializer_list<const Numbers*> lists) const {
    size_t more = 0;
    for (const Numbers* list : lists) more += places_.count(*list) ? 0 : list->size();
    return more;
  }
  // Where the list stands; -1 for none.
  int32_t place(const Numbers& list) {
    if (list.empty()) return -1;
    const auto [known, is_new] = places_.emplace(list, static_cast<int32_t>(numbers_.size()));
    if (is_new) numbers_.insert(numbers_.end(), list.begin(), list.end());
    return known->second;
  }
  const Numbers& numbers() const { return numbers_; }

 private:
  Numbers numbers_;
  std::map<Numbers, int32_t> places_;
};

// Copies them to the bytes of an argument; returns where they end.
template <class Item>
unsigned char* append(unsigned char* to, const std::vector<Item>& items) {
  std::memcpy(to, items.data(), items.size() * sizeof(Item));
  return to + items.size() * sizeof(Item);
}

// For each tap the set of windows that read it. None where there are too many, or one that reads a tap twice.
inline std::optional<Numbers> masks_of(const Lists& windows, const Lists& merged, int64_t taps) {
  if (windows.size() > kMaskBits) return std::nullopt;
  std::vector<uint32_t> masks(static_cast<size_t>(taps), 0);
  for (size_t window = 0; window < windows.size(); ++window)
    for (int32_t a : windows[window]) {
      uint32_t& mask = masks[merged[a][0]];
      if (mask >> window & 1) return std::nullopt;
      mask |= uint32_t{1} << window;
    }
  return Numbers(masks.begin(), masks.end());
}

// Where the rows are stretches of memory, with the taps evenly spaced, and no merged tap is more than one tap.
inline bool describe_dense(Described& described, const Matrix& matrix, const LayerPlan& plan, Lists inputs,
                           const Lists& outputs) {
  Layer& layer = described.layer;
  layer.tap_step = matrix.taps > 1 ? static_cast<int32_t>(matrix.tap_offsets[1]) : 1;
  bool dense = matrix.dense_rows;
  for (const auto& taps : plan.merged) dense &= taps.size() == 1;
  for (int64_t tap = 0; tap < matrix.taps; ++tap) dense &= matrix.tap_offsets[tap] == tap * layer.tap_step;
  const auto masks = dense ? masks_of(outputs, plan.merged, matrix.taps) : std::nullopt;
  if (!masks) return false;

  const bool read_all = outputs.size() == 1 && static_cast<int64_t>(outputs[0].size()) == matrix.taps;
  if (!read_all) described.masks = *masks;
  for (auto& window : inputs)
    for (int32_t& a : window) a = plan.merged[a][0];
  described.windows[kColumns] = pack(inputs);
  Lists summed;  // the first kernel has summed over each output window already
  for (size_t window = 0; window < outputs.size(); ++window) summed.push_back({static_cast<int32_t>(window)});
  described.windows[kRows] = pack(summed);
  layer.row_taps = static_cast<int32_t>(outputs.size());
  layer.length = static_cast<int32_t>(matrix.row_length());
  layer.column_step = matrix.columns > 1 ? static_cast<int32_t>(matrix.column_stride) : 0;
  const int64_t size = size_of(matrix.dtype);
  const bool aligned = reinterpret_cast<uintptr_t>(matrix.data) % kLaneBytes == 0 &&
                       matrix.row_stride * size % kLaneBytes == 0 && layer.length * size % kLaneBytes == 0;
  layer.path = aligned ? Path::kAligned : Path::kDense;
  return true;
}

inline bool describe_strided(Described& described, const Matrix& matrix, const LayerPlan& plan, const Lists& inputs,
                             const Lists& outputs) {
  Layer& layer = described.layer;
  Lists offsets;
  for (const auto& taps : plan.merged) {
    offsets.emplace_back();
    for (int32_t tap : taps) {
      if (matrix.tap_offsets[tap] > INT32_MAX) return false;
      offsets.back().push_back(static_cast<int32_t>(matrix.tap_offsets[tap]));
    }
  }
  described.windows = {pack(inputs), pack(outputs)};
  described.merged = pack(offsets);
  layer.row_taps = static_cast<int32_t>(offsets.size());
  layer.length = layer.row_taps * layer.columns;
  layer.column_step = 1;
  layer.tap_step = layer.columns;
  return true;
}

// None where the layer is too large for the kernels.
inline std::optional<Described> describe(Matrix matrix, const LayerPlan& plan, int32_t result) {
  const Lists *inputs = &plan.inputs, *outputs = &plan.outputs;
  const bool empty = matrix.groups < 1 || matrix.rows < 1 || matrix.columns < 1 || matrix.taps < 1;
  STD_TORCH_CHECK(!empty && !inputs->empty() && !outputs->empty(), "convnorm: weight or plan is empty");
  Described described{};
  described.dtype = matrix.dtype;
  Layer& layer = described.layer;
  layer.swaps = plan.transposed;
  if (!matrix.dense_rows && matrix.row_stride < matrix.column_stride) {  // neighbours in memory are neighbouring rows:
    std::swap(matrix.rows, matrix.columns);                              // turn the matrix, and all that is said of it
    std::swap(matrix.row_stride, matrix.column_stride);
    std::swap(inputs, outputs);
    layer.swaps = !layer.swaps;
    matrix.dense_rows = matrix.taps == 1 && matrix.column_stride == 1;
  }
  const size_t lists = std::max({plan.merged.size(), inputs->size(), outputs->size(), matrix.tap_offsets.size()});
  const int64_t channels = matrix.groups * std::max(matrix.rows, matrix.columns);
  if (channels >= kMostNumbers / static_cast<int64_t>(lists)) return std::nullopt;

  layer.data = matrix.data;
  layer.group_stride = matrix.group_stride;
  layer.row_stride = matrix.row_stride;
  layer.column_stride = matrix.column_stride;
  layer.groups = static_cast<int32_t>(matrix.groups);
  layer.rows = static_cast<int32_t>(matrix.rows);
  layer.columns = static_cast<int32_t>(matrix.columns);
  layer.result = result;
  layer.merges = plan.merges;
  const bool small = layer.groups > 1 && std::max(layer.rows, layer.columns) <= kSmallGroup;
  if (!small && describe_dense(described, matrix, plan, *inputs, *outputs)) return described;
  if (!describe_strided(described, matrix, plan, *inputs, *outputs)) return std::nullopt;
  layer.path = small ? Path::kSmall : Path::kStrided;
  return described;
}

}  // namespace convnorm::cuda
