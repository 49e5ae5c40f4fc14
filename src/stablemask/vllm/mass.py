"""Log of the pseudo mass of each layer by position, for kernels that know how long a sequence is.

Under vLLM a step has rows of many requests, and no positions reach the attention. A row's is what its request
had before it, ``seq_len - query_len + row``. The mass is a function of it alone, so each layer has a table of
it, made once when the weights are there: nothing is left to compute in a step, or for a CUDA graph to hold.
Shapes: T rows of a step, R requests, P positions, H query heads of this rank.
"""

import functools
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..models.settings import LEARNED, of_layer, pseudo_sink_logits, without_shift


class Mass(NamedTuple):
    """What a layer takes of its rows: the sink logit of head ``h`` at position ``p`` is ``table[p, h] + shift[h]``.

    Positions past the table have its last row, and a single column or number is that of all heads. Two
    parts, for the table of a long context, shared by all layers, would not fit once a layer.
    """

    table: Tensor  # (P, 1 or H), float32
    shift: Tensor  # (1 or H,), float32

    def at(self, positions: Tensor) -> Tensor:
        """Sink logits, (T, 1 or H) float32, of rows at ``positions``, int (T,)."""
        return self.table[positions.clamp(0, len(self.table) - 1)] + self.shift


def layer_mass(
    settings: dict[str, Any],
    num_heads: int,
    length: int,
    layer: int,
    *,
    heads: slice = slice(None),
    log_gamma: Tensor | None = None,
    sinks: Tensor | None = None,
    device: str = "cpu",
) -> Mass:
    """The mass of a layer.

    Args:
        settings: complete ones of the model, as ``stablemask.hf.settings.model_settings`` gives them.
        num_heads: query heads of the model.
        length: positions from 0 on that may be served.
        layer: its number.
        heads: which of them this rank has.
        log_gamma: of learned rates, (layers, num_heads), where the settings say so.
        sinks: learned sinks of this rank's heads beside the mass, (H,).
    """
    if layer not in settings.get("layers", (layer,)):
        table = _numbers([[-torch.inf]])
    elif settings["gamma"] != LEARNED:
        table = _table(json.dumps(_shared(settings)), num_heads, length)
    else:
        assert log_gamma is not None
        gamma = log_gamma[layer].detach().float().exp().cpu()
        table = _make_table(_shared(settings), num_heads, length, gamma)
    shift = _numbers([0.0])
    if isinstance(settings.get("shift"), list):
        shift = _numbers(of_layer(settings, layer)["shift"])
    table, shift = (x if x.shape[-1] == 1 else x[..., heads] for x in (table, shift))
    if sinks is not None:
        table, shift = torch.logaddexp(table + shift, sinks.detach().float().cpu()), _numbers([0.0])
    return Mass(table.contiguous().to(device), shift.contiguous().to(device))


def row_positions(query_start_loc: Tensor, seq_lens: Tensor, num_rows: int) -> Tensor:
    """Position of each row in its own sequence, int (num_rows,), without waiting for the device.

    Args:
        query_start_loc: the first row of each request, and their number, int (R + 1,). Requests without
            rows may be among them, and rows of padding at the end.
        seq_lens: tokens of each request, these rows among them, int (R,).
    """
    past = seq_lens - query_start_loc.diff()
    rows = torch.arange(num_rows, device=seq_lens.device, dtype=seq_lens.dtype)
    request = torch.searchsorted(query_start_loc[1:], rows, right=True).clamp(max=len(past) - 1)
    return (past - query_start_loc[:-1])[request] + rows


def sink_of_all_rows(mass: Mass, num_heads: int) -> Tensor:
    """A sink logit of each head that no row exceeds, (num_heads,) float32."""
    largest = (mass.table + mass.shift).amax(0).expand(num_heads)
    return torch.where(largest.isfinite(), largest, 0.0)


def share_of_wider(wide: Tensor, dim: int, mass: Mass, positions: Tensor) -> Tensor:
    """StableMask out of a kernel that takes one sink logit ``c`` per head, and gives no logsumexp.

    Heads are wider than the model's, and a column more of the values is 1: there the kernel gives the
    share ``p = Z / (Z + e^c)`` of the real tokens. With row i's own sink logit ``m`` in its place
    theirs is ``Z / (Z + e^m)``, which is ``p / (p + (1 - p) e^(m - c))``.

    Args:
        wide: what it returns with :func:`sink_of_all_rows`, (T, H, more than dim).
        dim: head_dim.
        positions: of the rows, int (T,).

    Returns:
        (T, H, dim) float32.
    """
    share = wide[..., dim].float()
    taken = torch.exp(mass.at(positions) - sink_of_all_rows(mass, wide.shape[1]))
    return wide[..., :dim].float() / (share + (1 - share) * taken).unsqueeze(-1)


class AttentionWithMass:
    """What the attention of a platform has of the mass; before vLLM's own class among its bases.

    vLLM makes one per layer, then loads the weights, then runs it. ``guard.py`` calls :meth:`prepare` where
    the model asks for a mass, and refuses a class that has none.
    """

    mass: Mass | None = None
    log_gamma: Tensor | None = None  # learned, (layers, num_heads), set by a model that has it
    make_mass: Callable[..., Mass] | None = None  # where the model asks for a mass

    def prepare(
        self,
        layer: Any,
        settings: dict[str, Any],
        num_heads: int,
        length: int,
        number: int,
        rank: int,
    ) -> None:
        """Before the weights are loaded.

        Args:
            layer: vLLM's, which this attention is of; ``number`` is which of the model's.
            settings, num_heads, length: as :func:`layer_mass` takes them.
            rank: of tensor parallelism, whose ranks have as many heads each, in order.
        """
        own: int = self.num_heads  # type: ignore[attr-defined]
        heads = slice(rank * own, (rank + 1) * own)
        self.make_mass = functools.partial(
            layer_mass, settings, num_heads, length, number, heads=heads
        )

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        super().process_weights_after_loading(act_dtype)  # type: ignore[misc]
        if self.make_mass is not None:
            from vllm.platforms import current_platform

            self.mass = self.make_mass(
                log_gamma=self.log_gamma,
                sinks=self.sinks,  # type: ignore[attr-defined]
                device=current_platform.device_type,
            )


def _shared(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of the table that all layers share."""
    listed = isinstance(settings.get("shift"), list)
    return without_shift(settings) if listed else settings


@functools.lru_cache(maxsize=4)
def _table(settings: str, num_heads: int, length: int) -> Tensor:
    return _make_table(json.loads(settings), num_heads, length)


def _make_table(
    settings: dict[str, Any], num_heads: int, length: int, gamma: Tensor | None = None
) -> Tensor:
    """Up to where the mass changes no more, (P, 1 or num_heads)."""
    hold, horizon, start = settings.get("hold"), settings["horizon"], settings.get("start", 0)
    if hold is not None:
        length = min(length, max(hold, start) + 1)
    elif horizon is not None and not settings.get("suffix"):
        length = min(length, max(horizon, start + 1))
    positions = torch.arange(length, device="cpu")
    return pseudo_sink_logits(settings, num_heads, positions, gamma).T.contiguous()


def _numbers(numbers: list) -> Tensor:
    """Whatever dtype and device vLLM has made the default, those of a model that it loads."""
    return torch.tensor(numbers, dtype=torch.float32, device="cpu")
