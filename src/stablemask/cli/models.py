"""How the commands that run a trained model load it."""

from typing import Any

from transformers import PreTrainedModel

from stablemask.hf.loading import load_model
from stablemask.inference.model import choose_device
from stablemask.options import option


def dtype_option() -> Any:
    return option(
        "auto", "of the weights; auto takes that of the files",
        choices=("auto", "float32", "bfloat16", "float16"),
    )  # fmt: skip


def device_option() -> Any:
    return option(None, "such as cpu or cuda; by default the GPU if there is one")


def load(name: str, dtype: str, device: str | None) -> PreTrainedModel:
    """The model of these options; InputError where there is none such, or no such device."""
    place = choose_device(device)  # before the weights are read
    return load_model(name, dtype=None if dtype == "auto" else dtype, device=place)
