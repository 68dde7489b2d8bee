"""A small model that this project trains to look up, follow and copy facts, and the language that it speaks."""

from pathlib import Path

MODEL = Path(__file__).parent / "model"  # the committed checkpoint
