"""QuantizedWeight: a weight that trains while it is stored in a few bits."""
from __future__ import annotations

import torch
from torch.utils._pytree import tree_map

from gradmill import formats
from gradmill.formats import Format
from gradmill.ops.quant import dequantize, quantize
from gradmill.reference.optim import as_matrix

__all__ = ["QuantizedWeight", "nbytes"]

aten = torch.ops.aten


class QuantizedWeight(torch.Tensor):
    """A tensor stored in a quantised format that looks like a float tensor to autograd.

    An integer Parameter cannot require a gradient; this wrapper can. Its dtype (float32, bfloat16 or float16) is the
    gradient's; ``codes``, ``scales`` and ``zeros`` are what exists in memory (see :class:`gradmill.formats.Format`; a
    weight of more than two dimensions counts as ``flatten(1)``). gradmill's layers and optimizers read and write the
    codes; any other torch op sees the dequantised values, and one that writes into the weight (``copy_``, ``mul_``,
    ``nn.init.normal_``, ``w[i] = x``, ``w.data = x``) quantises what it wrote, rounding to nearest. Two things follow.
    Train it with gradmill.optim, which rounds stochastically: under torch.optim updates smaller than half a step vanish.
    And a view (``w[0]``, ``w.t()``, ``w.chunk(2)``) is a copy of values: what is written into it does not reach the
    weight, which concerns ``nn.init.orthogonal_`` and ``sparse_`` too (initialise, then quantise).

    ``torch.load`` of a checkpoint that holds one needs ``import gradmill`` first.

    Build one with :meth:`quantize`.
    """

    @staticmethod
    def __new__(cls, codes, scales, zeros, format: Format, shape, dtype, requires_grad=False):
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=codes.device, requires_grad=requires_grad)

    def __init__(self, codes, scales, zeros, format: Format, shape, dtype, requires_grad=False):
        self.codes, self.scales, self.zeros, self.format = codes, scales, zeros, format

    @classmethod
    def quantize(cls, x: torch.Tensor, format: str | Format = "int8", requires_grad: bool | None = None) -> "QuantizedWeight":
        """x (float32, bfloat16 or float16, at least 2-D) in ``format``, rounded to nearest.

        Raises:
            TypeError: for another dtype.
            ValueError: for fewer than two dimensions, or a format that is not quantised.
        """
        format = formats.get(format)
        if not format.blocked:
            raise ValueError(f"format is {format}; a QuantizedWeight needs a quantised one")
        if formats.float_code(x.dtype) is None:
            raise TypeError(f"x is {x.dtype}; a QuantizedWeight needs float32, bfloat16 or float16")
        if x.dim() < 2:
            raise ValueError(f"x has shape {tuple(x.shape)}; a QuantizedWeight needs at least two dimensions")
        if isinstance(x, QuantizedWeight):
            x = x.dequantize()
        stored = quantize(as_matrix(x.detach()), format.code, format.block)
        return cls(*stored, format, x.shape, x.dtype, x.requires_grad if requires_grad is None else requires_grad)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The values as a plain tensor of this weight's shape, in its dtype or ``dtype``. No gradient."""
        columns = self.shape[1:].numel()
        return dequantize(self.codes, self.scales, self.zeros, self.format.code, self.format.block, columns,
                          dtype or self.dtype).view(self.shape)

    def _like(self, inner, dtype=None) -> "QuantizedWeight":
        return QuantizedWeight(*(inner(t) for t in (self.codes, self.scales, self.zeros)), self.format, self.shape, dtype or self.dtype)

    def _assign(self, value: torch.Tensor):
        """In place: this weight becomes ``value``."""
        if isinstance(value, QuantizedWeight) and value.format == self.format:
            stored = value.codes, value.scales, value.zeros
        else:
            value = value.dequantize() if isinstance(value, QuantizedWeight) else value
            value = value.to(device=self.device, dtype=value.dtype if formats.float_code(value.dtype) else torch.float32)
            stored = quantize(as_matrix(value.expand(self.shape)), self.format.code, self.format.block)
        for mine, theirs in zip((self.codes, self.scales, self.zeros), stored):
            mine.copy_(theirs)

    def share_memory_(self):
        for tensor in (self.codes, self.scales, self.zeros):
            tensor.share_memory_()
        return self

    def is_shared(self) -> bool:
        return self.codes.is_shared()

    def storage(self):
        # What safetensors asks for last, to see whether tensors share memory: torch's own answer is a null pointer's error without a name.
        raise RuntimeError("a QuantizedWeight has no storage of its own but codes, scales and zeros, and a safetensors file cannot hold it: call gradmill.state_in_parts(model) "
                           "after convert, or write the state_dict with torch.save, or w.dequantize() in its place, which a layer packs again when it is loaded")

    def __tensor_flatten__(self):
        return ["codes", "scales", "zeros"], (self.format, self.dtype)

    @staticmethod
    def __tensor_unflatten__(inner, meta, outer_size, outer_stride):
        return QuantizedWeight(inner["codes"], inner["scales"], inner["zeros"], meta[0], outer_size, meta[1])

    def __repr__(self, *, tensor_contents=None):
        return (f"QuantizedWeight({tuple(self.shape)}, {self.format.code} in blocks of {self.format.block or 'a row'}, "
                f"dtype={self.dtype}, device='{self.device}', requires_grad={self.requires_grad})")

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def data(self):
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, value):
        if isinstance(value, QuantizedWeight):
            torch.Tensor.data.__set__(self, value)
            self.codes, self.scales, self.zeros, self.format = value.codes, value.scales, value.zeros, value.format
        else:
            self._assign(value)

    def __setitem__(self, index, value):
        values = self.dequantize()
        values[index] = value.dequantize() if isinstance(value, QuantizedWeight) else value
        self._assign(values)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (aten.detach.default, aten.alias.default):
            return args[0]._like(lambda t: t)
        if func is aten.clone.default:
            return args[0]._like(torch.clone)
        if func is aten._to_copy.default:
            dtype = kwargs.get("dtype") or args[0].dtype
            device = kwargs.get("device")
            if formats.float_code(dtype):
                blocking = kwargs.get("non_blocking", False)
                return args[0]._like(lambda t: t.to(device=device, non_blocking=blocking, copy=True), dtype)
        if func is aten.copy_.default and isinstance(args[0], QuantizedWeight):
            args[0]._assign(args[1])
            return args[0]
        # Anything else works on the values; what it writes into a QuantizedWeight is quantised afterwards.
        values = {}

        def plain(x):
            if isinstance(x, QuantizedWeight):
                return values.setdefault(id(x), (x, x.dequantize()))[1]
            return x

        result = func(*tree_map(plain, args), **tree_map(plain, kwargs))
        for argument, schema in zip(args, func._schema.arguments):
            _store_written(schema, argument, values)
        for schema in func._schema.arguments:
            if schema.name in kwargs:
                _store_written(schema, kwargs[schema.name], values)
        if func._schema.is_mutable:  # an in-place op returns the weight it was given, not the values it worked on
            weights = {id(value): weight for weight, value in values.values()}
            result = tree_map(lambda x: weights.get(id(x), x), result)
        return result


def _store_written(schema, argument, values: dict):
    """Quantises what an op wrote into one of its arguments: a QuantizedWeight, or a list with some in it."""
    if schema.alias_info is None or not schema.alias_info.is_write:
        return
    for x in argument if isinstance(argument, (list, tuple)) else (argument,):
        if id(x) in values:
            x._assign(values[id(x)][1])


torch.serialization.add_safe_globals([QuantizedWeight, Format])


def nbytes(tensor: torch.Tensor) -> int:
    """Bytes that a tensor really holds: of a QuantizedWeight its codes, scales and zero points."""
    if isinstance(tensor, QuantizedWeight):
        return tensor.codes.nbytes + tensor.scales.nbytes + tensor.zeros.nbytes
    return tensor.nbytes
