"""Recipes: which format each of a linear layer's three matmuls uses, and how its weight is stored.

A new recipe is data: construct a :class:`Recipe` and pass it wherever a recipe's name is taken. To change one thing of a
known one: ``dataclasses.replace(gradmill.recipes.INT8, name="mine", gradient_rounding="stochastic")``.
"""
from __future__ import annotations

from dataclasses import dataclass

from gradmill.formats import FORMATS, Format

__all__ = ["Matmul", "Recipe", "RECIPES", "get", "INT8", "INT8_SWITCHBACK", "weight_only", "INT7", "FP8_TENSOR", "FP8_DELAYED", "FP8_ROW", "FP8_ROW_POW2", "FP8_BLOCK", "INT4", "FP4", "MXFP4",
           "BF16", "W8", "W4", "W3", "W2", "QAT_W4", "QAT_W3", "QAT_W2", "INT8_WEIGHTS", "ONE_BIT_FQT"]


@dataclass(frozen=True)
class Matmul:
    """One product's operand formats, each quantised along the dimension that is summed; None: as it is.

    Args:
        left, right: X and W for Y = X W^T; dY and W for dX = dY W; dY and X for dW = dY^T X.
        hadamard: both operands first go through a random Hadamard transform of this size along the sum (0: none).
    """

    left: Format | None
    right: Format | None
    hadamard: int = 0


