// The inner loops: absolute sums along the columns and the rows of a block of one matrix, in one read of it.
#pragma once

#include <cstdint>

namespace convnorm {

constexpr int64_t kPadding = 16;  // tables are padded to whole groups of lanes
inline int64_t padded(int64_t length) {
  return (length + kPadding - 1) / kPadding * kPadding;
}

constexpr int kStrands = 4;  // of rows that are read side by side: blocks are whole multiples of them

// A sum in float loses up to one rounding an addition. So no more than kMostRows rows are added to one float, then
// doubles take over: 8e-6 relative at worst. Along a row likewise.
constexpr int64_t kMostRows = 120;

enum class Number { kFloat, kDouble, kHalf, kBFloat16, kCount };

// A step of stochastic gradient descent on a stretch of a weight, as torch.optim.SGD has it.
struct SgdStretch {
  void* weight;
  const void* grad;
  void* buffer;  // of the momentum; null: none
  int64_t length;
  double rate, momentum, dampening, weight_decay;
  bool nesterov, maximize, first;

  SgdStretch part(int64_t begin, int64_t count, int64_t element_bytes) const {
    SgdStretch some = *this;
    some.weight = static_cast<char*>(weight) + begin * element_bytes;
    some.grad = static_cast<const char*>(grad) + begin * element_bytes;
    if (buffer) some.buffer = static_cast<char*>(buffer) + begin * element_bytes;
    some.length = count;
    return some;
  }
};

// Rows whose entries are one stretch of memory. Their sums are taken over `segments` equal parts of it, or, where
// `period` is more than 1, over every period-th entry. With period 1 either sums may be left out: null.
struct DenseBlock {
  const void* data;
  int64_t rows, row_stride, length, segments, period;
  void* column_sums;  // Sum[length], in the order of the memory; added to, whole lanes at a time, also
                      // where those of the last segment reach beyond the end
  double* row_sums;   // [rows][segments * period]; added to
  // Of float and double with period 1:
  const SgdStretch* step = nullptr;  // taken on each row before it is added up; null: none
  bool in_order = false;             // rows are added up one after another, as with a step: then sums are rounded alike
};

// Any strides; taps merged or left out.
struct GeneralBlock {
  const void* data;
  int64_t rows, row_stride, columns, column_stride, taps, merged_taps;
  const int64_t* tap_offsets;  // [taps]
  const int64_t* merged;       // [merged_taps + 1] where the taps of each begin in
  const int64_t* merged_of;    // taps
  void* column_sums;           // Sum[merged_taps][padded(columns)]; added to
  double* row_sums;            // [rows][merged_taps]; added to
};

// The sum of a few terms of small integers, each times its coefficient: sum[i] = sum_t coefficients[t] * terms[t][i]
struct TermSum {
  const void* const* terms;  // int8_t or int32_t [length]
  const double* coefficients;
  int64_t count, length;
  void* sum;  // float or double [padded(length)]
};

// Sum is double for double weights and wherever taps are merged, for what is merged may cancel; else float.
struct Kernels {
  void (*dense[static_cast<int>(Number::kCount)])(const DenseBlock&);         // period 1
  void (*interleaved[static_cast<int>(Number::kCount)])(const DenseBlock&);   // segments 1
  void (*general[static_cast<int>(Number::kCount)][2])(const GeneralBlock&);  // [..][Sum is double]
  void (*sum_terms[2][2])(const TermSum&);                                    // [terms of int32_t][sum in double]
  void (*sgd[2])(const SgdStretch&);                                          // of kFloat and kDouble
  void (*combine_floats)(const float* tables, int64_t count, int64_t length, double* total);
  void (*combine_doubles)(const double* tables, int64_t count, int64_t length, double* total);
};

const Kernels& kernels();  // the widest vectors that this processor has

Kernels kernels_baseline();
#if defined(__x86_64__)
Kernels kernels_avx2();
Kernels kernels_avx512();
#endif

}  // namespace convnorm
