"""Linear layers and convolutions of BiPer: binary weights as the sign of a sine, and their packed form."""
from __future__ import annotations

import contextlib

import torch

from gradmill.autograd.window import Window, own
from gradmill.formats import Format
from gradmill.functional import _output_dtype
from gradmill.nn._layer import look_at_signs
from gradmill.ops.binary import matmul_binary, pack_signs

_EPSILON = 1e-5  # beside a sample's variance


class Sign(torch.autograd.Function):
    """+1 or -1, +1 for 0; nan where x is not finite, as in packed products. Gradient: straight through, or with ``soft`` times max(0, 2 - 2|x|)."""

    @staticmethod
    def forward(ctx, x, soft):
        ctx.save_for_backward(*[x] * soft)
        return torch.where(x < 0, -1.0, 1.0) + (x - x)

    @staticmethod
    def backward(ctx, d):
        for x in ctx.saved_tensors:
            d = d * (2 - 2 * x.abs()).clamp(min=0)
        return d, None


class Infers(torch.autograd.Function):
    """y, which was made of x. A gradient that ended here in silence would leave the layers before it untrained: backward says so."""

    @staticmethod
    def forward(ctx, x, y, layer):
        ctx.layer = layer
        return own(y)

    @staticmethod
    def backward(ctx, d):
        raise RuntimeError(f"{ctx.layer} only infers and has no gradient; train before, or run it on x.detach()")


class _Products:
    """What the trained and the packed form of either layer share: ``_signs``, and one of ``_multiply`` and ``_multiply_packed``."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input float32, bfloat16 or float16, shaped as the plain layer's -> the plain layer's shape, in autocast's dtype if autocast is on for
        the device, else in input's. Products are fp32: with binary weights they are exact, and so are scale and bias."""
        dtype, device = _output_dtype(input), input.device.type
        with torch.autocast(device, enabled=False) if device != "meta" else contextlib.nullcontext():
            return self._forward(input).to(dtype)


class _Linear:
    @staticmethod
    def _spread(scales):
        return scales.view(-1)

    def _prepare(self, x):
        return x

    def _multiply(self, signs, weight):
        return torch.nn.functional.linear(signs, weight)

    def _multiply_packed(self, signs, scales, bias):
        rows = signs.reshape(-1, self.in_features)
        y = matmul_binary(*_pair(pack_signs(rows), (self.bits, scales), self.in_features), bias, torch.float32)
        return y.view(*signs.shape[:-1], self.out_features)


class _Conv2d:
    @staticmethod
    def _spread(scales):
        return scales.view(-1, 1, 1)

    def _prepare(self, x):
        """Padded as padding_mode says; zeros, whose sign is +, come after the sign."""
        return x if self.padding_mode == "zeros" else torch.nn.functional.pad(x, self._reversed_padding_repeated_twice, self.padding_mode)

    def _padded(self, signs):
        return torch.nn.functional.pad(signs, self._reversed_padding_repeated_twice, value=1.0) if self.padding_mode == "zeros" else signs

    def _multiply(self, signs, weight):
        return torch.nn.functional.conv2d(self._padded(signs), weight, None, self.stride, 0, self.dilation, self.groups)

    def _multiply_packed(self, signs, scales, bias):
        image = self._padded(signs if signs.dim() == 4 else signs[None]).to(torch.bfloat16)
        window = Window(self.kernel_size, self.stride, (0, 0), self.dilation, self.groups)
        oh, ow = window.output(image.shape)
        columns, size, parts = self.in_channels // self.groups * self.kernel_size[0] * self.kernel_size[1], self.out_channels // self.groups, []
        for group in range(self.groups):
            rows = window.patches(image, group).quantize(Format("sign"), False)[:2]
            own = slice(group * size, (group + 1) * size)
            parts.append(matmul_binary(*_pair((self.bits[own].contiguous(), scales[own].contiguous()), rows, columns), None if bias is None else bias[own], torch.float32, oh * ow))
        y = (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).view(len(image), self.out_channels, oh, ow)
        if image.is_contiguous(memory_format=torch.channels_last) and not image.is_contiguous():
            y = y.contiguous(memory_format=torch.channels_last)
        return y if signs.dim() == 4 else y[0]


def _pair(a, b, columns):
    """matmul_binary's first arguments."""
    return a[0], b[0].contiguous(), columns, a[1], b[1].contiguous()


