"""Context parallelism: each rank holds a part of the sequence, keys and values travel around a ring.

Ring attention (Liu et al. 2023, arXiv 2310.01889). At step ``t`` a rank holds the keys and values of the
rank ``t`` places before it; it attends to them through the stock kernel while they are on their way to
the next rank, and adds the part to what it has by its logsumexp (``merging.py``). The sink is added once,
at the end. The backward goes around again: the kernel's own backward, given the ``out`` and ``lse`` of
the whole row, is exact for each range of keys alone (``backends/operators.py``), and the sums of the
gradients of keys and values travel along with them, home after a whole turn.

Causal work is not the same everywhere, so by default a rank holds a zigzag, as in PyTorch's own context
parallelism: of ``2 N`` chunks the ranks get ``r`` and ``2 N - 1 - r``, and each computes one ``N``-th.

For B sequences of n tokens per rank, K key heads of D columns:

- sent by a rank: ``2 (N - 1) B K n D`` elements forward, grouped heads ungrouped; backward as many, and
  ``2 N B K n D`` float32 for the gradients;
- memory, linear in n: the shard of keys and values in use and the next one, a float32 ``out``; backward
  besides float32 gradients of the query, and of keys and values three times (being computed, coming in, going
  out).

Letters: B batch, H query heads, K key heads, n rows and keys of a rank, D head_dim, N ranks.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..arguments import (
    autocast,
    check_gamma_heads,
    check_masks,
    check_scale,
    check_sink,
    check_tensors,
)
from ..backends.calls import sink_gradient
from ..backends.stock import operators
from ..backends.stock.flash import fit, stock_kernel
from ..call import Call, as_tensor
from ..merging import merge_attention
from ..pseudo import pseudo_logsumexp


def context_parallel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink_logits: Tensor | float,
    *,
    window: int | None = None,
    alibi_slopes: Tensor | None = None,
    scale: float | None = None,
    group: dist.ProcessGroup | None = None,
    balanced: bool = True,
) -> Tensor:
    """:func:`~stablemask.sink_attention` of a sequence that is sharded over the ranks of a group.

    Every rank calls it with its shard, of the same shape on each, as :func:`shard_sequence` cuts it.
    Exact and differentiable in query, key, value and sink_logits. As with any weight, the gradient of
    a sink shared by the ranks is that of this rank's rows: sum it over the group where those of the
    weights are summed. Under ``torch.compile`` the graph breaks here.

    Args:
        query: ``(batch, heads, length / N, head_dim)``, floating point.
        key, value: ``(batch, kv_heads, length / N, ...)``.
        sink_logits: of this rank's rows, broadcastable to ``(batch, heads, length / N)``, or a number.
        window, alibi_slopes, scale: as in :func:`~stablemask.sink_attention`, over the whole sequence.
        group: the process group; default all ranks.
        balanced: whether the shards are zigzags, see :func:`shard_sequence`.

    Returns:
        ``(batch, heads, length / N, value_dim)`` in the dtype of ``query``.

    Raises:
        ValueError, TypeError: an argument does not fit, there is no process group, or no stock kernel
            serves the device or dtype.
    """
    ring = _Ring.of(group, balanced)
    check_tensors(query, key, value)
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            "query and key must be shards of one length, got "
            f"{query.shape[2]} rows and {key.shape[2]} keys"
        )
    ring.check_length(query.shape[2], 2 if balanced else 1, "the length of a shard")
    masks = check_masks(query, key, None, window, alibi_slopes, None)
    query, key, value = autocast(query, key, value)
    sink_logits = as_tensor(check_sink(sink_logits, query), query)
    scale = check_scale(scale, query)
    kernel = stock_kernel(Call(query, key, value, sink_logits, masks, 0.0, scale))
    query, key, value, value_dim, scale = fit(query, key, value, scale, kernel)
    out = _attend(query, key, value, sink_logits, alibi_slopes, window, scale, kernel, ring)
    return out[..., :value_dim]


def context_parallel_stable_mask_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    gamma: float | Tensor,
    horizon: int | None = None,
    window: int | None = None,
    alibi_slopes: Tensor | None = None,
    scale: float | None = None,
    group: dist.ProcessGroup | None = None,
    balanced: bool = True,
) -> Tensor:
    """:func:`~stablemask.stable_mask_attention` of a sequence sharded over the ranks of a group.

    Args:
        gamma, horizon: as there; ``horizon`` counts the columns of the whole sequence. A row's position
            is its place in the whole sequence. The gradient of a ``gamma`` tensor is that of this rank's
            rows.
        the others: as in :func:`context_parallel_attention`.
    """
    if not isinstance(query, Tensor) or query.dim() != 4:
        check_tensors(query, key, value)
    check_gamma_heads(gamma, query.shape[1])
    positions = sequence_positions(
        query.shape[2], group=group, balanced=balanced, device=query.device
    )
    return context_parallel_attention(
        query, key, value, pseudo_logsumexp(positions, gamma, horizon),
        window=window, alibi_slopes=alibi_slopes, scale=scale, group=group, balanced=balanced,
    )  # fmt: skip


def shard_sequence(
    tensor: Tensor, dim: int, *, group: dist.ProcessGroup | None = None, balanced: bool = True
) -> Tensor:
    """This rank's part of a tensor along its sequence.

    Args:
        tensor: the whole, the same on every rank.
        dim: its sequence axis, whose length is a multiple of ``2 N`` for ``N`` ranks (``N`` where not
            balanced).
        balanced: rank ``r`` gets chunks ``r`` and ``2 N - 1 - r`` of ``2 N``, so that causal attention
            is the same work for each; else chunk ``r`` of ``N``.

    Raises:
        ValueError: the length is no such multiple, or there is no process group.
    """
    ring = _Ring.of(group, balanced)
    chunk = ring.check_length(tensor.shape[dim], ring.num_chunks, f"the length along axis {dim}")
    pieces = tensor.split(chunk, dim)
    return torch.cat([pieces[i] for i in ring.chunks(ring.rank)], dim)


def unshard_sequence(
    tensor: Tensor, dim: int, *, group: dist.ProcessGroup | None = None, balanced: bool = True
) -> Tensor:
    """The whole of a tensor from each rank's part, on every rank; no gradient goes through it."""
    ring = _Ring.of(group, balanced)
    ring.check_length(tensor.shape[dim], len(ring.chunks(0)), f"the length along axis {dim}")
    shards = [
        torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(ring.size)
    ]
    dist.all_gather(shards, tensor.detach().contiguous(), group=group)
    pieces: dict[int, Tensor] = {}
    for rank, shard in enumerate(shards):
        chunks = ring.chunks(rank)
        pieces.update(zip(chunks, shard.chunk(len(chunks), dim)))
    return torch.cat([pieces[chunk] for chunk in range(ring.num_chunks)], dim)


