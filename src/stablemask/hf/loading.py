"""Loading a causal language model from a folder or the hub, with every failure in one line."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file, find_adapter_config_file, is_peft_available, logging

from ..errors import InputError
from ..models import StableMaskConfig

# NAME or OWNER/NAME; anything else can only be a path.
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def load_model(
    name_or_path: str,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
) -> PreTrainedModel:
    """Load any Transformers causal language model, ours too, for evaluation.

    It runs StableMask where its ``config.stablemask`` asks for it, and what it was saved with elsewhere.
    Reads safetensors only and runs no code from the checkpoint.

    Args:
        name_or_path: a folder, or the name of a model on the hub. That of a PEFT adapter brings the
            model it was trained on, with the adapter in its layers, and the settings in the adapter's
            own ``config.json`` where it has one.
        dtype: of the weights, such as ``torch.bfloat16`` or ``"bfloat16"``; default: as saved.
        device: where to put it; default: the CPU.

    Raises:
        InputError: there is no such model, it cannot be reached, its files are damaged, or there is no
            such dtype.
    """
    _check_dtype(dtype)
    name = _find(name_or_path)
    adapter = _adapter_of(name)
    base = name if adapter is None else _base_of(name, adapter)
    config = _read_config(base if adapter is None or not _has_config(name) else name)
    model, report = _from_pretrained(base, config, "auto" if dtype is None else dtype)
    _check_report(base, report, isinstance(config, StableMaskConfig))
    if adapter is not None:
        _add_adapter(model, name)
    if device is not None:
        model.to(device)  # type: ignore[arg-type]
    return model.eval()


def load_config(name_or_path: str) -> PreTrainedConfig:
    """The configuration of a model, or of the model an adapter was trained on, as it was saved.

    Raises:
        InputError: as :func:`load_model`.
    """
    name = _find(name_or_path)
    adapter = _adapter_of(name)
    if adapter is not None and not _has_config(name):
        name = _base_of(name, adapter)
    return _read_config(name)


def is_adapter(name_or_path: str) -> bool:
    """Whether this is a PEFT adapter in place of a whole model; InputError where it is neither."""
    return _adapter_of(_find(name_or_path)) is not None


def _check_dtype(dtype: torch.dtype | str | None) -> None:
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, dtype)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise InputError(f"dtype must be float32, bfloat16, float16 or float64, got {dtype!r}")


def _find(name_or_path: str) -> str:
    """A folder that holds a model or an adapter, or the name of one on the hub."""
    name_or_path = str(name_or_path)
    folder = Path(name_or_path).expanduser()
    if name_or_path and folder.is_dir():
        _check_folder(folder)
        return str(folder)
    if folder.is_file():
        raise InputError(f"{name_or_path} is a file; give the folder that holds the model")
    if not HUB_NAME.fullmatch(name_or_path):
        raise InputError(f"no model folder at {name_or_path!r}")
    _check_hub(name_or_path)
    return name_or_path


def _read_config(name: str) -> PreTrainedConfig:
    with _one_line(f"the model {name}"):
        return AutoConfig.from_pretrained(name, trust_remote_code=False)


def _from_pretrained(
    name: str, config: PreTrainedConfig, dtype: torch.dtype | str
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model and Transformers' report on its weights."""
    with _one_line(f"the model {name}"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        return loaded


@contextmanager
def _one_line(what: str) -> Iterator[None]:
    """An InputError in place of what Transformers raises for bad files; its report is left to us."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except SafetensorError as error:
        raise InputError(
            f"the weights of {what} are damaged or cut short ({error}); copy them again"
        ) from error
    # For a bad folder, name, connection or configuration, and no more.
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"cannot load {what}: {_first_line(error)}") from error
    finally:
        logging.set_verbosity(verbosity)


def _adapter_of(name: str) -> dict[str, Any] | None:
    """The ``adapter_config.json`` of an adapter, None for a whole model."""
    path = find_adapter_config_file(name)
    whole = path is not None and any(Path(path).parent.glob("model*.safetensors"))
    return None if path is None or whole else _read_json(Path(path))


def _base_of(name: str, adapter: dict[str, Any]) -> str:
    """The model that an adapter was trained on."""
    base = adapter.get("base_model_name_or_path")
    if not isinstance(base, str):
        raise InputError(f"{name} is an adapter, and its adapter_config.json names no model")
    try:
        return _find(base)
    except InputError as error:
        raise InputError(f"{name} is an adapter of {base!r}: {error}") from error


def _add_adapter(model: PreTrainedModel, name: str) -> None:
    if not is_peft_available():
        raise InputError(f"{name} is an adapter, which needs PEFT: pip install 'stablemask[train]'")
    from peft import PeftConfig

    with _one_line(f"the adapter {name}"):
        weights: Any = cached_file(name, ADAPTER_WEIGHTS)
        report = model.load_adapter(
            peft_config=PeftConfig.from_pretrained(name),
            adapter_state_dict=load_file(weights),
            ignore_mismatched_sizes=True,
        )
    _check_report(name, vars(report), True)


def _has_config(name: str) -> bool:
    return cached_file(name, "config.json", _raise_exceptions_for_missing_entries=False) is not None


def _check_folder(folder: Path) -> None:
    adapter = (folder / "adapter_config.json").is_file()
    if (folder / "config.json").is_file():
        _read_json(folder / "config.json")
    elif not adapter:
        raise InputError(f"{folder} holds no config.json, so it is not a saved model")
    if not any(folder.glob("*.safetensors")):
        raise InputError(f"{folder} holds no .safetensors weights, the only format that is read")


def _check_hub(name: str) -> None:
    """Ask the hub once, where Transformers would retry for half a minute."""
    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        HfApi().model_info(name, timeout=10)
    except RepositoryNotFoundError as error:
        raise InputError(
            f"no model folder at {name!r}, and no model of that name on the hub that you may read"
        ) from error
    except Exception as error:  # its HTTP client, and so its errors, differ between versions
        raise InputError(
            f"no model folder at {name!r}, and the hub could not be asked for a model of that name "
            f"({_first_line(error)})"
        ) from error


def _check_report(name: str, report: dict[str, Any], ours: bool) -> None:
    """Refuse weights that do not fit the model; some in Transformers carry tensors they do not use."""
    unexpected = report["unexpected_keys"] if ours else ()
    problems = {
        "lack tensors that its config.json asks for": report["missing_keys"],
        "hold tensors of another shape than its config.json asks for": report["mismatched_keys"],
        "hold tensors that its config.json does not ask for": unexpected,
    }
    for problem, keys in problems.items():
        if keys:
            first = min(key if isinstance(key, str) else key[0] for key in keys)
            raise InputError(f"the weights in {name} {problem}: {first} and {len(keys) - 1} more")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged: {_first_line(error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is damaged: it must hold a JSON object")
    return content


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
