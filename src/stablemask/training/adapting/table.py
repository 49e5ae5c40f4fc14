"""What a model was before its sink was taken out, and after."""

from typing import Any

import torch

from ...evaluation.summary import sink_summary
from .reading import spread

MEASURED_ON = 8  # texts


def measure(model: Any, held_out: Any, prefix: int | None) -> dict[str, float]:
    """What the table says of a model, on a few texts of a dataset that was held out.

    Args:
        prefix: token id to put in front of texts that do not begin with it.
    """
    texts = [example["input_ids"] for example in spread(held_out, MEASURED_ON)]
    shortest = min(len(text) for text in texts)
    found = sink_summary(model, torch.stack([text[:shortest] for text in texts]), prefix)
    return {
        "perplexity": found.perplexity,
        "first_token_attention": found.mean_first_token,
        "first_token_attention_max": found.worst_first_token,
        "largest_activation": found.largest_activation,
        "kurtosis": found.worst_kurtosis,
    }


_ROWS = {
    "perplexity": ("perplexity", ".2f"),
    "first_token_attention": ("attention on the first token", ".1%"),
    "first_token_attention_max": ("  in the layer with the most", ".1%"),
    "largest_activation": ("largest activation", ",.0f"),
    "kurtosis": ("kurtosis of the worst layer", ",.0f"),
}


def table(columns: dict[str, dict[str, float | None]]) -> str:
    """Of before and after, in Markdown; the columns are what :func:`measure` gives, None (of JSON) where not finite."""
    rows = [["", *columns], ["---", *("---:" for _ in columns)]]
    for name, (said, form) in _ROWS.items():
        numbers = (_text(column[name], form) for column in columns.values())
        rows.append([said, *numbers])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _text(number: float | None, form: str) -> str:
    return "not finite" if number is None else f"{number:{form}}".replace("%", " %")
