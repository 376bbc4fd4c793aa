// A CPU stand-in for the CUDA runtime: csrc/cuda/*.cu, compiled by a C++ compiler with this folder first on the include
// path, runs on host memory. For tests on machines without a GPU (tests/test_cuda.py), never in a wheel.
//
// A thread block's threads are fibers of one CPU thread; blocks run one after another. A fiber runs until it meets a
// barrier or a warp operation, so that a missing barrier shows: GM_EMULATION_ORDER=reverse runs the fibers backwards,
// =random shuffles them in every round, and results must not change. A barrier not all threads reach aborts.
#pragma once
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(8) uint2 { uint32_t x, y; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }

// --- the host side ----------------------------------------------------------------------------------------
typedef int cudaError_t;
typedef void* cudaStream_t;
constexpr cudaError_t cudaSuccess = 0;
enum { cudaDevAttrComputeCapabilityMajor };
inline const char* cudaGetErrorString(cudaError_t) { return "emulated error"; }
inline const char* cudaGetErrorName(cudaError_t) { return "cudaErrorEmulated"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* d) { return *d = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int d) { return d == 0 ? cudaSuccess : 101; }
inline cudaError_t cudaGetDeviceCount(int* n) { return *n = 1, cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* v) { return *v = 13000, cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* v) { return *v = 13000, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* v, int, int) { return *v = 8, cudaSuccess; }
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

// --- fibers -----------------------------------------------------------------------------------------------
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace gm_emulation {
struct Barrier {
  int waiting = 0;
  unsigned generation = 0;
};
struct State {
  std::vector<ucontext_t> fibers;  // how each starts; from then on they switch with _longjmp, which asks no kernel
  jmp_buf to_scheduler, to_fiber[1024];
  std::vector<std::vector<char>> stacks;
  std::vector<char> done;
  std::function<void()> body;
  Barrier all, warps[32];
  int threads = 0, current = 0;
  long progress = 0;
  uint64_t slots[32][32][8];  // what the lanes of a warp show each other
};
inline State state;

inline void select(int fiber) {
  state.current = fiber;
  threadIdx = dim3(fiber % blockDim.x, fiber / blockDim.x % blockDim.y, fiber / blockDim.x / blockDim.y);
}
inline void yield() {
  if (!_setjmp(state.to_fiber[state.current])) _longjmp(state.to_scheduler, 1);
}
inline void wait(Barrier& b, int threads) {
  const unsigned mine = b.generation;
  ++state.progress;
  if (++b.waiting == threads) {
    b.waiting = 0;
    ++b.generation;
  }
  while (b.generation == mine) yield();
}
inline int lane() { return state.current % 32; }
inline int warp() { return state.current / 32; }
inline void warp_barrier() { wait(state.warps[warp()], 32); }
inline void entry() {
  state.body();
  state.done[state.current] = 1;
  ++state.progress;
  _longjmp(state.to_scheduler, 1);
}
inline void resume(bool started) {
  if (_setjmp(state.to_scheduler)) return;
  if (started) _longjmp(state.to_fiber[state.current], 1);
  else setcontext(&state.fibers[state.current]);
}
inline void run_block() {
  const int n = state.threads;
  constexpr size_t stack = 64 << 10;
  while (static_cast<int>(state.stacks.size()) < n) state.stacks.emplace_back(stack);
  state.fibers.resize(1024);
  state.done.assign(n, 0);
  state.all = Barrier();
  for (auto& w : state.warps) w = Barrier();
  for (int i = 0; i < n; ++i) {
    getcontext(&state.fibers[i]);
    state.fibers[i].uc_stack.ss_sp = state.stacks[i].data();
    state.fibers[i].uc_stack.ss_size = stack;
    state.fibers[i].uc_link = nullptr;
    makecontext(&state.fibers[i], entry, 0);
  }
  const char* order = getenv("GM_EMULATION_ORDER");
  const bool reverse = order && !strcmp(order, "reverse"), random = order && !strcmp(order, "random");
  bool started = false;  // whether every fiber has run once
  for (int left = n; left > 0; started = true) {
    const long before = state.progress;
    left = 0;
    const int start = random ? rand() % n : 0, stride = random ? 2 * (rand() % (n / 2)) + 1 : 1;  // n is a power of two
    for (int i = 0; i < n; ++i) {
      const int fiber = reverse ? n - 1 - i : random ? (start + i * stride) % n : i;
      if (state.done[fiber]) continue;
      select(fiber);
      resume(started);
      left += !state.done[fiber];
    }
    if (left && state.progress == before) {
      fprintf(stderr, "CUDA emulation: %d threads wait at a barrier the others never reach\n", left);
      abort();
    }
  }
}
}  // namespace gm_emulation

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* c, void (*kernel)(P...), A&&... arguments) {
  using namespace gm_emulation;
  state.threads = static_cast<int>(c->blockDim.x * c->blockDim.y * c->blockDim.z);
  state.body = [&] { kernel(arguments...); };
  const char* cap = getenv("GM_EMULATION_GRID");  // a smaller grid, to test that kernels loop
  unsigned blocks = c->gridDim.x;
  if (cap && static_cast<unsigned>(atoi(cap)) < blocks) blocks = static_cast<unsigned>(atoi(cap));
  for (unsigned b = 0; b < blocks; ++b) {
    blockDim = c->blockDim, gridDim = dim3(blocks), blockIdx = dim3(b, 0, 0);
    run_block();
  }
  return cudaSuccess;
}

