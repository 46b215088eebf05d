// measure_native and decay_native as a GPU does them, with the kernels run by the emulator: for the tests of machines
// that have no GPU.
//
//     convnorm_emulated::measure(Tensor[] weights, str plan, int[] cut) -> (l1, linf, winners)
//     convnorm_emulated::decay(... as decay_native, int[] cut, int[] term_cut) -> ()
//     convnorm_emulated::work() -> int[]    launches, and bytes of scratch memory, since it was last asked
//
// The scratch memory is filled with NaN before it is used, and ends where a page begins that nobody may touch.
#include <sys/mman.h>
#include <torch/csrc/stable/library.h>  // before the next line, which it would understand otherwise
#include <unistd.h>
#define __CUDA_ARCH__ 900

#include "emulator.h"
// (the kernels come after the language they are written in)
#include "cuda/decay.h"
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

// Launches are left waiting until it is known that no other follows. All that they use is held until then.
class EmulatedDevice {
 public:
  EmulatedDevice() = default;
  ~EmulatedDevice() { finish(); }
  EmulatedDevice(const EmulatedDevice&) = delete;
  EmulatedDevice& operator=(const EmulatedDevice&) = delete;

  struct Scratch {
    void* data;
    void* mutable_data_ptr() const { return data; }
  };
  Scratch allocate(const Tensor&, int64_t bytes) const {
    scratch_bytes += bytes;
    memory_.push_back(std::make_unique<GuardedMemory>(bytes));
    return {memory_.back()->mutable_data_ptr()};
  }

  template <class Argument>
  void launch(void (*kernel)(Argument), int blocks, int threads, const Argument& argument, bool follows) const {
    ++launches;
    if (!follows) finish();
    std::vector<unsigned> order(static_cast<size_t>(blocks));
    for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<unsigned>(i);
    std::shuffle(order.begin(), order.end(), std::minstd_rand(static_cast<unsigned>(launches)));
    waiting_ = [=, awaited = std::exchange(waiting_, nullptr)] {
      emulator::Block::launch(order, static_cast<unsigned>(threads), [&] { kernel(argument); }, awaited);
    };
  }

  void hold(const Result& result) { results_.push_back(result); }

 private:
  void finish() const {
    if (waiting_) std::exchange(waiting_, nullptr)();
  }

  mutable std::function<void()> waiting_;
  mutable std::vector<std::unique_ptr<GuardedMemory>> memory_;
  std::vector<Result> results_;
};

Measured measure_emulated(std::vector<Tensor> weights, std::string plan, std::vector<int64_t> cut) {
  const EmulatedDevice device;
  return measure(weights, plan, Cut{cut.at(0), cut.at(1)}, device);
}

void decay_emulated(std::vector<Tensor> weights, std::vector<Tensor> grads, Tensor norms, Tensor winners, Tensor signs,
                    Tensor channels, Tensor clock, Tensor rates, double momentum, std::string plan, bool linf,
                    bool measured, std::vector<int64_t> cut, std::vector<int64_t> term_cut) {
  EmulatedDevice device;
  const State state{norms, winners, signs, channels, clock, rates, momentum, linf};
  const auto measure = [&](const std::vector<Tensor>& layers, const Plan& windows, const Result& result) {
    device.hold(result);
    return measure_batches(layers, windows, result, Cut{cut.at(0), cut.at(1)}, device);
  };
  decay(weights, grads, state, measured, plan, TermCut{term_cut.at(0), term_cut.at(1)}, measure, device);
}

std::vector<int64_t> work_emulated() {
  return {std::exchange(launches, 0), std::exchange(scratch_bytes, 0)};
}

}  // namespace
}  // namespace convnorm::cuda

STABLE_TORCH_LIBRARY(convnorm_emulated, m) {
  m.def("measure(Tensor[] weights, str plan, int[] cut) -> (Tensor l1, Tensor linf, Tensor winners)");
  m.def(
      "decay(Tensor[] weights, Tensor(a!)[] grads, Tensor(b!) norms, Tensor(c!) winners, Tensor(d!) signs, "
      "Tensor(e!) channels, Tensor(f!) clock, Tensor rates, float momentum, str plan, bool linf, bool measured, "
      "int[] cut, int[] term_cut) -> ()");
  m.def("work() -> int[]");
}
STABLE_TORCH_LIBRARY_IMPL(convnorm_emulated, CompositeExplicitAutograd, m) {
  m.impl("measure", TORCH_BOX(&convnorm::cuda::measure_emulated));
  m.impl("decay", TORCH_BOX(&convnorm::cuda::decay_emulated));
  m.impl("work", TORCH_BOX(&convnorm::cuda::work_emulated));
}
