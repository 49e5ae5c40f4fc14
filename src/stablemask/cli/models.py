"""How the commands that run a trained model load it."""

from transformers import PreTrainedModel

from stablemask.cli.options import ModelOptions
from stablemask.hf.loading import load_model
from stablemask.inference.model import choose_device


def load(options: ModelOptions) -> PreTrainedModel:
    """The model of these options; InputError where there is none such, or no such device."""
    place = choose_device(options.device)  # before the weights are read
    dtype = None if options.dtype == "auto" else options.dtype
    return load_model(options.model, dtype=dtype, device=place)
