"""Masks on top of causality, kept as what they are and made into numbers one tile at a time.

Letters: B batch, H query heads, n query rows, m keys. Query row ``i`` stands at key ``m - n + i``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Masks:
    """What a row may see, and what is added to its scores, causality aside.

    Attributes:
        attn_mask: bool (True = may attend) or additive, (B or 1, H or 1, n or 1, m).
        alibi_slopes: (H,); ``slope * (row - key)`` is subtracted from the scores.
        window: how many of the latest keys, itself included, a row sees.
        documents: (B or 1, m) ids; a row sees keys of its own document.
    """

    attn_mask: Tensor | None = None
    alibi_slopes: Tensor | None = None
    window: int | None = None
    documents: Tensor | None = None

    @property
    def by_tile(self) -> bool:
        """Whether all rows at once would take a tensor quadratic in length that nobody gave us."""
        return not (self.alibi_slopes is None and self.window is None and self.documents is None)

    @property
    def need_gradient(self) -> bool:
        tensors = (self.attn_mask, self.alibi_slopes)
        return any(tensor is not None and requires_grad(tensor) for tensor in tensors)

    def first_key(self, row: int) -> int:
        """The first key that a row at key ``row``, or any after it, can see."""
        return 0 if self.window is None else max(0, row - self.window + 1)

    def bias(
        self,
        rows: slice,
        keys: slice,
        past: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Tensor | None:
        """What to add to the scaled scores of a tile; -inf where a row may not look.

        Args:
            rows, keys: the tile.
            past: keys before the first query row, ``m - n``.
            dtype: floating point.

        Returns:
            (B or 1, H or 1, rows or 1, keys), or None where there is nothing to add.
        """
        bias = None
        if self.attn_mask is not None:
            mask = self.attn_mask[..., keys]
            mask = mask if mask.shape[2] == 1 else mask[:, :, rows]
            if mask.dtype == torch.bool:
                bias = torch.zeros((), dtype=dtype, device=mask.device).masked_fill(
                    ~mask, -torch.inf
                )
            else:
                bias = additive(mask, dtype)

        cut = self.window is not None and past + rows.stop - 1 - keys.start >= self.window
        if not (cut or self.alibi_slopes is not None or self.documents is not None):
            return bias
        row = torch.arange(past + rows.start, past + rows.stop, device=device).unsqueeze(-1)
        distance = (row - torch.arange(keys.start, keys.stop, device=device))[None, None]
        hide = None
        if self.window is not None and cut:
            hide = distance >= self.window
        if self.documents is not None:
            ids = self.documents[:, None, past + rows.start : past + rows.stop, None]
            other = ids != self.documents[:, None, None, keys]
            hide = other if hide is None else hide | other
        if self.alibi_slopes is not None:
            alibi = alibi_bias(distance, self.alibi_slopes.view(-1, 1, 1), dtype)
            bias = alibi if bias is None else bias + alibi
        if bias is None:
            bias = torch.zeros((), dtype=dtype, device=device)
        return bias if hide is None else bias.masked_fill(hide, -torch.inf)


def requires_grad(tensor: Tensor) -> bool:
    """Whether a tensor has a gradient; of what ``torch.func.vmap`` maps, that of what is inside."""
    while not (
        tensor.requires_grad
        or torch.compiler.is_compiling()
        or not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    ):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor.requires_grad


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask in a dtype; a number beyond its range becomes its lowest, for it is none of -inf."""
    lowest, bias = torch.finfo(dtype).min, mask.to(dtype)
    if torch.finfo(mask.dtype).min < lowest:
        bias = torch.where(mask.isinf(), bias, bias.clamp(min=lowest))
    return bias


def alibi_bias(distance: Tensor, slopes: Tensor, dtype: torch.dtype) -> Tensor:
    """``-slopes * distance``, rounded to ``dtype`` once: neither factor is one of half precision."""
    precise = torch.promote_types(dtype, torch.float32)
    return (distance * -slopes.to(precise)).to(dtype)


NO_MASKS = Masks()
