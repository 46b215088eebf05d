// measure_native on the CPU: cuts all layers into blocks, adds each up once, and finds the largest windows.
//
// The cut depends on the layers alone and every sum has one fixed order, so the result is the same to the last bit
// whatever the number of threads.
#include "measure.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <tuple>

#include "../matrix.h"
#include "accumulate.h"

namespace convnorm {
namespace {

constexpr int64_t kBlockElements = 1 << 19;     // two megabytes of floats: worth a table of its own
constexpr int64_t kParallelElements = 1 << 15;  // with fewer, as in PyTorch, one thread is faster
constexpr int64_t kLeastRows = 64;              // a block writes no more than a 64th of what it reads

#if defined(__SANITIZE_ADDRESS__)
constexpr bool kKeepsMemory = false;  // every table anew, so that a step beyond its end is seen
#else
constexpr bool kKeepsMemory = true;
#endif

// Memory that begins with a line of the cache, so that no vector straddles two.
template <class Sum>
class Table {
 public:
  Sum* of_length(int64_t length) {
    if (length > length_ || !kKeepsMemory) {
      memory_.reset(new (std::align_val_t(64)) Sum[length]);
      length_ = length;
    }
    return memory_.get();
  }

 private:
  struct Delete {
    void operator()(Sum* memory) const { operator delete[](memory, std::align_val_t(64)); }
  };
  std::unique_ptr<Sum[], Delete> memory_;
  int64_t length_ = 0;
};

struct Layer {
  bool in_order;
  const SgdStretch* step;  // to be taken on it first; null: none
  Matrix matrix;
  const LayerPlan* plan;
  Number number;
  bool dense;                    // see DenseBlock
  bool wide;                     // sums in double
  bool whole_rows;               // every output reads every tap: a row has one sum
  bool depthwise;                // a 1x1 matrix for each group: taken as one row, whose columns are the groups
  bool sums_columns, sums_rows;  // what is not asked for is left out where that saves time
  int64_t segments, period;
  std::vector<int64_t> taps;  // the offsets of those taps that count
  int64_t rows_per_block, blocks_per_group, groups_per_item;
  int64_t first_item, items;

  int64_t merged_taps() const { return static_cast<int64_t>(plan->merged.size()); }
  int64_t table_length() const {
    if (!dense) return merged_taps() * padded(matrix.columns);
    return padded(matrix.row_length() + (segments > 1 ? kPadding - 1 : 0));  // segments need not begin at whole lanes
  }
  // The sum of column c and merged tap a stands in a table at c * column_step() + tap_step(a).
  int64_t column_step() const { return dense ? matrix.column_stride : 1; }
  int64_t tap_step(int32_t a) const { return dense ? taps[a] : a * padded(matrix.columns); }
  // That of row r and merged tap a at r * row_step() + row_tap(a).
  int64_t row_step() const { return dense ? segments * period : merged_taps(); }
  int64_t row_tap(int32_t a) const { return !dense ? a : segments > 1 ? taps[a] / matrix.columns : taps[a]; }
};

// Either whole groups that fit into one block, or a block of one group's rows, whose column sums are partial.
struct Item {
  Layer* layer;
  int64_t group, groups, row, rows;
  int64_t table;  // where its partial column sums go in the scratch memory of their type; -1: it is whole groups
  size_t first;   // the item with which its group begins
  Best column{}, row_best{};
};

Number number_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return Number::kFloat;
    case ScalarType::Double:
      return Number::kDouble;
    case ScalarType::Half:
      return Number::kHalf;
    case ScalarType::BFloat16:
      return Number::kBFloat16;
    default:
      STD_TORCH_CHECK(false, "convnorm: weight must be float64, float32, float16 or bfloat16");
  }
}

// As many blocks as a power of two, where that is enough rows each: so many threads end together.
int64_t rows_per_block(const Matrix& matrix) {
  const int64_t most = std::clamp(kBlockElements / std::max<int64_t>(matrix.row_length(), 1), kLeastRows, kMostRows);
  int64_t blocks = 1;
  while (blocks * most < matrix.rows) blocks *= 2;
  const int64_t rows = (matrix.rows + blocks - 1) / blocks;
  return std::min((rows + kStrands - 1) / kStrands * kStrands, matrix.rows);
}

