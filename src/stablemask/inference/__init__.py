"""Running trained models: `generate.py` writes text, `model.py` knows what a model can take."""

from .generate import generate

__all__ = ["generate"]
