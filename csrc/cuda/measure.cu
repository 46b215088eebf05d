// measure_native on CUDA: at most two launches for all layers of one dtype, and nothing that a graph could not capture:
// no synchronisation, no copies (all that the kernels need to know travels as their argument), no memory but PyTorch's.
#include <torch/csrc/stable/ops.h>

#include "device.h"
#include "measure.h"

namespace convnorm::cuda {

bool measure_on(const Stream& stream, const std::vector<Tensor>& weights, const Plan& plan, const Result& result) {
  return measure_batches(weights, plan, result, Cut{kTileBlocks * stream.processors()}, stream);
}

namespace {

Measured measure_cuda(const std::vector<Tensor>& weights, const std::string& plan) {
  const int32_t device = device_of(weights);
  const DeviceGuard guard(device);
  const Stream stream(device);
  return measure(weights, plan, Cut{kTileBlocks * stream.processors()}, stream);
}

std::tuple<Tensor, Tensor> norms_cuda(const Tensor& weight, const std::string& plan) {
  const auto [l1, linf, winners] = measure_cuda({weight}, plan);
  return {torch::stable::squeeze(l1, 0), torch::stable::squeeze(linf, 0)};
}

}  // namespace
}  // namespace convnorm::cuda

STABLE_TORCH_LIBRARY_IMPL(convnorm, CUDA, m) {
  m.impl("measure_native", TORCH_BOX(&convnorm::cuda::measure_cuda));
  m.impl("norms_native", TORCH_BOX(&convnorm::cuda::norms_cuda));
}
