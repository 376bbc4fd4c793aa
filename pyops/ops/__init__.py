"""gradmill's ops: schema, fake kernel, checks and choice of backend per family. Tensors in, tensors out, no autograd."""
from gradmill.ops._registry import OPS, BackendError, use_backend
from gradmill.ops.binary import (gradient_ranges, matmul_binary, matmul_planes, matmul_tenants, pack_gradient, pack_planes, pack_signs, sample_groups,
                                 transpose_bits)
from gradmill.ops.codebook import codebook_sums, matmul_codebook, move_indices
from gradmill.ops.conv import fold_kept, fold_patches, pack_image, patch_bits, quantize_patches
from gradmill.ops.grouped import matmul_grouped, quantize_grouped
from gradmill.ops.linear import linear_int8, linear_int8_backward
from gradmill.ops.matmul import matmul_int8, matmul_packed, matmul_scaled
from gradmill.ops.optim import fused_step, measure, scaled_step
from gradmill.ops.projection import dct, project, project_back, subspace_basis
from gradmill.ops.quant import dequantize, fake_quantize, fake_quantize_backward, hadamard, quantize, quantize_both, quantize_to

__all__ = ["OPS", "BackendError", "use_backend", "quantize", "quantize_both", "quantize_to", "dequantize", "hadamard", "fake_quantize", "fake_quantize_backward",
           "quantize_patches", "fold_patches", "matmul_int8", "matmul_packed", "matmul_scaled", "matmul_grouped", "quantize_grouped", "linear_int8", "linear_int8_backward",
           "fused_step", "scaled_step", "measure",
           "project", "project_back", "subspace_basis", "dct", "pack_signs", "pack_planes", "matmul_binary", "matmul_planes", "matmul_tenants",
           "gradient_ranges", "pack_gradient", "sample_groups", "transpose_bits", "pack_image", "patch_bits", "fold_kept",
           "matmul_codebook", "codebook_sums", "move_indices"]
