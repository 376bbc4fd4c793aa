#define GM_BUILD_CXX "emulation"
#define GM_BUILD_NVCC "emulation"
#define GM_BUILD_CUDA_ARCHS ""
