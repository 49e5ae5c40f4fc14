"""Benchmark tasks, by EleutherAI's lm-evaluation-harness, on any causal language model."""

import difflib
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.hub import require_hub
from ..errors import InputError
from ..inference.model import errors_only
from ..reading import first_line
from ..shell import pip_install


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    include_path: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 1,
) -> dict[str, Any]:
    """Run tasks and return the harness's results, under ``results`` by task, metric and filter.

    As the harness's own command does, this cuts contexts longer than the model's training length on
    their left, and seeds Python's, NumPy's and PyTorch's generators.

    Args:
        model, tokenizer: from ``load_model`` and ``load_tokenizer``.
        tasks: names of tasks, groups or tags; ``*`` stands for any characters.
        include_path: a folder of tasks of one's own, YAML files in the harness's format. What is found
            there is not looked for among the harness's.
        limit: take so many examples of each task, from its first on.
        num_fewshot: examples with their answers before each question; by default what a task says.
        batch_size: requests at a time.

    Raises:
        InputError: lm-eval is not installed, there is no such task, its data cannot be had, or it would
            run code that the model writes.
    """
    for name, value, least in (
        ("limit", limit, 1), ("num_fewshot", num_fewshot, 0), ("batch_size", batch_size, 1),
    ):  # fmt: skip
        if value is not None and value < least:
            raise InputError(f"{name} must be at least {least}, got {value}")
    if include_path is not None and not include_path.is_dir():
        raise InputError(f"include_path must be a folder of YAML files, got {str(include_path)!r}")
    try:
        import lm_eval
        from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise InputError(f"tasks need lm-eval: {pip_install('eval')}") from error

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    with errors_only("lm_eval", "huggingface_hub", "datasets"):
        loaded = _load_tasks(tasks, include_path)
        for task in loaded["tasks"].values():
            _check_and_set_up(task, num_fewshot, DEFAULT_OTHER_SEED)
        harness_model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    return lm_eval.evaluate(harness_model, loaded, limit=limit, log_samples=False)


def results_table(results: dict[str, Any]) -> str:
    """The harness's tables of tasks and of groups, in Markdown."""
    from lm_eval.utils import make_table

    columns = ("results", "groups") if results.get("groups") else ("results",)
    return "\n\n".join(make_table(results, column).strip() for column in columns)


def _load_tasks(patterns: Sequence[str], include_path: Path | None) -> dict[str, Any]:
    """The harness's tasks and groups by name, their data at hand."""
    from lm_eval.tasks import TaskManager

    manager = None
    if include_path is not None:
        manager = TaskManager(include_path=include_path, include_defaults=False)
    # The harness's own are 14,000 files, read in seconds: not if there is no need.
    if manager is None or not _all_there(patterns, manager):
        manager = TaskManager(include_path=include_path)
        for pattern in patterns:
            if not manager.match_tasks([pattern]):
                raise InputError(f"no task {pattern!r}; {_hint(pattern, manager.all_tasks)}")
        require_hub("the data of the tasks")
    try:
        return manager.load(manager.match_tasks(list(patterns)))
    except Exception as error:  # what a YAML file names, or a server says, may be anything
        raise InputError(f"cannot load {', '.join(patterns)}: {first_line(error)}") from error


def _all_there(patterns: Sequence[str], manager: Any) -> bool:
    """Whether each pattern names tasks known here, and no group, which may hold some that are not."""
    found = [manager.match_tasks([pattern]) for pattern in patterns]
    return all(names and set(names) <= set(manager.all_subtasks) for names in found)


def _hint(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3)
    return f"did you mean {', '.join(close)}?" if close else "`lm-eval ls tasks` lists all"


def _check_and_set_up(task: Any, num_fewshot: int | None, seed: int) -> None:
    """As the harness's own command does; a task that fixes 0 examples keeps them."""
    if getattr(task, "UNSAFE_CODE", False):
        raise InputError(
            f"the task {task.task_name!r} runs code that the model writes, which is not done here; "
            "run it by lm-eval itself, in a sandbox"
        )
    given = task.get_config("num_fewshot")
    if given is None or (given != 0 and num_fewshot is not None):
        task.set_config("num_fewshot", num_fewshot or 0)
    task.set_fewshot_seed(seed)
