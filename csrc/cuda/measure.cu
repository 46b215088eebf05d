// measure_native on CUDA: at most two launches for all layers of one dtype, and nothing that a graph could not capture:
// no synchronisation, no copies (all that the kernels need to know travels as their argument), no memory but PyTorch's.
#include "device.h"
#include "measure.h"

namespace convnorm::cuda {

bool measure_on(const Stream& stream, const std::vector<Tensor>& weights, const Plan& plan, const Result& result) {
  return measure_batches(weights, plan, result, Cut{kTileBlocks * stream.processors()}, stream);
}

namespace {

Measured measure_cuda(std::vector<Tensor> weights, std::vector<int64_t> plan, std::vector<int64_t> shape) {
  const int32_t device = device_of(weights);
  const DeviceGuard guard(device);
  const Stream stream(device);
  return measure(weights, plan, shape, Cut{kTileBlocks * stream.processors()}, stream);
}

}  // namespace
}  // namespace convnorm::cuda

STABLE_TORCH_LIBRARY_IMPL(convnorm, CUDA, m) {
  m.impl("measure_native", TORCH_BOX(&convnorm::cuda::measure_cuda));
}
