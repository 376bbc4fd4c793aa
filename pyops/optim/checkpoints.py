"""Optimizer checkpoints: files, and the formats of other projects."""
from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from gradmill._files import replacing
from gradmill.optim._base import CheckpointError, is_sharded

VERSION = "1"  #: of what save_optimizer writes: gradmill_format in the file's metadata


# --- files ------------------------------------------------------------------------------------------------
def _plain(x):
    """x as JSON holds it: tuples, dtypes and tensors of one element (lr, betas) are marked."""
    if isinstance(x, torch.Tensor):
        return {"tensor": x.tolist(), "dtype": str(x.dtype).removeprefix("torch.")}
    if isinstance(x, torch.dtype):
        return {"dtype": str(x).removeprefix("torch.")}
    if isinstance(x, tuple):
        return {"tuple": [_plain(v) for v in x]}
    if isinstance(x, (list, dict)):
        return [_plain(v) for v in x] if isinstance(x, list) else {"dict": {k: _plain(v) for k, v in x.items()}}
    if x is None or isinstance(x, (bool, int, float, str)):
        return x
    raise TypeError(f"an option of the optimizer is {x!r}; save_optimizer stores numbers, strings, None, dtypes, tensors and tuples, lists and dicts of them")


def _restored(x):
    if isinstance(x, list):
        return [_restored(v) for v in x]
    if not isinstance(x, dict):
        return x
    if "tensor" in x:
        return torch.tensor(x["tensor"], dtype=getattr(torch, x["dtype"]))
    if "dtype" in x:
        return getattr(torch, x["dtype"])
    return tuple(_restored(v) for v in x["tuple"]) if "tuple" in x else {k: _restored(v) for k, v in x["dict"].items()}


def save_optimizer(optimizer: torch.optim.Optimizer, path: str | os.PathLike):
    """Writes optimizer.state_dict() as a safetensors file: all of it, so that a resumed run is bit-equal.

    States are stored as they are (codes and scales). The file is written under a temporary name in the same folder, flushed
    to the disk and then renamed: an interrupted call leaves the old file. Raises TypeError for options that are no plain
    values, and for DTensor states, which are for torch.distributed.checkpoint.
    """
    from safetensors.torch import save_file

    path, saved = Path(path), optimizer.state_dict()
    tensors, rest = {}, {}
    for index, state in saved["state"].items():
        rest[str(index)] = {}
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and is_sharded(value):
                raise TypeError(f"state {index}: {name} is a DTensor; save sharded optimizers with torch.distributed.checkpoint")
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{name}"] = value.detach().contiguous()
            else:
                rest[str(index)][name] = _plain(value)
    metadata = {"gradmill_format": VERSION, "kind": "optimizer", "optimizer": type(optimizer).__name__, "state": json.dumps(rest),
                "param_groups": json.dumps(_plain(saved["param_groups"]))}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata)


def load_optimizer(optimizer: torch.optim.Optimizer, path: str | os.PathLike):
    """Loads what save_optimizer wrote into ``optimizer``, by its load_state_dict.

    Raises FileNotFoundError, and CheckpointError for a file that is no optimizer's, is damaged, has an unknown
    gradmill_format or does not fit; the optimizer is then as it was.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.fspath(path), "pt", device="cpu") as file:
            metadata = file.metadata() or {}
            if metadata.get("gradmill_format") != VERSION or metadata.get("kind") != "optimizer":
                raise CheckpointError(f"{path}: gradmill_format is {metadata.get('gradmill_format')!r} and kind {metadata.get('kind')!r}; this gradmill "
                                      f"reads optimizers of format {VERSION!r}")
            state = {int(index): {k: _restored(v) for k, v in values.items()} for index, values in json.loads(metadata["state"]).items()}
            for key in file.keys():
                index, name = key.split(".", 1)
                state[int(index)][name] = file.get_tensor(key)
            groups = _restored(json.loads(metadata["param_groups"]))
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise
    except (SafetensorError, KeyError, ValueError, AttributeError, TypeError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as an optimizer checkpoint: {type(error).__name__}: {error}") from None
    optimizer.load_state_dict({"state": state, "param_groups": groups})


# --- other projects' formats ------------------------------------------------------------------------------
BITSANDBYTES = "__bnb_optimizer_quant_state__"  # newer versions nest the quantised tensors under this key


def from_table(codes, table, scales, shape, index, name):
    """table[codes] times the scale of each block; blocks run over the flat tensor, bitsandbytes' 256, 2048 or 4096 long."""
    count = codes.numel()
    if codes.dtype != torch.uint8 or table.numel() != 256 or count != shape.numel():
        raise CheckpointError(f"state {index}: {name} has {count} {codes.dtype} codes and a table of {table.numel()}; it must have "
                              f"{shape.numel()} uint8 codes and 256 values")
    for block in (256, 2048, 4096):
        if scales.numel() == -(-count // block):
            break
    else:
        raise CheckpointError(f"state {index}: {name} has {scales.numel()} scales for {count} codes; blocks must be 256, 2048 or 4096 long")
    values = table.to(torch.float32)[codes.flatten().to(torch.int64)]
    padded = torch.nn.functional.pad(values, (0, -count % block)).view(-1, block) * scales.to(torch.float32)[:, None]
    return padded.flatten()[:count].view(shape)


def foreign_state(saved: dict, names: tuple[str, ...], shape: torch.Size, index) -> dict:
    """A state of bitsandbytes (state1, state2) or torchao (tensor subclasses) as plain fp32 tensors under this rule's names;
    any other state as it is.

    Formats as their sources describe them: bitsandbytes/optim/optimizer.py (8-bit codes, 256-value maps qmap1/2, block-wise
    absmax1/2, or plain floats for small tensors), torchao/optim/subclass_{8bit,4bit,fp8}.py (codes, scale, qmap; they decode
    themselves)."""
    saved = dict(saved)
    saved.update(saved.pop(BITSANDBYTES, None) or {})
    if "state1" in saved:
        for number, name in enumerate(names[:2], 1):
            value = saved.pop(f"state{number}", None)
            if not isinstance(value, torch.Tensor):
                raise CheckpointError(f"state {index}: a bitsandbytes state without state{number}, which {name} is")
            table, scales = saved.pop(f"qmap{number}", None), saved.pop(f"absmax{number}", None)
            if value.dtype == torch.uint8:
                if not isinstance(table, torch.Tensor) or not isinstance(scales, torch.Tensor):
                    raise CheckpointError(f"state {index}: a bitsandbytes state without qmap{number} or absmax{number}: only its block-wise 8-bit states load")
                value = from_table(value, table, scales, shape, index, name)
            saved[name] = value
        for extra in [k for k in saved if k.startswith(("state", "qmap", "absmax", "max", "new_max", "gnorm_vec", "unorm_vec"))]:
            del saved[extra]
    for name in names:
        if isinstance(saved.get(name), torch.Tensor) and hasattr(saved[name], "tensor_attrs"):
            try:
                saved[name] = saved[name].dequantize().to(torch.float32)
            except Exception as error:
                raise CheckpointError(f"state {index}: {name} is a {type(saved[name]).__name__} that does not dequantise: {error}") from None
    return saved
