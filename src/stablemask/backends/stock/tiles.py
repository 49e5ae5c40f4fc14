"""Which calls of a stock kernel make up one attention, and the bias of each.

A kernel knows causality for a square, aligned top-left, and a bias. So a block of query rows is two
calls, the keys before it (all visible) and its own (square, causal). All rows are one block, unless a
mask would need a bias quadratic in length: then a block is ``ROWS_IN_BLOCK`` rows (``ROWS_IN_HALF_BLOCK``),
and its biases are made when its turn comes.

- FlashAttention on CUDA takes windows, packed documents and rows behind other keys in one call (:class:`Band`),
  and no bias: where these are all there is, there is one tile.
- A window or documents: keys that no row of the block sees are left out of the call.
- ALiBi: ``-slope * (row - key)`` is ``slope * (key - anchor)``, one number a key, less
  ``slope * (row - anchor)``, which shifts a row's logsumexp and nothing else. With the anchor at the
  block's first row, both are small for the keys before it where the weights are not, so no precision is
  lost. The square on the diagonal takes the distances as they are; they are those of every block. In
  half precision, where the bias is float32 still, it too can take one number a key.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...masks import Masks, alibi_bias
from .. import hardware

ROWS_IN_BLOCK = 256
# Of half precision in the backward, which on the CPU packs all keys anew in each call, and under ALiBi alone,
# which has no bias of rows by keys. Its largest number a key, 1024 * slope, is rounded by a tenth of what
# float16 is.
ROWS_IN_HALF_BLOCK = 1024
_KEPT_BIASES = 4  # the square's, the window's, and those of the blocks where a window begins


@dataclass(frozen=True)
class Band:
    """What FlashAttention hides by itself, besides later keys.

    Attributes:
        window: how many of the latest keys, itself included, a row sees; None for all.
        limits: where each packed document of the batch begins and ends, counted over all sequences, int32 on
            the device, with the length of the longest; None for one document a sequence.
    """

    window: int | None = None
    limits: tuple[Tensor, int] | None = None


@dataclass(frozen=True)
class Tile:
    """One call of a kernel.

    Attributes:
        rows, keys: the query rows and the keys.
        causal: the tile is a square on the diagonal.
        bias: (B or 1, H or 1, rows or 1, keys or 1), or None.
        shift: (H, rows), what the bias adds too much to each row's scores, or None.
        band: what the kernel hides by itself; the rows then stand on the last of the keys.
    """

    rows: slice
    keys: slice
    causal: bool
    bias: Tensor | None
    shift: Tensor | None
    band: Band | None = None


class Tiling:
    """The tiles of one attention; row ``i`` stands at key ``past + i``.

    Args:
        masks: what is on top of causality.
        num_rows, num_keys: the lengths. The rows stand on the last keys or, all of them, behind the
            last: ``past + num_rows <= num_keys`` or ``past >= num_keys``.
        past: the key of the first row.
        batch: sequences.
        dtype: of the biases.
        on_cpu: whether what documents hold may be read without waiting for a GPU.
        half: of inputs in half precision, whose bias is float32.
        backward: whether the tiles are those of a backward pass.
        banded: whether the kernel takes a :class:`Band`.
        alibi_reach: (H,), the largest ALiBi penalty that is not hidden; None for no limit.
    """

    def __init__(
        self,
        masks: Masks,
        num_rows: int,
        num_keys: int,
        past: int,
        *,
        batch: int,
        dtype: torch.dtype,
        device: torch.device,
        on_cpu: bool = True,
        half: bool = False,
        backward: bool = False,
        banded: bool = False,
        alibi_reach: Tensor | None = None,
    ) -> None:
        self.masks = masks
        self.num_rows, self.num_keys, self.past = num_rows, num_keys, past
        self.batch = batch
        self.dtype, self.device = dtype, device
        self.half, self.backward = half, backward
        self.alibi_reach = None if alibi_reach is None else alibi_reach.view(1, -1, 1, 1)
        self._document_starts = None
        if masks.documents is not None and on_cpu:  # a GPU would have to wait
            self._document_starts = _document_starts(masks.documents)
        self._by_distance: dict[tuple[int, int, int], Tensor | None] = {}
        self.band = self._find_band() if banded else None

    @property
    def biased(self) -> bool:
        """Whether a tile has a bias."""
        return self.band is None and (self.masks.by_tile or self.masks.attn_mask is not None)

    def _find_band(self) -> Band | None:
        masks, stop = self.masks, self.past + self.num_rows
        if masks.attn_mask is not None or masks.alibi_slopes is not None or stop > self.num_keys:
            return None
        # The kernel reads an int of 32 bits, of a larger one the last 32.
        window = None if masks.window is None else min(masks.window, self.num_keys)
        if masks.documents is None:
            plain = window is None and (self.past == 0 or self.num_rows == 1)
            return None if plain else Band(window)
        if self.past > 0 or stop < self.num_keys:
            return None
        limits = _document_limits(masks.documents.expand(self.batch, -1))
        return None if limits is None else Band(window, limits)

    def blocks(self) -> list[slice]:
        """The query rows, in blocks."""
        step = max(self.num_rows, 1)
        if self.masks.by_tile and self.band is None:
            alibi_alone = self.masks.window is None and self.masks.documents is None
            large = self.half and (self.backward or alibi_alone)
            step = ROWS_IN_HALF_BLOCK if large else ROWS_IN_BLOCK
        starts = range(0, self.num_rows, step)
        return [slice(start, min(start + step, self.num_rows)) for start in starts]

    def tiles(self, rows: slice) -> Iterator[Tile]:
        """The calls of a block; none where no row of it sees a key."""
        first, stop = self.past + rows.start, self.past + rows.stop
        if self.band is not None:
            yield Tile(rows, slice(0, stop), True, None, None, self.band)
            return
        lowest = self._lowest_key(rows)
        if rows.stop - rows.start == 1:
            ranges = [(slice(lowest, min(stop, self.num_keys)), False)]
        else:
            ranges = [
                (slice(lowest, min(first, self.num_keys)), False),
                (slice(first, min(stop, self.num_keys)), True),
            ]
        for keys, causal in ranges:
            if keys.start < keys.stop:
                yield self._tile(rows, keys, causal)

    def _lowest_key(self, rows: slice) -> int:
        """The first key that any row of a block can see."""
        first, stop = self.past + rows.start, self.past + rows.stop
        lowest = self.masks.first_key(first)
        if self._document_starts is not None:
            lowest = max(lowest, int(self._document_starts[first:stop].amin()))
        return lowest

    def _tile(self, rows: slice, keys: slice, causal: bool) -> Tile:
        if not self.masks.by_tile and self.masks.attn_mask is None:
            return Tile(rows, keys, causal, None, None)
        slopes = self.masks.alibi_slopes
        by_key = slopes is not None and (self.half or not causal)
        bias = self._mask_bias(rows, keys, with_alibi=not by_key)
        if slopes is None or not by_key:
            return Tile(rows, keys, causal, bias, None)
        anchor = self.past + rows.start
        distance = torch.arange(anchor - keys.start, anchor - keys.stop, -1, device=self.device)
        alibi = alibi_bias(distance, slopes.unsqueeze(-1), self.dtype)
        alibi = alibi.view(1, -1, 1, distance.shape[0])
        alibi = self._within_reach(alibi)  # the first row is the nearest
        shift = None
        if rows.stop - rows.start > 1:
            offset = torch.arange(rows.stop - rows.start, device=self.device)
            precise = torch.promote_types(self.dtype, torch.float32)  # as lse is
            shift = offset * slopes.to(precise).unsqueeze(-1)
        bias = alibi if bias is None else bias + alibi
        return Tile(rows, keys, causal, bias, shift)

    def _mask_bias(self, rows: slice, keys: slice, *, with_alibi: bool) -> Tensor | None:
        """What depends on distance alone is made once; the rest is different in each tile."""
        masks = self.masks if with_alibi else replace(self.masks, alibi_slopes=None)
        by_distance = replace(masks, attn_mask=None, documents=None)
        by_place = replace(masks, alibi_slopes=None, window=None)
        place = (
            self.past + rows.start - keys.start,
            rows.stop - rows.start,
            keys.stop - keys.start,
        )
        if place not in self._by_distance:
            if len(self._by_distance) == _KEPT_BIASES:
                self._by_distance.clear()
            bias = self._dense(by_distance, rows, keys)
            if bias is not None and with_alibi:
                bias = self._within_reach(bias)
            self._by_distance[place] = bias
        bias, other = self._by_distance[place], self._dense(by_place, rows, keys)
        if bias is None or other is None:
            return other if bias is None else bias
        return bias + other

    def _within_reach(self, bias: Tensor) -> Tensor:
        if self.alibi_reach is None:
            return bias
        return bias.masked_fill_(bias < -self.alibi_reach, -torch.inf)

    def _dense(self, masks: Masks, rows: slice, keys: slice) -> Tensor | None:
        return masks.bias(rows, keys, self.past, dtype=self.dtype, device=self.device)


def _document_starts(documents: Tensor) -> Tensor:
    """For each key the first key, over all sequences, that has its document: (m,)."""
    ids, order = documents.sort(dim=1, stable=True)
    place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    new = torch.ones_like(ids, dtype=torch.bool)
    new[:, 1:] = ids[:, 1:] != ids[:, :-1]
    group = torch.where(new, place, 0).cummax(dim=1).values
    starts = torch.empty_like(order).scatter_(1, order, order.gather(1, group))
    return starts.amin(dim=0)


def _document_limits(documents: Tensor) -> tuple[Tensor, int] | None:
    """``Band.limits`` of ids (B, m); None where a document is not in one piece, or may not be read now."""
    if hardware.is_capturing(documents):
        return None
    ids = documents.cpu()  # once a call: how many documents there are decides what is launched
    starts = torch.ones_like(ids, dtype=torch.bool)
    starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
    for row, start in zip(ids, starts, strict=True):
        pieces = row[start]
        if len(pieces.unique()) < len(pieces):
            return None
    begins = starts.flatten().nonzero().flatten()
    limits = torch.cat([begins, begins.new_full((1,), ids.numel())])
    longest = int(limits.diff().max())
    return limits.to(documents.device, torch.int32), longest
