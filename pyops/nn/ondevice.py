"""nn.Linear and nn.Conv2d with INT8 weights and activations, of which chosen input channels and the bias train."""
from __future__ import annotations

import torch

from gradmill import functional
from gradmill.autograd.ondevice import OnDevice
from gradmill.autograd.window import Window
from gradmill.formats import FORMATS, float_code
from gradmill.ops.conv import check_geometry
from gradmill.ops.quant import quantize
from gradmill.weight import QuantizedWeight


class Int8Layer(torch.nn.Module):
    """What Int8Linear and Int8Conv2d share.

    Lin et al., "On-Device Training Under 256KB Memory": weights are INT8 under a fixed scale for each output channel, inputs INT8 under one fixed scale, products sums of
    integers, and gradients too are made by INT8 products. ``weight`` (the input channels that train) and ``frozen`` (the others) are
    :class:`gradmill.QuantizedWeight`s of the format int8_row; either is None where it has no channels. Train them by :class:`gradmill.ondevice.SGD`, which keeps the scales.

    Args:
        layer: an nn.Linear or nn.Conv2d, float32, bfloat16 or float16. Its weight is rounded to nearest; a row of zeros takes the scale of the largest.
        x_scale: what a step of the input's codes is worth; inputs beyond 127 of them saturate.
        channels: indices of the input channels that train; None for all of them, () for none. All or none of a grouped convolution's.
        bias: whether the bias trains.
        cap: outputs are held to 0 .. cap (inf is a ReLU, 6 a ReLU6) by the layer itself: one bit of each output element is kept for it. None: they are not.
        qas: False leaves out quantisation-aware scaling, for comparison: see :class:`gradmill.ondevice.SGD`.

    Raises:
        TypeError: for another layer or dtype. ValueError: for an x_scale that is not positive, and for channels.
    """

    _plain: type[torch.nn.Module]

    def __init__(self, layer, x_scale: float, channels=None, bias: bool = True, cap: float | None = None, qas: bool = True):
        super().__init__()
        if type(layer) is not self._plain or float_code(layer.weight.dtype) is None:
            raise TypeError(f"layer is {type(layer).__name__} of {layer.weight.dtype}; it must be torch.nn.{self._plain.__name__} of float32, bfloat16 or float16")
        if cap is not None and not cap > 0:
            raise ValueError(f"cap is {cap!r}; it must be None or positive")
        if not x_scale > 0 or x_scale == float("inf"):
            raise ValueError(f"x_scale is {x_scale!r}; it must be positive and finite")
        weight = layer.weight.detach()
        count, of = weight.shape[1], range(weight.shape[1])
        channels = list(of if channels is None else channels)
        if sorted(set(channels)) != sorted(channels) or any(c not in of for c in channels):
            raise ValueError(f"channels is {channels}; they must be different and 0 to {count - 1}")
        if self._groups(layer) > 1 and len(channels) not in (0, count):
            raise ValueError(f"channels is {channels}; of a convolution in {layer.groups} groups all or none train")
        self._take(layer)
        self.cap, self.qas = cap, qas
        trained = torch.zeros(count, dtype=torch.bool, device=weight.device)
        trained[channels] = True
        scales = _scales(weight)
        for name, mask in (("weight", trained), ("frozen", ~trained)):
            self.register_parameter(name, torch.nn.Parameter(_int8(weight[:, mask], scales), name == "weight") if mask.any() else None)
        self.register_parameter("bias", None if layer.bias is None else torch.nn.Parameter(layer.bias.detach().clone(), bias))
        self.register_buffer("trained", trained if 0 < len(channels) < count else None)
        self.register_buffer("x_scale", torch.full((1, 1), x_scale, dtype=torch.float32, device=weight.device))
        self.train(layer.training)

    @staticmethod
    def _groups(layer) -> int:
        return getattr(layer, "groups", 1)

    def _weights(self):
        return self.weight, self.frozen, self.bias, self.trained, self.x_scale

    def dequantize(self) -> torch.nn.Module:
        """A torch layer of the values that this one holds, all of which train; the cap is left out."""
        held = self.weight if self.weight is not None else self.frozen
        new = self._make_plain(held)
        with torch.no_grad():
            if self.trained is None:
                new.weight.copy_(held.dequantize())
            else:
                new.weight[:, self.trained] = self.weight.dequantize()
                new.weight[:, ~self.trained] = self.frozen.dequantize()
            if self.bias is not None:
                new.bias.copy_(self.bias)
        return new.train(self.training)

    def saved_bytes(self, shape, needs_x: bool = True) -> int:
        """Bytes kept for backward of an input of that shape, exact. needs_x: whether a layer before this one trains."""
        n, trains = shape[0], self.weight is not None and self.weight.requires_grad
        channels = 0 if not trains else self.weight.shape[1] * self._groups(self)
        kept = n * channels * torch.Size(shape[2:]).numel()
        if self.cap is not None and (needs_x or trains or self.bias is not None and self.bias.requires_grad):
            kept += n * -(-self.out_elements(shape) // 8)
        return kept

    def extra_repr(self) -> str:
        trained = 0 if self.weight is None else self.weight.shape[1]
        total = trained + (0 if self.frozen is None else self.frozen.shape[1])
        return f"{trained} of {total} input channels train, bias={'none' if self.bias is None else self.bias.requires_grad}, cap={self.cap}"


def _scales(weight):
    """absmax / 127 of every output channel, (out, 1) fp32, as the format int8_row has them; of one that is all zeros the largest of the others, so that it can train."""
    matrix = weight.reshape(weight.shape[0], weight.shape[1:].numel())
    scales = quantize(matrix, "int8", 0)[1]
    largest = scales.nan_to_num(0, 0, 0).max() if scales.numel() else scales.new_ones(())
    return torch.where(scales == 0, torch.where(largest > 0, largest, 1.0), scales)


def _int8(values, scales) -> QuantizedWeight:
    codes, scales, zeros = quantize(values.reshape(values.shape[0], values.shape[1:].numel()), "int8", 0, False, None, 0, scales)
    return QuantizedWeight(codes, scales, zeros, FORMATS["int8_row"], values.shape, torch.float32)


class Int8Linear(Int8Layer):
    _plain = torch.nn.Linear
    __doc__ = Int8Layer.__doc__.replace("What Int8Linear and Int8Conv2d share.", "torch.nn.Linear, all INT8; input (..., in), output (..., out) of the input's dtype.")

    def _take(self, layer):
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def _make_plain(self, held):
        return torch.nn.Linear(self.in_features, self.out_features, self.bias is not None, device=held.device, dtype=held.dtype)

    def out_elements(self, shape) -> int:
        return self.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        functional._require_tensors("Int8Linear", input=x)
        if x.dim() < 1 or x.shape[-1] != self.in_features:
            raise ValueError(f"gradmill Int8Linear: input has shape {tuple(x.shape)}; it must be (..., {self.in_features})")
        rows = x.reshape(-1, self.in_features) if x.dim() != 2 else x
        return OnDevice.apply(rows, *self._weights(), None, self.cap, self.qas).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {super().extra_repr()}"


class Int8Conv2d(Int8Layer):
    _plain = torch.nn.Conv2d
    __doc__ = Int8Layer.__doc__.replace("What Int8Linear and Int8Conv2d share.", "torch.nn.Conv2d padded with zeros, all INT8; groups are worked off one after the other.")

    def _take(self, layer):
        if layer.padding_mode != "zeros" or layer.padding == "same" and any(d * (k - 1) % 2 for d, k in zip(layer.dilation, layer.kernel_size)):
            raise ValueError(f"padding is {layer.padding!r}, {layer.padding_mode}; Int8Conv2d pads zeros, as many on either side")
        self.in_channels, self.out_channels, self.groups = layer.in_channels, layer.out_channels, layer.groups
        padding = tuple(d * (k - 1) // 2 for d, k in zip(layer.dilation, layer.kernel_size)) if layer.padding == "same" else (0, 0) if layer.padding == "valid" else layer.padding
        self.window = Window(layer.kernel_size, layer.stride, padding, layer.dilation, layer.groups)

    def _make_plain(self, held):
        return torch.nn.Conv2d(self.in_channels, self.out_channels, *self.window, bias=self.bias is not None, device=held.device, dtype=held.dtype)

    def out_elements(self, shape) -> int:
        oh, ow = self.window.output(shape)
        return self.out_channels * oh * ow

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        functional._require_tensors("Int8Conv2d", input=x)
        if x.dim() not in (3, 4) or x.shape[-3] != self.in_channels:
            raise ValueError(f"gradmill Int8Conv2d: input has shape {tuple(x.shape)}; it must be ((n,) {self.in_channels}, height, width)")
        check_geometry("Int8Conv2d", *x.shape[-2:], *self.window[:4])
        y = OnDevice.apply(x if x.dim() == 4 else x[None], *self._weights(), self.window, self.cap, self.qas)
        return y if x.dim() == 4 else y[0]

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, {', '.join(f'{k}={v}' for k, v in self.window._asdict().items())}, {super().extra_repr()}"
