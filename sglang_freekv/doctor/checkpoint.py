"""What lies at ``--model-path``, and how much memory its weights take."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from sglang_freekv.config import UnsupportedConfiguration
from sglang_freekv.doctor.parameters import estimate_weights_bytes

if TYPE_CHECKING:
    from sglang.srt.configs.model_config import ModelConfig

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")  # "owner/model"
_GIVE_FOLDER = "give the folder of a checkpoint, with its config.json"


class Weights(NamedTuple):
    """Size of a whole model's weights in memory."""

    num_bytes: int
    source: str  # of the number, in words


def check_path(model_path: str) -> None:
    """Raise UnsupportedConfiguration where no model can be at a path; names of a hub, addresses and GGUF files pass."""
    path = Path(model_path)
    if "://" in model_path or path.suffix == ".gguf":
        return
    if path.is_file():
        raise UnsupportedConfiguration(f"--model-path is {model_path!r}, a file; {_GIVE_FOLDER}.")
    if path.is_dir():
        _check_config(path / "config.json", model_path)
    elif not _HUB_NAME.fullmatch(model_path):
        raise UnsupportedConfiguration(f"--model-path is {model_path!r}, which does not exist; {_GIVE_FOLDER}.")


def not_found(model_path: str, reason: str) -> str:
    """Say that neither a folder nor a hub has a model of this name."""
    return f"--model-path is {model_path!r}: no folder, and no model of a hub could be had ({reason}); {_GIVE_FOLDER}."


def weights_of(model: ModelConfig, given_bytes: int | None) -> Weights:
    """What the user says; else from the headers of the model's files; else an estimate from its config.json.

    Raises
    ------
    UnsupportedConfiguration
        If there is nothing to tell it by; asks for ``--weights-gb``.
    """
    if given_bytes is not None:
        return Weights(given_bytes, "as given")
    if files := sorted(Path(model.model_path).glob("*.safetensors")):
        return Weights(_bytes_of_files(model, files), "from its files")
    estimate = None
    if model.hf_config is model.hf_text_config:  # a part for images or sound is not counted
        estimate = estimate_weights_bytes(model.hf_text_config.to_dict(), model.dtype.itemsize, model.quantization)
    if estimate is None:
        raise UnsupportedConfiguration(
            f"{model.model_path} has no *.safetensors file to tell the size of the weights by, and it cannot be "
            f"estimated for this kind of model; give --weights-gb, the GiB of the whole model."
        )
    return Weights(estimate, "estimated from config.json, as there are no files; --weights-gb says it exactly")


def _check_config(file: Path, model_path: str) -> None:
    if not file.is_file():
        raise UnsupportedConfiguration(f"--model-path is {model_path!r}, a folder without config.json; {_GIVE_FOLDER}.")
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UnsupportedConfiguration(f"{file} cannot be read as JSON ({error}); give a model's own.") from error
    names = config.get("architectures") if isinstance(config, dict) else None
    if not (isinstance(names, list) and names and all(isinstance(name, str) for name in names)):
        raise UnsupportedConfiguration(
            f"{file} names no architectures, by which SGLang chooses the class of a model; give a model's own."
        )


def _bytes_of_files(model: ModelConfig, files: list[Path]) -> int:
    from safetensors import safe_open

    if model.quantization is not None:
        return sum(file.stat().st_size for file in files)
    num_elements = 0
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            num_elements += sum(torch.Size(tensors.get_slice(name).get_shape()).numel() for name in tensors.keys())  # noqa: SIM118
    return num_elements * model.dtype.itemsize
