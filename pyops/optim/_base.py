"""FusedOptimizer: what every gradmill optimizer shares. A subclass names its rule and its hyperparameters."""
from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.optim import Optimizer

from gradmill import formats
from gradmill.formats import Format, cached
from gradmill.ops._registry import describe, short
from gradmill.ops.optim import MAX_SCALARS, as_matrix_shape, fused_step
from gradmill.ops.quant import FLOATS, dequantize, quantize
from gradmill.optim.rules import RULES
from gradmill.reference.optim import as_matrix
from gradmill.weight import QuantizedWeight

STATES = ("fp32", "bf16", "int8")
BLOCK = 256            # elements per scale of an int8 state
MIN_ROW = 64           # rows shorter than this stay fp32: a scale per row would cost as much as it saves


# Group options that say how states are stored: a loaded checkpoint does not change them.
STORAGE = ("states", "min_quantized_numel", "rank", "bits", "group_size")


class CheckpointError(ValueError):
    """A checkpoint does not fit or is damaged. What was to be loaded into is as it was."""


class Item(NamedTuple):
    """One tensor's work in a step: what fused_step needs of it."""

    param: torch.Tensor
    grad: torch.Tensor
    state: dict
    step: int


def state_nbytes(optimizer: Optimizer) -> int:
    """Exact bytes of an optimizer's state tensors (any torch optimizer), step counters aside."""
    return sum(v.nbytes for state in optimizer.state.values() for k, v in state.items() if isinstance(v, torch.Tensor) and k != "step")


@dataclass
class _Kept:
    """Carries a state tensor past torch's load_state_dict, which would cast it to the parameter's dtype."""

    tensor: torch.Tensor


