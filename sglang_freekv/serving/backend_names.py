"""Names of SGLang's attention backends under which FreeKV's goes, for models that SGLang serves with no usual one."""

from __future__ import annotations

from collections.abc import Iterable

# Plain SGLang has no sinks in the backends by whose names FreeKV's goes, so it takes neither for such a model; and none
# that it takes runs on a CPU without its kernel library.
_BACKENDS_OF_CLASSES = {"GptOssForCausalLM": "triton"}
OTHER_NAMES = frozenset(_BACKENDS_OF_CLASSES.values())


def architectures_of(model_path: str) -> list[str]:
    """The classes that a model names; none where it is not on this machine yet, or cannot be read."""
    from transformers import PretrainedConfig

    try:
        fields, _ = PretrainedConfig.get_config_dict(model_path, local_files_only=True)
    except (OSError, ValueError):
        return []
    return fields.get("architectures") or []


def backend_of(architectures: Iterable[str]) -> str | None:
    """The name of the attention backend that SGLang wants for a class; None: any."""
    return next((_BACKENDS_OF_CLASSES[name] for name in architectures if name in _BACKENDS_OF_CLASSES), None)
