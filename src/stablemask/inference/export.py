"""A model as a graph that runs without its code: a ``torch.export`` program, or an ONNX file.

What they take and give, under the names that ONNX runtimes of language models look for::

    input_ids                          (batch, length)
    attention_mask                     (batch, past + length), 0 at padding
    past_key_values.LAYER.key, .value  (batch, kv_heads, past, head_dim), with a cache
    logits                             (batch, length, vocabulary)
    present.LAYER.key, .value          (batch, kv_heads, past + length, head_dim), with a cache

Positions are counted from the mask within the graph, so a left-padded batch gives the logits of its texts
alone. With a cache, the first call has a past of length 0. From Python, a program and an ONNX file are called
alike: ``logits, *cache = graph(input_ids, attention_mask, cache)``.
"""

import inspect
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from transformers import DynamicCache, PreTrainedModel

from ..errors import InputError
from ..models.cache import CACHE
from ..shell import pip_install
from ..writing import whole_file
from .model import changing_rope, check_length, errors_only, evaluating

Graph = Callable[..., tuple[Tensor, ...]]

# A file of the ONNX format ends at 2 GiB; weights that come near stand in another one beside it.
_WEIGHTS_IN_THE_FILE = 1536 * 2**20


def export_program(
    model: PreTrainedModel, *, cache: bool = False, shape: tuple[int, int] | None = None
) -> ExportedProgram:
    """A causal language model as a ``torch.export`` program, whose attention is the operator that runs here.

    ``program.module()`` can be called.

    Args:
        model: ours, or another of Transformers'.
        cache: take and give keys and values, to decode with.
        shape: ``(batch, length)`` to fix, without a cache; default: any.

    Raises:
        InputError: the model takes no positions, too few of them, has another kind of cache, or a RoPE
            that depends on the length of the text, or a shape is to be fixed with a cache.
    """
    if cache and shape is not None:
        raise InputError("a shape can only be fixed without a cache, which grows")
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise InputError(f"{type(model).__name__} takes no position_ids, so it cannot be exported")
    if shape is not None:
        check_length(model, shape[1], f"a length of {shape[1]}")
    kind, same = changing_rope(model)
    if kind is not None and (shape is None or shape[1] > same):
        advice = f"; fix a length of at most {same}" if same else ""
        raise InputError(
            f"the {kind} RoPE of {type(model).__name__} depends on the length of the text, which that of "
            f"a graph does not{advice}"
        )
    with evaluating(model):
        inputs = _sample_inputs(model, cache, shape or (2, 4), past=3)
        axes = None if shape else _axes(inputs, lambda name: Dim.DYNAMIC)
        return torch.export.export(_Decoder(model), inputs, dynamic_shapes=axes)


def export_pt2(
    model: PreTrainedModel,
    path: str | os.PathLike,
    *,
    cache: bool = False,
    shape: tuple[int, int] | None = None,
) -> None:
    """Write :func:`export_program` as a file for ``torch.export.load``.

    A process that loads it must have imported ``stablemask.hf``, which brings the operator.

    Args, Raises: as for :func:`export_program`; ``path`` is replaced if it exists.
    """
    program = export_program(model, cache=cache, shape=shape)
    with whole_file(path) as partial:
        torch.export.save(program, partial)


