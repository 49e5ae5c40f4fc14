"""The method: pseudo-attention scores and the mass they hold.

StableMask (Yin et al., ICML 2024, arXiv 2402.04779) fills the masked upper triangle of causal
attention with scores that decay along the columns, ``P[i, j] = -gamma * j`` for ``j > i``. They take
part in the softmax and carry no value, so a row needs only their logsumexp, which has a closed form:

    log M[i] = log sum_{j=i+1}^{n-1} exp(-gamma * j)

``attention.py`` adds that one mass to each row; ``docs/method.md`` has the derivation.
"""

import math
import sys

import torch
from torch import Tensor

from .arguments import INT_END, is_int, is_number, shown
from .backends import hardware
from .backends.calls import only_autograd_watches

# Of rate times columns, up to which a series is exact: it leaves out a twenty-fourth of the square.
_FLAT = 1e-6


def head_decay_rates(num_heads: int) -> Tensor:
    """Geometric per-head rates ``2^(-8 (h + 1) / num_heads)``, ALiBi's slopes.

    Returns:
        A float32 tensor ``(num_heads,)``: an option for ``gamma``, and the slopes of ALiBi positions.
    """
    if not isinstance(num_heads, int) or num_heads < 1:
        raise ValueError(f"num_heads must be a positive int, got {num_heads!r}")
    exponents = torch.arange(1, num_heads + 1, dtype=torch.float64) * (-8.0 / num_heads)
    return torch.exp2(exponents).float()


def pseudo_logsumexp(
    positions: Tensor, gamma: float | Tensor, horizon: int | None = None, *, suffix: bool = False
) -> Tensor:
    """Log of the pseudo mass of each row, StableMask's sink logits.

        finite horizon n : log M = -(i+1) gamma + log(1 - exp(-gamma (n-1-i))) - log(1 - exp(-gamma))
        infinite horizon : log M = -(i+1) gamma - log(1 - exp(-gamma))
        gamma = 0        : log M = log(n-1-i), finite horizon only

    Args:
        positions: absolute position ``i`` of each row in its own sequence, an integer tensor
            ``(q_len,)`` or ``(batch, q_len)``.
        gamma: decay rate, a number or a tensor ``(heads,)``; differentiable when it is a tensor.
            Positive; zero is allowed with a finite horizon.
        horizon: the number of columns ``n`` (real and pseudo together), or None for infinitely many.
            Rows from ``n - 1`` on have no pseudo mass (``-inf``): they are plain causal rows.
        suffix: these rows have one pseudo column instead, ``log M = -i gamma``, for which the horizon must
            be finite.

    Returns:
        float32, ``(heads, q_len)`` or ``(batch, heads, q_len)``; ``heads`` is 1 when ``gamma`` is a
        number. Computed in float64.

    Raises:
        ValueError, TypeError: an argument is out of its range. The values of a ``gamma`` tensor are
            checked in eager mode on the CPU only; elsewhere a negative one shows as NaN, and one of zero
            has an infinite mass where the horizon is infinite.
    """
    _check(positions, gamma, horizon)
    if not isinstance(gamma, Tensor):
        gamma = gamma * 1.0  # of an int, which may be too large for a tensor's
    if suffix and horizon is None:
        raise ValueError("suffix needs a finite horizon: behind an infinite one there is no row")
    if positions.device.type == "mps":  # Apple's GPU has no float64
        on_cpu = gamma.cpu() if isinstance(gamma, Tensor) else gamma
        log_mass = pseudo_logsumexp(positions.cpu(), on_cpu, horizon, suffix=suffix)
        return log_mass.to(positions.device)
    row = positions.to(torch.float64).unsqueeze(-2)
    symbolic = torch.compiler.is_compiling() or isinstance(gamma, torch.SymFloat)
    if horizon is None and not (isinstance(gamma, Tensor) or symbolic):  # `math` knows no symbol
        return (row * -gamma + log_pseudo_mass(0, gamma)).float()
    if isinstance(gamma, Tensor):
        rate = gamma.to(positions.device, torch.float64).reshape(-1, 1)
    else:  # made on the device: a copy to it would end the capture of a CUDA graph
        rate = torch.full((1, 1), gamma, dtype=torch.float64, device=positions.device)
    if horizon is None:
        return (-(row + 1) * rate - torch.log(-torch.expm1(-rate))).float()

    remaining = horizon - 1 - row
    # Both branches of a `where` reach the gradient, so each is kept finite where it is not chosen.
    columns = remaining.clamp(min=1)
    # The gradient of a tiny rate would be the difference of two huge numbers, and 0 has no logarithm.
    flat = (rate >= 0) & (rate * columns < _FLAT)
    series = columns.log() - rate * (columns - 1) / 2
    safe_rate = torch.where(flat, 1.0, rate)
    decayed = torch.log(-torch.expm1(-safe_rate * columns)) - torch.log(-torch.expm1(-safe_rate))
    log_mass = torch.where(flat, series, decayed) - (row + 1) * rate
    return torch.where(remaining > 0, log_mass, -row * rate if suffix else -torch.inf).float()


