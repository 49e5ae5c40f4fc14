"""Loading a causal language model from a folder or the hub, with every failure in one line."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..errors import InputError
from ..models import StableMaskConfig

# NAME or OWNER/NAME; anything else can only be a path.
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


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
        name_or_path: a folder, or the name of a model on the hub.
        dtype: of the weights, such as ``torch.bfloat16`` or ``"bfloat16"``; default: as saved.
        device: where to put it; default: the CPU.

    Raises:
        InputError: there is no such model, it cannot be reached, or its files are damaged.
    """
    name_or_path = str(name_or_path)
    folder = Path(name_or_path).expanduser()
    if name_or_path and folder.is_dir():
        name_or_path = str(folder)
        _check_folder(folder)
    elif folder.is_file():
        raise InputError(f"{name_or_path} is a file; give the folder that holds the model")
    elif not HUB_NAME.fullmatch(name_or_path):
        raise InputError(f"no model folder at {name_or_path!r}")
    else:
        _check_hub(name_or_path)

    config, model, report = _from_pretrained(name_or_path, "auto" if dtype is None else dtype)
    _check_report(name_or_path, report, isinstance(config, StableMaskConfig))
    if device is not None:
        model.to(device)  # type: ignore[arg-type]
    return model.eval()


def _from_pretrained(
    name: str, dtype: torch.dtype | str
) -> tuple[PreTrainedConfig, PreTrainedModel, dict[str, Any]]:
    """The configuration, the model and Transformers' report on its weights."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the report is ours to judge, and to word
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except SafetensorError as error:
        raise InputError(
            f"the weights in {name} are damaged or cut short ({error}); copy them again"
        ) from error
    # What Transformers raises for a bad folder, name, connection or configuration, and no more.
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"cannot load the model {name}: {_first_line(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
    return config, *loaded


def _check_folder(folder: Path) -> None:
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder} holds no config.json, so it is not a saved model")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged: {_first_line(error)}") from error
    if not isinstance(settings, dict):
        raise InputError(f"{path} is damaged: it must hold a JSON object")
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


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
