"""The masks that are timed: as the arguments of our functions, and dense, as stock SDPA takes them.

The dense form is written from the definition of each mask and shares no code with ``stablemask.masks``.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stablemask.pseudo import head_decay_rates

from .cases import Case

WINDOW = 256
DOCUMENT_LENGTHS = (200, 400)
HIDDEN_SHARE = 0.1

Arguments = dict[str, Any]


def _causal(case: Case) -> Arguments:
    return {}


def _mask(case: Case) -> Arguments:
    """Any mask a user may have built: a tenth of the keys hidden at random, never a row's own."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.rand(case.q_len, case.kv_len, generator=generator) < HIDDEN_SHARE
    hidden.diagonal(case.kv_len - case.q_len).fill_(False)
    return {"attn_mask": ~hidden.to(case.device)}


def _padding(case: Case) -> Arguments:
    """The last quarter of the keys, as of a batch padded on the right; no row is without a key."""
    seen = torch.arange(case.kv_len, device=case.device) < case.kv_len - case.kv_len // 4
    return {"attn_mask": seen.view(1, 1, 1, -1)}


def _alibi(case: Case) -> Arguments:
    return {"alibi_slopes": head_decay_rates(case.heads).to(case.device)}


def _window(case: Case) -> Arguments:
    return {"window": WINDOW}


def _documents(case: Case) -> Arguments:
    """Documents of 200 to 400 tokens, and positions that restart in each."""
    generator = torch.Generator().manual_seed(0)
    count = case.kv_len // DOCUMENT_LENGTHS[0] + 1
    lengths = torch.randint(*DOCUMENT_LENGTHS, (count,), generator=generator)
    ids = torch.repeat_interleave(torch.arange(count), lengths)[: case.kv_len]
    starts = (lengths.cumsum(0) - lengths)[ids]
    positions = (torch.arange(case.kv_len) - starts)[case.kv_len - case.q_len :]
    return {"documents": ids.to(case.device), "positions": positions.to(case.device)}


MASKS: dict[str, Callable[[Case], Arguments]] = {
    "causal": _causal,
    "mask": _mask,
    "padding": _padding,
    "alibi": _alibi,
    "window": _window,
    "documents": _documents,
}


def arguments(case: Case) -> Arguments:
    """The mask as keyword arguments of ``stable_mask_attention``."""
    return MASKS[case.mask](case)


def positions(case: Case) -> Tensor:
    """Position of each query row in its own sequence, ``(q_len,)``."""
    given = arguments(case).get("positions")
    first = case.kv_len - case.q_len
    return torch.arange(first, case.kv_len, device=case.device) if given is None else given


def dense_bias(case: Case, rows: Tensor | None = None) -> Tensor:
    """What is added to the scores of ``rows`` (by default all): causality and the mask.

    Returns:
        float32 ``(1 or heads, rows, kv_len)``, -inf where a row may not look.
    """
    given = arguments(case)
    if rows is None:
        rows = torch.arange(case.q_len, device=case.device)
    row = (rows + case.kv_len - case.q_len).unsqueeze(-1)
    column = torch.arange(case.kv_len, device=case.device)
    visible = column <= row
    if "window" in given:
        visible = visible & (column > row - given["window"])
    if "documents" in given:
        visible = visible & (given["documents"][row] == given["documents"])
    if "attn_mask" in given:
        visible = visible & given["attn_mask"].view(-1, case.kv_len).expand(case.q_len, -1)[rows]
    bias = torch.zeros(1, 1, 1, device=case.device)
    if "alibi_slopes" in given:
        bias = -given["alibi_slopes"].view(-1, 1, 1) * (row - column)
    return bias.masked_fill(~visible, -torch.inf)
