"""What a training run can be told.

``shared.py`` has the options of every run, ``pretrain.py`` and ``finetune.py`` those of each kind beside them.
"""

from .finetune import FinetuneOptions
from .pretrain import PretrainOptions
from .shared import FREE_ON_RESUME, KEPT_ON_RESUME, TrainingOptions

__all__ = [
    "FREE_ON_RESUME",
    "KEPT_ON_RESUME",
    "FinetuneOptions",
    "PretrainOptions",
    "TrainingOptions",
]
