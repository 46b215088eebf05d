// measure_native on a GPU, but for the launching itself, which is left to a `Device`:
//
//     allocate(like, bytes)                               scratch memory, until the returned tensor is gone
//     launch(kernel, blocks, threads, argument, follows)  `follows`: the launch before it left something for this one
#pragma once

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "batch.h"
#include "winners.h"

namespace convnorm::cuda {

using Measured = std::tuple<Tensor, Tensor, Tensor>;

inline Measured as_tuple(const Result& result) {
  return {result.l1, result.linf, result.winners};
}

// Plain PyTorch, for layers with so many windows that they do not fit into the argument of a kernel.
inline Measured measure_reference(const std::vector<Tensor>& weights, const std::string& plan) {
  namespace stable = torch::stable::detail;
  std::array<StableIValue, 3> stack{stable::from(weights), stable::from(plan)};  // two arguments, three results
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("convnorm::measure_reference", "", stack.data(), TORCH_ABI_VERSION));
  return {stable::to<Tensor>(stack[0]), stable::to<Tensor>(stack[1]), stable::to<Tensor>(stack[2])};
}

// None where a layer is too much for the kernels.
inline std::optional<std::vector<Batch>> batches_of(const std::vector<Tensor>& weights, const Plan& plan,
                                                    const Cut& cut) {
  std::vector<Batch> batches;
  std::map<ScalarType, size_t> open;  // the batch of each dtype that has room left
  for (size_t i = 0; i < weights.size(); ++i) {
    const auto described = describe(as_matrix(weights[i], plan[i]), plan[i], static_cast<int32_t>(i));
    if (!described) return std::nullopt;
    const auto known = open.find(described->dtype);
    if (known != open.end() && batches[known->second].add(*described)) continue;
    open[described->dtype] = batches.size();
    batches.emplace_back(described->dtype);
    if (!batches.back().add(*described)) return std::nullopt;
  }
  for (Batch& batch : batches) batch.cut(cut);
  return batches;
}

template <class Weight, int kSize, class Device>
void measure_batch(const Batch& batch, const Result& result, const Device& device) {
  Network<kSize> network;
  batch.pack(network);
  const auto scratch = device.allocate(result.l1, batch.scratch_bytes());
  network.scratch = static_cast<char*>(scratch.mutable_data_ptr());
  network.norms[0] = result.l1.mutable_data_ptr();
  network.norms[1] = result.linf.mutable_data_ptr();
  network.winners = static_cast<int64_t*>(result.winners.mutable_data_ptr());
  network.norms_double = result.l1.scalar_type() == ScalarType::Double;
  const bool two_stages = batch.tiles() > 0 || batch.compares_parts();
  if (two_stages)
    device.launch(sum_tiles_kernel<Weight, kSize>, std::max(1, batch.tiles()), kTileThreads, network, false);
  device.launch(find_winners_kernel<Weight, kSize>, batch.parts(), kWinnerThreads, network, two_stages);
}

template <class Weight, class Device>
void measure_batch(const Batch& batch, const Result& result, const Device& device) {
  if (batch.fits<kSmallNetwork>())
    measure_batch<Weight, kSmallNetwork>(batch, result, device);
  else
    measure_batch<Weight, kLargeNetwork>(batch, result, device);
}

// False, and nothing is measured, where a layer is too much for the kernels.
template <class Device>
bool measure_batches(const std::vector<Tensor>& weights, const Plan& plan, const Result& result, const Cut& cut,
                     const Device& device) {
  const auto batches = batches_of(weights, plan, cut);
  if (!batches) return false;
  for (const Batch& batch : *batches) switch (batch.dtype) {
      case ScalarType::Float:
        measure_batch<float>(batch, result, device);
        break;
      case ScalarType::Double:
        measure_batch<double>(batch, result, device);
        break;
      case ScalarType::Half:
        measure_batch<torch::headeronly::Half>(batch, result, device);
        break;
      case ScalarType::BFloat16:
        measure_batch<torch::headeronly::BFloat16>(batch, result, device);
        break;
      default:
        STD_TORCH_CHECK(false, "convnorm: weight must be float64, float32, float16 or bfloat16");
    }
  return true;
}

template <class Device>
Measured measure(const std::vector<Tensor>& weights, const std::string& text, const Cut& cut, const Device& device) {
  const auto plan = read_plan(text);
  const Result result = new_result(weights, *plan);
  return measure_batches(weights, *plan, result, cut, device) ? as_tuple(result) : measure_reference(weights, text);
}

}  // namespace convnorm::cuda
