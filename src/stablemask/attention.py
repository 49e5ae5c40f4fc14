"""The public functions: check the arguments once, choose a backend.

Every shape here is that of ``F.scaled_dot_product_attention``. Where to go next: ``pseudo.py`` for
the sink logits of StableMask, ``backends/`` for the ways of computing.
"""

import torch
from torch import Tensor

from .arguments import (
    autocast,
    broadcasts,
    check_dropout,
    check_gamma_heads,
    check_masks,
    check_scale,
    check_sink,
    check_stock_options,
    check_tensors,
)
from .backends.calls import nothing_watches
from .backends.choice import choose
from .call import Call
from .distributed import is_dtensor
from .masks import Masks
from .pseudo import log_pseudo_mass, pseudo_logsumexp


def stable_mask_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = True,
    *,
    gamma: float | Tensor,
    horizon: int | None = None,
    positions: Tensor | None = None,
    window: int | None = None,
    alibi_slopes: Tensor | None = None,
    documents: Tensor | None = None,
    scale: float | None = None,
    enable_gqa: bool = True,
    backend: str = "auto",
) -> Tensor:
    """StableMask attention: causal attention that may leave a share of each row to its pseudo mass.

        out[i] = sum_{j<=i} exp(s_ij) v_j / (sum_{j<=i} exp(s_ij) + M_i)

    with ``log M`` from :func:`pseudo_logsumexp`. (Yin et al., ICML 2024, arXiv 2402.04779.)

    Args:
        query: ``(batch, heads, q_len, head_dim)``, floating point.
        key: ``(batch, kv_heads, kv_len, head_dim)``; ``kv_heads`` divides ``heads`` and query head
            ``h`` reads key head ``h // (heads // kv_heads)``; ``kv_len >= q_len``.
        value: ``(batch, kv_heads, kv_len, value_dim)``.
        gamma: decay rate of the pseudo scores per column, a number or ``(heads,)``, positive; about
            ``1 / context`` suits most models.
        horizon: number of columns in all, or None for infinitely many, which lets a cached decode
            step and a full pass agree without being told a length.
        positions: absolute position of each query row in its own sequence, int, ``(q_len,)`` or
            ``(batch, q_len)``. Default: ``kv_len - q_len + arange(q_len)``. With left padding or packed
            documents, give the position that starts after the padding or at each document.
        attn_mask, dropout_p, is_causal, window, alibi_slopes, documents, scale, enable_gqa, backend: as
            in :func:`sink_attention`.

    Returns:
        ``(batch, heads, q_len, value_dim)`` in the dtype of ``query``.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """
    check_tensors(query, key, value)
    check_stock_options(query, key, is_causal, enable_gqa)
    if is_dtensor(query):
        from .distributed.tensor_parallel import attend_on_shards

        return attend_on_shards(
            stable_mask_attention, query, key, value, gamma=gamma, horizon=horizon,
            positions=positions, attn_mask=attn_mask, window=window, alibi_slopes=alibi_slopes,
            documents=documents, dropout_p=dropout_p, scale=scale, backend=backend,
        )  # fmt: skip
    masks = check_masks(query, key, attn_mask, window, alibi_slopes, documents)
    sink_logits = _sink_logits(query, key, gamma, horizon, positions)
    return _attend(query, key, value, sink_logits, masks, dropout_p, scale, backend)