def sequence_positions(
    length: int,
    *,
    group: dist.ProcessGroup | None = None,
    balanced: bool = True,
    device: torch.device | str | None = None,
) -> Tensor:
    """Place in the whole sequence of each row of this rank's shard.

    Args:
        length: of the shard.

    Returns:
        int64 ``(length,)``.
    """
    ring = _Ring.of(group, balanced)
    chunk = ring.check_length(length, len(ring.chunks(0)), "the length of a shard")
    starts = (i * chunk for i in ring.chunks(ring.rank))
    return torch.cat([torch.arange(start, start + chunk, device=device) for start in starts])


@dataclass(frozen=True)
class _Ring:
    """The ranks and which chunks of the sequence each holds."""

    group: dist.ProcessGroup | None
    rank: int
    size: int
    balanced: bool

    @classmethod
    def of(cls, group: dist.ProcessGroup | None, balanced: bool) -> "_Ring":
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "context parallelism needs a process group: "
                "call torch.distributed.init_process_group first"
            )
        rank = dist.get_rank(group)
        if rank < 0:
            raise ValueError(f"this process, rank {dist.get_rank()}, is not in the group {group}")
        return cls(group, rank, dist.get_world_size(group), balanced)

    @property
    def num_chunks(self) -> int:
        return 2 * self.size if self.balanced else self.size

    def chunks(self, rank: int) -> tuple[int, ...]:
        """The chunks of a rank, in order."""
        return (rank, 2 * self.size - 1 - rank) if self.balanced else (rank,)

    def check_length(self, length: int, parts: int, name: str) -> int:
        """The length of a part."""
        if length % parts or length == 0:
            layout = "balanced" if self.balanced else "contiguous"
            raise ValueError(
                f"{name} must be a positive multiple of {parts} for {self.size} ranks with {layout} "
                f"shards, got {length}; pad the sequence at its end"
            )
        return length // parts

    def around(self, tensor: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Each rank's tensor in turn, with that rank, beginning with our own.

        While one is in use it is on its way to the next rank, and must not be written to.
        """
        for step in range(self.size):
            passing = _Passing(tensor, self) if step + 1 < self.size else None
            yield (self.rank - step) % self.size, tensor
            if passing is not None:
                tensor = passing.wait()

    def ranges(
        self, source: int, length: int, window: int | None, by_distance: bool
    ) -> list[tuple[slice, slice, int]]:
        """What of the shard of ``source`` our rows see: rows, keys, and the keys before the first row.

        The squares on the diagonal come first, so that every row has seen a key before another part
        is merged into it. Chunks that are joined in one call are not neighbours in the sequence, which
        matters to a mask by distance only.
        """
        chunk = length // len(self.chunks(0))
        if not by_distance:
            if source == self.rank:
                return [(slice(0, length), slice(0, length), 0)]
            if source < self.rank:
                return [(slice(0, length), slice(0, chunk), length)]
            return [(slice(chunk, length), slice(0, length), length)] if self.balanced else []
        ranges = []
        for i, row_chunk in enumerate(self.chunks(self.rank)):
            for j, key_chunk in enumerate(self.chunks(source)):
                past = (row_chunk - key_chunk) * chunk
                if past >= 0 and (window is None or past - chunk + 1 < window):
                    rows = slice(i * chunk, (i + 1) * chunk)
                    ranges.append((rows, slice(j * chunk, (j + 1) * chunk), past))
        return sorted(ranges, key=lambda part: part[2])


class _Passing:
    """A tensor on its way to the next rank while that of the previous one comes in."""

    def __init__(self, tensor: Tensor, ring: _Ring):
        if ring.size == 1:
            self._received, self._works = tensor, []
            return
        self._sent, self._received = tensor, torch.empty_like(tensor)
        following, previous = (ring.rank + 1) % ring.size, (ring.rank - 1) % ring.size
        self._works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, self._sent, group=ring.group, group_peer=following),
                dist.P2POp(dist.irecv, self._received, group=ring.group, group_peer=previous),
            ]
        )

    def wait(self) -> Tensor:
        for work in self._works:
            work.wait()
        return self._received


@torch.compiler.disable
def _attend(*arguments):
    return _RingAttention.apply(*arguments)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, sink_logits, slopes, window, scale, kernel, ring):
        precise = operators.lse_dtype(query)
        length = query.shape[2]
        by_distance = slopes is not None or window is not None
        out = torch.zeros(query.shape, dtype=precise, device=query.device)
        lse = out.new_full(out.shape[:3], -torch.inf)
        for source, (keys, values) in ring.around(torch.stack((key, value))):
            for rows, cols, past in ring.ranges(source, length, window, by_distance):
                part, part_lse = operators.forward(
                    query[:, :, rows], keys[:, :, cols], values[:, :, cols],
                    None, None, slopes, window, None, past, scale, kernel,
                )  # fmt: skip
                # `merge_attention` of two parts, in place.
                row_lse = lse[:, :, rows]
                share = torch.sigmoid(part_lse - row_lse)
                out[:, :, rows].lerp_(part.to(precise), share.unsqueeze(-1))
                row_lse.copy_(torch.logaddexp(row_lse, part_lse))
        out, lse = merge_attention([(out, lse)], sink_logits)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, sink_logits, slopes, out, lse)
        ctx.settings = window, scale, kernel, ring
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        query, key, value, sink_logits, slopes, out, lse = ctx.saved_tensors
        window, scale, kernel, ring = ctx.settings
        length = query.shape[2]
        by_distance = slopes is not None or window is not None
        d_query = torch.zeros(query.shape, dtype=lse.dtype, device=query.device)
        passing: _Passing | None = None
        for source, (keys, values) in ring.around(torch.stack((key, value))):
            # Of the shard in hand; the sum over the ranks it has passed comes in behind it.
            d_keys, d_values = d_shard = torch.zeros(
                (2, *key.shape), dtype=lse.dtype, device=key.device
            )
            for rows, cols, past in ring.ranges(source, length, window, by_distance):
                parts = operators.backward(
                    grad[:, :, rows], query[:, :, rows], keys[:, :, cols], values[:, :, cols],
                    out[:, :, rows], lse[:, :, rows],
                    None, slopes, window, None, past, scale, kernel,
                )  # fmt: skip
                d_query[:, :, rows] += parts[0]
                d_keys[:, :, cols] += parts[1]
                d_values[:, :, cols] += parts[2]
            if passing is not None:
                d_shard += passing.wait()
            passing = _Passing(d_shard, ring)
        assert passing is not None
        d_key, d_value = passing.wait()

        d_sink = None
        if ctx.needs_input_grad[3]:
            d_total = -operators.row_sums(grad, out)
            d_sink = sink_gradient(sink_logits, lse, d_total)
        return (
            d_query.to(query.dtype), d_key.to(key.dtype), d_value.to(value.dtype), d_sink,
            *(None,) * 5,
        )  # fmt: skip
