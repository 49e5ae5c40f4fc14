"""Loading a causal language model from a folder or the hub, with every failure in one line."""

import re
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import cached_file, find_adapter_config_file, is_peft_available, logging

from ..arguments import FLOATS
from ..errors import InputError
from ..models import StableMaskConfig
from ..reading import first_line, read_json, reading, user_path
from ..shell import pip_install
from ..writing import FULL_DISK
from .adapters import adapter_settings, settle

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
            model it was trained on, with the adapter in its layers, and the settings of the adapter.
        dtype: of the weights, such as ``torch.bfloat16`` or ``"bfloat16"``; default: as saved.
        device: where to put it; default: the CPU.

    Raises:
        InputError: there is no such model, it cannot be reached, its files are damaged, or there is no
            such dtype.
    """
    name = _find(name_or_path)
    model, adapted = _load_base(name, dtype)
    if adapted:
        _add_adapter(model, name)
    if device is not None:
        model.to(device)  # type: ignore[arg-type]
    return model.eval()


def load_config(name_or_path: str) -> PreTrainedConfig:
    """The configuration of a model, or of the model an adapter was trained on, as it was saved.

    Raises:
        InputError: as :func:`load_model`.
    """
    return _config_of(_find(name_or_path))[0]


def load_without_weights(name_or_path: str) -> PreTrainedModel:
    """The model that a configuration describes, on the meta device: it tells which modules there are.

    Raises:
        InputError: as :func:`load_model`.
    """
    name = _find(name_or_path)
    config = _config_of(name)[0]
    with _one_line(f"the model {name}"), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def is_adapter(name_or_path: str) -> bool:
    """Whether this is a PEFT adapter in place of a whole model; InputError where it is neither."""
    return _adapter_of(_find(name_or_path)) is not None


def merge_adapter(name_or_path: str, out: str | Path) -> str:
    """Write the model that a PEFT adapter makes of its base: whole, or not at all.

    The adapter's StableMask settings come with it, and the tokenizer: the adapter's where it has one, else
    the model's.

    Args:
        name_or_path: of the adapter, a folder or a name on the hub.
        out: a folder that is empty or not there.

    Returns:
        The name or path of the base.

    Raises:
        InputError: this is no adapter, of a kind that cannot be merged, or does not fit its base; the base
            cannot be loaded; or ``out`` holds something.
    """
    out = user_path(out)
    if out.exists() and not (out.is_dir() and next(out.iterdir(), None) is None):
        raise InputError(f"{out} is not an empty folder; name another --out")
    name = _find(name_or_path)
    adapter = _adapter_of(name)
    if adapter is None:
        raise InputError(f"{name_or_path} is a whole model, and no adapter to merge into one")
    base = _base_of(name, adapter)
    tokenizer = _tokenizer_of(name, base)
    model = _merged(_load_base(name, None)[0], name)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        whole = Path(scratch) / "model"
        model.save_pretrained(whole)
        if tokenizer is not None:
            tokenizer.save_pretrained(whole)
        whole.rename(out)
    return base


def _check_dtype(dtype: torch.dtype | str | None) -> None:
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, dtype)
    if dtype is not None and dtype not in FLOATS:
        raise InputError(f"dtype must be float32, bfloat16, float16 or float64, got {dtype!r}")


def _find(name_or_path: str) -> str:
    """A folder that holds a model or an adapter, or the name of one on the hub."""
    name_or_path = str(name_or_path)
    folder = user_path(name_or_path)
    with reading(folder):
        if name_or_path and folder.is_dir():
            _check_folder(folder)
            return str(folder.absolute())  # as an adapter of it will remember it
        if folder.is_file():
            raise InputError(f"{name_or_path} is a file; give the folder that holds the model")
    if not HUB_NAME.fullmatch(name_or_path):
        raise InputError(f"no model folder at {name_or_path!r}")
    _check_hub(name_or_path)
    return name_or_path


def _load_base(name: str, dtype: torch.dtype | str | None) -> tuple[PreTrainedModel, bool]:
    """A model, or that an adapter was trained on with its settings, and whether the name is an adapter's."""
    _check_dtype(dtype)
    config, base = _config_of(name)
    model, report = _from_pretrained(base, config, "auto" if dtype is None else dtype)
    _check_report(base, report, isinstance(config, StableMaskConfig))
    return model, base != name