Layer make_layer(const Tensor& weight, const LayerPlan& plan, Norms norms) {
  Layer layer{};
  Matrix& matrix = layer.matrix = as_matrix(weight, plan);
  layer.plan = &plan;
  layer.number = number_of(matrix.dtype);
  layer.wide = plan.merges || layer.number == Number::kDouble;
  layer.depthwise = matrix.groups > 1 && matrix.rows == 1 && matrix.columns == 1;
  if (layer.depthwise) {
    matrix.columns = std::exchange(matrix.groups, 1);
    matrix.column_stride = matrix.group_stride;
  }
  layer.whole_rows = plan.outputs_read_all();
  const bool taps_apart = matrix.column_stride == 1, taps_together = matrix.column_stride == matrix.taps;
  layer.dense =
      !layer.depthwise && !plan.merges && matrix.dense_rows && (layer.whole_rows || taps_apart || taps_together);
  layer.segments = layer.dense && !layer.whole_rows && taps_apart ? matrix.taps : 1;
  layer.period = layer.dense && !layer.whole_rows && !taps_apart ? matrix.taps : 1;
  const bool both = !layer.dense || layer.period > 1 || norms == Norms::kBoth;
  layer.sums_columns = both || (norms == Norms::kL1) != plan.transposed;
  layer.sums_rows = both || !layer.sums_columns;
  layer.taps.reserve(plan.taps.size());
  for (int32_t tap : plan.taps) layer.taps.push_back(matrix.tap_offsets[tap]);
  layer.rows_per_block = rows_per_block(matrix);
  layer.blocks_per_group = (matrix.rows + layer.rows_per_block - 1) / layer.rows_per_block;
  layer.groups_per_item = std::max<int64_t>(1, kBlockElements / (matrix.rows * matrix.row_length()));
  return layer;
}

// max over columns and input windows u of  sum_a u[a] * table[column, a], sixteen columns at a time
template <class Sum>
Best best_column(const Layer& layer, const Lists& windows, const Sum* table, int64_t group) {
  const int64_t step = layer.column_step(), columns = layer.matrix.columns;
  const int64_t lists = static_cast<int64_t>(windows.size());
  Best best;
  thread_local Table<double> memory;
  double* sums = memory.of_length(16 * lists);
  for (int64_t c = 0; c < columns; c += 16) {
    const int64_t lanes = std::min<int64_t>(16, columns - c);
    std::fill_n(sums, 16 * lists, 0.0);
    for (int64_t w = 0; w < lists; ++w)
      for (int32_t a : windows[w]) {
        const Sum* from = table + c * step + layer.tap_step(a);
        for (int64_t l = 0; l < lanes; ++l) sums[w * 16 + l] += from[l * step];
      }
    for (int64_t l = 0; l < lanes; ++l)
      for (int64_t w = 0; w < lists; ++w) best.offer({sums[w * 16 + l], group * columns + c + l, w});
  }
  return best;
}

// max over rows and output windows v of  sum_a v[a] * sums[row, a]
Best best_row(const Layer& layer, const double* sums, int64_t first, int64_t rows) {
  Best best;
  const Lists& windows = layer.plan->outputs;
  for (int64_t r = 0; r < rows; ++r, sums += layer.row_step()) {
    if (layer.dense && layer.whole_rows) {
      best.offer({sums[0], first + r, 0});
      continue;
    }
    for (size_t w = 0; w < windows.size(); ++w) {
      double sum = 0;
      for (int32_t a : windows[w]) sum += sums[layer.row_tap(a)];
      best.offer({sum, first + r, static_cast<int64_t>(w)});
    }
  }
  return best;
}

