"""What every page shares: how its template is filled, and when its words call a first token a sink.

A page is one file that needs no other, and no script.
"""

import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from .drawing import SCALE_TICKS, shade

PAPER = "https://arxiv.org/abs/2402.04779"  # the one link out of a page
# A layer makes the first token a sink where it gives it more than so many times an even spread's share.
SINK = 2


def render(template: str, **values: Any) -> str:
    """The whole file; every value is escaped."""
    return _templates().get_template(template).render(values)


@cache
def _templates() -> Environment:
    environment = Environment(
        loader=PackageLoader("stablemask.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(
        paper=PAPER,
        shade=shade,
        scale_ticks=[(100 * tick**0.5, f"{tick:.0%}") for tick in SCALE_TICKS],
        scale_stops=",".join(shade((i / 16) ** 2)[0] for i in range(17)),
    )
    environment.filters.update(printable=printable, listed=listed, share="{:.1%}".format)
    return environment


def listed(parts: Sequence[str]) -> str:
    """Such as "one, two and three"."""
    return ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else "".join(parts)


def printable(token: str) -> str:
    """The token with what would not be seen, or would upset the line, made visible."""
    shown = (
        {"\n": "↵", "\t": "→", "\r": "↵"}.get(
            c, "□" if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp") else c
        )
        for c in token
    )
    return "".join(shown) or "□"
