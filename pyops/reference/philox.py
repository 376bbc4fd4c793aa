"""Philox4x32-10 in plain torch, keyed as gradmill fixes it (csrc/common/philox.h is the native twin).

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""
from __future__ import annotations

import torch

#: What a random word is used for: the low 8 bits of ``stream``.
PURPOSES = {"weight": 0, "state": 1, "gradient": 2, "basis": 3, "dither": 4, "hadamard": 5}
MASK = 0xFFFFFFFF


def stream(tensor_id: int, purpose: str) -> int:
    """The third counter word: tensor id << 8 | purpose."""
    return (tensor_id << 8 | PURPOSES[purpose]) & MASK


def _mulhilo(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    product = a * b  # wraps modulo 2^64, which keeps all the bits
    return (product >> 32) & MASK, product & MASK


def words(seed: int, step: int, stream: int, first: int, count: int, device="cpu") -> torch.Tensor:
    """The random words of elements ``first .. first + count`` as int64 in [0, 2^32).

    key = seed (low, high word); counter = (element // 4 low, high, stream, step); word = element % 4.
    """
    element = torch.arange(first, first + count, dtype=torch.int64, device=device)
    group = element >> 2
    c0, c1 = group & MASK, (group >> 32) & MASK
    c2, c3 = torch.full_like(c0, stream & MASK), torch.full_like(c0, step & MASK)
    k0, k1 = seed & MASK, (seed >> 32) & MASK
    for _ in range(10):
        hi0, lo0 = _mulhilo(0xD2511F53, c0)
        hi1, lo1 = _mulhilo(0xCD9E8D57, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return torch.stack((c0, c1, c2, c3), dim=1).gather(1, (element & 3)[:, None])[:, 0]
