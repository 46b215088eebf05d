// What the two kernels of a measurement need to know of a network, small enough to travel as a kernel argument.
#pragma once

#include <cstdint>

namespace convnorm::cuda {

constexpr int kWarp = 32;
constexpr int kTileThreads = 256;
constexpr int kWinnerThreads = 512;

// A layer's two sides: the sums along its columns, over all rows, and those along its rows, over all columns.
enum Side { kColumns, kRows, kSides };

enum class Path : int32_t {
  kAligned,  // rows are one stretch of memory, read 16 bytes at a time
  kDense,    // rows are one stretch of memory, with 16-byte boundaries anywhere
  kStrided,  // any strides, merged taps
  kSmall,    // many small groups, of any strides: no first stage, each sum is formed where its windows are
};

// Lists of integers, one after another: their number n, n + 1 places where one ends and the next begins, their entries.
struct PackedLists {
  const int32_t* numbers;

  __host__ __device__ int32_t count() const { return numbers[0]; }
  __host__ __device__ const int32_t* begin(int32_t list) const { return entries() + numbers[1 + list]; }
  __host__ __device__ const int32_t* end(int32_t list) const { return entries() + numbers[2 + list]; }
  __host__ __device__ const int32_t* entries() const { return numbers + 2 + count(); }
};

// Entry (row, column) of group g, at a tap that stands `offset` from the first, is at data[g * group_stride +
// row * row_stride + column * column_stride + offset].
//
// The first kernel leaves partial sums behind, one for each tile that has a share in it:
//
//     column_sums[row_tiles][groups][length]              of column c and tap a at c * column_step + a * tap_step
//     row_sums[column_tiles][row_taps][groups * rows]
//
// The second adds them up over tiles and over the taps of each window. On the dense paths the taps of column_sums are
// those of the kernel, in the order of the memory, and row_sums has one "tap" for each output window, already summed
// over it. On the strided path both have the merged taps. Sums are double for double weights and where taps are merged.
struct Layer {
  const void* data;
  int64_t group_stride, row_stride, column_stride;
  int64_t column_sums, row_sums;  // in bytes from the beginning of the scratch memory
  int32_t groups, rows, columns;
  int32_t length, column_step, tap_step, row_taps;
  int32_t rows_per_tile, row_tiles, column_tiles;
  int32_t windows[kSides];  // places in Network::list_numbers(): for each side, the taps of its table in each window,
  int32_t merged;           // the offsets of each merged tap (not on the dense paths)
  int32_t masks;            // and (on the dense paths) for each tap the set of output windows that read it; -1: all do
  int32_t lanes[kSides];    // how many threads share a sum of the second kernel: a power of two, 32 at most
  int32_t result;           // which of the results is this layer's
  Path path;
  bool merges;  // some merged tap is more than one tap
  bool swaps;   // the l1 norm is that of the rows
};

// A sum, and where in (channel, window) order it stands.
struct Best {
  double value;
  int64_t place;

  static __host__ __device__ Best none() { return {-1, INT64_MAX}; }

  // NaN is the largest, and the first of equals wins: so the order of offers does not matter.
  __host__ __device__ void offer(const Best& other) {
    const bool is_nan = value != value, other_is_nan = other.value != other.value;
    const bool equal = value == other.value || (is_nan && other_is_nan);
    if (equal ? other.place < place : !is_nan && (other_is_nan || other.value > value)) *this = other;
  }
};

// The argument of both kernels, kSize bytes long. Its numbers begin with
//
//     first_tile[layers + 1]          where the blocks of the first kernel that sum each layer's tiles begin
//     first_part[2 * layers + 1]      where those of the second begin that search each side of it
//
// and the lists follow. The scratch memory begins with bests[parts] and counters[2 * layers].
template <int kSize>
struct Network {
  static constexpr int kBytes = kSize - 48;

  char* scratch;
  void* norms[2];     // l1[*], linf[*]
  int64_t* winners;   // [*][2][2]: for the l1, then the linf norm: channel, window
  bool norms_double;  // or float
  int32_t layers;
  int32_t parts;
  alignas(8) unsigned char bytes[kBytes];  // Layer[layers], then the numbers

  __host__ __device__ const Layer& layer(int32_t i) const { return reinterpret_cast<const Layer*>(bytes)[i]; }
  __host__ __device__ const int32_t* numbers() const {
    return reinterpret_cast<const int32_t*>(bytes + layers * sizeof(Layer));
  }
  __host__ __device__ const int32_t* first_tile() const { return numbers(); }
  __host__ __device__ const int32_t* first_part() const { return first_tile() + layers + 1; }
  __host__ __device__ const int32_t* list_numbers() const { return first_part() + kSides * layers + 1; }
  __host__ __device__ PackedLists lists(int32_t at) const { return {list_numbers() + at}; }
  __device__ Best* bests() const { return reinterpret_cast<Best*>(scratch); }
  __device__ int* counters() const { return reinterpret_cast<int*>(scratch + parts * sizeof(Best)); }
};

// 4 KB always fit and are quick to launch; with CUDA 12.1 and later a little less than 32 KB fit.
constexpr int kSmallNetwork = 4096;
constexpr int kLargeNetwork = 32752;
static_assert(sizeof(Network<kSmallNetwork>) == kSmallNetwork && sizeof(Network<kLargeNetwork>) == kLargeNetwork);

// The last i of those with first[i] <= number: first[0] is 0, first[count] larger than the number.
__host__ __device__ inline int32_t find(const int32_t* first, int32_t count, int32_t number) {
  int32_t low = 0, high = count;
  while (high - low > 1) {
    const int32_t middle = (low + high) / 2;
    (first[middle] <= number ? low : high) = middle;
  }
  return low;
}

}  // namespace convnorm::cuda