class FusedOptimizer(Optimizer):
    """Base of gradmill's optimizers.

    One native call steps all parameters of a group that share formats. Parameters may be fp32, bf16 (stochastically
    rounded), fp16 or :class:`gradmill.QuantizedWeight` (stochastically rounded); gradients fp32, bf16 or fp16. Random
    bits depend on the seed, the step, the parameter's place and the element only, and all of that is in the
    state_dict: a resumed run is bit-equal to an uninterrupted one.

    Group options every subclass has: ``states`` ("fp32", "bf16" or "int8": 8-bit codes, one fp32 scale per 256
    elements of a row), ``min_quantized_numel`` (smaller tensors keep fp32 states), ``maximize``, ``seed`` (default
    ``torch.initial_seed()``). Of torch.optim's arguments ``foreach`` and ``fused`` are accepted and ignored (the step is
    always fused), ``capturable`` and ``differentiable`` refused if True.
    """

    _step_supports_amp_scaling = True  # GradScaler hands us grad_scale and found_inf instead of unscaling itself

    def __init__(self, params, defaults: dict, *, states="fp32", min_quantized_numel=4096, maximize=False, seed=None, foreach=None, fused=None,
                 capturable=False, differentiable=False):
        for name, value in (("capturable", capturable), ("differentiable", differentiable)):
            if value:
                raise ValueError(f"{type(self).__name__}: {name}=True is not supported; gradmill's step is already fused, and runs outside autograd")
        seed = torch.initial_seed() if seed is None else seed
        if not isinstance(seed, int):
            raise TypeError(f"seed is {seed!r}; it must be an int or None")
        seed = (seed & 0xFFFFFFFFFFFFFFFF) - (1 << 64 if seed & (1 << 63) else 0)  # as an int64 holds it
        super().__init__(params, {**defaults, "states": states, "min_quantized_numel": min_quantized_numel, "maximize": maximize,
                                  "seed": seed})

    # --- what a subclass says -----------------------------------------------------------------------------
    def rule(self, group: dict) -> str:
        """The rule's name (gradmill.optim.rules.RULES) for a group."""
        raise NotImplementedError

    def check_group(self, group: dict):
        """Raises ValueError for hyperparameters out of range."""

    # --- parameters ---------------------------------------------------------------------------------------
    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_options(group)
            for p in group["params"]:
                if formats.float_code(p.dtype) is None:
                    raise TypeError(f"a parameter of shape {tuple(p.shape)} is {p.dtype}; gradmill.optim steps float32, bfloat16 and "
                                    "float16 parameters (and QuantizedWeight)")
        except Exception:
            self.param_groups.pop()
            raise

    def _check_options(self, group):
        if group["states"] not in STATES:
            raise ValueError(f"states is {group['states']!r}; it must be one of {', '.join(STATES)}")
        self.check_group(group)

    def _rng_id(self, p) -> int:
        """The parameter's order of first appearance, which numbers its random bits."""
        ids = self.__dict__.setdefault("_ids", {})
        if p not in ids:
            for group in self.param_groups:
                for q in group["params"]:
                    ids.setdefault(q, len(ids))
        return ids[p]

    def state_formats(self, group: dict, rows: int, columns: int, dims: int = 2) -> tuple[Format, ...]:
        """The formats of a (rows, columns) tensor's states under the group's ``states``."""
        rule = RULES[self.rule(group)]
        kind = group["states"]
        if kind == "int8" and (dims < 2 or columns < MIN_ROW or rows * columns < group["min_quantized_numel"]):
            kind = "fp32"
        if kind != "int8":
            return (cached(kind),) * len(rule.states)
        return tuple(cached(code, BLOCK) for code in rule.state_codes)

    def _formats_like(self, group, like) -> tuple[Format, ...]:
        """state_formats for a tensor shaped like ``like``; fp32 where its own blocks and the states' do not nest."""
        block = like.format.block if isinstance(like, QuantizedWeight) else 0
        if block and max(block, BLOCK) % min(block, BLOCK):
            group = {**group, "states": "fp32"}
        return self.state_formats(group, *as_matrix_shape(like), like.dim())

    def _new_states(self, state: dict, group: dict, like: torch.Tensor):
        """Zero states for a tensor of like's shape, named as torch names them (+ _codes, _scales when quantised)."""
        rows, columns = as_matrix_shape(like)
        for name, format in zip(RULES[self.rule(group)].states, self._formats_like(group, like)):
            if format.blocked:
                state[f"{name}_codes"] = torch.zeros(rows, format.code_columns(columns), dtype=format.code_dtype, device=like.device)
                state[f"{name}_scales"] = torch.zeros(rows, format.blocks(columns), dtype=torch.float32, device=like.device)
            else:
                state[name] = torch.zeros(like.shape, dtype=format.code_dtype, device=like.device)

    def _init_state(self, p, group):
        state = self.state[p]
        state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
        state["rng_id"] = self._rng_id(p)
        self._new_states(state, group, p)

    # --- the step -----------------------------------------------------------------------------------------
    @torch.no_grad()
    def step(self, closure=None):
        """Performs one step. ``closure`` re-evaluates the model and returns the loss, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if found_inf is not None and bool(found_inf.item()):
            return loss
        factor = 1.0 if scale is None else 1.0 / float(scale.item())
        work = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        for _, params in work:  # every reason to refuse comes before anything is changed
            for p in params:
                self._check_gradient(p)
        for group, params in work:
            states = [self.state[p] for p in params]
            for p, state in zip(params, states):
                if not state:
                    self._init_state(p, group)
            steps = [state["step"] for state in states]
            if steps:
                torch._foreach_add_(steps, 1)
            counts = torch.stack(steps).tolist() if steps else []  # one call, not one .item() each
            items = [Item(p, p.grad, state, int(count)) for p, state, count in zip(params, states, counts)]
            self._step_group(group, items, factor)
            if params:
                torch.autograd.graph.increment_version(params)  # so that autograd refuses a stale saved weight
        return loss

    def _check_gradient(self, p):
        g = p.grad
        if g.dtype in FLOATS and g.layout == torch.strided:
            return
        what = f"the gradient of a parameter of shape {tuple(p.shape)}"
        if g.layout != torch.strided:
            raise RuntimeError(f"{type(self).__name__} does not support sparse gradients: {what} is {g.layout}")
        raise TypeError(f"{what} is {g.dtype}; it must be float32, bfloat16 or float16")

    def _step_group(self, group: dict, items: list[Item], factor: float):
        self.apply_rule(group, items, factor)

    def apply_rule(self, group: dict, items: list[Item], factor: float, *, rule=None, lr=None, param_code=None, decay=True):
        """Steps ``items`` by a rule (default: the group's), one native call for all that share formats, step and device.

        param_code "delta" leaves the update in each item's fp32 param instead of stepping it (no weight decay).
        """
        name = rule or self.rule(group)
        rule = RULES[name]
        buckets = defaultdict(list)
        code_names = [f"{n}_codes" for n in rule.states]
        for item in items:
            param, grad, state, step = item
            f = param_code or (param.format if isinstance(param, QuantizedWeight) else param.dtype)
            # What is stored decides a state's format, not the group's option, which may have changed.
            stored = tuple([None if codes in state else state[n].dtype for n, codes in zip(rule.states, code_names)])
            buckets[f, stored, grad.dtype, grad.get_device(), step].append(item)
        lr = float(group["lr"]) if lr is None else lr
        options = group if decay else {**group, "weight_decay": 0.0}
        for (f, stored, _, _, step), bucket in buckets.items():
            states = [cached(code, BLOCK) if dtype is None else cached(formats.float_code(dtype)) for dtype, code in zip(stored, rule.state_codes)]
            scalars = [factor * (-1.0 if group["maximize"] else 1.0), *rule.scalars(options, step, lr)]
            scalars = torch.tensor([scalars + [0.0] * (MAX_SCALARS - len(scalars))], dtype=torch.float32, device="cpu")
            format = f if isinstance(f, Format) else cached(f if isinstance(f, str) else formats.float_code(f))
            params = [item.param for item in bucket]
            blocked = any(s.blocked for s in states)
            names = [(f"{n}_codes", f"{n}_scales") if s.blocked else (n, None) for n, s in zip(rule.states, states)]
            empty = scalars.new_empty(0)
            fused_step(
                name, [p.codes for p in params] if format.blocked else params, [p.scales for p in params] if format.blocked else [],
                [p.zeros for p in params] if format.has_zero_point else [], [item.grad for item in bucket],
                [item.state[codes] for item in bucket for codes, _ in names],
                [item.state[scales] if scales else empty for item in bucket for _, scales in names] if blocked else [],
                scalars, torch.tensor([group["seed"], step], dtype=torch.int64, device="cpu"), [item.state["rng_id"] for item in bucket],
                format.code, format.block, [s.code for s in states], BLOCK)

    # --- checkpoints --------------------------------------------------------------------------------------
    def load_state_dict(self, state_dict):
        """Loads a state_dict of this optimizer, or of the torch.optim optimizer of the same rule.

        As in torch the checkpoint's hyperparameters win, but how states are stored is this optimizer's choice
        (``states``, ``min_quantized_numel``, for projections also ``rank``, ``bits`` and ``group_size``): what was saved
        in another format is converted. Quantised states keep their dtypes (torch's own method would cast codes to the
        parameter's dtype). Raises :class:`CheckpointError` for a state that does not fit its parameter or is another
        optimizer's; the optimizer is then as it was.
        """
        state_dict = state_dict.copy()
        for hook in list(self._optimizer_load_state_dict_pre_hooks.values()):
            result = hook(self, state_dict)
            state_dict = state_dict if result is None else result
        groups = state_dict["param_groups"]
        if len(groups) != len(self.param_groups):
            raise ValueError("loaded state dict has a different number of parameter groups")
        if any(len(a["params"]) != len(b["params"]) for a, b in zip(groups, self.param_groups)):
            raise ValueError("loaded state dict contains a parameter group that doesn't match the size of optimizer's group")
        merged = [{**{k: v for k, v in mine.items() if k != "params"}, **saved, **{k: mine[k] for k in STORAGE if k in mine}}
                  for mine, saved in zip(self.param_groups, groups)]
        state = {}
        for saved, group, mine in zip(groups, merged, self.param_groups):
            try:
                self._check_options(group)
            except (TypeError, ValueError) as error:
                raise CheckpointError(f"a parameter group cannot be loaded: {error}") from None
            for index, p in zip(saved["params"], mine["params"]):
                if index in state_dict["state"]:
                    state[index] = self._adopt(dict(state_dict["state"][index]), p, group, index)
        hooks, self._optimizer_load_state_dict_pre_hooks = self._optimizer_load_state_dict_pre_hooks, type(self._optimizer_load_state_dict_pre_hooks)()
        try:
            super().load_state_dict({**state_dict, "state": state, "param_groups": merged})
        finally:
            self._optimizer_load_state_dict_pre_hooks = hooks

    def __setstate__(self, state):
        for values in state.get("state", {}).values():
            for k, v in values.items():
                if isinstance(v, _Kept):
                    values[k] = v.tensor
        super().__setstate__(state)

    def _adopt(self, saved: dict, p, group: dict, index) -> dict:
        """A saved state, checked and converted to what this group stores, its tensors wrapped in _Kept."""
        rng_id = saved.setdefault("rng_id", self._rng_id(p))
        if not isinstance(rng_id, int) or rng_id < 0:
            raise CheckpointError(f"state {index}: rng_id is {rng_id!r}; it must be an int of at least 0")
        try:
            step = float(saved.get("step", 0.0))
        except (TypeError, ValueError, RuntimeError):
            step = -1.0
        if not step >= 0:
            raise CheckpointError(f"state {index}: step is {saved['step']!r}; it must be one number of at least 0")
        saved["step"] = torch.tensor(step, dtype=torch.float32, device="cpu")
        self._adopt_states(saved, p, group, index)
        foreign = {n for rule in RULES.values() for n in rule.states} - set(RULES[self.rule(group)].states)
        foreign = sorted(k for k in saved if k.removesuffix("_codes").removesuffix("_scales") in foreign)
        if foreign:
            raise CheckpointError(f"state {index} is another optimizer's: {type(self).__name__} has no {', '.join(foreign)}")
        return {k: _Kept(v) if isinstance(v, torch.Tensor) else v for k, v in saved.items()}

    @staticmethod
    def _adopt_tensor(saved: dict, name: str, dtypes, shape, device, index) -> torch.Tensor:
        """saved[name] copied to ``device``; CheckpointError unless it is a tensor of one of ``dtypes`` and of ``shape``."""
        value = saved.pop(name, None)
        if not isinstance(value, torch.Tensor) or value.dtype not in dtypes or tuple(value.shape) != tuple(shape):
            raise CheckpointError(f"state {index}: {name} is {describe(value)}; it must be {short(dtypes)} of shape {tuple(shape)}")
        return value.detach().to(device, copy=True)

    def _adopt_states(self, saved, like, group, index):
        rows, columns = as_matrix_shape(like)
        wanted = self._formats_like(group, like)
        for name, code, format in zip(RULES[self.rule(group)].states, RULES[self.rule(group)].state_codes, wanted):
            if f"{name}_codes" in saved:
                stored = cached(code, BLOCK)
                codes = self._adopt_tensor(saved, f"{name}_codes", (stored.code_dtype,), (rows, stored.code_columns(columns)), like.device, index)
                scales = self._adopt_tensor(saved, f"{name}_scales", (torch.float32,), (rows, stored.blocks(columns)), like.device, index)
                if format.blocked:
                    saved[f"{name}_codes"], saved[f"{name}_scales"] = codes, scales
                    continue
                value = dequantize(codes, scales, scales.new_empty(0, dtype=torch.uint8), code, BLOCK, columns, torch.float32).view(like.shape)
            elif name in saved:
                value = self._adopt_tensor(saved, name, FLOATS + (torch.float64,), like.shape, like.device, index)
            else:
                raise CheckpointError(f"state {index}: neither {name} nor {name}_codes is there; got {', '.join(sorted(saved))}")
            if format.blocked:
                saved[f"{name}_codes"], saved[f"{name}_scales"], _ = quantize(as_matrix(value.to(torch.float32)), code, BLOCK)
            else:
                saved[name] = value.to(format.code_dtype)
