"""The rules of the compiled library, changed for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from stablemask import native


@contextmanager
def rules(**changed: tuple[float, float]) -> Iterator[None]:
    before = native.RULES
    native.set_rules(before._replace(**changed))
    try:
        yield
    finally:
        native.set_rules(before)
