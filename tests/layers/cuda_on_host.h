// Runs CUDA kernels on the host, for tests: enough of CUDA to compile mask_kernels.cuh with g++.
//
// One block runs at a time, each of its threads on a stack of its own: a thread runs until it
// waits at a barrier or a ballot, a warp until all of it waits at a barrier, then it is the turn of
// the next one. Which is next is up to the schedule, so that a missing barrier shows as a result
// that depends on it. Threads that wait for each other at different places, and grids that CUDA
// refuses, are errors.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
// The values of the block before stay in it, as they may on a GPU.
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_host {

enum Schedule { kForward, kBackward, kShuffled };
enum class State { kReady, kAtBarrier, kAtBallot, kDone };
constexpr unsigned kWarp = 32;

struct Thread {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 16);
  State state;
  int line;        // of the source, where it waits
  bool vote;       // what it brings there
  unsigned votes;  // what it takes from there: a bit for each lane, or 1 if any thread voted
};

class Device {
 public:
  Schedule schedule = kForward;

  void run(dim3 grid, dim3 block, std::function<void()> kernel) {
    const uint64_t blocks = uint64_t{grid.x} * grid.y, threads = uint64_t{block.x} * block.y;
    if (blocks == 0 || threads == 0 || threads > 1024 || grid.x > INT_MAX || grid.y > 65535 ||
        grid.z * block.z != 1) {
      throw std::runtime_error("invalid configuration argument");
    }
    kernel_ = std::move(kernel);
    count_ = static_cast<unsigned>(threads);
    while (threads_.size() < count_) threads_.emplace_back();
    gridDim = grid;
    blockDim = block;
    for (const unsigned b : order(static_cast<unsigned>(blocks))) {
      blockIdx = dim3(b % grid.x, b / grid.x);
      run_block();
    }
  }

  // Called by a thread: gives way to the others until all that matter wait here too.
  unsigned wait(State state, int line, bool vote) {
    Thread& me = threads_[current_];
    me.state = state;
    me.line = line;
    me.vote = vote;
    swapcontext(&me.context, &main_);
    return me.votes;
  }

 private:
  static void enter();

  std::vector<unsigned> order(unsigned count) {
    std::vector<unsigned> numbers(count);
    std::iota(numbers.begin(), numbers.end(), 0);
    if (schedule == kBackward) std::reverse(numbers.begin(), numbers.end());
    if (schedule == kShuffled) std::shuffle(numbers.begin(), numbers.end(), random_);
    return numbers;
  }

  void run_block() {
    for (unsigned t = 0; t < count_; ++t) {
      Thread& thread = threads_[t];
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = thread.stack.data();
      thread.context.uc_stack.ss_size = thread.stack.size();
      thread.context.uc_link = &main_;
      makecontext(&thread.context, enter, 0);
      thread.state = State::kReady;
    }
    do {
      for (const unsigned w : order((count_ + kWarp - 1) / kWarp)) {
        run_warp(w * kWarp, std::min((w + 1) * kWarp, count_));
      }
    } while (meet(0, count_, State::kAtBarrier));
    for (unsigned t = 0; t < count_; ++t) {
      if (threads_[t].state == State::kDone) continue;
      throw std::runtime_error("threads do not meet: thread " + std::to_string(t) +
                               " waits in line " + std::to_string(threads_[t].line));
    }
  }

  // Runs a warp as far as it gets without the others.
  void run_warp(unsigned begin, unsigned end) {
    do {
      for (const unsigned lane : order(end - begin)) {
        current_ = begin + lane;
        if (threads_[current_].state != State::kReady) continue;
        threadIdx = dim3(current_ % blockDim.x, current_ / blockDim.x);
        swapcontext(&main_, &threads_[current_].context);
      }
    } while (meet(begin, end, State::kAtBallot));
  }

  // If all of these threads wait at the same place, hands out their votes and lets them go on.
  bool meet(unsigned begin, unsigned end, State state) {
    unsigned votes = 0;
    for (unsigned t = begin; t < end; ++t) {
      const Thread& thread = threads_[t];
      if (thread.state != state || thread.line != threads_[begin].line) return false;
      votes |= unsigned{thread.vote} << (state == State::kAtBallot ? t - begin : 0);
    }
    for (unsigned t = begin; t < end; ++t) {
      threads_[t].votes = votes;
      threads_[t].state = State::kReady;
    }
    return true;
  }

  std::function<void()> kernel_;
  std::vector<Thread> threads_;
  unsigned count_ = 0, current_ = 0;
  ucontext_t main_;
  std::mt19937 random_;
};

inline Device device;

inline void Device::enter() {
  device.kernel_();
  device.threads_[device.current_].state = State::kDone;
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, Arguments... arguments) {
  device.run(grid, block, [=] { kernel(arguments...); });
}

}  // namespace cuda_on_host

#define __syncthreads() \
  ::cuda_on_host::device.wait(::cuda_on_host::State::kAtBarrier, __LINE__, false)
#define __syncthreads_or(vote) \
  ::cuda_on_host::device.wait(::cuda_on_host::State::kAtBarrier, __LINE__, (vote) != 0)
// Of whole warps only, whatever the mask.
#define __ballot_sync(mask, vote) \
  ::cuda_on_host::device.wait(::cuda_on_host::State::kAtBallot, __LINE__, (vote) != 0)

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }

inline long long __double_as_longlong(double x) {
  long long bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline double __longlong_as_double(long long bits) {
  double x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// Threads change only where they wait: nothing comes between the load and the store.
template <typename T>
T exchange(T* at, T value) {
  const T old = *at;
  *at = value;
  return old;
}
inline int atomicAdd(int* at, int x) { return exchange(at, *at + x); }
inline int atomicMin(int* at, int x) { return exchange(at, std::min(*at, x)); }
inline int atomicMax(int* at, int x) { return exchange(at, std::max(*at, x)); }
inline unsigned long long atomicMax(unsigned long long* at, unsigned long long x) {
  return exchange(at, std::max(*at, x));
}
inline unsigned long long atomicOr(unsigned long long* at, unsigned long long x) {
  return exchange(at, *at | x);
}
