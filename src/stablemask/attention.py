"""The public functions: check the arguments once, choose a backend.

Every shape here is that of ``F.scaled_dot_product_attention``. Where to go next: ``pseudo.py`` for
the sink logits of StableMask, ``backends/`` for the ways of computing.
"""

import math

import torch
from torch import Tensor

from .backends import BACKENDS, Backend
from .call import Call
from .masks import Masks
from .pseudo import pseudo_logsumexp

# Above this many keys "auto" raises rather than fall to the dense backend.
MAX_DENSE_KEYS = 4096


def stable_mask_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    gamma: float | Tensor,
    horizon: int | None = None,
    positions: Tensor | None = None,
    attn_mask: Tensor | None = None,
    window: int | None = None,
    alibi_slopes: Tensor | None = None,
    documents: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """StableMask attention: causal attention whose masked upper triangle absorbs surplus attention.

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
        attn_mask, window, alibi_slopes, documents, dropout_p, scale, backend: as in :func:`sink_attention`.

    Returns:
        ``(batch, heads, q_len, value_dim)`` in the dtype of ``query``.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """
    _check_tensors(query, key, value)
    batch, heads, q_len, _ = query.shape
    if positions is None:
        first = key.shape[2] - q_len
        positions = torch.arange(first, first + q_len, device=query.device)
    elif isinstance(positions, Tensor) and tuple(positions.shape) not in (
        (q_len,), (1, q_len), (batch, q_len),
    ):  # fmt: skip
        raise ValueError(
            f"positions must be (q_len,) or (batch, q_len) = ({batch}, {q_len}), "
            f"got shape {tuple(positions.shape)}"
        )
    if isinstance(gamma, Tensor) and gamma.dim() == 1 and gamma.shape[0] not in (1, heads):
        raise ValueError(
            f"gamma must be a number or a tensor (heads,) = ({heads},), "
            f"got shape {tuple(gamma.shape)}"
        )
    sink_logits = pseudo_logsumexp(positions, gamma, horizon).to(query.device)
    masks = _check_masks(query, key, attn_mask, window, alibi_slopes, documents)
    return _attend(query, key, value, sink_logits, masks, dropout_p, scale, backend)


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
    scale: float | None = None,
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
        scale: of the scores; default ``head_dim ** -0.5``.
        backend: ``"auto"`` or one of ``stablemask.backends.BACKENDS``.

    Returns:
        ``(batch, heads, q_len, value_dim)`` in the dtype of ``query``.

    Raises:
        ValueError, TypeError: an argument does not fit, or the named backend cannot serve the call;
            the message says why.
    """
    _check_tensors(query, key, value)
    masks = _check_masks(query, key, attn_mask, window, alibi_slopes, documents)
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
    query, key, value = _autocast(query, key, value)
    sink_logits = _check_sink(sink_logits, query)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if scale is None:
        scale = query.shape[-1] ** -0.5
    elif not math.isfinite(scale):
        raise ValueError(f"scale must be a finite number, got {scale}")

    call = Call(query, key, value, sink_logits, masks, dropout_p, float(scale))
    return _choose(backend, call).attend(call)


def _choose(backend: str, call: Call) -> Backend:
    if backend != "auto":
        if backend not in BACKENDS:
            raise ValueError(f"backend must be 'auto' or one of {list(BACKENDS)}, got {backend!r}")
        reason = BACKENDS[backend].unsupported(call)
        if reason:
            raise ValueError(f"backend {backend!r} cannot serve this call: {reason}")
        return BACKENDS[backend]
    reason = BACKENDS["flash"].unsupported(call)
    if reason is None:
        return BACKENDS["flash"]
    kv_len = call.key.shape[2]
    if kv_len > MAX_DENSE_KEYS:
        raise ValueError(
            f"{reason}, and the dense backend would store every score of {kv_len} keys; "
            "name backend='reference' to accept that"
        )
    return BACKENDS["reference"]


def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dim() != 4:
            raise ValueError(
                f"{name} must be (batch, heads, length, head_dim), got shape {tuple(tensor.shape)}"
            )
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device}, query on {query.device}")
    batch, heads, q_len, head_dim = query.shape
    if key.shape[0] != batch or value.shape[0] != batch:
        raise ValueError(
            f"batch differs: query {batch}, key {key.shape[0]}, value {value.shape[0]}"
        )
    if key.shape[3] != head_dim:
        raise ValueError(f"head_dim differs: query {head_dim}, key {key.shape[3]}")
    if head_dim == 0:
        raise ValueError("head_dim must be at least 1, got 0")
    if key.shape[1:3] != value.shape[1:3]:
        raise ValueError(
            f"key and value must share (kv_heads, kv_len), got {tuple(key.shape[1:3])} "
            f"and {tuple(value.shape[1:3])}"
        )
    kv_heads, kv_len = key.shape[1:3]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"kv_heads must divide heads, got {kv_heads} and {heads}")
    if kv_len < q_len:
        raise ValueError(f"kv_len must be at least q_len, got {kv_len} and {q_len}")


def _autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What autocast does for the stock attention: float32 and half inputs take its dtype."""
    device = query.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        query, key, value = (
            tensor if tensor.dtype == torch.float64 else tensor.to(dtype)
            for tensor in (query, key, value)
        )
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(
            f"query, key and value must share a dtype, got {query.dtype}, {key.dtype} "
            f"and {value.dtype}"
        )
    return query, key, value