void accumulate(const Layer& layer, int64_t group, int64_t row, int64_t rows, void* table, double* row_sums) {
  const Matrix& matrix = layer.matrix;
  const int64_t offset = group * matrix.group_stride + row * matrix.row_stride;
  const int number = static_cast<int>(layer.number);
  const int64_t size = size_of(matrix.dtype);
  const void* data = static_cast<const char*>(matrix.data) + offset * size;
  SgdStretch step{};
  if (layer.step) step = layer.step->part(offset, rows * matrix.row_length(), size);
  const Kernels& all = kernels();
  if (layer.dense && layer.period == 1) {
    all.dense[number]({data, rows, matrix.row_stride, matrix.row_length(), layer.segments, layer.period, table,
                       row_sums, layer.step ? &step : nullptr, layer.in_order});
    return;
  }
  if (layer.step) all.sgd[layer.number == Number::kDouble](step);
  if (layer.dense)
    all.interleaved[number](
        {data, rows, matrix.row_stride, matrix.row_length(), layer.segments, layer.period, table, row_sums});
  else
    all.general[number][layer.wide]({data, rows, matrix.row_stride, matrix.columns, matrix.column_stride,
                                     static_cast<int64_t>(layer.taps.size()), layer.merged_taps(), layer.taps.data(),
                                     layer.plan->member_of.data(), layer.plan->members.data(), table, row_sums});
}

template <class Sum>
void run(Item& item, Sum* scratch) {
  const Layer& layer = *item.layer;
  const int64_t columns = layer.sums_columns ? layer.table_length() : 0;
  const int64_t rows = layer.sums_rows ? item.rows * layer.row_step() : 0;
  thread_local Table<Sum> own_memory;
  thread_local Table<double> row_memory;
  Sum* own_table = item.table < 0 ? own_memory.of_length(columns) : nullptr;
  double* row_sums = layer.sums_rows ? row_memory.of_length(rows) : nullptr;
  for (int64_t group = item.group; group < item.group + item.groups; ++group) {
    Sum* table = !layer.sums_columns ? nullptr : item.table < 0 ? own_table : scratch + item.table;
    std::fill(table, table + columns, Sum(0));
    std::fill(row_sums, row_sums + rows, 0.0);
    accumulate(layer, group, item.row, item.rows, table, row_sums);
    if (layer.sums_columns && item.table < 0) item.column.offer(best_column(layer, layer.plan->inputs, table, group));
    if (layer.depthwise)
      item.row_best.offer(best_column(layer, layer.plan->outputs, table, group));
    else if (layer.sums_rows)
      item.row_best.offer(best_row(layer, row_sums, group * layer.matrix.rows + item.row, item.rows));
  }
}

inline void combine(const float* tables, int64_t count, int64_t length, double* total) {
  kernels().combine_floats(tables, count, length, total);
}
inline void combine(const double* tables, int64_t count, int64_t length, double* total) {
  kernels().combine_doubles(tables, count, length, total);
}

// The best column of a group whose blocks have left partial sums. `first` is the first of them.
template <class Sum>
Best best_of_blocks(const Item& first, const Sum* scratch) {
  const Layer& layer = *first.layer;
  thread_local Table<double> total;
  double* sums = total.of_length(layer.table_length());
  combine(scratch + first.table, layer.blocks_per_group, layer.table_length(), sums);
  return best_column(layer, layer.plan->inputs, sums, first.group);
}

LayerNorms best_of(const Layer& layer, const Item* items) {
  Best column, row;
  for (const Item* item = items; item < items + layer.items; ++item) {
    if (item->table < 0 || item->row == 0) column.offer(item->column);
    row.offer(item->row_best);
  }
  return layer.plan->transposed ? LayerNorms{row, column} : LayerNorms{column, row};
}

// Runs all items, the larger part of a call. Threads take them off one queue, since they differ in size. Who ends the
// last block of a group finds its best column, and who ends the last item of a layer its norms.
void run_all(std::vector<Layer>& layers, std::vector<Item>& items, float* float_tables, double* double_tables,
             bool parallel, const Take& take) {
  std::atomic<size_t> next{0};
  std::vector<std::atomic<int64_t>> ended(items.size() + layers.size());  // blocks of the group that begins there
  std::atomic<int64_t>* ended_of = ended.data() + items.size();           // items of each layer
  auto work = [&](int64_t, int64_t) {
    for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < items.size();) {
      Item& item = items[i];
      const Layer& layer = *item.layer;
      layer.wide ? run(item, double_tables) : run(item, float_tables);
      if (item.table >= 0 && layer.sums_columns && ++ended[item.first] == layer.blocks_per_group) {
        Item& first = items[item.first];
        first.column = layer.wide ? best_of_blocks(first, double_tables) : best_of_blocks(first, float_tables);
      }
      const int64_t number = item.layer - layers.data();
      if (++ended_of[number] == layer.items) take(number, best_of(layer, &items[layer.first_item]));
    }
  };
  if (parallel && items.size() > 1)
    torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1, work);
  else
    work(0, 1);
}

