// decay_native on CUDA: as measure.cu, and one launch more.
#include "decay.h"
#include "device.h"

namespace convnorm::cuda {
namespace {

void decay_cuda(const std::vector<Tensor>& weights, const std::vector<Tensor>& grads, const Tensor& norms,
                const Tensor& winners, const Tensor& signs, const Tensor& channels, const Tensor& clock,
                const Tensor& rates, double momentum, const std::string& plan, bool linf, bool measured) {
  const State state{norms, winners, signs, channels, clock, rates, momentum, linf};
  std::vector<Tensor> all{norms, winners, signs, channels, clock, rates};
  all.insert(all.end(), weights.begin(), weights.end());
  for (const Tensor& grad : grads)
    if (grad.numel() > 0) all.push_back(grad);
  const int32_t device = device_of(all);
  const DeviceGuard guard(device);
  const Stream stream(device);
  const auto measure = [&](const auto&... network) { return measure_on(stream, network...); };
  decay(weights, grads, state, measured, plan, TermCut{kTermBlocks * stream.processors()}, measure, stream);
}

}  // namespace
}  // namespace convnorm::cuda

STABLE_TORCH_LIBRARY_IMPL(convnorm, CUDA, m) {
  m.impl("decay_native", TORCH_BOX(&convnorm::cuda::decay_cuda));
}
