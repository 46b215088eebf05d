// A layer's windows, read from the integers that convnorm/plan.py writes. The theory behind them stands in
// convnorm/geometry.py; here the axes are only multiplied out into what a kernel sums over.
#pragma once

#include <charconv>
#include <cstdint>
#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace convnorm {

constexpr int64_t kMostAxes = 3;

using Lists = std::vector<std::vector<int32_t>>;

struct LayerPlan {
  int64_t groups;
  bool transposed;
  std::vector<int64_t> kernel;  // taps of each axis; a tap of the layer is their row-major index
  Lists merged;                 // the taps of each merged tap that some window counts
  Lists inputs;                 // windows: the merged taps (indices into `merged`), each as often as it counts
  Lists outputs;
  bool merges;                              // some merged tap is more than one tap
  std::vector<int32_t> taps;                // those that count
  std::vector<int64_t> members, member_of;  // merged tap a has taps[members[i]] for i from member_of[a] to [a + 1]

  // Every output reads every tap once: a row's absolute sum needs no telling taps apart.
  bool outputs_read_all() const {
    int64_t taps = 1;
    for (int64_t k : kernel) taps *= k;
    return !merges && outputs.size() == 1 && static_cast<int64_t>(outputs[0].size()) == taps;
  }
};

// Reads one layer after another. Numbers that name what does not exist are refused, so that no kernel leaves a table.
class PlanReader {
 public:
  explicit PlanReader(const std::string& text) {
    const char* at = text.data();
    for (const char* end = at + text.size(); at != end;) {
      if (*at == ' ' || *at == '\n') {
        ++at;
        continue;
      }
      const auto [rest, error] = std::from_chars(at, end, numbers_.emplace_back());
      if (error != std::errc()) throw std::runtime_error("convnorm: plan is no list of integers");
      at = rest;
    }
  }

  bool done() const { return at_ == numbers_.size(); }

  LayerPlan layer() {
    LayerPlan plan{};
    plan.groups = next();
    plan.transposed = next() != 0;
    plan.merged = plan.inputs = plan.outputs = {{0}};
    const int64_t axes = below(kMostAxes + 1, next());
    int64_t layer_taps = 1;
    for (int64_t i = 0; i < axes; ++i) {
      const int64_t taps = below(kMostTaps, next());
      if ((layer_taps *= taps) >= kMostTaps) below(0, taps);
      Lists merged = lists(taps);
      if (merged.empty())
        for (int32_t tap = 0; tap < taps; ++tap) merged.push_back({tap});
      const int64_t merged_taps = static_cast<int64_t>(merged.size());
      plan.kernel.push_back(taps);
      plan.merged = product(plan.merged, merged, taps);
      plan.inputs = product(plan.inputs, windows(merged_taps), merged_taps);
      plan.outputs = product(plan.outputs, windows(merged_taps), merged_taps);
    }
    drop_uncounted(plan);
    number_taps(plan, layer_taps);
    return plan;
  }

 private:
  int64_t next() {
    if (done()) throw std::runtime_error("convnorm: plan ends too early");
    return numbers_[at_++];
  }
  static constexpr int64_t kMostTaps = int64_t{1} << 26;  // as convnorm/geometry.py has it
  static int64_t below(int64_t limit, int64_t number) {
    if (number < 0 || number >= limit) throw std::runtime_error("convnorm: plan names what does not exist");
    return number;
  }
  Lists lists(int64_t limit) {
    const int64_t left = static_cast<int64_t>(numbers_.size()) + 1;
    Lists read(below(left, next()));
    for (auto& one : read) {
      one.resize(below(left, next()));
      for (int32_t& number : one) number = static_cast<int32_t>(below(limit, next()));
    }
    return read;
  }
  Lists windows(int64_t limit) {
    Lists read = lists(limit);
    if (!read.empty()) return read;
    std::vector<int32_t> all_once(limit);
    std::iota(all_once.begin(), all_once.end(), 0);
    return {all_once};
  }
  static Lists product(const Lists& slow, const Lists& fast, int64_t fast_size) {
    Lists all;
    for (const auto& one : slow)
      for (const auto& other : fast) {
        all.emplace_back();
        for (int32_t i : one)
          for (int32_t j : other) all.back().push_back(i * static_cast<int32_t>(fast_size) + j);
      }
    return all;
  }
  static void number_taps(LayerPlan& plan, int64_t layer_taps) {
    std::vector<int64_t> number(layer_taps, -1);
    plan.member_of.push_back(0);
    for (const auto& merged : plan.merged) {
      if (merged.empty()) below(0, 0);
      plan.merges |= merged.size() > 1 || number[merged[0]] >= 0;  // of taps that merge none each stands once
      for (int32_t tap : merged) {
        if (number[tap] < 0) {
          number[tap] = static_cast<int64_t>(plan.taps.size());
          plan.taps.push_back(tap);
        }
        plan.members.push_back(number[tap]);
      }
      plan.member_of.push_back(static_cast<int64_t>(plan.members.size()));
    }
  }
  static void drop_uncounted(LayerPlan& plan) {
    std::vector<int32_t> kept(plan.merged.size(), -1);
    for (const Lists* side : {&plan.inputs, &plan.outputs})
      for (const auto& window : *side)
        for (int32_t a : window) kept[a] = 0;
    Lists merged;
    for (size_t a = 0; a < kept.size(); ++a)
      if (kept[a] == 0) {
        kept[a] = static_cast<int32_t>(merged.size());
        merged.push_back(std::move(plan.merged[a]));
      }
    plan.merged = std::move(merged);
    for (Lists* side : {&plan.inputs, &plan.outputs})
      for (auto& window : *side)
        for (int32_t& a : window) a = kept[a];
  }

  std::vector<int64_t> numbers_;
  size_t at_ = 0;
};

using Plan = std::vector<LayerPlan>;

// The layers of a plan. Networks are measured again and again: what was read stays, for as many plans as a process
// could have use for.
inline std::shared_ptr<const Plan> read_plan(const std::string& text) {
  static std::mutex mutex;
  static std::unordered_map<std::string, std::shared_ptr<const Plan>> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(text);
  if (found != known.end()) return found->second;
  auto plan = std::make_shared<Plan>();
  for (PlanReader reader(text); !reader.done();) plan->push_back(reader.layer());
  if (known.size() >= 1024) known.clear();
  return known.emplace(text, std::move(plan)).first->second;
}

}  // namespace convnorm
