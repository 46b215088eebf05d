// Enough of CUDA to run these kernels, as they are, on the CPU: one block after another, each thread a fiber.
//
// A kernel that may begin before the one it follows is done does so: that one runs when all threads of a block wait for
// it, and not before. So what was read too early, or written, shows.
//
// Fibers change hands only where threads wait for one another, at __syncthreads() and at shuffles, and which of them
// goes on next is random: so a missing barrier shows sooner or later. Shuffles want all lanes of a warp, a barrier all
// threads that have not returned; where they wait forever, the emulator says so.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

struct uint4 {
  unsigned x, y, z, w;
};
struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx;

using std::min;

namespace emulator {

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 256 << 10;

class Block {
 public:
  // One for each of the kernels that have begun: the last runs.
  static Block& current() {
    while (all().size() <= depth()) all().push_back(std::make_unique<Block>());
    return *all()[depth()];
  }

  // `awaited` leaves behind what the blocks wait for with cudaGridDependencySynchronize().
  static void launch(const std::vector<unsigned>& blocks, unsigned threads, const std::function<void()>& kernel,
                     std::function<void()> awaited) {
    current().awaited_ = std::move(awaited);
    for (unsigned block : blocks) current().run(block, threads, kernel);
    current().run_awaited();
  }

  void run(unsigned block, unsigned threads, const std::function<void()>& kernel) {
    kernel_ = &kernel;
    blockIdx.x = block;
    while (fibers_.size() < threads) fibers_.push_back(std::make_unique<Fiber>());
    live_ = threads;
    waiting_ = 0;
    warps_.assign((threads + kWarp - 1) / kWarp, {});
    for (Warp& warp : warps_) warp.pace = random_() % 4 ? 1 : 8;
    order_.clear();
    for (unsigned i = 0; i < threads; ++i) order_.push_back(i);
    for (unsigned i = 0; i < threads; ++i) start(i);
    std::shuffle(order_.begin(), order_.end(), random_);
    while (live_ > 0) {
      bool ready = false;
      for (unsigned i : order_)
        if (fibers_[i]->state == State::kReady) {
          ready = true;
          if (random_() % warps_[i / kWarp].pace == 0) resume(i);
        }
      if (ready) continue;
      if (!awaited_) stuck("threads wait for others that never come");
      run_awaited();
      blockIdx.x = block;
      for (unsigned i : order_)
        if (fibers_[i]->state == State::kAtAwait) fibers_[i]->state = State::kReady;
    }
  }

  void await() {
    if (awaited_) suspend(State::kAtAwait);
  }

  void barrier() {
    if (++waiting_ == live_)
      release_block();
    else
      suspend(State::kAtBarrier);
  }

  // All lanes of the warp bring a number, and each takes that of another.
  template <class Number>
  Number shuffle(unsigned mask, Number number, unsigned lane_xor) {
    static_assert(sizeof(Number) <= sizeof(uint64_t));
    if (mask != 0xffffffff) stuck("a shuffle without all lanes");
    Warp& warp = warps_[threadIdx.x / kWarp];
    const unsigned lane = threadIdx.x % kWarp;
    auto& numbers = warp.numbers[fibers_[threadIdx.x]->shuffles++ % 2];
    std::memcpy(&numbers[lane], &number, sizeof number);
    if (++warp.arrived == kWarp) {
      warp.arrived = 0;
      for (unsigned i = threadIdx.x - lane; i < threadIdx.x - lane + kWarp; ++i)
        if (fibers_[i]->state == State::kAtShuffle) fibers_[i]->state = State::kReady;
    } else {
      suspend(State::kAtShuffle);
    }
    std::memcpy(&number, &numbers[lane ^ lane_xor], sizeof number);
    return number;
  }

 private:
  enum class State { kReady, kAtBarrier, kAtShuffle, kAtAwait, kDone };
  struct Fiber {
    State state;
    unsigned shuffles;
    bool begun;
    jmp_buf place;
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStack]};
  };
  struct Warp {
    unsigned arrived = 0, pace = 1;  // how many times slower than the fastest
    uint64_t numbers[2][kWarp];      // by turns: no lane is two shuffles ahead of another
  };

  static std::vector<std::unique_ptr<Block>>& all() {
    static std::vector<std::unique_ptr<Block>> blocks;
    return blocks;
  }
  static size_t& depth() {
    static size_t depth = 0;
    return depth;
  }

  void run_awaited() {
    const std::function<void()> awaited = std::exchange(awaited_, nullptr);
    if (!awaited) return;
    ++depth();
    awaited();
    --depth();
  }

  void start(unsigned i) {
    Fiber& fiber = *fibers_[i];
    fiber.state = State::kReady;
    fiber.shuffles = 0;
    fiber.begun = false;
  }

  void resume(unsigned i) {
    Fiber& fiber = *fibers_[i];
    threadIdx.x = i;
    if (_setjmp(scheduler_)) return;
    if (fiber.begun) _longjmp(fiber.place, 1);
    fiber.begun = true;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &Block::enter, 0);
    setcontext(&fiber.context);
  }

  static void enter() {
    Block& block = current();
    (*block.kernel_)();
    block.fibers_[threadIdx.x]->state = State::kDone;
    if (--block.live_ > 0 && block.waiting_ == block.live_) block.release_block();
    _longjmp(block.scheduler_, 1);
  }

  void suspend(State state) {
    Fiber& fiber = *fibers_[threadIdx.x];
    const unsigned thread = threadIdx.x;
    fiber.state = state;
    if (!_setjmp(fiber.place)) _longjmp(scheduler_, 1);
    threadIdx.x = thread;
  }

  void release_block() {
    waiting_ = 0;
    for (auto& fiber : fibers_)
      if (fiber->state == State::kAtBarrier) fiber->state = State::kReady;
  }

  [[noreturn]] static void stuck(const char* why) {
    std::fprintf(stderr, "emulated kernel, block %u: %s\n", blockIdx.x, why);
    std::abort();
  }

  const std::function<void()>* kernel_ = nullptr;
  std::function<void()> awaited_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Warp> warps_;
  std::vector<unsigned> order_;
  std::minstd_rand random_;
  unsigned live_ = 0, waiting_ = 0;
  jmp_buf scheduler_;
};

}  // namespace emulator

inline void __syncthreads() {
  emulator::Block::current().barrier();
}
inline void __threadfence() {}
inline void cudaTriggerProgrammaticLaunchCompletion() {}
inline void cudaGridDependencySynchronize() {
  emulator::Block::current().await();
}
template <class Number>
Number __shfl_xor_sync(unsigned mask, Number number, int lane_xor) {
  return emulator::Block::current().shuffle(mask, number, static_cast<unsigned>(lane_xor));
}
template <class Number>
Number atomicAdd(Number* to, Number number) {
  return std::exchange(*to, *to + number);
}
inline int atomicMin(int* to, int number) {
  return std::exchange(*to, std::min(*to, number));
}
inline int atomicMax(int* to, int number) {
  return std::exchange(*to, std::max(*to, number));
}
template <class Number>
Number __ldcg(const Number* from) {
  return *from;
}
