"""The sink that takes the prefix's place: a constant per layer and head, and the value that it stands for."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from ... import strict_json
from ...errors import InputError
from ...hf.settings import model_settings
from ...inference.model import evaluating
from ...models.settings import pseudo_sink_logits, without_shift
from ...reading import parse_json
from ...writing import whole_file
from .reading import Reading
from .watch import Recorded, Watch, record

# Not beside the weights: vLLM reads every such file in a model's folder as weights.
FILE = "adapting/calibration.safetensors"


@dataclass(frozen=True)
class Calibration:
    """What is measured of a model before it is trained.

    Attributes:
        shifts: by layer and query head, what added to log M makes the mass as large as the prefix: the
            median over rows of (score on the prefix - log M), (L, H), float32.
        values: the prefix's value in each layer that attends, mean over texts, (KV, value_dim), float32.
        keys: of its key there the dimensions that biases take over, the others 0, (KV, head_dim), float32;
            empty where they take over nothing.
        ordinary: of each decoder layer the largest hidden value of an ordinary token, the median over
            tokens, (L,).
        notes: what else is kept with them, for JSON.
    """

    shifts: Tensor
    values: dict[int, Tensor]
    keys: dict[int, Tensor]
    ordinary: Tensor
    notes: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        tensors = {"shifts": self.shifts, "ordinary": self.ordinary}
        tensors |= {f"value.{layer}": value for layer, value in self.values.items()}
        tensors |= {f"key.{layer}": key for layer, key in self.keys.items()}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        path = folder / FILE
        path.parent.mkdir(exist_ok=True)
        with whole_file(path) as partial:
            save_file(tensors, partial, metadata={"notes": strict_json.dumps(self.notes)})

    @classmethod
    def load(cls, folder: Path) -> "Calibration":
        """
        Raises:
            InputError: the file is not what :meth:`save` writes.
        """
        try:
            with safe_open(folder / FILE, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                notes = parse_json(file.metadata()["notes"])
            values, keys = (
                {
                    int(name.partition(".")[2]): tensor
                    for name, tensor in tensors.items()
                    if name.startswith(kind)
                }
                for kind in ("value.", "key.")
            )
            return cls(tensors["shifts"], values, keys, tensors["ordinary"], notes)
        except (OSError, SafetensorError, ValueError, LookupError, TypeError) as error:
            raise InputError(
                f"{folder / FILE} is damaged; begin the run anew in another --out"
            ) from error


def calibrate(
    model: PreTrainedModel,
    watch: Watch,
    batches: Iterable[dict[str, Tensor]],
    prefix: int | None,
    steady: Tensor | None = None,
) -> Calibration:
    """Read texts with the prefix in front, as the softmax model that it was.

    Without a prefix the scores are those on each text's own first token.

    Args:
        model: with ``config.stablemask``, whose shift is left out of log M.
        batches: ``input_ids`` and ``attention_mask``, padded on the right.
        steady: which dimensions of a key biases take over (see biases.py), (head_dim,), bool; None without
            biases.

    Raises:
        ValueError: the settings leave no row a mass, or a layer cannot attend by the stock kernels.
    """
    config: Any = model.config.get_text_config(decoder=True)
    settings = model_settings(config, without_shift(config.stablemask))
    heads = config.num_attention_heads
    scores: dict[int, list[Tensor]] = {}
    values: dict[int, list[Tensor]] = {}
    keys: dict[int, list[Tensor]] = {}
    largest: dict[int, list[Tensor]] = {}
    for batch in batches:
        ids, real = batch["input_ids"].to(model.device), batch["attention_mask"].bool()
        reading = Reading.of(ids, prefix)
        with evaluating(model), watch.over(record, Recorded(steady)) as seen:
            model.get_decoder()(input_ids=reading.teacher, use_cache=False)
        positions = torch.arange(ids.shape[1], device=ids.device)
        log_mass = pseudo_sink_logits(settings, heads, positions)
        counted = real.to(ids.device).clone()
        counted[:, 0] &= ~reading.has_prefix  # a first token has no choice
        for layer, found in seen.scores.items():
            over = reading.rows(found, dim=2) - log_mass
            by_head = over.transpose(0, 1)[:, counted]
            scores.setdefault(layer, []).append(by_head.float().cpu())
            values.setdefault(layer, []).append(seen.values[layer].float().cpu())
            keys.setdefault(layer, []).append(seen.keys[layer].float().cpu())
        for layer, found in seen.largest.items():
            largest.setdefault(layer, []).append(reading.rows(found)[counted].cpu())
    shifts = torch.zeros(config.num_hidden_layers, heads)
    for layer, parts in scores.items():
        shifts[layer] = torch.stack([_median(head) for head in torch.cat(parts, 1)])
    taken = (
        {}
        if steady is None
        else {layer: torch.cat(parts) * steady.cpu() for layer, parts in keys.items()}
    )
    return Calibration(
        shifts,
        {layer: torch.cat(parts).mean(0) for layer, parts in values.items()},
        {layer: key.mean(0) for layer, key in taken.items()},
        torch.stack([torch.cat(parts).median() for _, parts in sorted(largest.items())]),
    )


def _median(over: Tensor) -> Tensor:
    """Of the rows that have a mass and see the prefix, which steep rates and windows leave without."""
    over = over[over.isfinite()]
    if not len(over):
        raise ValueError("its settings leave no row a pseudo mass to take the place of a token")
    return over.median()
