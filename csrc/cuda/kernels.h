// The interface of the CUDA kernels: the CPU kernels' structs with device pointers, and where to launch.
// Each launcher checks every CUDA call and throws std::runtime_error with the call, the kernel and the reason.
#pragma once
#include <string>

#include "../cpu/kernels.h"

namespace gradmill::cuda {

struct Launch {
  int device;
  void* stream;  // cudaStream_t
};

// Why kernels cannot run here (no driver, driver older than the runtime, no device), or "".
std::string problem();

void quantize(const QuantizeArgs&, const Launch&);
void quantize_both(const QuantizeBothArgs&, const Launch&);
void dequantize(const DequantizeArgs&, const Launch&);
void hadamard(const HadamardArgs&, const Launch&);
void fake_quantize(const FakeArgs&, const Launch&);
void fake_quantize_backward(const FakeArgs&, const Launch&);
void matmul_int8(const Int8MatmulArgs&, const Launch&);
void matmul_packed(const PackedMatmulArgs&, const Launch&);
void matmul_grouped(const GroupedArgs&, const Launch&);
void quantize_grouped(const QuantizeGroupedArgs&, const Launch&);
void pack_bits(const PackBitsArgs&, const Launch&);
void matmul_tenants(const TenantsArgs&, const Launch&);
void matmul_binary(const BinaryMatmulArgs&, const Launch&);
void fused_step(const StepArgs&, const Launch&);
void measure(const MeasureArgs&, const Launch&);
void project(const ProjectArgs&, const Launch&);
void project_back(const ProjectBackArgs&, const Launch&);

}  // namespace gradmill::cuda
