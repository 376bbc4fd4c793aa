"""gradmill memory: bytes that training needs for weights, gradients and optimizer states, before anything is trained.

Nothing is estimated: the model, its conversion and the optimizer are the real ones, on torch's meta device, where tensors have
shapes and dtypes but no storage; what they would hold is added up. Activations, the kernels' own buffers and the allocator's slack are
not in it.
"""
from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from functools import partial

import torch

from gradmill.convert import convert
from gradmill.formats import FLOAT_DTYPES
from gradmill.optim import (SGD, AdamW, DCTAdamW, FiraAdamW, FrugalAdamW, GaLoreAdamW, Lion, QGaLoreAdamW, param_groups_for_projection, state_nbytes)
from gradmill.weight import nbytes

__all__ = ["LLAMA", "Llama", "OPTIMIZERS", "Plan", "WEIGHTS", "build", "make_optimizer", "plan"]


@dataclass(frozen=True)
class Llama:
    """A LLaMA's sizes; ``rank``: the one GaLore's paper projects it to."""

    width: int
    hidden: int
    heads: int
    layers: int
    rank: int
    vocabulary: int = 32000


#: Zhao et al., "GaLore", tables 2, 3 and 5.
LLAMA = {
    "llama-60m": Llama(512, 1376, 8, 8, 128),
    "llama-130m": Llama(768, 2048, 12, 12, 256),
    "llama-350m": Llama(1024, 2736, 16, 24, 256),
    "llama-1b": Llama(2048, 5461, 32, 24, 512),
    "llama-7b": Llama(4096, 11008, 32, 32, 1024),
}
OPTIMIZERS = {
    "adamw": AdamW, "adamw8bit": partial(AdamW, states="int8"), "adamw4bit": partial(AdamW, states="int4"), "lion": Lion,
    "sgd": partial(SGD, lr=1e-3, momentum=0.9), "galore": GaLoreAdamW, "qgalore": QGaLoreAdamW, "fira": FiraAdamW, "frugal": FrugalAdamW, "dct": DCTAdamW,
}
#: fp32 or bf16 for all of them; int8: the linear layers but the head in recipe int8_weights, everything else and all gradients bf16.
WEIGHTS = ("fp32", "bf16", "int8")


def build_layer(shape: Llama, weights: str = "bf16", device="meta") -> torch.nn.ModuleDict:
    """One of its layers, without a forward. A model is built layer by layer, so that only one is ever there in float32."""
    nn, w, h = torch.nn, shape.width, shape.hidden
    linear = partial(nn.Linear, bias=False, device=device)
    layer = nn.ModuleDict({**{n: linear(w, w) for n in ("q_proj", "k_proj", "v_proj", "o_proj")}, "gate_proj": linear(w, h), "up_proj": linear(w, h),
                           "down_proj": linear(h, w), "input_norm": nn.RMSNorm(w, device=device), "post_attention_norm": nn.RMSNorm(w, device=device)})
    layer.to(FLOAT_DTYPES.get(weights, torch.bfloat16))
    if weights == "int8":
        convert(layer, "int8_weights")
    return layer


def build(shape: Llama, weights: str = "bf16", device="meta") -> torch.nn.Module:
    """The modules that hold such a LLaMA's weights, stored as ``weights`` says; without a forward."""
    if weights not in WEIGHTS:
        raise ValueError(f"weights is {weights!r}; it must be one of {', '.join(WEIGHTS)}")
    nn, dtype = torch.nn, FLOAT_DTYPES.get(weights, torch.bfloat16)
    return nn.ModuleDict({"embed_tokens": nn.Embedding(shape.vocabulary, shape.width, device=device, dtype=dtype),
                          "layers": nn.ModuleList(build_layer(shape, weights, device) for _ in range(shape.layers)),
                          "norm": nn.RMSNorm(shape.width, device=device, dtype=dtype),
                          "lm_head": nn.Linear(shape.width, shape.vocabulary, bias=False, device=device, dtype=dtype)})


def _projects(name: str) -> bool:
    made = OPTIMIZERS[name]
    return isinstance(made, type) and issubclass(made, GaLoreAdamW)