def export_onnx(
    model: PreTrainedModel,
    path: str | os.PathLike,
    *,
    cache: bool = False,
    shape: tuple[int, int] | None = None,
) -> None:
    """Write a causal language model as an ONNX file, of standard operators only.

    Weights of 1.5 GiB and more go to a second file, named as the first with ``.data`` at its end.

    Args:
        model, cache, shape: as for :func:`export_program`.
        path: of the file, which is replaced if it exists.

    Raises:
        InputError: as for :func:`export_program`, or a package is not installed.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(_missing()) from error
    program = export_program(model, cache=cache, shape=shape)
    assert program.example_inputs is not None
    inputs = program.example_inputs[0]
    num_layers = len(inputs[2]) // 2 if cache else 0
    # The exporter warns of packages we do not need, and of names that axes share on purpose.
    with errors_only("torch.onnx"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        onnx_program = torch.onnx.export(
            program,
            input_names=["input_ids", "attention_mask", *_names("past_key_values", num_layers)],
            output_names=["logits", *_names("present", num_layers)],
            dynamic_shapes=None if shape else _axes(inputs, lambda name: name),
            verbose=False,
        )
    assert onnx_program is not None
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    with whole_file(path) as partial:
        onnx_program.save(partial, external_data=weights > _WEIGHTS_IN_THE_FILE)


def load_onnx(path: str | os.PathLike) -> Graph:
    """A file of :func:`export_onnx` as a function, run by ONNX Runtime on the CPU.

    Raises:
        InputError: ONNX Runtime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise InputError(_missing()) from error
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]

    def run(
        input_ids: Tensor, attention_mask: Tensor, past: Sequence[Tensor] = ()
    ) -> tuple[Tensor, ...]:
        inputs = (input_ids, attention_mask, *past)
        feed = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        return tuple(torch.from_numpy(output) for output in session.run(None, feed))

    return run


def largest_difference(
    model: PreTrainedModel,
    graph: Graph,
    *,
    cache: bool = False,
    shape: tuple[int, int] | None = None,
) -> float:
    """How far a graph's outputs are from the model's, as a share of their largest value.

    A row is left-padded, and the shape another than the graph was made with, unless it is fixed.
    """
    with evaluating(model):
        inputs = _sample_inputs(model, cache, shape or (3, 7), past=2)
        inputs[1][0, 0] = 0
        expected = _Decoder(model)(*inputs)
        outputs = graph(*inputs)
    shares = [
        (output - truth).abs().max() / truth.abs().max()
        for output, truth in zip(outputs, expected, strict=True)
    ]
    return torch.stack(shares).max().item()  # Python's `max` would pass over a NaN


def _missing() -> str:
    return f"ONNX needs packages that are not installed: {pip_install('export')}"


class _Decoder(nn.Module):
    """The model with tensors alone as its inputs and outputs."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, past: list[Tensor] | None = None
    ) -> tuple[Tensor, ...]:
        length, past_length = input_ids.shape[1], past[0].shape[2] if past else 0
        # Not a slice, nor the whole mask: either would make cases of short inputs, for the exporter
        # takes every length for at least 2.
        columns = torch.arange(past_length + length, device=input_ids.device)
        attention_mask = attention_mask[:, columns]
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, columns[past_length:]]
        cache = DynamicCache(list(zip(past[::2], past[1::2]))) if past else None
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=positions,
            use_cache=cache is not None,
            **{CACHE: cache},
        )
        return outputs.logits, *([] if cache is None else _keys_and_values(cache))


def _keys_and_values(cache: Any) -> list[Tensor]:
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def _sample_inputs(
    model: PreTrainedModel, cache: bool, shape: tuple[int, int], past: int
) -> tuple[Any, ...]:
    """Arguments of :class:`_Decoder`."""
    vocab_size = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
    ids = (torch.arange(shape[0] * shape[1], device=model.device) % vocab_size).view(shape)
    if not cache:
        return ids, torch.ones_like(ids)
    filled = model(input_ids=ids[:, :past], use_cache=True).get(CACHE)
    if not isinstance(filled, DynamicCache):
        raise InputError(f"{type(model).__name__} has no cache of keys and values alone")
    mask = torch.ones(shape[0], past + shape[1], dtype=torch.int64, device=model.device)
    return ids, mask, _keys_and_values(filled)


def _axes(inputs: tuple[Any, ...], choose: Callable[[str], Any]) -> tuple[Any, ...]:
    """What is chosen for each axis that may have any length, laid out as the inputs are."""
    batch = choose("batch")
    axes = {0: batch, 1: choose("length")}, {0: batch, 1: choose("total_length")}
    if len(inputs) == 2:
        return axes
    return *axes, [{0: batch, 2: choose("past_length")} for _ in inputs[2]]


def _names(kind: str, num_layers: int) -> list[str]:
    return [f"{kind}.{layer}.{part}" for layer in range(num_layers) for part in ("key", "value")]
