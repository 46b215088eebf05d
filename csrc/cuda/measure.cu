// measure_native on CUDA: at most two launches for all layers of one dtype, and nothing that a graph could not capture:
// no synchronisation, no copies (all that the kernels need to know travels as their argument), no memory but PyTorch's.
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include "measure.h"

namespace convnorm::cuda {
namespace {

void check(cudaError_t code, const char* what) {
  STD_TORCH_CHECK(code == cudaSuccess, "convnorm: ", what, " failed: ", cudaGetErrorString(code));
}

// Makes a device current, and afterwards again the one that was.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    changes_ = before_ != device;
    if (changes_) check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceGuard() {
    if (changes_) (void)cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changes_ = false;
};

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

// PyTorch's current stream. The function stands in libtorch_cuda, which this library cannot name, since it serves a
// PyTorch without CUDA as well; nor would a weak symbol find it, since Python loads PyTorch's libraries RTLD_LOCAL.
cudaStream_t current_stream(int device) {
  using Find = AOTITorchError (*)(int32_t, void**);
  static const auto find = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Find>(dlsym(library ? library : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
  }();
  STD_TORCH_CHECK(find, "convnorm: aoti_torch_get_current_cuda_stream is not found in libtorch_cuda.so");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(find(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

class Stream {
 public:
  explicit Stream(int device)
      : stream_(current_stream(device)), overlaps_(attribute(cudaDevAttrComputeCapabilityMajor, device) >= 9) {}

  // The caching allocator gives memory out again in the order of the stream: it may be freed right after a launch.
  static Tensor allocate(const Tensor& like, int64_t bytes) {
    return new_tensor(like, {(bytes + 7) / 8}, aoti_torch_dtype_int64());
  }

  template <int kSize>
  void launch(void (*kernel)(Network<kSize>), int blocks, int threads, Network<kSize>& network, bool follows) const {
    // See await_previous_kernel(): all that the second kernel does before it is done in the shadow of the first.
    cudaLaunchAttribute overlap{};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.stream = stream_;
    config.attrs = &overlap;
    config.numAttrs = follows && overlaps_ ? 1 : 0;
    void* arguments[] = {&network};
    check(cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), arguments), "launching a kernel");
  }

 private:
  const cudaStream_t stream_;
  const bool overlaps_;
};

Measured measure_cuda(std::vector<Tensor> weights, std::vector<int64_t> plan, std::vector<int64_t> shape) {
  STD_TORCH_CHECK(!weights.empty(), "convnorm: weights [] is empty");
  const int32_t device = weights[0].get_device_index();
  for (const Tensor& weight : weights)
    STD_TORCH_CHECK(weight.is_cuda() && weight.get_device_index() == device, "convnorm: weights must be on one device");
  const DeviceGuard guard(device);
  const Stream stream(device);
  const Cut cut{kTileBlocks * attribute(cudaDevAttrMultiProcessorCount, device)};
  return measure(weights, plan, shape, cut, stream);
}

}  // namespace
}  // namespace convnorm::cuda

STABLE_TORCH_LIBRARY_IMPL(convnorm, CUDA, m) {
  m.impl("measure_native", TORCH_BOX(&convnorm::cuda::measure_cuda));
}