def make_optimizer(model: torch.nn.Module, name: str, rank=None, states=None, bits=None) -> torch.optim.Optimizer:
    """OPTIMIZERS[name] over model, the layers of :func:`gradmill.optim.param_groups_for_projection` projected where it projects.

    Args:
        rank: basis vectors, or a fraction of the projected side; needed by an optimizer that projects, refused by the others.
        states: "fp32", "bf16", "fp8", "int8" or "int4" in place of the optimizer's own.
        bits: 4, 8, 16 or 32 of a stored basis (galore, qgalore, fira), in place of the optimizer's own.

    Raises:
        ValueError: for a choice that the optimizer does not have.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer is {name!r}; it must be one of {', '.join(OPTIMIZERS)}")
    options = {} if states is None else {"states": states}
    if not _projects(name):
        for argument, value in (("rank", rank), ("bits", bits)):
            if value is not None:
                raise ValueError(f"{argument} is {value}; {name} has none, because it does not project")
        return OPTIMIZERS[name](model.parameters(), **options)
    if rank is None:
        raise ValueError(f"rank is None; {name} needs one")
    if bits is not None:
        if name in ("frugal", "dct"):
            raise ValueError(f"bits is {bits}; {name} has none, because it stores indices only")
        options["bits"] = bits
    chosen, *rest = param_groups_for_projection(model, rank)
    return OPTIMIZERS[name]([{"params": chosen["params"], "rank": rank}, *rest], **options)


@dataclass
class Plan:
    """Bytes of a configuration."""

    model: str
    optimizer: str
    weights: str
    rank: int | float | None
    states: str
    bits: int | None              #: of a stored basis
    release_gradients: bool
    offload: bool                 #: states in CPU memory, not in the total; bases are on the GPU
    parameters: int               #: numbers that train
    weight_bytes: int
    gradient_bytes: int           #: all at once; with release_gradients the largest one
    state_bytes: int              #: of which basis_bytes are bases
    basis_bytes: int
    total_bytes: int = field(init=False)
    bytes_per_parameter: float = field(init=False)

    def __post_init__(self):
        self.total_bytes = self.weight_bytes + self.gradient_bytes + (self.basis_bytes if self.offload else self.state_bytes)
        self.bytes_per_parameter = self.total_bytes / self.parameters

    def to_dict(self) -> dict:
        return asdict(self)

    def show(self, console):
        """Prints the plan as a table."""
        from rich.table import Table

        projected = f", rank {self.rank:g}" + (f", {self.bits}-bit basis" if self.bits else "") if self.rank is not None else ""
        console.print(f"[bold]{self.model}[/bold], {self.parameters:,} parameters: {self.optimizer}{projected}, {self.states} states, {self.weights} weights",
                      highlight=False)
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        table.add_column("")
        for name in ("bytes", "GB (1e9)", "GiB", "bytes/parameter"):
            table.add_column(name, justify="right", no_wrap=True)
        gradients = "gradients, one at a time" if self.release_gradients else "gradients"
        rows = [("weights", self.weight_bytes), (gradients, self.gradient_bytes), ("optimizer states" + " (CPU memory)" * self.offload, self.state_bytes)]
        if self.basis_bytes:
            rows.append(("  of these, bases", self.basis_bytes))
        for name, count in rows + [("total" + " on the GPU" * self.offload, self.total_bytes)]:
            table.add_row(name, f"{count:,}", f"{count / 1e9:.3f}", f"{count / 2**30:.3f}", f"{count / self.parameters:.3f}",
                          style="bold" if name.startswith("total") else None)
        console.print(table)
        console.print("Exact for what is stored; activations and the allocator's slack come on top.", style="dim")


def plan(model: str | Llama, optimizer: str, *, weights="bf16", rank=None, states=None, bits=None, release_gradients=False, offload=False) -> Plan:
    """What training ``model`` (a key of LLAMA, or sizes) takes. rank: default the paper's, FRUGAL's a quarter; states and bits: the
    optimizer's own. offload: the states are in CPU memory (beside them, not counted, two chunks of 32 MiB, or of a row, in pinned memory).
    A lazily refreshed layer's last cosines, at most 20 bytes, are not counted.

    Raises:
        ValueError: for an unknown name, or a choice that the optimizer does not have.
    """
    if isinstance(model, str) and model not in LLAMA:
        raise ValueError(f"model is {model!r}; it must be one of {', '.join(LLAMA)}")
    shape = LLAMA[model] if isinstance(model, str) else model
    if rank is None and optimizer in OPTIMIZERS and _projects(optimizer):
        rank = 0.25 if optimizer == "frugal" else shape.rank
    built = build(shape, weights)
    made = make_optimizer(built, optimizer, rank, states, bits)
    params = [p for p in built.parameters() if p.requires_grad]
    basis = 0
    for group in made.param_groups:
        for p in group["params"]:
            made._init_state(p, group)
            projection = made._projection(p, group)
            if projection is not None:  # a basis comes with the first step
                rows, columns = p.shape[0], p.shape[1:].numel()
                tensors = projection.basis_tensors(projection.rank_of(p.shape), rows if projection.left(rows, columns) else columns)
                basis += sum(math.prod(size) * dtypes[0].itemsize for _, dtypes, size in tensors)
    gradients = [p.numel() * p.dtype.itemsize for p in params]
    group = made.param_groups[0]
    stored = group["projection"] is not None and group["projection"].stored
    return Plan(model if isinstance(model, str) else "llama", optimizer, weights, rank, group["states"], group["projection"].bits if stored else None,
                release_gradients, offload, sum(p.numel() for p in params), sum(nbytes(p) for p in params),
                max(gradients) if release_gradients else sum(gradients), state_nbytes(made) + basis, basis)
