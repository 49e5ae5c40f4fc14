"""Everything a report shows of trained models, measured on the same text, as plain data.

Shapes: L layers, H heads, n tokens.
"""

import platform
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .. import __version__, strict_json
from ..bars import progress_bar
from ..data import Corpus, load_tokenizer
from ..errors import InputError
from ..evaluation import (
    AttentionMaps,
    LayerAttention,
    attention_maps,
    identical_token_spread,
    perplexity,
    reduce_attention,
)
from ..hf.loading import load_model
from ..inference import generate
from ..inference.model import choose_device
from ..options import load_yaml, options_from_values
from ..reading import read_json
from ..training.assembly import METRICS_FILE
from ..training.callbacks.progress import read_rows
from ..training.options import FREE_ON_RESUME
from ..training.pretrain import OPTIONS_FILE, prepare_data
from ..training.pretrain_options import PretrainOptions
from ..training.run import RUN_FILE

MULTIPLES = (1, 2, 4)  # of the training length
SNIPPET_TOKENS = 32  # of the attention maps; more would leave no room for the tokens' labels
ATTENTION_BLOCKS = 8  # over which attention is averaged
# A report compares runs of one design, so these options must be the same in all of them.
SHARED_OPTIONS = ("preset", "context")
# Options that change nothing in the model that is trained.
UNIMPORTANT = FREE_ON_RESUME - {"steps"} | {"eval_tokens", "compile", "gradient_checkpointing"}
# What the files of a run must hold to be compared.
RECORDED = {
    "corpus": str,
    "command": str,
    "versions": dict,
    "train_tokens": int | None,
    "validation_tokens": int,
}
RESOLVED = ("steps", "context", "vocab_size", "global_batch_size")


@dataclass(frozen=True)
class RunMeasurement:
    """One trained model.

    Attributes:
        options, record: what its ``pretrain.yaml`` and ``run.json`` hold.
        gamma: decay of its pseudo scores, None where it has none.
        training, validation: loss in nats a token by step, ``{"step": ..., "loss": ...}``.
        tokens_per_second: median over the log lines of the training.
        perplexity: one entry a length; its ``nats`` a token and its ``perplexity`` are None where ``note``
            says why not.
        first_token: mean attention on token 0 by layer, (L,).
        first_token_of_real: the same as a share of what real tokens receive.
        real_share: mean share of attention that real tokens receive, by layer, (L,).
        mask_ratio: what the pseudo mass receives by layer, head and position, (L, H, n).
        map_real, map_pseudo: attention of one layer on the snippet, (H, n, n) and (H, n).
        identical_distance: how far the output at each position is from position 0's, (n,), where
            all tokens are the same one; ``identical_spread`` is the largest.
        sample: the continuation of the prompt.
    """

    options: dict[str, Any]
    record: dict[str, Any]
    parameters: int
    gamma: float | list[float] | str | None
    training: list[dict[str, float]]
    validation: list[dict[str, float]]
    tokens_per_second: float | None
    perplexity: list[dict[str, Any]]
    first_token: list[float]
    first_token_of_real: list[float]
    real_share: list[float]
    mask_ratio: list[list[list[float]]]
    map_real: list[list[list[float]]]
    map_pseudo: list[list[float]]
    identical_distance: list[float]
    identical_spread: float
    sample: str

    @property
    def attention(self) -> str:
        return self.options["attention"]


