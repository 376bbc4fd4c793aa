// Can kernels run here at all? No context is created: only versions, counts and attributes are asked for.
// Never run on a GPU yet (without one, the answer is tested).
#include <cuda_runtime.h>

#include "kernels.h"

namespace gradmill::cuda {
namespace {

std::string version(int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); }

std::string reason(const char* call, cudaError_t error) {
  cudaGetLastError();
  return std::string(call) + " failed: " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")";
}

}  // namespace

std::string problem() {
  int driver = 0, runtime = 0, count = 0;
  cudaError_t error = cudaRuntimeGetVersion(&runtime);
  if (error != cudaSuccess) return reason("cudaRuntimeGetVersion", error);
  error = cudaDriverGetVersion(&driver);
  if (error != cudaSuccess) return reason("cudaDriverGetVersion", error);
  if (driver == 0) return "no NVIDIA driver was found";
  // Within one major version every driver runs every runtime's compiled code.
  if (driver / 1000 < runtime / 1000)
    return "the NVIDIA driver supports CUDA " + version(driver) + ", older than the CUDA " + version(runtime) +
           " this gradmill was built with: update the driver";
  error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) return reason("cudaGetDeviceCount", error);
  if (count == 0) return "no CUDA device was found";
  int newest = 0;
  for (int i = 0; i < count; ++i) {
    int major = 0;
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, i);
    if (error != cudaSuccess) return reason("cudaDeviceGetAttribute", error);
    newest = major > newest ? major : newest;
  }
  if (newest < 8) return "the kernels need compute capability 8.0 or newer; the newest GPU here has " + std::to_string(newest) + ".x";
  return "";
}

}  // namespace gradmill::cuda