def _config_of(name: str) -> tuple[PreTrainedConfig, str]:
    """The configuration of a model or of an adapted one, and where the model's weights are."""
    adapter = _adapter_of(name)
    if adapter is None:
        return _read_config(name), name
    base = _base_of(name, adapter)
    config = _read_config(base)
    with _one_line(f"the adapter {name}"):
        settle(config, adapter_settings(name), "it")
    return config, base


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
    # A field of a wrong type can end in any exception of Python's. A full disk is not the model's fault.
    except Exception as error:
        if getattr(error, "errno", None) in FULL_DISK:
            raise
        raise InputError(f"cannot load {what}: {_reason(error)}") from error
    finally:
        logging.set_verbosity(verbosity)


def _reason(error: Exception) -> str:
    """The first line of an error, with the next where it only announces that, and what it is of Python's."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = " ".join(lines[: 1 + lines[0].endswith(":")]) if lines else "no reason given"
    plain = isinstance(error, OSError | ValueError | RuntimeError | ImportError)
    return reason if plain else f"{type(error).__name__}: {reason}"


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
        found = _find(base)
    except InputError as error:
        raise InputError(f"{name} is an adapter of {base!r}: {error}") from error
    if _adapter_of(found) is not None:
        raise InputError(f"{name} is an adapter of an adapter, {base}; merge that one first")
    return found


def _add_adapter(model: PreTrainedModel, name: str) -> None:
    config, weights = _read_adapter(name)
    with _one_line(f"the adapter {name}"):
        report = model.load_adapter(
            peft_config=config, adapter_state_dict=weights, ignore_mismatched_sizes=True
        )
    _check_report(name, vars(report), True)


def _read_adapter(name: str) -> tuple[Any, dict[str, Tensor]]:
    """PEFT's configuration of an adapter and its weights."""
    if not is_peft_available():
        raise InputError(f"{name} is an adapter, which needs PEFT: {pip_install('train')}")
    from peft import PeftConfig

    with _one_line(f"the adapter {name}"):
        weights: Any = cached_file(name, ADAPTER_WEIGHTS)
        return PeftConfig.from_pretrained(name), load_file(weights)


def _merged(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """A model with an adapter added to its weights."""
    config, weights = _read_adapter(name)
    from peft import (
        PeftType,
        get_peft_model,
        get_peft_model_state_dict,
        set_peft_model_state_dict,
    )

    config.base_model_name_or_path = model.name_or_path
    with _one_line(f"the adapter {name}"), warnings.catch_warnings():
        # PEFT asks by a name that Transformers has changed.
        warnings.simplefilter("ignore", FutureWarning)
        adapted: Any = get_peft_model(model, config)
        expected = get_peft_model_state_dict(adapted)
    both = expected.keys() & weights.keys()
    report = {
        "missing_keys": expected.keys() - weights.keys(),
        "mismatched_keys": [key for key in both if expected[key].shape != weights[key].shape],
        "unexpected_keys": weights.keys() - expected.keys(),
    }
    _check_report(name, report, True)
    set_peft_model_state_dict(adapted, weights)
    if not hasattr(adapted, "merge_and_unload"):
        raise InputError(
            f"{name} is an adapter of the kind {PeftType(config.peft_type).value}, which cannot be merged"
        )
    return adapted.merge_and_unload()


def _tokenizer_of(*names: str) -> Any:
    """The first tokenizer there is in these folders or repositories, or None."""
    for name in names:
        file = "tokenizer_config.json"
        if cached_file(name, file, _raise_exceptions_for_missing_entries=False) is not None:
            with _one_line(f"the tokenizer {name}"):
                return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    return None


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
    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
        HfApi().model_info(name, timeout=10)
    except RepositoryNotFoundError as error:
        raise InputError(
            f"no model folder at {name!r}, and no model of that name on the hub that you may read"
        ) from error
    except Exception as error:  # its HTTP client, and so its errors, differ between versions
        raise InputError(
            f"no model folder at {name!r}, and the hub could not be asked for a model of that name "
            f"({first_line(error)})"
        ) from error


def _check_report(name: str, report: dict[str, Any], ours: bool) -> None:
    """Refuse weights that do not fit the model; some in Transformers carry tensors they do not use."""
    unexpected = report["unexpected_keys"] if ours else ()
    scales = [key for key in report["unexpected_keys"] if "weight_scale" in key]
    problems = {
        "have scales, as eight-bit weights do, and its config.json has no quantization_config": scales,
        "lack tensors that its config.json asks for": report["missing_keys"],
        "hold tensors of another shape than its config.json asks for": report["mismatched_keys"],
        "hold tensors that its config.json does not ask for": unexpected,
    }
    for problem, keys in problems.items():
        if keys:
            first = min(key if isinstance(key, str) else key[0] for key in keys)
            raise InputError(f"the weights in {name} {problem}: {first} and {len(keys) - 1} more")


def _read_json(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"'{path}' is damaged: it must hold a JSON object")
    return content
