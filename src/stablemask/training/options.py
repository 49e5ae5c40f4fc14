"""What a training run can be told.

``shared_options.py`` has the options of every run, ``pretrain_options.py`` and ``finetune_options.py`` those of
each kind beside them.
"""

from .finetune_options import FinetuneOptions
from .pretrain_options import PretrainOptions
from .shared_options import FREE_ON_RESUME, KEPT_ON_RESUME, TrainingOptions

__all__ = [
    "FREE_ON_RESUME",
    "KEPT_ON_RESUME",
    "FinetuneOptions",
    "PretrainOptions",
    "TrainingOptions",
]
