// A weight as the matrices of its groups: what a kernel walks over, with the strides as the tensor has them.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <iterator>
#include <map>
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
  STD_TORCH_CHECK(axes <= kMostAxes && sizes.size() == axes + 2 && weight.numel() > 0 && plan.groups > 0 &&
                      sizes[0] % plan.groups == 0,
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
  matrix.taps = 1;
  std::array<std::pair<int64_t, int64_t>, kMostAxes + 1> steps{{{strides[1], sizes[1]}}};
  for (size_t i = 0; i < axes; ++i) {
    STD_TORCH_CHECK(sizes[i + 2] == plan.kernel[i], "convnorm: the plan is of another weight");
    matrix.taps *= sizes[i + 2];
    steps[i + 1] = {strides[i + 2], sizes[i + 2]};
  }
  matrix.tap_offsets.reserve(matrix.taps);
  matrix.tap_offsets.push_back(0);
  for (size_t i = axes; i-- > 0;) {  // the last axis is the fastest
    const size_t faster = matrix.tap_offsets.size();
    for (int64_t tap = 1; tap < sizes[i + 2]; ++tap)
      for (size_t t = 0; t < faster; ++t) matrix.tap_offsets.push_back(matrix.tap_offsets[t] + tap * strides[i + 2]);
  }
  std::sort(steps.begin(), steps.end());  // those of no axis have size 0
  int64_t reach = 1;
  matrix.dense_rows = true;
  for (const auto& [stride, size] : steps)
    if (size > 1) {
      matrix.dense_rows &= stride == reach;
      reach *= size;
    }
  return matrix;
}

inline int64_t size_of(ScalarType dtype) {
  return dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
}

// One number of a tensor of float32 or float64 on the CPU.
inline void write_number(const Tensor& of, int64_t at, double number) {
  if (of.scalar_type() == ScalarType::Double)
    static_cast<double*>(of.mutable_data_ptr())[at] = number;
  else
    static_cast<float*>(of.mutable_data_ptr())[at] = static_cast<float>(number);
}

// Of an expanded tensor one element would be written many times.
inline void check_apart(const Tensor& grad) {
  const auto sizes = grad.sizes(), strides = grad.strides();
  for (size_t i = 0; i < sizes.size(); ++i)
    STD_TORCH_CHECK(sizes[i] <= 1 || strides[i] != 0, "convnorm: elements of a gradient share memory");
}

// Stretches of memory, none of which reaches into another.
class Apart {
 public:
  // That in which the tensor lies. False, and nothing is added, where it reaches into one that is here.
  bool add(const Tensor& tensor) {
    const auto sizes = tensor.sizes(), strides = tensor.strides();
    int64_t last = 0;
    for (size_t i = 0; i < sizes.size(); ++i) last += (sizes[i] - 1) * strides[i];
    const auto begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
    const uintptr_t end = begin + static_cast<uintptr_t>((last + 1) * size_of(tensor.scalar_type()));
    const auto next = ends_.lower_bound(end);  // that begins past it; one before may reach over here
    if (next != ends_.begin() && std::prev(next)->second > begin) return false;
    ends_.emplace(begin, end);
    return true;
  }

 private:
  std::map<uintptr_t, uintptr_t> ends_;  // by where they begin
};

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

inline int32_t sums_dtype(const std::vector<Tensor>& weights) {
  bool wide = false;
  for (const Tensor& weight : weights) wide |= weight.scalar_type() == ScalarType::Double;
  return wide ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
}

inline Result new_result(const std::vector<Tensor>& weights, const Plan& plan) {
  STD_TORCH_CHECK(!weights.empty() && plan.size() == weights.size(), "convnorm: the plan is of other weights");
  const int32_t dtype = sums_dtype(weights);
  const auto layers = static_cast<int64_t>(weights.size());
  return {new_tensor(weights[0], {layers}, dtype), new_tensor(weights[0], {layers}, dtype),
          new_tensor(weights[0], {layers, 2, 2}, aoti_torch_dtype_int64())};
}

}  // namespace convnorm