// --- the device side --------------------------------------------------------------------------------------
inline void __syncthreads() { gm_emulation::wait(gm_emulation::state.all, gm_emulation::state.threads); }
inline void __syncwarp() { gm_emulation::warp_barrier(); }
template <class T>
T __shfl_xor_sync(unsigned, T v, int mask) {
  using namespace gm_emulation;
  memcpy(&state.slots[warp()][lane()][0], &v, sizeof(T));
  warp_barrier();
  T out;
  memcpy(&out, &state.slots[warp()][lane() ^ mask][0], sizeof(T));
  warp_barrier();
  return out;
}
inline unsigned __ballot_sync(unsigned, bool v) {
  using namespace gm_emulation;
  state.slots[warp()][lane()][0] = v;
  warp_barrier();
  unsigned out = 0;
  for (int i = 0; i < 32; ++i) out |= static_cast<unsigned>(state.slots[warp()][i][0]) << i;
  warp_barrier();
  return out;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
template <class T>
T atomicMax(T* p, T v) { T old = *p; if (v > old) *p = v; return old; }
template <class T>
T atomicMin(T* p, T v) { T old = *p; if (v < old) *p = v; return old; }

// One product of 16 x 8 sums: `multiply` adds the products in one 32-bit register of a and of b.
template <class Multiply>
void emulated_mma(int (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Multiply multiply) {
  using namespace gm_emulation;
  auto& slots = state.slots[warp()];
  for (int i = 0; i < 4; ++i) slots[lane()][i] = a[i];
  for (int i = 0; i < 2; ++i) slots[lane()][4 + i] = b[i];
  warp_barrier();
  // word k of row `row` of a: lane (row % 8) * 4 + k % 4, register row / 8 + k / 4 * 2
  for (int i = 0; i < 4; ++i) {
    const int row = lane() / 4 + i / 2 * 8, col = lane() % 4 * 2 + i % 2;
    for (int k = 0; k < 8; ++k)
      sums[i] += multiply(static_cast<uint32_t>(slots[row % 8 * 4 + k % 4][row / 8 + k / 4 * 2]), static_cast<uint32_t>(slots[col * 4 + k % 4][4 + k / 4]));
  }
  warp_barrier();
}
inline void emulated_mma_b1(int (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulated_mma(sums, a, b, [](uint32_t x, uint32_t y) { return __popc(x & y); });
}
inline void emulated_mma_int8(int (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulated_mma(sums, a, b, [](uint32_t x, uint32_t y) {
    int sum = 0;
    for (int i = 0; i < 32; i += 8) sum += static_cast<int>(static_cast<int8_t>(x >> i)) * static_cast<int8_t>(y >> i);
    return sum;
  });
}
