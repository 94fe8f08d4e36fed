"""State dicts between this library (``backbone.*``, ``head.*``) and the plain model the parts were taken from."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fl_lightning import files
from fl_lightning.state import State

BACKBONE = "backbone."
HEAD = "head."


def export_state_dict(state: dict[str, Tensor], head_path: str) -> dict[str, Tensor]:
    """Rename ``backbone.X`` to ``X`` and ``head.Y`` to ``<head_path>.Y``, as the plain model loads them strictly.

    Args:
        state: Tensors whose names begin with ``backbone.`` or ``head.``; others, of a method's own, keep their names.
        head_path: Module path of the head in the plain model, from ``Model.head_path``.
    """
    exported: dict[str, Tensor] = {}
    for name, tensor in state.items():
        name = name.replace("_orig_mod.", "")  # torch.compile wraps a module under this name
        if name.startswith(BACKBONE):
            plain = name[len(BACKBONE) :]
        elif name.startswith(HEAD):
            plain = f"{head_path}.{name[len(HEAD) :]}"
        else:
            plain = name
        if plain in exported:
            raise ValueError(f"head_path must be free, got {head_path!r}: two tensors would be exported as {plain!r}")
        exported[plain] = tensor
    return exported


def import_state_dict(state: dict[str, Tensor], head_path: str) -> dict[str, Tensor]:
    """Undo `export_state_dict`: a plain model's tensors under the names ``backbone.*`` and ``head.*``.

    Args:
        state: State dict of the plain model.
        head_path: Module path of its head, from ``Model.head_path``.
    """
    prefix = f"{head_path}."
    if not any(name.startswith(prefix) for name in state):
        raise ValueError(
            f"the state must hold tensors under the head's path {head_path!r}, got none among {len(state)} names; "
            "take one of the same architecture"
        )
    return {_own_name(name, head_path): tensor for name, tensor in state.items()}


def _own_name(name: str, head_path: str) -> str:
    prefix = f"{head_path}."
    return HEAD + name[len(prefix) :] if head_path and name.startswith(prefix) else BACKBONE + name


def read_global_model(path: str | Path, head_path: str, names: Collection[str] = ()) -> State:
    """Read the tensors of a model under the names ``backbone.*`` and ``head.*``, whatever form they were saved in.

    Args:
        path: A run folder, or a file of ``torch.save`` or safetensors: a plain model's state dict, one with this
            library's names, or a checkpoint that holds one, under ``state_dict`` as Lightning's do, or under ``state``.
        head_path: Module path of the head in the plain model; empty: it has none of its own.
        names: Names of the tensors that the model has; a plain model whose names fit is taken as it is.
    """
    path = Path(path)
    file = path / "global_model.pt" if path.is_dir() else path
    if path.is_dir() and not file.exists() and (path / "config.json").is_file():
        raise ValueError(f"{path} holds a model of transformers; begin with it by model=hf model.name={path}")
    content = _read_safetensors(file) if file.suffix == ".safetensors" else files.read_tensors(file)
    for key in ("state_dict", "state"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    tensors = isinstance(content, Mapping) and all(isinstance(value, Tensor) for value in content.values())
    if not tensors or not content:
        raise ValueError(f"{file} is not the state dict of a model; give a run folder, or its global_model.pt")
    state = {str(name): tensor for name, tensor in content.items()}
    plain = {_own_name(name, head_path): tensor for name, tensor in state.items()}
    if plain.keys() == set(names):
        return plain
    if all(any(name.startswith(part) for name in state) for part in (BACKBONE, HEAD)):
        return {name: tensor for name, tensor in state.items() if name.startswith((BACKBONE, HEAD))}
    # A LightningModule that keeps its network as self.model puts that before every name.
    prefixes = {name.partition(".")[0] for name in state}
    if len(prefixes) == 1 and not any(name.startswith(f"{head_path}.") for name in state):
        state = {name.partition(".")[2]: tensor for name, tensor in state.items()}
    try:
        return import_state_dict(state, head_path)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _read_safetensors(path: Path) -> State:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged, or no safetensors file: {error}") from error
