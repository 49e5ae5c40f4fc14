"""The rules of the compiled library, others for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from stablemask import sink_attention
from stablemask.backends import native
from stablemask.backends.native.tuning import Rules, everywhere

BY_TILES = everywhere("forward_by_tiles", "backward_by_tiles")


@contextmanager
def rules(others: Rules) -> Iterator[None]:
    before = native.RULES
    native.set_rules(others)
    try:
        yield
    finally:
        native.set_rules(before)


def can_be_tiled(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies tiles of it: their bits are not those of the stock kernel."""
    query = torch.randn(1, 1, 64, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = []
    for others in (BY_TILES, {}):
        with rules(others), torch.no_grad():
            found.append(sink_attention(query, query, query, 0.0))
    return not torch.equal(*found)
