"""Gradients kept away from directions: a stored subspace (CUBER, GPM), the normal plane of another gradient (O-DICE)."""
from __future__ import annotations

import torch

from gradmill.formats import float_code
from gradmill.ops._registry import describe
from gradmill.ops.projection import project, project_back
from gradmill.ops.quant import FLOATS
from gradmill.optim._base import measured
from gradmill.reference.optim import as_matrix
from gradmill.weight import QuantizedWeight


def _listed(tensors) -> list:
    return [tensors] if tensors is None or isinstance(tensors, torch.Tensor) else list(tensors)


def _pairs(name: str, grads, other_name: str, others) -> list[tuple]:
    """(index, gradient, its other) without the pairs in which one is None. Checks counts and dtypes."""
    grads, others = _listed(grads), _listed(others)
    if len(grads) != len(others):
        raise ValueError(f"{other_name} has {len(others)} entries; it must have one for each of the {len(grads)} in {name}")
    for what, tensors in ((name, grads), (other_name, others)):
        for i, t in enumerate(tensors):
            if not (t is None or isinstance(t, torch.Tensor) and t.dtype in FLOATS):
                raise TypeError(f"{what}[{i}] is {describe(t)}; it must be a float32, bfloat16 or float16 tensor, or None")
    return [(i, g, o) for i, (g, o) in enumerate(zip(grads, others)) if g is not None and o is not None]


@torch.no_grad()
def project_out(grads, bases, *, side: str = "right", orthonormal: bool = True):
    """G <- G - (G B^T) B in place: each gradient without its part in the span of its basis.

    Source: Lin et al., "Beyond Not-Forgetting: Continual Learning with Backward Knowledge Transfer" (CUBER), and Saha et al.,
    "Gradient Projection Memory for Continual Learning", whose B spans the inputs that a layer had in old tasks: steps then leave the old
    outputs as they are. Two passes over G: one reads it for G B^T straight from the stored codes, one updates it; nothing of G's
    size is made, but for a bf16 or a non-contiguous one, which goes through an fp32 copy and is rounded once, to nearest.

    Args:
        grads: a gradient or a list, float32, bfloat16 or float16 of two or more dimensions (more count as ``flatten(1)``).
        bases: as many bases (rank, columns), rows the vectors: plain floats, or packed by ``QuantizedWeight.quantize(B, "int4")``, 8 times
            smaller. None (or a None gradient) leaves the gradient as it is.
        side: "left" removes B^T (B G), B (rank, rows), instead.
        orthonormal: False where the rows are not (4 bits cost a few percent of that): G B^T is multiplied by the pseudo-inverse of
            B B^T, formed in float64, so that nothing is left in the span of the vectors as they are stored.

    Raises:
        ValueError: for a count, shape or device that does not fit. TypeError: for another dtype.
    """
    if side not in ("left", "right"):
        raise ValueError(f"side is {side!r}; it must be 'left' or 'right'")
    left, work = side == "left", _pairs("grads", grads, "bases", bases)
    for i, g, basis in work:  # every reason to refuse comes before anything is changed
        if g.dim() < 2 or isinstance(g, QuantizedWeight):
            raise ValueError(f"grads[{i}] is {describe(g)}; it must have two or more dimensions and be a plain tensor")
        wanted = g.shape[0] if left else g.shape[1:].numel()
        if basis.dim() != 2 or basis.shape[1] != wanted or basis.device != g.device:
            raise ValueError(f"bases[{i}] is {describe(basis)}; it must be of shape (rank, {wanted}) on {g.device}")
    for _, g, basis in work:
        if not (g.numel() and len(basis)):
            continue
        if isinstance(basis, QuantizedWeight):
            packed = basis.codes, basis.scales, basis.zeros, basis.format.code, basis.format.block
        else:
            none = torch.empty(len(basis), 1, dtype=torch.float32, device=g.device)
            packed = basis.contiguous(), none, none.new_empty(0, dtype=torch.uint8), float_code(basis.dtype), 0
        matrix = as_matrix(g)
        if matrix.dtype == torch.bfloat16 or not matrix.is_contiguous():
            matrix = matrix.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        low = project(matrix, *packed, left)
        if not orthonormal:
            vectors = (basis.dequantize() if isinstance(basis, QuantizedWeight) else basis).to(torch.float64)
            inverse = torch.linalg.pinv(vectors @ vectors.t(), hermitian=True)
            low = (inverse @ low.double() if left else low.double() @ inverse).to(torch.float32)
        project_back(matrix, None, None, float_code(matrix.dtype), 0, matrix.shape[1], low.contiguous(), *packed, left,
                     torch.tensor([1.0, -1.0], dtype=torch.float32, device="cpu"), torch.zeros(2, dtype=torch.int64, device="cpu"), 0)
        if matrix.data_ptr() != g.data_ptr():
            g.copy_(matrix.view(g.shape))


@torch.no_grad()
def project_normal(grads, references) -> float:
    """g <- f + (g - c f) in place, c = <f, g> / max(<f, f>, 1e-10) over the whole model: g's part normal to the reference
    gradient f, and f itself.

    Source: Mao et al., "ODICE: Revealing the Mystery of Distribution Correction Estimation via Orthogonal-gradient Update", where f is the
    gradient through V(s), g the one through V(s').

    Args:
        grads: a gradient or a list, float32, bfloat16 or float16. references: as many, of the same shapes. A pair with None is left
            out, as if both were zero.

    Returns:
        c. Products within a tensor are summed in fp32 as torch.dot does, tensors in float64.

    Raises:
        ValueError: for a count, shape or device that does not fit. TypeError: for another dtype.
    """
    work = _pairs("grads", grads, "references", references)
    for i, g, f in work:
        if g.shape != f.shape or g.device != f.device:
            raise ValueError(f"references[{i}] is {describe(f)}; it must be of shape {tuple(g.shape)} on {g.device}")
    if not work:
        return 0.0
    grads, references = [g for _, g, _ in work], [f for _, _, f in work]
    inner = sum(float(torch.dot(f.to(torch.float32).flatten(), g.to(torch.float32).flatten())) for f, g in zip(references, grads))
    c = inner / max(float(measured(references)[:, 0].sum()), 1e-10)
    torch._foreach_add_(grads, references, alpha=1 - c)
    return c