def _check_sink(sink_logits: Tensor | float, query: Tensor) -> Tensor:
    """Sink logits as a three-dimensional tensor on the device of query."""
    if isinstance(sink_logits, (int, float)):
        return torch.full((1, 1, 1), float(sink_logits), device=query.device)
    if not isinstance(sink_logits, Tensor) or not sink_logits.dtype.is_floating_point:
        kind = sink_logits.dtype if isinstance(sink_logits, Tensor) else type(sink_logits).__name__
        raise TypeError(f"sink_logits must be a floating-point tensor or a number, got {kind}")
    if sink_logits.device != query.device:
        raise ValueError(f"sink_logits is on {sink_logits.device}, query on {query.device}")
    rows = query.shape[:3]
    if sink_logits.dim() > 3 or any(
        size not in (1, row) for size, row in zip(reversed(sink_logits.shape), reversed(rows))
    ):
        raise ValueError(
            "sink_logits must broadcast to (batch, heads, q_len) = "
            f"{tuple(rows)}, got shape {tuple(sink_logits.shape)}; one per head is (heads, 1)"
        )
    return sink_logits.reshape((1,) * (3 - sink_logits.dim()) + tuple(sink_logits.shape))


def _check_masks(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    window: int | None,
    alibi_slopes: Tensor | None,
    documents: Tensor | None,
) -> Masks:
    if attn_mask is None and window is None and alibi_slopes is None and documents is None:
        return Masks()
    heads, kv_len = query.shape[1], key.shape[2]
    shape = (*query.shape[:3], kv_len)
    for name, tensor in (
        ("attn_mask", attn_mask), ("alibi_slopes", alibi_slopes), ("documents", documents),
    ):  # fmt: skip
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device}, query on {query.device}")

    if attn_mask is not None:
        if attn_mask.dim() > 4 or any(
            size not in (1, full) for size, full in zip(reversed(attn_mask.shape), reversed(shape))
        ):
            raise ValueError(
                f"attn_mask must broadcast to (batch, heads, q_len, kv_len) = {shape}, "
                f"got shape {tuple(attn_mask.shape)}"
            )
        if attn_mask.dtype != torch.bool and not attn_mask.dtype.is_floating_point:
            raise TypeError(f"attn_mask must be bool or floating point, got {attn_mask.dtype}")
        attn_mask = attn_mask.reshape((1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape))
        attn_mask = attn_mask.expand(*attn_mask.shape[:-1], kv_len)
    if alibi_slopes is not None and tuple(alibi_slopes.shape) != (heads,):
        raise ValueError(
            f"alibi_slopes must be (heads,) = ({heads},), got shape {tuple(alibi_slopes.shape)}"
        )
    if window is not None and (
        isinstance(window, bool) or not isinstance(window, int) or window < 1
    ):
        raise ValueError(f"window must be an int of at least 1, or None, got {window!r}")
    if documents is not None:
        if documents.dtype.is_floating_point or documents.dtype.is_complex:
            raise TypeError(f"documents must be an integer tensor, got {documents.dtype}")
        if tuple(documents.shape) not in ((kv_len,), (1, kv_len), (shape[0], kv_len)):
            raise ValueError(
                f"documents must be (kv_len,) or (batch, kv_len) = ({shape[0]}, {kv_len}), "
                f"got shape {tuple(documents.shape)}"
            )
        documents = documents.reshape(-1, kv_len)
    return Masks(attn_mask, alibi_slopes, window, documents)
