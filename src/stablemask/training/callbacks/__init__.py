"""What a run shows and records while it goes, and how it is stopped: callbacks for the Trainer.

On a log, each of them may add to what the ones after it get. So: first ``SkipBadSteps`` and ``Probe``,
then ``Record``, then what sends the values elsewhere, TensorBoard or Weights & Biases.
"""

from .guards import SkipBadSteps
from .probe import Probe
from .progress import Record, training_flops
from .signals import StopOnSignal

__all__ = [
    "Probe",
    "Record",
    "SkipBadSteps",
    "StopOnSignal",
    "training_flops",
]
