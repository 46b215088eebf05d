// A weight as the matrices of its groups: what a kernel walks over, with the strides as the tensor has them.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "plan.h"

namespace convnorm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Entry (row, column, tap) of group g stands at data[g * group_stride + row * row_stride + column * column_stride +
// tap_offsets[tap]], in elements. Rows are the first dimension of the weight, columns the second.
struct Matrix {
  const void* data;
  ScalarType dtype;
  int64_t groups, rows, columns, taps;
  int64_t group_stride, row_stride, column_stride;
  std::vector<int64_t> tap_offsets;
  bool dense_rows;  // the entries of a row are one stretch of memory, in any order

  int64_t row_length() const { return columns * taps; }
};

inline Matrix as_matrix(const Tensor& weight, const LayerPlan& plan) {
  const auto sizes = weight.sizes();
  const auto strides = weight.strides();
  const size_t axes = plan.kernel.size();
  STD_TORCH_CHECK(sizes.size() == axes + 2 && weight.numel() > 0 && plan.groups > 0 && sizes[0] % plan.groups == 0,
                  "convnorm: the plan is of another weight");
  Matrix matrix{};
  matrix.data = weight.const_data_ptr();
  matrix.dtype = weight.scalar_type();
  matrix.groups = plan.groups;
  matrix.rows = sizes[0] / plan.groups;
  matrix.columns = sizes[1];
  matrix.row_stride = strides[0];
  matrix.column_stride = strides[1];
  matrix.group_stride = matrix.rows * matrix.row_stride;
  matrix.tap_offsets = {0};
  std::vector<std::pair<int64_t, int64_t>> steps{{strides[1], sizes[1]}};
  for (size_t i = 0; i < axes; ++i) {
    STD_TORCH_CHECK(sizes[i + 2] == plan.kernel[i], "convnorm: the plan is of another weight");
    std::vector<int64_t> grown;
    grown.reserve(matrix.tap_offsets.size() * plan.kernel[i]);
    for (int64_t offset : matrix.tap_offsets)
      for (int64_t tap = 0; tap < plan.kernel[i]; ++tap) grown.push_back(offset + tap * strides[i + 2]);
    matrix.tap_offsets = std::move(grown);
    steps.emplace_back(strides[i + 2], sizes[i + 2]);
  }
  matrix.taps = static_cast<int64_t>(matrix.tap_offsets.size());
  std::sort(steps.begin(), steps.end());
  int64_t reach = 1;
  matrix.dense_rows = true;
  for (const auto& [stride, size] : steps)
    if (size > 1) {
      matrix.dense_rows &= stride == reach;
      reach *= size;
    }
  return matrix;
}

// Of an expanded tensor one element would be written many times.
inline void check_apart(const Tensor& grad) {
  const auto sizes = grad.sizes(), strides = grad.strides();
  for (size_t i = 0; i < sizes.size(); ++i)
    STD_TORCH_CHECK(sizes[i] <= 1 || strides[i] != 0, "convnorm: elements of a gradient share memory");
}

// What measure_native returns: see convnorm/library.py.
struct Result {
  Tensor l1, linf, winners;
};

inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& shape, int32_t dtype) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * shape[i];
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
                                                  dtype, device_type, like.get_device_index(), &handle));
  return Tensor(handle);
}

inline Result new_result(const std::vector<Tensor>& weights, const Plan& plan, const std::vector<int64_t>& shape) {
  int64_t count = 1;
  for (int64_t size : shape) count *= size;
  STD_TORCH_CHECK(!weights.empty() && plan.size() == weights.size() && count == static_cast<int64_t>(weights.size()),
                  "convnorm: the plan or the shape is of other weights");
  bool wide = false;
  for (const Tensor& weight : weights) wide |= weight.scalar_type() == ScalarType::Double;
  const int32_t dtype = wide ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
  std::vector<int64_t> winners(shape);
  winners.insert(winners.end(), {2, 2});
  return {new_tensor(weights[0], shape, dtype), new_tensor(weights[0], shape, dtype),
          new_tensor(weights[0], winners, aoti_torch_dtype_int64())};
}

}  // namespace convnorm
