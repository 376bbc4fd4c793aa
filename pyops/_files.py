"""Files that are written whole or not at all; safetensors files of models with replaced layers, ``gradmill_format`` in their metadata."""
from __future__ import annotations

import json
import os
from contextlib import contextmanager
from pathlib import Path

import torch


@contextmanager
def replacing(path: str | os.PathLike):
    """``with replacing(path) as temporary:`` what the block writes to ``temporary`` takes path's place when the block has ended well;
    after an exception path is as it was and nothing is left beside it."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_layers(path: str | os.PathLike, format: str, tensors: dict[str, torch.Tensor], layers: dict):
    """Writes tensors and, as JSON, what each replaced layer is; under a temporary name, then renamed."""
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, temporary, {"gradmill_format": format, "layers": json.dumps(layers)})


def read_layers(path: str | os.PathLike, format: str) -> tuple[dict[str, torch.Tensor], dict]:
    """What :func:`write_layers` wrote. gradmill.CheckpointError where the file is another."""
    from safetensors import safe_open

    from gradmill.optim._base import CheckpointError  # late: gradmill.optim imports this module

    try:
        with safe_open(os.fspath(path), "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("gradmill_format") != format:
                raise CheckpointError(f"{path}: gradmill_format is {metadata.get('gradmill_format')!r}; this gradmill reads {format!r}")
            return {k: file.get_tensor(k) for k in file.keys()}, json.loads(metadata["layers"])
    except (FileNotFoundError, CheckpointError):
        raise
    except Exception as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from None