class _BiPer(_Products):
    """Mixin of the layers that train, before a torch layer, which ``_plain`` names."""

    def _adopt(self, omega):
        if not 0 < omega < float("inf"):
            raise ValueError(f"omega is {omega!r}; it must be positive and finite")
        self.omega, self.stage = float(omega), 1
        self.alpha = torch.nn.Parameter(self._first_alpha(), self.weight.requires_grad)

    def _first_alpha(self):
        return self.weight.detach().to(torch.float32).flatten(1).abs().mean(1, keepdim=True)

    @classmethod
    def _from(cls, layer: torch.nn.Module, omega: float):
        new = cls.__new__(cls)
        new.__dict__ = layer.__dict__.copy()
        for name in ("_parameters", "_buffers", "_modules"):
            new.__dict__[name] = layer.__dict__[name].copy()
        new._adopt(omega)
        return new

    def reset_parameters(self):
        super().reset_parameters()
        if "alpha" in self._parameters:  # not yet there when torch's constructor calls
            with torch.no_grad():
                self.alpha.copy_(self._first_alpha())

    def periodic_weight(self) -> torch.Tensor:
        """sin(omega W), fp32, in stage 2 its sign: what products see, before alpha."""
        wave = (self.omega * self.weight.to(torch.float32)).sin()
        return Sign.apply(wave, False) if self.stage == 2 else wave

    def _forward(self, x):
        x = x.to(torch.float32)
        look_at_signs(self, x)
        if self.training:  # a row of a linear layer, an image of a convolution
            axes = [-3, -2, -1][-self.weight.dim() + 1:]
            x = x / (x.var(axes, correction=0, keepdim=True) + _EPSILON).sqrt()
        y = self._multiply(Sign.apply(self._prepare(x), True), self.periodic_weight()) * self._spread(self.alpha.to(torch.float32))
        return y if self.bias is None else y + self._spread(self.bias.to(torch.float32))

    def get_extra_state(self):
        return torch.tensor([self.omega, self.stage], dtype=torch.float64)

    def set_extra_state(self, state):
        self.omega, self.stage = float(state[0]), int(state[1])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, omega={self.omega:g}, stage={self.stage}"


class _Binary(_Products):
    """Mixin of the packed layers, before a torch layer that has lost its weight."""

    @classmethod
    @torch.no_grad()
    def _from(cls, layer: _BiPer):
        new = cls.__new__(cls)
        new.__dict__ = {k: v for k, v in layer.__dict__.items() if k not in ("omega", "stage")}
        new._buffers, new._modules = layer._buffers.copy(), layer._modules.copy()
        new._parameters = {} if layer.bias is None else {"bias": torch.nn.Parameter(layer.bias.detach(), False)}
        new._parameters.setdefault("bias", None)
        bits, nans = pack_signs(layer.periodic_weight().flatten(1))
        new.register_buffer("bits", bits)
        new.register_buffer("alpha", nans * layer.alpha.to(torch.float32))
        return new

    def _forward(self, x):
        with torch.no_grad():
            y = self._multiply_packed(Sign.apply(self._prepare(x), False), self.alpha.to(torch.float32), self.bias)
        return Infers.apply(x, y, type(self).__name__)


class BiPerLinear(_Linear, _BiPer, torch.nn.Linear):
    """torch.nn.Linear with binary inputs and weights that are a wave's: y = alpha (sign(x) s(omega W)^T) + b.

    Vargas et al., "BiPer: Binary Neural Networks using a Periodic Function". s is the sine in stage 1, the sine's sign in stage 2 (see
    gradmill.biper.binarize); the gradient of W is omega cos(omega W) times that of s in both. The gradient of sign(x) is max(0, 2 - 2|x|); in
    training x is first divided by its row's standard deviation, which changes no sign. Signs of 0 are +.

    Args:
        in_features, out_features, bias, device, dtype: as in torch.nn.Linear. omega: the frequency, positive.

    Beside the plain layer's parameters ``alpha`` (out, 1) fp32, at first the mean magnitude of a row of W; omega and stage are in the ``state_dict``.
    """

    def __init__(self, in_features, out_features, bias=True, device=None, dtype=None, omega=20.0):
        super().__init__(in_features, out_features, bias, device, dtype)
        self._adopt(omega)


class BiPerConv2d(_Conv2d, _BiPer, torch.nn.Conv2d):
    """torch.nn.Conv2d in the same way: see :class:`BiPerLinear`. In training x is divided by its image's standard deviation. Zero padding counts as +.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as in torch.nn.Conv2d.
        omega: the frequency, positive.
    """

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, bias=True, padding_mode="zeros",
                 device=None, dtype=None, omega=20.0):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype)
        self._adopt(omega)


class BinaryLinear(_Linear, _Binary, torch.nn.Linear):
    """A packed :class:`BiPerLinear` of stage 2, from gradmill.biper.pack: the same outputs as in its eval mode, exactly. It only infers.

    Buffers: ``bits`` (out, ceil(in / 8)) uint8 as gradmill.ops.pack_signs makes them, ``alpha`` (out, 1) fp32; and the bias.
    """


class BinaryConv2d(_Conv2d, _Binary, torch.nn.Conv2d):
    """A packed :class:`BiPerConv2d`: see :class:`BinaryLinear`; ``bits`` (out, ceil(in / groups * kh * kw / 8))."""
