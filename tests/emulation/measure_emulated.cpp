// measure_native as a GPU does it, with the kernels run by the emulator: for the tests of machines that have no GPU.
//
//     convnorm_emulated::measure(Tensor[] weights, int[] plan, int[] shape, int[] cut) -> (l1, linf, winners)
//     convnorm_emulated::work() -> int[]    launches, and bytes of scratch memory, since it was last asked
//
// The scratch memory is filled with NaN before it is used, and ends where a page begins that nobody may touch.
#include <sys/mman.h>
#include <unistd.h>

#include "emulator.h"
// (the kernels come after the language they are written in)
#include "cuda/measure.h"

namespace convnorm::cuda {
namespace {

int64_t launches = 0, scratch_bytes = 0;

class GuardedMemory {
 public:
  explicit GuardedMemory(int64_t bytes) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), used = static_cast<size_t>(aligned(bytes));
    size_ = (used + page - 1) / page * page + page;
    void* mapped = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    STD_TORCH_CHECK(mapped != MAP_FAILED, "mmap failed");
    memory_ = static_cast<char*>(mapped);
    STD_TORCH_CHECK(mprotect(memory_ + size_ - page, page, PROT_NONE) == 0, "mprotect failed");
    std::memset(memory_, 0xff, size_ - page);
    data_ = memory_ + size_ - page - used;
  }
  ~GuardedMemory() { munmap(memory_, size_); }
  GuardedMemory(const GuardedMemory&) = delete;
  GuardedMemory& operator=(const GuardedMemory&) = delete;
  void* mutable_data_ptr() const { return data_; }

 private:
  static int64_t aligned(int64_t bytes) { return (bytes + 15) / 16 * 16; }
  char *memory_, *data_;
  size_t size_;
};

struct EmulatedDevice {
  static GuardedMemory allocate(const Tensor&, int64_t bytes) {
    scratch_bytes += bytes;
    return GuardedMemory(bytes);
  }

  template <int kSize>
  void launch(void (*kernel)(Network<kSize>), int blocks, int threads, const Network<kSize>& network, bool) const {
    ++launches;
    std::vector<unsigned> order(static_cast<size_t>(blocks));
    for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<unsigned>(i);
    std::shuffle(order.begin(), order.end(), std::minstd_rand(static_cast<unsigned>(launches)));
    for (unsigned block : order)
      emulator::Block::current().run(block, static_cast<unsigned>(threads), [&] { kernel(network); });
  }
};

Measured measure_emulated(std::vector<Tensor> weights, std::vector<int64_t> plan, std::vector<int64_t> shape,
                          std::vector<int64_t> cut) {
  const EmulatedDevice device{};
  return measure(weights, plan, shape, Cut{cut.at(0), cut.at(1)}, device);
}

std::vector<int64_t> work_emulated() {
  return {std::exchange(launches, 0), std::exchange(scratch_bytes, 0)};
}

}  // namespace
}  // namespace convnorm::cuda

STABLE_TORCH_LIBRARY(convnorm_emulated, m) {
  m.def("measure(Tensor[] weights, int[] plan, int[] shape, int[] cut) -> (Tensor l1, Tensor linf, Tensor winners)");
  m.def("work() -> int[]");
}
STABLE_TORCH_LIBRARY_IMPL(convnorm_emulated, CompositeExplicitAutograd, m) {
  m.impl("measure", TORCH_BOX(&convnorm::cuda::measure_emulated));
  m.impl("work", TORCH_BOX(&convnorm::cuda::work_emulated));
}
