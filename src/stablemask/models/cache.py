"""The cache of keys and values: Transformers called it ``past_key_values``, and from 5.24 on ``cache``."""

import inspect

from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask

CACHE_NAMES = ("cache", "past_key_values")
# The keyword that the installed version takes, and the name that its outputs have.
CACHE = next(
    name for name in CACHE_NAMES if name in inspect.signature(create_causal_mask).parameters
)


def one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """The cache, given under either name; ValueError where each names another."""
    if cache is None or past_key_values is None or cache is past_key_values:
        return past_key_values if cache is None else cache
    raise ValueError("cache and past_key_values are two names of one thing: give one of them")