def log_pseudo_mass(position: int, gamma: float) -> float:
    """:func:`pseudo_logsumexp` of one row, infinite horizon, in numbers: a decode step needs no tensor."""
    return -(position + 1) * gamma - math.log(-math.expm1(-gamma))


def dense_stable_mask(
    n: int,
    gamma: float | Tensor,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """The two matrices of the definition: ``out = (softmax(scores * C + P) * C) @ value``.

    For reading, testing and drawing; both are quadratic in ``n``.

    Returns:
        ``C`` ``(n, n)``, 1 on and below the diagonal; ``P`` ``(heads, n, n)``, ``-gamma * j`` above it.
    """
    if not (is_int(n) and 0 <= n < INT_END):
        raise ValueError(f"n must be an int of at least 0 and below 2**63, got {n!r}")
    _check(torch.zeros(1, dtype=torch.int64), gamma, n)
    rate = torch.as_tensor(gamma, dtype=dtype, device=device).reshape(-1, 1, 1)
    column = torch.arange(n, dtype=dtype, device=device)
    causal = torch.ones(n, n, dtype=dtype, device=device).tril()
    return causal, -rate * column * (1 - causal)


def mask_ratio(lse: Tensor, sink_logits: Tensor) -> Tensor:
    """Share of a row's attention that the valueless mass absorbs, ``M / (Z + M)``.

    ``lse`` is ``log Z``, the logsumexp of the row's real scores; real tokens receive the rest.
    """
    return torch.sigmoid(sink_logits - lse)


def _check(positions: Tensor, gamma: float | Tensor, horizon: int | None) -> None:
    if not isinstance(positions, Tensor):
        raise TypeError(f"positions must be an integer tensor, got {type(positions).__name__}")
    if positions.dtype.is_floating_point or positions.dtype.is_complex:
        raise TypeError(f"positions must be an integer tensor, got dtype {positions.dtype}")
    if positions.dtype == torch.bool:
        raise TypeError("positions must be an integer tensor, got dtype torch.bool")
    if positions.dim() not in (1, 2):
        raise ValueError(
            f"positions must be (q_len,) or (batch, q_len), got shape {tuple(positions.shape)}"
        )
    if horizon is not None:
        if not is_int(horizon):
            raise TypeError(f"horizon must be an int or None, got {horizon!r}")
        if not 0 <= horizon < INT_END:
            raise ValueError(f"horizon must be at least 0 and below 2**63, got {shown(horizon)}")

    if isinstance(gamma, Tensor):
        if gamma.dtype.is_floating_point and gamma.dtype.itemsize < 2:
            raise TypeError(f"gamma must have 16, 32 or 64 bits, got {gamma.dtype}")
        if gamma.dim() > 1:
            raise ValueError(
                f"gamma must be a number or a tensor (heads,), got shape {tuple(gamma.shape)}"
            )
        # Reading values would wait for the device, or break a graph or a transform.
        if hardware.kind_of(gamma) != "cpu" or not only_autograd_watches(gamma):
            return
        rates = gamma.detach().reshape(-1)
        wrong = rates[~rates.isfinite()]
        lowest = float((wrong if len(wrong) else rates).amin()) if len(rates) else 0.0
    elif is_number(gamma):
        lowest = gamma
    else:
        raise TypeError(f"gamma must be a number or a tensor (heads,), got {type(gamma).__name__}")
    if lowest > sys.float_info.max:  # infinity, of which 0 times is no number, or an int
        raise ValueError(f"gamma must be a finite number, got {shown(lowest)}")
    if not (lowest > 0 or (lowest == 0 and horizon is not None)):
        allowed = "greater than 0 with an infinite horizon" if horizon is None else "at least 0"
        raise ValueError(f"gamma must be {allowed}, got {shown(lowest)}")
