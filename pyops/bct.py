"""Block-wise compressed transformers (BCT): a trained model in integers with power-of-two scales, after training, forward only.

    model, report = gradmill.bct.quantize(model, bits=4, calibration=batches)     # in place where it can; print(report)
    y = model(x)

Weights, embeddings too, take ``bits`` a value and a shift for each block; a product is one exact integer product of 8-bit activations and the
weights' codes; GELU, softmax, LayerNorm and what lies between them are integers of 16 bits with an exponent for each token. BCT says that every step
is quantised with block-wise shifts to about 4 bits a stored value, not by which formulas: those here are ours, and stand in
gradmill.reference.shifted and gradmill.nn.bct. In floats run: reading a layer's input and writing its output (a torch.nn.TransformerEncoderLayer is
one layer), unpacking codes (exactly), the final fp32 rounding of integer sums beyond 2^24, and whatever a model does between its layers.
"""
from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import Callable, Iterable

import torch

from gradmill._calibrate import input_energy
from gradmill.convert import leave_fast_path
from gradmill.nn.bct import CODES, BctActivation, BctAttention, BctEmbedding, BctEncoderLayer, BctLinear, BctNorm, BctSoftmax, ShiftMatrix

__all__ = ["Report", "quantize"]


@dataclass
class Report:
    """What :func:`quantize` did: ``str(report)`` is a table. Bytes are of all Parameters and buffers of the model, tied ones counted once."""

    bits: int
    block: int
    layers: dict[str, tuple[str, int, int]] = field(default_factory=dict)  #: name -> (its class before, bytes before, bytes after)
    floats: dict[str, str] = field(default_factory=dict)  #: modules that stay as they are, name -> class
    bytes_before: int = 0
    bytes_after: int = 0

    @property
    def factor(self) -> float:
        """How many times smaller the whole model is."""
        return self.bytes_before / self.bytes_after if self.bytes_after else 1.0

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        table = Table()
        for title, how in (("module", "left"), ("was", "left"), ("bytes", "right"), ("factor", "right")):
            table.add_column(title, justify=how, overflow="fold")
        for name, (kind, before, after) in self.layers.items():
            table.add_row(name, kind, f"{before:,} -> {after:,}", f"{before / after:.2f}" if after else "-")
        for name, kind in self.floats.items():
            table.add_row(name, f"{kind}, stays")
        text = io.StringIO()
        Console(file=text, width=100).print(table)
        return (f"gradmill.bct.quantize, {self.bits} bits, a shift for each {self.block or 'row'}: {len(self.layers)} modules; the whole model {self.bytes_before:,} -> "
                f"{self.bytes_after:,} bytes, {self.factor:.3f} times smaller\n{text.getvalue().rstrip()}")


def _held(module: torch.nn.Module) -> int:
    """Bytes of Parameters and buffers, tied ones once."""
    return sum({(t.data_ptr(), t.nbytes): t.nbytes for t in (*module.parameters(), *module.buffers())}.values())


def _activation(f) -> str | None:
    """The name of an activation, as a function or a module."""
    if isinstance(f, torch.nn.GELU):
        return "gelu" if f.approximate == "none" else "gelu_tanh"
    names = {torch.nn.functional.relu: "relu", torch.relu: "relu", torch.nn.functional.gelu: "gelu", torch.nn.functional.silu: "silu"}
    return {torch.nn.ReLU: "relu", torch.nn.SiLU: "silu"}.get(type(f)) if isinstance(f, torch.nn.Module) else names.get(f)


