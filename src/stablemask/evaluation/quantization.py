"""Int8 weights and activations, by torchao: what a quantised model loses to outliers.

Weights get a scale per output channel. A *dynamic* activation scale is found for each token as it
comes, so an enormous token costs only itself; a *static* one is fixed beforehand for the whole
tensor, which is what the fastest integer kernels want, and there one enormous token takes the range
away from all others.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import InputError
from ..inference.model import check_length, check_token_ids, decoder_layers, evaluating
from ..shell import pip_install

INT8_MAX = 127


def quantize_int8(
    model: PreTrainedModel,
    activations: Literal["dynamic", "static"] = "dynamic",
    calibration: Tensor | None = None,
) -> PreTrainedModel:
    """Quantise every linear map inside the decoder layers to int8, in place.

    Embeddings, the output head, normalisations and the attention itself keep their precision.

    Args:
        model: a decoder-only model of Transformers. It cannot be trained afterwards.
        activations: ``"dynamic"`` (a scale per token) or ``"static"`` (a scale per tensor).
        calibration: ids, (batch, n), that the static scales are taken from: the largest magnitude
            that each linear map sees on them becomes 127.

    Raises:
        InputError: torchao is missing, the calibration is missing or does not fit the model, or no
            linear map is found.
    """
    try:
        from torchao.quantization import (
            Int8DynamicActivationInt8WeightConfig,
            Int8StaticActivationInt8WeightConfig,
            PerRow,
            PerTensor,
            quantize_,
        )
    except ImportError as error:
        raise InputError(f"int8 needs torchao: {pip_install('quant')}") from error

    layers = decoder_layers(model)
    linears = [module for module in layers.modules() if isinstance(module, nn.Linear)]
    if not linears:
        raise InputError(f"{type(model).__name__} has no nn.Linear in its decoder layers")
    if activations == "dynamic":
        quantize_(layers, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
        return model
    if activations != "static":
        raise InputError(f"activations must be dynamic or static, got {activations!r}")
    if calibration is None:
        raise InputError("static activation scales need calibration ids, (batch, n)")
    for linear, largest in zip(linears, _largest_inputs(model, linears, calibration), strict=True):
        scale = (largest.float() / INT8_MAX).clamp(min=torch.finfo(torch.float32).eps)
        config = Int8StaticActivationInt8WeightConfig(
            act_quant_scale=scale.reshape(1, 1, 1),  # as many axes as (batch, n, features)
            granularity=[PerTensor(), PerRow()],
            set_inductor_config=False,
        )
        quantize_(linear, config)
    return model


def _largest_inputs(
    model: PreTrainedModel, linears: list[nn.Linear], calibration: Tensor
) -> list[Tensor]:
    """The largest magnitude each linear map is given, over the sequences of ``calibration``."""
    if calibration.dim() != 2 or calibration.numel() == 0:
        raise InputError(f"calibration must be ids (batch, n), got {tuple(calibration.shape)}")
    check_length(model, calibration.shape[1], f"a sequence of {calibration.shape[1]} tokens")
    check_token_ids(model, calibration)
    largest: dict[nn.Module, Tensor] = {
        linear: torch.zeros((), device=linear.weight.device) for linear in linears
    }

    def record(linear: nn.Module, args: tuple[Any, ...]) -> None:
        largest[linear] = torch.maximum(largest[linear], args[0].abs().max())

    hooks = [linear.register_forward_pre_hook(record) for linear in linears]
    try:
        with evaluating(model):
            for sequence in calibration.to(model.device):
                model(input_ids=sequence[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [largest[linear] for linear in linears]
