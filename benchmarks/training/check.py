"""No row is timed before its loss and gradients are those of the model it claims to train.

The same weights are given to all. The softmax rows are compared with Transformers' Llama and its eager
attention in float64, StableMask with our decoder in float64 and its attention by the dense definition.
The tolerance of a tensor is derived: twice the distance at which the reference itself lies in the
precision of the row, and four roundings of the tensor's norm.
"""

import functools
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from stablemask.attention import sink_attention
from stablemask.models import layers, modeling
from stablemask.models.configuration import preset_config

from ..correctness import IncorrectError
from .trainers import llama_config
from .workload import Contender, Workload

ROWS, LENGTH = 2, 64  # tokens to check with


class Reference:
    """Loss and gradients of the workload's weights, exactly and in its precision."""

    def __init__(self, workload: Workload, attention: str) -> None:
        self.ids = workload.blocks().ids[:ROWS, :LENGTH].to(workload.device)
        self.exact = _reference(workload, attention, self.ids, torch.float64)
        self.rounded = _reference(workload, attention, self.ids, torch.float32)
        self._rounding = torch.finfo(getattr(torch, workload.dtype)).eps

    def check(self, contender: Contender) -> float:
        """The largest distance of the loss or a gradient, as a share of what is allowed.

        Raises:
            IncorrectError: it is above 1, or not finite.
        """
        loss = contender.loss(self.ids)
        loss.backward()
        actual = {"loss": loss.detach()} | contender.gradients()
        worst = 0.0
        for name, exact in self.exact.items():
            distance = _distance(actual[name], exact)
            allowed = 2 * _distance(self.rounded[name], exact)
            allowed += 4 * self._rounding * exact.norm().item()
            if not distance <= allowed:
                raise IncorrectError(
                    f"{name} is {distance:.1e} from the reference, above {allowed:.1e}"
                )
            worst = max(worst, distance / allowed)
        for parameter in contender.parameters().values():
            parameter.grad = None
        return worst


def _distance(tensor: Tensor, exact: Tensor) -> float:
    return (tensor.double() - exact).norm().item()


def _reference(
    workload: Workload, attention: str, ids: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    model: Any
    with torch.device(workload.device):
        if attention == "stablemask":
            ours = preset_config(workload.preset, attention=attention)
            model = modeling.StableMaskForCausalLM(ours)
        else:
            theirs = llama_config(workload)
            model = LlamaForCausalLM._from_config(theirs, attn_implementation="eager")
    model.load_state_dict(workload.weights())
    model.to(workload.device, dtype)
    dense = functools.partial(sink_attention, backend="reference")
    autocast = nullcontext() if dtype == torch.float64 else workload.autocast()
    with autocast, patch.object(layers, "sink_attention", dense):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    gradients = {
        name: parameter.grad for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    return {"loss": loss.detach()} | gradients
