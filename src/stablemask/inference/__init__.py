"""Running trained models: `generate.py` writes text, `model.py` knows what a model can take.

`batch.py` answers files of prompts, `streaming.py` keeps a cache bounded, `serving/` speaks HTTP,
`export.py` writes graphs that run without this code.
"""

from .generate import generate

__all__ = ["generate"]
