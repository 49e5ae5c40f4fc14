"""The prefix in the biases of attention: what a sink without a value lacks is there exactly.

Let a row give s to the prefix, whose value is v0, and p_j to its other tokens, so that s = 1 - sum_j p_j:

    s v0 + sum_j p_j v_j  =  v0 + sum_j p_j (v_j - v0)

So a bias of -v0 on every value and of v0, through the output's matrix, on what attention puts out stand for the
prefix's value. A score q k_j less q k0 is q (k_j - k0), and a row of softmax does not change where the same is
taken from all its scores: a bias of -k0 on every key stands for the prefix's key, and the sink is a constant.
That holds in the dimensions of a key that rotate little with the position, where the prefix has what makes it a
sink: the sink's score should not depend on how far it is. The others are left to the constant.
"""

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...hf.guard import attention_layers, numbered_layers
from .calibration import Calibration

MAPS = {"q_proj", "k_proj", "v_proj", "o_proj"}
STEADY = 0.5  # radians that a dimension may rotate within the context
SWITCH = "attention_bias"  # of a configuration


def steady_dimensions(model: PreTrainedModel, context: int) -> Tensor | None:
    """Which dimensions of a key its biases can take over, (head_dim,), bool; None if the model takes no biases.

    No dimension where the position is not by rotation, or where the key is normalised after its bias.
    """
    if not takes_biases(model):
        return None
    config: Any = model.config.get_text_config(decoder=True)
    decoder: Any = model.get_decoder()
    layer = next(iter(numbered_layers(model, config).values()))
    head_dim: int = layer.head_dim  # type: ignore[assignment]
    none = torch.zeros(head_dim, dtype=torch.bool, device=model.device)
    rotary = getattr(decoder, "rotary_emb", None)
    if rotary is None or normalises(layer):
        return none
    if list(inspect.signature(rotary.forward).parameters) != ["x", "position_ids"]:
        return none
    positions = torch.arange(context, device=model.device)[None]
    cosines, _ = rotary(torch.zeros(1, 1, device=model.device), positions)
    scale = cosines[0, 0].max()  # some scale their rotations
    kept = ~none  # what is not rotated at all is steady
    kept[: cosines.shape[-1]] = (cosines[0] >= scale * torch.tensor(STEADY).cos()).all(0)
    return kept


def takes_biases(model: PreTrainedModel) -> bool:
    """Whether a configuration can have the model give all four maps of attention a bias, and nothing else.

    A gate, a sink of its own or a norm of values would come between, and the biases not stand for the prefix.
    """
    config = copy.deepcopy(model.config)
    text: Any = config.get_text_config(decoder=True)
    if not isinstance(getattr(text, SWITCH, None), bool):
        return False
    setattr(text, SWITCH, True)
    with torch.device("meta"):
        biased = type(model)(config)
    names = {id(module): name for name, module in model.named_modules()}
    layers: Any = attention_layers(model, model.config.get_text_config(decoder=True))
    for layer in layers:
        more = {name.partition(".")[0] for name, _ in layer.named_parameters()} - MAPS
        if not all(hasattr(layer, name) for name in MAPS):
            return False
        if not all("norm" in name and name[0] in "qk" for name in more):
            return False
        if layer.q_proj.out_features != layer.o_proj.in_features:  # a gate in the query's map
            return False
    wanted = {f"{names[id(layer)]}.{name}.bias" for layer in layers for name in MAPS}
    had = {name for name, _ in model.named_parameters()}
    has = {name for name, _ in biased.named_parameters()}
    return wanted <= has and has == had | wanted


def normalises_keys(model: PreTrainedModel) -> bool:
    """Whether the attention of any layer does."""
    layers = attention_layers(model, model.config.get_text_config(decoder=True))
    return any(map(normalises, layers))


def normalises(layer: nn.Module) -> bool:
    """Whether an attention normalises its keys, behind any bias of theirs."""
    return any("norm" in name for name, _ in layer.named_children())


def give_biases(model: PreTrainedModel, calibration: Calibration) -> None:
    """Have the biases of each layer's attention stand for the prefix."""
    config: Any = model.config.get_text_config(decoder=True)
    setattr(config, SWITCH, True)
    layers: dict[int, Any] = numbered_layers(model, config)
    for number, layer in layers.items():
        value, key = (of[number].to(model.device) for of in (calibration.values, calibration.keys))
        output = layer.o_proj
        by_head = value.repeat_interleave(output.in_features // value.numel(), 0)
        added = {
            "q_proj": torch.zeros(layer.q_proj.out_features, device=model.device),
            "k_proj": -key.flatten(),
            "v_proj": -value.flatten(),
            "o_proj": output.weight.detach().to(value.dtype) @ by_head.flatten(),
        }
        for name, bias in added.items():
            linear = getattr(layer, name)
            before = 0.0 if linear.bias is None else linear.bias.detach()
            bias = (before + bias).to(linear.weight.dtype)
            linear.bias = nn.Parameter(bias, requires_grad=linear.weight.requires_grad)
