"""A linear layer shared by many fine-tunes, each one bit a weight away from it."""
from __future__ import annotations

import contextlib
import contextvars

import torch

from gradmill.autograd.bit_delta import BitDelta
from gradmill.formats import float_code
from gradmill.ops.binary import pack_signs
from gradmill.ops.matmul import matmul_scaled

FEW_ROWS = 16  # up to here gradmill's own fp32 product of a CPU is faster than torch's: 8 rows, 4096 x 4096: 7.7 ms against 10.5 (AVX2), 5.8 against 9.9 (AVX-512)

_tenants: contextvars.ContextVar[torch.Tensor | None] = contextvars.ContextVar("gradmill_tenants", default=None)


@contextlib.contextmanager
def serving(tenants: torch.Tensor):
    """``with gradmill.bitdelta.serving(tenants):`` every :class:`BitDeltaLinear` called inside takes row i of its batch (the first dimension
    of its input) for tenant ``tenants[i]``; -1 is the base model. tenants: int64 (batch,), on the CPU. Outside of it every row is tenant 0's. TypeError for
    anything but a tensor."""
    if not isinstance(tenants, torch.Tensor):
        raise TypeError(f"serving: tenants is a {type(tenants).__name__}; it must be an int64 tensor, one tenant for each row of the batch")
    token = _tenants.set(tenants)
    try:
        yield
    finally:
        _tenants.reset(token)


class BitDeltaLinear(torch.nn.Module):
    """Y = X W^T + alpha_t X sign(Delta_t)^T + b_t for the tenant t of each batch row, from packed signs.

    Liu et al., "BitDelta: Your Fine-Tune May Only Be Worth One Bit". W is the base model's Parameter itself and does not train; a tenant adds
    out * ceil(in / 8) bytes of ``bits``, 4 of ``alphas`` and its bias. An element of Delta that is 0 counts as +.

    Args:
        weight: (out, in) float32, bfloat16 or float16: the base's.
        bits: (tenants, out, ceil(in / 8)) uint8, as gradmill.ops.pack_signs makes them.
        alphas: (tenants,) float32, trained by gradmill.bitdelta.distill.
        biases: (tenants, out), or None. The base itself (tenant -1) has ``bias`` (out).
    """

    def __init__(self, weight, bits, alphas, biases=None, bias=None):
        super().__init__()
        self.weight = weight if isinstance(weight, torch.nn.Parameter) else torch.nn.Parameter(weight, False)
        self.register_parameter("bias", bias)
        self.alphas = torch.nn.Parameter(alphas.detach().to(torch.float32).clone())
        self.register_buffer("bits", bits)
        self.register_buffer("biases", biases)
        self.out_features, self.in_features = weight.shape

    @classmethod
    def from_linears(cls, base: torch.nn.Linear, tuned: torch.nn.Linear) -> "BitDeltaLinear":
        """One tenant: sign and mean magnitude of the difference of two layers of the same shape."""
        delta = tuned.weight.detach().to(torch.float32) - base.weight.detach().to(device=tuned.weight.device, dtype=torch.float32)
        bits, means = pack_signs(delta, mean=True)
        biases = None if tuned.bias is None else tuned.bias.detach()[None].clone()
        bias = None if base.bias is None else torch.nn.Parameter(base.bias.detach(), False)
        return cls(base.weight, bits[None], means.mean(dtype=torch.float64).to(torch.float32)[None], biases, bias)

    def tenant_bytes(self) -> int:
        """Exact bytes that one more tenant takes."""
        return self.bits[0].nbytes + 4 + (0 if self.biases is None else self.biases[0].nbytes)

    def forward(self, x: torch.Tensor, tenants: torch.Tensor | None = None) -> torch.Tensor:
        """x (batch, ..., in), tenants int64 (batch,) on the CPU, by default those of :func:`serving`, else tenant 0 -> (batch, ..., out) in
        autocast's dtype if autocast is on for the device, else in x's. Raises ValueError for shapes and tenants."""
        tenants = _tenants.get() if tenants is None else tenants
        batch = x.shape[0] if x.dim() > 1 else 1
        if tenants is None:
            tenants = torch.zeros(batch, dtype=torch.int64)
        if x.shape[-1] != self.in_features:
            raise ValueError(f"BitDeltaLinear: x has shape {tuple(x.shape)}; its last dimension must be {self.in_features}")
        if tenants.shape != (batch,):
            raise ValueError(f"BitDeltaLinear: tenants has shape {tuple(tenants.shape)}; it must be ({batch},), one for each row of the batch")
        rows = x.reshape(-1, self.in_features)
        tenants = tenants.repeat_interleave(rows.shape[0] // max(batch, 1))
        code = float_code(self.weight.dtype)
        if len(rows) <= FEW_ROWS and x.device.type == "cpu" and rows.dtype == self.weight.dtype and self.weight.is_contiguous() and not (
                torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")):
            base = matmul_scaled(rows.contiguous(), None, None, code, 0, self.weight, None, None, code, 0, self.in_features, False, None, rows.dtype)
        else:
            base = torch.nn.functional.linear(rows, self.weight.to(rows.dtype) if not torch.is_autocast_enabled(x.device.type) else self.weight)
        y = BitDelta.apply(rows.to(base.dtype), base, self.bits, self.alphas, tenants)
        if self.biases is not None:
            own = self.biases.index_select(0, tenants.clamp(min=0).to(x.device)).to(y.dtype)
            if self.bias is not None:
                own = torch.where((tenants < 0).to(x.device)[:, None], self.bias.to(y.dtype), own)
            y = y + own
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, tenants={self.bits.shape[0]}"
