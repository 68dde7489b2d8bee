"""Names of SGLang's attention backends under which FreeKV's goes, for models that SGLang serves with no usual one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# SGLang takes neither of the names by which FreeKV's attention usually goes for a model with sinks, nor for Exaone 4
# with windows; and none that it takes runs on a CPU without its kernel library.
OTHER_NAME = "triton"


def fields_of(model_path: str) -> dict[str, Any]:
    """A model's config.json; nothing where it is not on this machine yet, or cannot be read."""
    from transformers import PretrainedConfig

    try:
        fields, _ = PretrainedConfig.get_config_dict(model_path, local_files_only=True)
    except (OSError, ValueError):
        return {}
    return fields


def needs_other_name(fields: Mapping[str, Any]) -> bool:
    """Whether SGLang serves the model of a config.json under OTHER_NAME alone."""
    names = fields.get("architectures") or ()
    slides = fields.get("sliding_window_pattern") is not None
    return "GptOssForCausalLM" in names or ("Exaone4ForCausalLM" in names and slides)
