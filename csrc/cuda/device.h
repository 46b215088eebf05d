// The `Device` of measure.h and decay.h: a GPU, and PyTorch's current stream on it.
#pragma once

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "../matrix.h"

namespace convnorm::cuda {

inline void check(cudaError_t code, const char* what) {
  STD_TORCH_CHECK(code == cudaSuccess, "convnorm: ", what, " failed: ", cudaGetErrorString(code));
}

// Makes a device current, and afterwards again the one that was. PyTorch's: to set a device that has none yet makes a
// context on it, of hundreds of megabytes, and the device that was may be such a one.
using torch::stable::accelerator::DeviceGuard;

inline int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

// PyTorch's current stream. The function stands in libtorch_cuda, which this library cannot name, since it serves a
// PyTorch without CUDA as well; nor would a weak symbol find it, since Python loads PyTorch's libraries RTLD_LOCAL.
inline cudaStream_t current_stream(int device) {
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
      : stream_(current_stream(device)),
        processors_(attribute(cudaDevAttrMultiProcessorCount, device)),
        overlaps_(attribute(cudaDevAttrComputeCapabilityMajor, device) >= 9) {}

  int processors() const { return processors_; }

  // The caching allocator gives memory out again in the order of the stream: it may be freed right after a launch.
  static Tensor allocate(const Tensor& like, int64_t bytes) {
    return new_tensor(like, {(bytes + 7) / 8}, aoti_torch_dtype_int64());
  }

  template <class Argument>
  void launch(void (*kernel)(Argument), int blocks, int threads, Argument& argument, bool follows) const {
    // See await_previous_kernel(): all that a kernel does before it is done in the shadow of the one that it follows.
    cudaLaunchAttribute overlap{};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.stream = stream_;
    config.attrs = &overlap;
    config.numAttrs = follows && overlaps_ ? 1 : 0;
    void* arguments[] = {&argument};
    check(cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), arguments), "launching a kernel");
  }

 private:
  const cudaStream_t stream_;
  const int processors_;
  const bool overlaps_;
};

// Where all of them are.
inline int32_t device_of(const std::vector<Tensor>& tensors) {
  STD_TORCH_CHECK(!tensors.empty(), "convnorm: weights [] is empty");
  const int32_t device = tensors[0].get_device_index();
  for (const Tensor& tensor : tensors)
    STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == device,
                    "convnorm: weights, and what belongs to them, must be on one device");
  return device;
}

// measure_batches() of measure.h: in measure.cu, so that its kernels are compiled once.
bool measure_on(const Stream& stream, const std::vector<Tensor>& weights, const Plan& plan, const Result& result);

}  // namespace convnorm::cuda