void measure(const std::vector<Tensor>& weights, const Plan& plan, Norms norms, const Take& take, bool in_order,
             const SgdStretch* steps) {
  std::vector<Layer> layers;
  std::vector<Item> items;
  layers.reserve(weights.size());
  int64_t elements = 0, floats = 0, doubles = 0;  // the last two: of tables of partial sums
  for (size_t i = 0; i < weights.size(); ++i) {
    layers.push_back(make_layer(weights[i], plan[i], norms));
    Layer& layer = layers.back();
    layer.in_order = in_order;
    layer.step = steps ? steps + i : nullptr;
    const Matrix& matrix = layer.matrix;
    elements += matrix.groups * matrix.rows * matrix.row_length();
    layer.first_item = static_cast<int64_t>(items.size());
    if (layer.blocks_per_group == 1) {
      for (int64_t g = 0; g < matrix.groups; g += layer.groups_per_item)
        items.push_back({&layer, g, std::min(layer.groups_per_item, matrix.groups - g), 0, matrix.rows, -1, 0});
      layer.items = static_cast<int64_t>(items.size()) - layer.first_item;
      continue;
    }
    int64_t& end = layer.wide ? doubles : floats;
    for (int64_t g = 0; g < matrix.groups; ++g) {
      const size_t first = items.size();
      for (int64_t r = 0; r < matrix.rows; r += layer.rows_per_block) {
        items.push_back({&layer, g, 1, r, std::min(layer.rows_per_block, matrix.rows - r), end, first});
        if (layer.sums_columns) end += layer.table_length();
      }
    }
    layer.items = static_cast<int64_t>(items.size()) - layer.first_item;
  }

  thread_local Table<float> float_memory;  // stays: new pages on every call would cost more than the sums
  thread_local Table<double> double_memory;
  run_all(layers, items, float_memory.of_length(floats), double_memory.of_length(doubles), elements > kParallelElements,
          take);
}

}  // namespace

void measure(const std::vector<Tensor>& weights, const Plan& plan, Norms norms, const Take& take) {
  measure(weights, plan, norms, take, false, nullptr);
}
void measure_in_order(const std::vector<Tensor>& weights, const Plan& plan, Norms norms, const Take& take,
                      const SgdStretch* steps) {
  measure(weights, plan, norms, take, true, steps);
}

namespace {

std::tuple<Tensor, Tensor, Tensor> measure_cpu(const std::vector<Tensor>& weights, const std::string& text) {
  const auto plan = read_plan(text);
  Result result = new_result(weights, *plan);
  auto* winners = static_cast<int64_t*>(result.winners.mutable_data_ptr());
  measure(weights, *plan, Norms::kBoth, [&](int64_t layer, const LayerNorms& norms) {
    write_number(result.l1, layer, norms.l1.value);
    write_number(result.linf, layer, norms.linf.value);
    const int64_t places[] = {norms.l1.channel, norms.l1.window, norms.linf.channel, norms.linf.window};
    std::copy_n(places, 4, winners + 4 * layer);
  });
  return {result.l1, result.linf, result.winners};
}

std::tuple<Tensor, Tensor> norms_cpu(const Tensor& weight, const std::string& text) {
  const auto plan = read_plan(text);
  STD_TORCH_CHECK(plan->size() == 1, "convnorm: the plan is of other weights");
  const std::vector<Tensor> weights(1, weight);
  const int32_t dtype = sums_dtype(weights);
  Tensor l1 = new_tensor(weight, {}, dtype), linf = new_tensor(weight, {}, dtype);
  measure(weights, *plan, Norms::kBoth, [&](int64_t, const LayerNorms& norms) {
    write_number(l1, 0, norms.l1.value);
    write_number(linf, 0, norms.linf.value);
  });
  return {l1, linf};
}

}  // namespace
}  // namespace convnorm

STABLE_TORCH_LIBRARY_IMPL(convnorm, CPU, m) {
  m.impl("measure_native", TORCH_BOX(&convnorm::measure_cpu));
  m.impl("norms_native", TORCH_BOX(&convnorm::norms_cpu));
}
