"""The run folder: begun, gone on with, or finished; assembly.py makes the Trainer that works in it.

``--out`` holds::

    pretrain.yaml or finetune.yaml                    the resolved options
    run.json                                          versions, data, command, result
    model.safetensors, config.json, tokenizer files   the model, written last
    README.md           its model card                metrics.jsonl, tensorboard/
    checkpoints/        checkpoint-STEP, each whole
    texts/, adapting/                                 of a model that is adapted (adapting/)
"""

import dataclasses
import functools
import math
import platform
import shlex
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
import transformers

from .. import __version__, strict_json
from ..backends import native
from ..data.sources import PACKAGES, packages_of
from ..errors import InputError
from ..evaluation.perplexity import perplexity_of
from ..options import command_words, load_yaml, option_fields, save_yaml
from ..reading import parse_json, read_json
from ..versions import tell_newer
from ..writing import only_writer, write_whole
from . import checkpoints
from .options import FREE_ON_RESUME, KEPT_ON_RESUME, TrainingOptions
from .processes import join_processes, on_main

RUN_FILE = "run.json"
Value = TypeVar("Value")
Options = TypeVar("Options", bound=TrainingOptions)


@dataclass(frozen=True)
class RunResult:
    """What a run came to. ``stopped_by`` is the signal that ended it early, or None."""

    folder: Path
    step: int
    eval_loss: float | None
    stopped_by: signal.Signals | None = None

    @property
    def perplexity(self) -> float | None:
        return None if self.eval_loss is None else perplexity_of(self.eval_loss)


def given(value: Value | None) -> Value:
    """An option that is filled in once the options are resolved."""
    assert value is not None
    return value


def options_file(options: TrainingOptions) -> str:
    return f"{options.command}.yaml"


def tokens_per_step(options: TrainingOptions) -> int:
    """Of all processes."""
    return given(options.global_batch_size) * given(options.context)


@dataclass(frozen=True)
class Start(Generic[Options]):
    """Where a run begins: its options resolved, its folder, and what an earlier part of it has left."""

    options: Options
    folder: Path
    checkpoint: Path | None
    finished: RunResult | None


def alone(run: Callable[[Options], RunResult]) -> Callable[[Options], RunResult]:
    """Of a function that trains: no other run may write to its folder meanwhile."""

    @functools.wraps(run)
    def guarded(options: Options) -> RunResult:
        join_processes(options)
        with ExitStack() as held:
            if options.out is not None:
                folder = Path(options.out)
                on_main(lambda: held.enter_context(only_writer(folder)))
            return run(options)

    return guarded


def start(options: Options) -> Start[Options]:
    """Resolve the options of a run and look into its folder.

    Raises:
        InputError: an option is out of its range, or the folder holds something else, was started with
            other options, or is damaged.
    """

    def look() -> Start[Options]:
        resolved = _as_begun(options).resolved()
        folder, checkpoint = _open_run(resolved)
        finished = None
        if options.resume:
            finished = _finished_run(folder, given(resolved.steps), checkpoint)
        tell_newer()
        return Start(resolved, folder, checkpoint, finished)

    return on_main(look)


def _as_begun(options: Options) -> Options:
    """A run that is resumed keeps what would follow from other options, where it is not given anew.

    So it has the same global batch on any number of devices, and the same warm-up for more steps.
    """
    if not options.resume or options.out is None:
        return options
    written = Path(options.out) / options_file(options)
    if not written.exists():
        return options
    before = load_yaml(written)
    left_out = [name for name in KEPT_ON_RESUME if getattr(options, name, before) in (None, "auto")]
    kept: dict[str, Any] = {name: before.get(name) for name in left_out}
    return dataclasses.replace(options, **kept)


def _open_run(options: TrainingOptions) -> tuple[Path, Path | None]:
    folder = Path(given(options.out))
    written = folder / options_file(options)
    if not options.resume:
        if written.exists():
            raise InputError(f"{folder} already holds a run; add --resume, or name another --out")
        # A hidden file is what a kill left of one that was never renamed.
        if folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
            raise InputError(f"{folder} is not empty and holds no run; name another --out")
        return folder, None
    if not written.exists():
        raise InputError(f"{folder} holds no run to resume; leave out --resume to start one")
    before, now = load_yaml(written), dataclasses.asdict(options)
    for field in option_fields(type(options)):
        name = field.name
        started = before.get(name, field.default)
        if name not in FREE_ON_RESUME and started != now[name]:
            raise InputError(
                f"{folder} was started with {name} {started!r}, not {now[name]!r}; "
                "resume with the same settings, or name another --out"
            )
    return folder, checkpoints.last_whole(folder / "checkpoints")


