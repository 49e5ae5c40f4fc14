"""A saved StableMask model says so to whoever does not know it.

``config.stablemask`` is a key that other programs pass over, and then they run softmax without a word. Two
more keys of ``config.json`` stop them. The name in ``architectures`` begins with ``StableMask``: vLLM, SGLang,
llama.cpp and others choose their code by it, and refuse one that they do not know. ``attn_implementation`` is
Transformers' own, which then asks for an attention that only ``import stablemask.hf`` registers.

Both are of the file alone. With the import, a configuration in memory has neither, so whatever looks for a
class by its name finds it.
"""

from typing import Any

from transformers import PreTrainedConfig

from ..models import StableMaskConfig
from ..models.modeling import ATTN_IMPLEMENTATION
from .guard import wrap_method

PREFIX = "StableMask"


def install() -> None:
    """Have Transformers write both keys where a configuration asks for StableMask, and take them off again."""
    wrap_method(PreTrainedConfig, "to_diff_dict", _writing)
    wrap_method(PreTrainedConfig, "get_config_dict", _reading)


def _writing(to_diff_dict: Any) -> Any:
    def write(self: PreTrainedConfig) -> dict[str, Any]:
        content = to_diff_dict(self)
        if _is_adapted(content):
            content["attn_implementation"] = ATTN_IMPLEMENTATION
            _rename(content, lambda name: PREFIX + name.removeprefix(PREFIX))
        return content

    return write


def _reading(get_config_dict: Any) -> Any:
    def read(cls: type, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        content, unused = get_config_dict(cls, *args, **kwargs)
        if _is_adapted(content):
            if content.get("attn_implementation") == ATTN_IMPLEMENTATION:
                del content["attn_implementation"]
            _rename(content, lambda name: name.removeprefix(PREFIX))
        return content, unused

    return read


def _is_adapted(content: Any) -> bool:
    """Whether it is another model than ours and asks for StableMask, itself or in a part of it, as the text."""
    if not isinstance(content, dict) or content.get("model_type") == StableMaskConfig.model_type:
        return False
    return content.get("stablemask") is not None or any(map(_is_adapted, content.values()))


def _rename(content: dict[str, Any], change: Any) -> None:
    names = content.get("architectures")
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        content["architectures"] = [change(name) for name in names]