def _sink_logits(
    query: Tensor,
    key: Tensor,
    gamma: float | Tensor,
    horizon: int | None,
    positions: Tensor | None,
) -> Tensor | float:
    batch, heads, q_len, _ = query.shape
    first = key.shape[2] - q_len
    check_gamma_heads(gamma, heads)
    if positions is None:
        traced = torch.compiler.is_compiling() or type(first) is not int
        # In float64 log M is the float32 that `pseudo_logsumexp` gives, in one row as in many.
        one_row = q_len == 1 and query.dtype != torch.float64
        one_row = one_row and horizon is None and not traced
        if one_row and type(gamma) is float and 0 < gamma < torch.inf:
            return log_pseudo_mass(first, gamma)  # a number, which launches nothing
        positions = torch.arange(first, first + q_len, device=query.device)
    elif (
        isinstance(positions, Tensor)
        and positions.dim() in (1, 2)
        and not (positions.shape[-1] == q_len and broadcasts(positions.shape, (batch, q_len)))
    ):
        raise ValueError(
            f"positions must be (q_len,) or (batch, q_len) = ({batch}, {q_len}), "
            f"got shape {tuple(positions.shape)}"
        )
    return pseudo_logsumexp(positions, gamma, horizon).to(query.device)


def sink_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink_logits: Tensor | float,
    *,
    attn_mask: Tensor | None = None,
    window: int | None = None,
    alibi_slopes: Tensor | None = None,
    documents: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = True,
    scale: float | None = None,
    enable_gqa: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Causal attention with one extra logit per row that takes part in the softmax without a value.

        out[i] = sum_{j<=i} exp(s_ij) v_j / (sum_{j<=i} exp(s_ij) + exp(sink_logits[i]))

    A sink logit of 0 is softmax-off-by-one, a parameter ``(heads, 1)`` is gpt-oss's learned sink,
    ``-inf`` is plain softmax, and :func:`pseudo_logsumexp` is StableMask. Exact and differentiable
    in query, key, value and sink_logits. Causality is aligned bottom-right: the last query row sees
    every key.

    Args:
        query, key, value: as in :func:`stable_mask_attention`.
        sink_logits: floating point, broadcastable to ``(batch, heads, q_len)`` (so one per head is
            ``(heads, 1)``), or a number.
        attn_mask: on top of causality, broadcastable to ``(batch, heads, q_len, kv_len)``; bool (True
            may attend) or floating point (added to the scaled scores). A row that may attend to
            nothing has output 0 and passes no gradient.
        window: how many of the latest keys, itself included, a row sees.
        alibi_slopes: ``(heads,)``; subtracts ``slope * distance`` from the scores, where distance is
            counted in keys.
        documents: integer ids of packed documents, ``(kv_len,)`` or ``(batch, kv_len)``: a row sees
            keys of its own document only.
        dropout_p: dropout on the attention weights, the sink's share not among them.
        is_causal: True; False only of a single row, which sees every key either way.
        scale: of the scores; default ``head_dim ** -0.5``.
        enable_gqa: whether ``kv_heads`` may be fewer than ``heads``.
        backend: one of ``stablemask.backends.BACKENDS``, or ``"auto"`` for the fastest that can serve the
            call; none that ``"auto"`` takes stores every score.

    Returns:
        ``(batch, heads, q_len, value_dim)`` in the dtype of ``query``.

    Raises:
        ValueError, TypeError: an argument does not fit, or the named backend cannot serve the call;
            the message says why.
    """
    check_tensors(query, key, value)
    check_stock_options(query, key, is_causal, enable_gqa)
    if is_dtensor(query):
        from .distributed.tensor_parallel import attend_on_shards

        return attend_on_shards(
            sink_attention, query, key, value, sink_logits=sink_logits, attn_mask=attn_mask,
            window=window, alibi_slopes=alibi_slopes, documents=documents, dropout_p=dropout_p,
            scale=scale, backend=backend,
        )  # fmt: skip
    masks = check_masks(query, key, attn_mask, window, alibi_slopes, documents)
    return _attend(query, key, value, sink_logits, masks, dropout_p, scale, backend)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink_logits: Tensor | float,
    masks: Masks,
    dropout_p: float,
    scale: float | None,
    backend: str,
) -> Tensor:
    query, key, value = autocast(query, key, value)
    sink_logits = check_sink(sink_logits, query)
    check_dropout(dropout_p)
    scale = check_scale(scale, query)
    call = Call(
        query, key, value, sink_logits, masks, dropout_p, scale, watched=not nothing_watches()
    )
    return choose(call, backend).attend(call)