def _finished_run(folder: Path, steps: int, checkpoint: Path | None) -> RunResult | None:
    """The result of a run that has nothing left to do.

    Raises:
        InputError: it has taken more steps, or its checkpoints are gone and it has to take more.
    """
    try:
        result = parse_json((folder / RUN_FILE).read_bytes())["result"]
        loss = result["eval_loss"]  # null where it was not finite
        finished = RunResult(folder, int(result["step"]), math.nan if loss is None else float(loss))
    except (OSError, ValueError, LookupError, TypeError):
        finished = RunResult(folder, 0, None)
    done = 0 if checkpoint is None else checkpoints.step_of(checkpoint)
    if steps < max(done, finished.step):
        raise InputError(
            f"{folder} has taken {max(done, finished.step)} steps already, and --steps asks for {steps}"
        )
    if steps > finished.step > done:
        raise InputError(
            f"{folder} has finished its {finished.step} steps and holds no checkpoint of them to go on "
            "from; its model can be trained on with `stablemask finetune`"
        )
    return finished if finished.step == steps else None


def claim(folder: Path, options: TrainingOptions) -> None:
    """Make the folder that of a run, before what it trains on is ready; ``resume`` then finds it."""
    if not (folder / options_file(options)).exists():
        _keep(folder, options)


def _keep(folder: Path, options: TrainingOptions) -> None:
    """Write the options as another run can begin with them."""
    save_yaml(dataclasses.replace(options, resume=False), folder / options_file(options))


def begin_run(folder: Path, options: TrainingOptions, key: str, record: dict[str, Any]) -> None:
    """Write what makes the folder a run, or check that a run goes on with the text it began with."""
    on_main(lambda: _begin_run(folder, options, key, record))


def _begin_run(folder: Path, options: TrainingOptions, key: str, record: dict[str, Any]) -> None:
    if (folder / RUN_FILE).exists():
        before = read_json(folder / RUN_FILE)
        if not isinstance(before, dict) or before.get("corpus") != key:
            text = ", ".join(options.sources()) or "the model's own text"
            raise InputError(
                f"{text}: that is not what {folder} began with, for its text or its tokenizer has "
                "changed; restore it, or name another --out"
            )
        _tell_other_kernels(before.get("attention_on_cpu"))
        if load_yaml(folder / options_file(options)).get("steps") != options.steps:
            _write_record(folder, before | {"command": record["command"]})
        _keep(folder, options)
        return
    _keep(folder, options)  # from here on --resume finds the run
    versions = {
        "stablemask": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    more: dict[str, Any] = {"versions": versions, "attention_on_cpu": native.in_use()}
    if PACKAGES in options.sources():
        more["packages"] = packages_of(PACKAGES)
    _write_record(folder, {"corpus": key, **record, **more})


def _tell_other_kernels(before: Any) -> None:
    """Say in a line if attention is computed in another way than in the part of the run that is done."""
    now = native.in_use()
    then = before if isinstance(before, dict) else now
    kernels = [(ways.get("library"), ways.get("rules")) for ways in (then, now)]
    if kernels[0] != kernels[1] and not torch.cuda.is_available():
        named = [f"{library or 'no library'}, rules {rules}" for library, rules in kernels]
        print(
            f"stablemask: attention takes other ways on the CPU than when this run began ({named[0]}; now "
            f"{named[1]}): it goes on the same to rounding, not to the bit",
            file=sys.stderr,
        )


def put_in_place(
    partial: Path,
    result: RunResult,
    write_card: Callable[[dict[str, Any]], None],
    more: dict[str, Any],
) -> None:
    """Move a model saved in ``partial`` into the run folder, and write its card and the result."""
    folder = result.folder
    for path in partial.iterdir():
        if path.name == "training_args.bin":  # a pickle, which nothing of ours reads
            continue
        if path.is_dir():  # as of a tokenizer's chat templates, where the run had finished before
            shutil.rmtree(folder / path.name, ignore_errors=True)
        path.replace(folder / path.name)
    shutil.rmtree(partial)
    record = read_json(folder / RUN_FILE) | more
    record["result"] = {"step": result.step, "eval_loss": result.eval_loss}
    write_card(record)
    _write_record(folder, record)


def command_line(options: TrainingOptions) -> str:
    """The command that gives these options, defaults left out."""
    words = command_words(options, without=("resume", "dry_run"))
    return shlex.join(["stablemask", options.command, *words])


def _write_record(folder: Path, record: dict[str, Any]) -> None:
    write_whole(folder / RUN_FILE, strict_json.dumps(record, indent=2) + "\n")