def _problem(module: torch.nn.Module) -> str:
    """Why a module of a kind that can be quantised cannot be, or ""."""
    if isinstance(module, (torch.nn.LayerNorm, torch.nn.RMSNorm)) and len(module.normalized_shape) != 1:
        return "it normalises over more than the last dimension"
    if isinstance(module, torch.nn.Softmax) and module.dim != -1:
        return "it is not over the last dimension (dim=-1)"
    if isinstance(module, torch.nn.Embedding) and (module.max_norm is not None or module.scale_grad_by_freq):
        return "max_norm changes its weight"
    if isinstance(module, torch.nn.MultiheadAttention) and (module.bias_k is not None or module.add_zero_attn):
        return "it has bias_k or add_zero_attn"
    if isinstance(module, torch.nn.TransformerEncoderLayer):
        if _activation(module.activation) is None:
            return f"its activation is {getattr(module.activation, '__name__', type(module.activation).__name__)}; relu, gelu and silu have tables"
        return _problem(module.self_attn)
    return ""


def _joined(name: str, own: str) -> str:
    return f"{name}.{own}" if name and own else name or own


class _Maker:
    """Makes BCT's modules of torch's; a weight that several have becomes one ShiftMatrix."""

    def __init__(self, bits, block, energies):
        self.bits, self.block, self.energies, self.matrices = bits, block, energies, {}

    def matrix(self, weight, name):
        key = (weight.data_ptr(), tuple(weight.shape))
        if key not in self.matrices:
            self.matrices[key] = ShiftMatrix(weight, self.bits, self.block, self.energies.get(name))
        return self.matrices[key]

    def linear(self, layer, name):
        return BctLinear(self.matrix(layer.weight, name), layer.bias)

    def norm(self, layer, name):
        eps = layer.eps if layer.eps is not None else torch.finfo(torch.float32).eps
        return BctNorm(layer.weight, getattr(layer, "bias", None), eps, isinstance(layer, torch.nn.LayerNorm))

    def embedding(self, layer, name):
        return BctEmbedding(self.matrix(layer.weight, name), layer.weight.dtype)

    def attention(self, layer, name, own=False):
        """``own``: keys and values are the queries, whose energies are then theirs, too."""
        weights = layer.in_proj_weight.chunk(3) if layer.in_proj_weight is not None else (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
        biases = layer.in_proj_bias.chunk(3) if layer.in_proj_bias is not None else (None,) * 3
        energies = self.energies.get(name), *(self.energies.get(name if own else None),) * 2
        three = [BctLinear(ShiftMatrix(w, self.bits, self.block, e), b) for w, b, e in zip(weights, biases, energies)]
        return BctAttention(*three, self.linear(layer.out_proj, None), layer.num_heads, layer.batch_first)

    def encoder_layer(self, layer, name):
        return BctEncoderLayer(self.attention(layer.self_attn, _joined(name, "self_attn"), True), self.linear(layer.linear1, _joined(name, "linear1")),
                               self.linear(layer.linear2, _joined(name, "linear2")), self.norm(layer.norm1, name), self.norm(layer.norm2, name), BctActivation(_activation(layer.activation)), layer.norm_first)

    def activation(self, layer, name):
        return BctActivation(_activation(layer))

    def softmax(self, layer, name):
        return BctSoftmax()


#: torch's class -> what makes ours; exact classes only.
_KINDS = {torch.nn.Linear: _Maker.linear, torch.nn.LayerNorm: _Maker.norm, torch.nn.RMSNorm: _Maker.norm, torch.nn.Embedding: _Maker.embedding,
          torch.nn.MultiheadAttention: _Maker.attention, torch.nn.TransformerEncoderLayer: _Maker.encoder_layer, torch.nn.GELU: _Maker.activation,
          torch.nn.SiLU: _Maker.activation, torch.nn.ReLU: _Maker.activation, torch.nn.Softmax: _Maker.softmax}


def _walk(module, name, filter, chosen, floats):
    """Outermost modules to replace; ValueError for one that has weights and cannot be."""
    if type(module) in _KINDS and (filter is None or filter(name, module)):
        if problem := _problem(module):
            raise ValueError(f"bct cannot quantise {name or 'model'!r}, a {type(module).__name__}: {problem}; leave it out with filter=")
        chosen[name] = module
        return
    if list(module.parameters(recurse=False)):
        if filter is None or filter(name, module):
            raise ValueError(f"bct cannot quantise {f'{name!r}' if name else 'the model itself (its name is empty)'}, a {type(module).__name__} with Parameters of its own; it knows "
                             f"{', '.join(kind.__name__ for kind in _KINDS)}. Leave it in floats with filter=")
        floats[name] = type(module).__name__
    elif not list(module.children()):
        floats[name] = type(module).__name__
    for child_name, child in module._modules.items():
        if child is not None:
            _walk(child, _joined(name, child_name), filter, chosen, floats)


def quantize(model: torch.nn.Module, bits: int = 4, block: int = 128, calibration: Iterable | None = None,
             filter: Callable[[str, torch.nn.Module], bool] | None = None) -> tuple[torch.nn.Module, Report]:
    """Quantises a trained transformer block, or any tree of modules, to block-wise shift-quantised integers, in place where it can.

    Replaced are exact nn.TransformerEncoderLayer, MultiheadAttention, Linear, Embedding, LayerNorm, RMSNorm, GELU, SiLU, ReLU and Softmax: the
    outermost that are found, so that a TransformerEncoderLayer runs in integers throughout. Modules without Parameters that are none of these
    (Dropout, containers) stay. The result only infers: no gradient, and dropout does nothing inside a replaced module.

    Args:
        model: the module itself may be one of these; then the result is another module.
        bits: of a weight, 2, 3, 4 or 8. block: neighbours along a row that share a shift (0: a whole row); a multiple of 8.
        calibration: batches for the model (a tensor, a tuple of positional or a dict of keyword arguments each): a weight's error then counts as
            much as the mean square of what it is multiplied by, when shifts are chosen. By default all count alike.
        filter: ``filter(name, module)`` says what to quantise, the model itself being ''; by default everything, the head too.

    Returns:
        (the quantised module, a :class:`Report`).

    Raises:
        TypeError: if model is not a Module. ValueError: for bits or block, a module with Parameters that is none of these, an activation without a
            table, a weight that is not finite, calibration without a batch, or nothing to quantise (nothing is changed then).
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model is {type(model).__name__}; it must be a torch.nn.Module")
    if bits not in CODES:
        raise ValueError(f"bits is {bits!r}; it must be one of {', '.join(map(str, CODES))}")
    if not (isinstance(block, int) and block >= 0 and block % 8 == 0):
        raise ValueError(f"block is {block!r}; it must be a multiple of 8, or 0 for a whole row")
    report, chosen = Report(bits, block), {}
    _walk(model, "", filter, chosen, report.floats)
    if not chosen:
        raise ValueError("model has nothing to quantise that filter, if given, accepts")
    for name, module in chosen.items():
        for own, t in module.named_parameters():
            if not t.isfinite().all():
                raise ValueError(f"{name + '.' if name else ''}{own} has a nan or an inf, which shift-quantised integers cannot hold")
    energies = {}
    if calibration is not None:
        linears = {_joined(name, own): m for name, module in chosen.items() for own, m in module.named_modules()
                   if type(m) is torch.nn.Linear or type(m) is torch.nn.MultiheadAttention and m.in_proj_weight is not None}
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # which would call no layer of a TransformerEncoderLayer
        try:
            energies = input_energy(model, linears, calibration)
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
    report.bytes_before = _held(model)
    maker, made = _Maker(bits, block, energies), {}
    for name, module in chosen.items():
        if module not in made:
            made[module] = _KINDS[type(module)](maker, module, name).train(module.training)
        report.layers[name] = (type(module).__name__, _held(module), _held(made[module]))
    for name, module in chosen.items():
        if not name:
            model = made[module]
        else:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, made[module])
    leave_fast_path(model)
    report.bytes_after = _held(model)
    return model, report
