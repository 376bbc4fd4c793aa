// The CPU kernels' tables, empty: the emulated module runs CUDA sources only.
#include "../../cpu/kernels.h"

namespace gradmill {
#define GM_EMPTY(level)                                \
  extern const QuantKernels quant_##level{};           \
  extern const ConvKernels conv_##level{};             \
  extern const MatmulKernels matmul_##level{};         \
  extern const OptimKernels optim_##level{};           \
  extern const ProjectionKernels projection_##level{}; \
  extern const BinaryKernels binary_##level{};         \
  extern const CodebookKernels codebook_##level{};
GM_EMPTY(portable)
GM_EMPTY(avx2)
GM_EMPTY(avx512)
GM_EMPTY(avx512_vnni)
}  // namespace gradmill
