"""PEFT adapters keep the StableMask settings they were trained with, and bring them when they are loaded.

The settings stand in ``adapter_config.json``, under ``stablemask``. Without ``import stablemask.hf`` PEFT
warns that it ignores them; with it, PEFT's and Transformers' own saving writes them and their own loading
gives them to the model, or refuses.
"""

import importlib.abc
import inspect
import json
import os
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import find_adapter_config_file

from ..models.configuration import StableMaskConfig
from ..models.modeling import ATTN_IMPLEMENTATION
from ..models.settings import SHIFT_PARAMETER, in_short
from ..reading import parse_json
from ..writing import write_whole
from .guard import wrap_method
from .settings import model_settings
from .shift import note_shifts

ADAPTER_CONFIG = "adapter_config.json"
KEY = "stablemask"


def install() -> None:
    """Make Transformers' saving and loading of adapters, and PEFT's once it is there, mind the settings."""
    wrap_method(PreTrainedModel, "save_pretrained", _saving)
    wrap_method(PreTrainedModel, "load_adapter", _loading)
    if "peft" in sys.modules:
        _guard(sys.modules["peft"])
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())


class _WhenImported(importlib.abc.MetaPathFinder):
    """Guards PEFT when somebody imports it: it is optional, and slow to import."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != "peft":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_guard(module: Any) -> None:
                execute(module)
                _guard(module)

            spec.loader.exec_module = execute_and_guard  # type: ignore[method-assign]
        return spec


def _guard(peft: Any) -> None:
    wrap_method(peft.PeftModel, "save_pretrained", _saving)
    for cls in (peft.PeftModel, peft.PeftMixedModel):  # which cannot save
        wrap_method(cls, "load_adapter", _loading)
    wrap_method(peft.PeftConfig, "from_json_file", _reading)
    # Our decoder names its layers as Llama does.
    for name, defaults in vars(peft.utils).items():
        if name.endswith("_MODULES_MAPPING") and "llama" in defaults:
            defaults.setdefault(StableMaskConfig.model_type, defaults["llama"])


def _saving(save: Any) -> Any:
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        model = model_of(self)
        call = inspect.signature(save).bind(self, save_directory, *args, **kwargs)
        if model is not None and note_shifts(model) and self is model:
            given = call.arguments.get("state_dict")
            whole = self.state_dict() if given is None else given
            weights = {k: v for k, v in whole.items() if not k.endswith(SHIFT_PARAMETER)}
            call.arguments["state_dict"] = weights
        result = save(*call.args, **call.kwargs)
        settings = None if model is None else running_settings(model.config)
        if settings is not None and kwargs.get("is_main_process", True):
            for name in getattr(self, "peft_config", ()):
                for folder in (save_directory, os.path.join(save_directory, name)):
                    _write_settings(Path(folder) / ADAPTER_CONFIG, settings)
        return result

    return save_pretrained


def _loading(load: Any) -> Any:
    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = inspect.signature(load).bind(self, *args, **kwargs).arguments
        where = call.get("model_id", call.get("peft_model_id"))
        model = model_of(self)
        if where is not None and model is not None:
            download = {**(call.get("adapter_kwargs") or {}), **call.get("kwargs", {})}
            settings = adapter_settings(str(where), **download)
            name = call.get("adapter_name") or "default"
            others = set(getattr(self, "peft_config", ())) - {name}
            if settle(model.config, settings, f"the adapter {where}", others):
                model.set_attn_implementation(ATTN_IMPLEMENTATION)
        return load(self, *args, **kwargs)

    return load_adapter


def _reading(read: Any) -> Any:
    def from_json_file(cls: type, *args: Any, **kwargs: Any) -> Any:
        content = read(cls, *args, **kwargs)
        content.pop(KEY, None)  # which PEFT would warn of
        return content

    return from_json_file


def adapter_settings(adapter: str, **download: Any) -> dict[str, Any] | None:
    """The StableMask settings an adapter was trained with, None where it tells of none.

    Args:
        adapter: a folder, or a name on the hub.
        download: ``subfolder``, ``revision``, ``token`` and ``cache_dir``, as PEFT takes them.
    """
    path: Any = Path(adapter, download.get("subfolder") or "", ADAPTER_CONFIG)
    if not path.is_file():
        known = ("subfolder", "revision", "token", "cache_dir", "local_files_only")
        given = {key: download[key] for key in known if download.get(key)}
        path = find_adapter_config_file(adapter, **given)
    if path is None:
        return None
    path = Path(path)
    content = parse_json(path.read_text(encoding="utf-8"))
    # Earlier versions of ours put the model's whole configuration beside it.
    beside = path.with_name("config.json")
    if KEY not in content and beside.is_file():
        content = parse_json(beside.read_text(encoding="utf-8"))
    return content.get(KEY)


def settle(
    config: PreTrainedConfig,
    settings: dict[str, Any] | None,
    what: str,
    others: Collection[str] = (),
) -> bool:
    """Let a model's configuration ask for what an adapter was trained with; whether that is a change.

    Args:
        settings: those of the adapter; None leaves the model as it is.
        what: the adapter, for messages.
        others: names of the adapters that the model has already.

    Raises:
        ValueError: the model runs other settings, or softmax with ``others`` that were made for that.
    """
    if settings is None:
        return False
    text: Any = config.get_text_config(decoder=True)
    wanted, running = model_settings(text, settings), running_settings(text)
    if running is not None:
        running = model_settings(text, running)
        if running != wanted:
            raise ValueError(
                f"{what} was trained with StableMask {in_short(wanted)}, its model runs "
                f"{in_short(running)}"
            )
        return False
    if others:
        raise ValueError(
            f"{what} was trained with StableMask {in_short(wanted)}, and the model runs softmax for its "
            f"{', '.join(sorted(others))}: load it into a model of its own"
        )
    if isinstance(text, StableMaskConfig):
        text.attention = "stablemask"
    text.stablemask = wanted
    return True


def running_settings(config: PreTrainedConfig) -> dict[str, Any] | None:
    """What a configuration asks for, None for softmax."""
    text: Any = config.get_text_config(decoder=True)
    if isinstance(text, StableMaskConfig) and text.attention != "stablemask":
        return None
    return getattr(text, "stablemask", None)


def model_of(holder: Any) -> PreTrainedModel | None:
    """The Transformers model that holds adapters: the one itself, or that within PEFT's."""
    if not isinstance(holder, PreTrainedModel):
        get = getattr(holder, "get_base_model", None)
        inner = getattr(getattr(holder, "base_model", None), "model", None)
        holder = get() if get is not None else inner
    return holder if isinstance(holder, PreTrainedModel) else None


def _write_settings(path: Path, settings: dict[str, Any]) -> None:
    if not path.is_file():
        return
    content = json.loads(path.read_text(encoding="utf-8")) | {KEY: settings}
    write_whole(path, json.dumps(content, indent=2, sort_keys=True))