@dataclass(frozen=True)
class Recipe:
    """What a linear layer's matmuls compute in.

    Args:
        name: how users call it.
        y, dx, dw: a :class:`Matmul`, the name of a format for both operands, or None (the input's precision), for
            Y = X W^T, dX = dY W, dW = dY^T X. "forward" for dx or dw: dY as it is times the very operand that the
            forward product stored (straight-through).
        weight: format the weight is stored in (a :class:`gradmill.QuantizedWeight`); None keeps the Parameter.
        frozen: a stored weight does not train (weight-only recipes; its step sizes may, see ``nn.Linear.train_steps_``).
        gradient_rounding: "nearest" or "stochastic" rounding of dY.
        history: a tensor's scale comes from its largest magnitude in so many steps before (0: in this one), kept in the layer; what
            exceeds it saturates. For products of whole-tensor formats.
        fake: (bits, group): the products see the weight as ``gradmill.functional.fake_quantize`` makes it, with trained steps
            and zero points; the weight itself stays a float Parameter.
        one_bit: (bits, pruning): forward multiplies the signs of X and W, under a trained scale for each output channel; dX and dW multiply
            signs with a gradient in that many bits (1 to 4), of which "sample" or "top" keeps a share of 1 / bits, "none" everything.
    """

    name: str
    y: Matmul | str | None = None
    dx: Matmul | str | None = None
    dw: Matmul | str | None = None
    weight: Format | None = None
    frozen: bool = False
    gradient_rounding: str = "nearest"
    fake: tuple[int, int] | None = None
    history: int = 0
    one_bit: tuple[int, str] | None = None
    #: "int8" or "int7" where both operands of all three products are that code under a scale for each row and nothing else is asked for: a
    #: linear layer is then one call forward and one backward. Not a field: found once, here.
    exact = None

    def __post_init__(self):
        for field in ("y", "dx", "dw"):
            value = getattr(self, field)
            if isinstance(value, str) and value in _NAMED:
                object.__setattr__(self, field, Matmul(_NAMED[value], _NAMED[value]))
            elif not (value is None or isinstance(value, Matmul) or value == "forward" and field != "y"):
                raise ValueError(f"{field} is {value!r}; it must be None, a Matmul, {'or ' if field == 'y' else ''}one of "
                                 f"{', '.join(map(repr, _NAMED))}{'' if field == 'y' else ', or forward'}")
        if "forward" in (self.dx, self.dw) and not isinstance(self.y, Matmul):
            raise ValueError(f"y is {self.y!r}; dx or dw 'forward' needs a Matmul whose operands can be kept")
        if self.gradient_rounding not in ("nearest", "stochastic"):
            raise ValueError(f"gradient_rounding is {self.gradient_rounding!r}; it must be 'nearest' or 'stochastic'")
        if self.history < 0 or self.history and not all(
                isinstance(m, Matmul) and not m.hadamard and all(f is not None and f.rows == f.block == 0 and f.scale == "fp32" for f in (m.left, m.right))
                for m in (self.y, self.dx, self.dw)):
            raise ValueError(f"history is {self.history!r}; it must be 0, or positive where all operands of y, dx and dw have one scale for the whole tensor")
        if self.fake is not None:
            bits, group = self.fake
            if not (2 <= bits <= 8 and group >= 0 and group % 2 == 0):
                raise ValueError(f"fake is {self.fake!r}; it must be (2 to 8 bits, an even group or 0 for a whole row)")
            if self.weight is not None:
                raise ValueError(f"weight is {self.weight!r}; it must be None where fake is given")

        if self.one_bit is not None:
            bits, pruning = self.one_bit
            if not (1 <= bits <= 4 and pruning in ("sample", "top", "none")):
                raise ValueError(f"one_bit is {self.one_bit!r}; it must be (1 to 4 bits, 'sample', 'top' or 'none')")
            if (self.y, self.dx, self.dw, self.weight, self.fake) != (None,) * 5:
                raise ValueError(f"one_bit is {self.one_bit!r}; y, dx, dw, weight and fake must be None where it is given")
        for format in (_ROW8, _NAMED["int7"]):
            if all(isinstance(m, Matmul) and m.left == m.right == format and not m.hadamard for m in (self.y, self.dx, self.dw)) and not self.history:
                object.__setattr__(self, "exact", format.code)

    def saved_bytes(self, tokens: int, columns: int, itemsize: int) -> int:
        """Bytes of X that forward keeps for dW: exact, for (tokens, columns) of that item size."""
        if self.frozen:
            return 0
        if self.one_bit is not None:  # signs, a scale for each row and column
            return tokens * -(-columns // 8) + 4 * (tokens + columns)
        if self.dw == "forward" and self.y.left is not None:
            return self.y.left.nbytes(tokens, columns)
        if isinstance(self.dw, Matmul) and self.dw.right is not None:
            return self.dw.right.nbytes(columns, tokens)
        return tokens * columns * itemsize


_NAMED = {"int8": FORMATS["int8_row"], "int7": FORMATS["int7_row"], "e4m3": FORMATS["e4m3_row"], "bf16": FORMATS["bf16"]}
_ROW8, _TENSOR8 = FORMATS["int8_row"], FORMATS["int8_tensor"]
_E4M3, _E5M2 = FORMATS["e4m3_tensor"], FORMATS["e5m2_tensor"]
_LINE, _SQUARE = FORMATS["e4m3_1x128"], FORMATS["e4m3_128x128"]
_FP4, _FP4_SQUARE, _MXFP4 = FORMATS["nvfp4"], FORMATS["nvfp4_16x16"], FORMATS["mxfp4"]

#: Row-wise dynamic INT8 in all three matmuls (torchao's INT8 mixed-precision training). The weight stays a float Parameter.
INT8 = Recipe("int8", "int8", "int8", "int8")
#: The same with codes in [-63, 63], whose products add up in 16 bits: faster where the processor has no INT8 dot product.
INT7 = Recipe("int7", "int7", "int7", "int7")
#: Wortsman et al., "Stable and low-precision training for large-scale vision-language models" (SwitchBack): one scale for
#: the whole weight, dW in high precision.
INT8_SWITCHBACK = Recipe("int8_switchback", Matmul(_ROW8, _TENSOR8), Matmul(_ROW8, _TENSOR8))
#: Micikevicius et al., "FP8 Formats for Deep Learning": e4m3 for X and W, e5m2 for dY, one dynamic scale per tensor.
FP8_TENSOR = Recipe("fp8_tensor", Matmul(_E4M3, _E4M3), Matmul(_E5M2, _E4M3), Matmul(_E5M2, _E4M3))
#: The same with delayed scaling: the scale of X, W and dY from the largest magnitude of 16 steps (Micikevicius et al.; the history
#: is that of NVIDIA's Transformer Engine). Another length: ``dataclasses.replace(FP8_DELAYED, history=1024)``.
FP8_DELAYED = Recipe("fp8_delayed", Matmul(_E4M3, _E4M3), Matmul(_E5M2, _E4M3), Matmul(_E5M2, _E4M3), history=16)
#: e4m3 everywhere, a scale per row of either operand.
FP8_ROW = Recipe("fp8_row", "e4m3", "e4m3", "e4m3")
#: The same with scales rounded up to powers of two: dividing by them rounds nothing, at the price of half a bit of range on average.
FP8_ROW_POW2 = Recipe("fp8_row_pow2", *(Matmul(FORMATS["e4m3_row_pow2"], FORMATS["e4m3_row_pow2"]) for _ in range(3)))
#: DeepSeek-AI, "DeepSeek-V3 Technical Report", 3.3: X and dY in 1x128 blocks, W in 128x128, dW over groups of 128 tokens.
FP8_BLOCK = Recipe("fp8_block", Matmul(_LINE, _SQUARE), Matmul(_LINE, _SQUARE), Matmul(_LINE, _LINE))
#: Huang et al., "Stable-SPAM": W in groups of 256 with a zero point, X symmetric with each group's two largest entries
#: exact, gradients straight through in high precision. The range of a group of W includes zero here.
INT4 = Recipe("int4", Matmul(FORMATS["int4_outlier"], FORMATS["int4"]), "forward", "forward")
#: NVIDIA, "Pretraining Large Language Models with NVFP4": e2m1 in blocks of 16 under e4m3 scales and one fp32 scale, W in
#: 16x16 blocks, dY rounded stochastically, 16-wide random Hadamard transforms of dW's operands.
FP4 = Recipe("fp4", Matmul(_FP4, _FP4_SQUARE), Matmul(_FP4, _FP4_SQUARE), Matmul(_FP4, _FP4, 16), gradient_rounding="stochastic")
#: OCP Microscaling formats: e2m1 in blocks of 32 under a power-of-two scale (rounded up: nothing saturates).
MXFP4 = Recipe("mxfp4", Matmul(_MXFP4, _MXFP4), Matmul(_MXFP4, _MXFP4), Matmul(_MXFP4, _MXFP4, 16), gradient_rounding="stochastic")
#: bf16 operands, fp32 sums: half of the saved activations. Where torch's own product is the faster one (CUDA, CPUs with
#: bf16 instructions) the sums are rounded to bf16 once more before they become the output's dtype.
BF16 = Recipe("bf16", "bf16", "bf16", "bf16")
#: Weight-only: the weight packed and frozen, groups of 128 (w2: 64) with a zero point; X and dX in the input's precision.
W8, W4, W3, W2 = (Recipe(name, weight=FORMATS[name], frozen=True) for name in ("w8", "w4", "w3", "w2"))
#: Chen et al., "EfficientQAT", Block-AP: float matmuls over a weight quantised on the fly, groups of 128 (qat_w2: 64),
#: weight, steps and zero points all trained.
QAT_W4, QAT_W3, QAT_W2 = (Recipe(f"qat_w{bits}", fake=(bits, group)) for bits, group in ((4, 128), (3, 128), (2, 64)))
#: INT8 matmuls over a weight that is itself stored in INT8, groups of 256 with a zero point (Zhang et al., "Q-GaLore").
INT8_WEIGHTS = Recipe("int8_weights", "int8", "int8", "int8", weight=FORMATS["int8"])
#: Gao et al., "1-Bit FQT: Pushing the Limit of Fully Quantized Training to 1-bit": signs forward (straight-through for W, within |X| <= 1 for X),
#: 4-bit gradients rounded stochastically over the range of each sample (dX) and each output channel (dW), a quarter of them kept, sampled with
#: probabilities proportional to their ranges and divided by them. ``one_bit=(4, "top")`` keeps the largest instead, as the official code does.
ONE_BIT_FQT = Recipe("one_bit_fqt", gradient_rounding="stochastic", one_bit=(4, "sample"))

RECIPES = {r.name: r for r in (INT8, INT8_SWITCHBACK, INT7, FP8_TENSOR, FP8_DELAYED, FP8_ROW, FP8_ROW_POW2, FP8_BLOCK, INT4, FP4, MXFP4, BF16, W8, W4, W3, W2, QAT_W4, QAT_W3, QAT_W2,
                               INT8_WEIGHTS, ONE_BIT_FQT)}


def weight_only(bits: int, group: int = 128, symmetric: bool = False) -> Recipe:
    """A weight-only recipe: the weight packed in ``bits`` bits and frozen, X and dX in the input's precision.

    Args:
        bits: 8, 4, 3 or 2.
        group: neighbours along a row that share a scale; 0 for a whole row. It must fill whole bytes: a multiple of 2 for 4 bits, of
            8 for 3, of 4 for 2.
        symmetric: no zero points: a byte a group saved, and less precise where a group's values lie to one side.

    Returns:
        A :class:`Recipe`, to pass wherever a recipe's name is taken; ``weight_only(4)`` is w4 by another name.

    Raises:
        ValueError: for bits or group.
    """
    if bits not in (8, 4, 3, 2):
        raise ValueError(f"bits is {bits!r}; it must be 8, 4, 3 or 2")
    return Recipe(f"w{bits}_{group or 'row'}{'_symmetric' * symmetric}", weight=Format(f"{'' if symmetric else 'u'}int{bits}", group), frozen=True)


def get(recipe: str | Recipe) -> Recipe:
    """The recipe of that name, or ``recipe`` itself. ValueError for an unknown name."""
    if isinstance(recipe, Recipe):
        return recipe
    if recipe not in RECIPES:
        raise ValueError(f"recipe is {recipe!r}; it must be a gradmill.recipes.Recipe or one of {', '.join(RECIPES)}")
    return RECIPES[recipe]