@dataclass(frozen=True)
class Comparison:
    """Runs by label, the first of them the one the others are compared with, and how they were measured.

    Attributes:
        context: the training length, in tokens.
        differences: the options in which the runs differ.
        snippet: text of each token of the attention maps.
        layer, head: the head whose map is shown large, the one with most attention on token 0 over
            all runs; ``layer`` is that of every ``map_real``.
        identical_token: text of the repeated token.
        command: what made this comparison, or None.
        machine, versions: what it was measured with.
    """

    runs: dict[str, RunMeasurement]
    context: int
    differences: list[str]
    validation_tokens: int
    attention_blocks: int
    snippet: list[str]
    layer: int
    head: int
    identical_token: str
    prompt: str
    temperature: float
    seed: int
    command: str | None
    machine: dict[str, Any]
    versions: dict[str, str]

    @property
    def baseline(self) -> str:
        return next(iter(self.runs))

    def to_json(self) -> str:
        return strict_json.dumps(asdict(self), ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class _Run:
    """A finished run folder, before anything is measured."""

    folder: Path
    options: dict[str, Any]
    record: dict[str, Any]


def compare(
    folders: Mapping[str, Path],
    *,
    max_tokens: int = 2**17,
    prompt: str | None = None,
    temperature: float = 0.8,
    seed: int = 0,
    command: str | None = None,
) -> Comparison:
    """Measure the models in run folders that ``pretrain`` has finished.

    Args:
        folders: two or more run folders by label; the first is the baseline.
        max_tokens: read so many validation tokens at most for a perplexity.
        prompt: what each model continues; by default the beginning of the validation text.
        temperature, seed: of the continuation; temperature 0 is greedy.
        command: the command to name in the report as the one that made it.

    Raises:
        InputError: a folder holds no finished run, or the runs cannot be compared: another preset,
            another context or another text.
    """
    if max_tokens < 2:
        raise InputError(f"max_tokens must be at least 2, got {max_tokens}")
    if len(folders) < 2:
        raise InputError(f"a comparison needs two runs or more, got {len(folders)}")
    found = {label: _read_run(Path(folder)) for label, folder in folders.items()}
    _check_comparable(found)
    first = next(iter(found.values()))
    context = first.options["context"]
    corpus = _corpus(first)
    tokenizer = load_tokenizer(str(first.folder))
    tokens = corpus.validation.tokens
    snippet = torch.from_numpy(tokens[: min(SNIPPET_TOKENS, context)].astype(np.int64))
    if prompt is None:
        prompt = str(tokenizer.decode(snippet[:8].tolist()))
    common = int(np.bincount(tokens[:max_tokens]).argmax())

    measured: dict[str, dict[str, Any]] = {}
    maps: dict[str, AttentionMaps] = {}
    for label, run in progress_bar(found.items(), "measuring"):
        model: Any = load_model(str(run.folder), dtype=torch.float32, device=choose_device(None))
        maps[label] = attention_maps(model, snippet)
        identical = identical_token_spread(model, context, common)
        distance = (identical.outputs - identical.outputs[0]).abs().amax(-1)
        measured[label] = {
            "options": run.options,
            "record": run.record,
            "parameters": model.num_parameters(),
            "gamma": (model.config.stablemask or {}).get("gamma"),
            **_training(run.folder),
            "perplexity": list(_perplexities(model, tokens, context, max_tokens)),
            **_attention(model, corpus),
            "identical_distance": [float(f"{value:.5g}") for value in distance.tolist()],
            "identical_spread": identical.spread,
            "sample": generate(
                model, tokenizer, [prompt],
                max_new_tokens=context // 2, temperature=temperature, seed=seed,
            )[0],
        }  # fmt: skip
    layer, head = _most_on_first_token(list(maps.values()))
    runs = {
        label: RunMeasurement(
            **measured[label],
            map_real=_rounded(maps[label].real[layer]),
            map_pseudo=_rounded(maps[label].pseudo[layer]),
        )
        for label in measured
    }
    return Comparison(
        runs=runs,
        context=context,
        differences=_differences(found),
        validation_tokens=min(len(tokens), max_tokens),
        attention_blocks=min(ATTENTION_BLOCKS, len(corpus.validation)),
        snippet=[_token_text(tokenizer, token) for token in snippet.tolist()],
        layer=layer,
        head=head,
        identical_token=_token_text(tokenizer, common),
        prompt=prompt,
        temperature=temperature,
        seed=seed,
        command=command,
        machine=_machine(),
        versions={
            "stablemask": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
    )


def _read_run(folder: Path) -> _Run:
    written = folder / OPTIONS_FILE
    if not written.is_file():
        raise InputError(f"{folder} holds no run; give a folder that `stablemask pretrain` made")
    record = read_json(folder / RUN_FILE)
    if not isinstance(record, dict) or not all(
        isinstance(record.get(name), kind) for name, kind in RECORDED.items()
    ):
        raise InputError(f"{folder / RUN_FILE} is damaged: {', '.join(RECORDED)} must be there")
    result = record.get("result")
    if isinstance(result, dict) and result.get("eval_loss", 0) is None:
        raise InputError(f"the run in {folder} ended with a held-out loss that is not finite")
    if not isinstance(result, dict) or not isinstance(result.get("eval_loss"), float):
        raise InputError(f"the run in {folder} has not finished; go on with it by --resume first")
    names = {field.name for field in fields(PretrainOptions)}
    known = {name: value for name, value in load_yaml(written).items() if name in names}
    options = asdict(PretrainOptions(**options_from_values(PretrainOptions, known, str(written))))
    missing = [name for name in RESOLVED if options[name] is None]
    if missing:
        raise InputError(f"{written} is damaged: {', '.join(missing)} must be there")
    if result.get("step") != options["steps"]:  # it goes on to more
        raise InputError(
            f"the run in {folder} has not finished its {options['steps']} steps; go on with it by --resume first"
        )
    return _Run(folder, options, record)


def _check_comparable(runs: Mapping[str, _Run]) -> None:
    (name, first), *others = runs.items()
    for other_name, other in others:
        for option in SHARED_OPTIONS:
            ours, theirs = first.options[option], other.options[option]
            if ours != theirs:
                raise InputError(
                    f"{name} and {other_name} cannot be compared: their {option} is {ours!r} and "
                    f"{theirs!r}"
                )
        if first.record["corpus"] != other.record["corpus"]:
            raise InputError(
                f"{name} and {other_name} cannot be compared: their text or tokenizer differs"
            )


def _differences(runs: Mapping[str, _Run]) -> list[str]:
    first, *others = [run.options for run in runs.values()]
    return [
        name
        for name, value in first.items()
        if name not in UNIMPORTANT and any(other.get(name) != value for other in others)
    ]


def _corpus(run: _Run) -> Corpus:
    options = PretrainOptions(**run.options)
    corpus = prepare_data(options)
    if corpus.key != run.record["corpus"]:
        raise InputError(
            f"{', '.join(options.sources())}: that is not what {run.folder} was trained on, for its text "
            "has changed"
        )
    return corpus


def _training(folder: Path) -> dict[str, Any]:
    rows = read_rows(folder / METRICS_FILE)
    speeds = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]

    def curve(name: str) -> list[dict[str, float]]:
        return [{"step": row["step"], "loss": row[name]} for row in rows if name in row]

    return {
        "training": curve("loss"),
        "validation": curve("eval_loss"),
        "tokens_per_second": statistics.median(speeds) if speeds else None,
    }


def _perplexities(
    model: Any, tokens: np.ndarray, context: int, max_tokens: int
) -> Iterator[dict[str, Any]]:
    for multiple in MULTIPLES:
        length = multiple * context
        row: dict[str, Any] = {"multiple": multiple, "length": length}
        try:
            result = perplexity(
                model,
                tokens,
                length=length,
                stride=length,
                max_tokens=max_tokens,
            )
        except InputError as error:  # one length may be impossible and the others not
            yield {**row, "tokens": 0, "nats": None, "perplexity": None, "note": str(error)}
        else:
            yield {
                **row,
                "tokens": result.tokens,
                "nats": result.nats_per_token,
                "perplexity": result.perplexity,
                "note": None,
            }


def _attention(model: Any, corpus: Corpus) -> dict[str, Any]:
    """Attention at the training length, averaged over blocks spread over the validation text."""
    blocks = len(corpus.validation)
    count = min(ATTENTION_BLOCKS, blocks)
    measured = [
        zip(*reduce_attention(model, corpus.validation[i * blocks // count]["input_ids"], _shares))
        for i in range(count)
    ]
    first, first_of_real, share, ratio = (
        torch.stack([torch.stack(layers) for layers in of_blocks]).double().mean(0)
        for of_blocks in zip(*measured)
    )
    return {
        "first_token": first.tolist(),
        "first_token_of_real": first_of_real.tolist(),
        "real_share": share.tolist(),
        "mask_ratio": _rounded(ratio),
    }


def _shares(attention: LayerAttention) -> tuple[Tensor, ...]:
    """Of one layer: what the first token gets, of all and of what real tokens get; these; the mask ratio, (H, n)."""
    real = attention.real[0].cpu()
    received = real.sum(-1)
    first = real[:, 1:, 0]
    of_real = first / received[:, 1:]
    return first.mean(), of_real.mean(), received.mean(), attention.pseudo[0].cpu()


def _most_on_first_token(maps: list[AttentionMaps]) -> tuple[int, int]:
    """Layer and head that give token 0 the most, over all runs."""
    by_head = torch.stack([one.real[:, :, 1:, 0].mean(-1) for one in maps]).mean(0)
    layer, head = divmod(int(by_head.argmax()), by_head.shape[1])
    return layer, head


def _rounded(values: Tensor) -> Any:
    """Nested lists; five decimals are more than a figure can show."""
    return np.round(values.double().numpy(), 5).tolist()


def _token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    return str(tokenizer.decode([token]))


def _machine() -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }
