"""The options of the commands, in one place that loads quickly; those of trainings stand beside their code in ``training/``.

The first line of a docstring is the command's in ``stablemask --help``.
"""

from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Literal

from stablemask.options import option

SOURCE = "builtin[:packages], a file or folder of text, or hub:OWNER/NAME[:CONFIG]"


@dataclass(kw_only=True)
class ModelOptions:
    """Of every command that runs a trained model."""

    model: str = option(MISSING, "folder or hub name of the model", group="model")
    dtype: str = option(
        "auto", "of the weights; auto takes that of the files",
        choices=("auto", "float32", "bfloat16", "float16"),
    )  # fmt: skip
    device: str | None = option(None, "such as cpu or cuda; by default the GPU if there is one")


@dataclass(kw_only=True)
class EnvOptions:
    """What is installed, and which attention backends work here.

    Each backend is checked by running it; whether decoding with a cache is right is checked too.
    """

    json: bool = option(False, "print one JSON object instead of the table")


@dataclass(kw_only=True)
class BuildOptions:
    """Compile what the CPU does in C++, and time it.

    It is for the PyTorch and Python installed, and needs a C++ compiler. A cached step of one token then
    takes less time than stock SDPA's on most processors. Then it times on this processor, for some 20 seconds, where kernels of
    ours are faster than the stock one, trained too; keep the machine quiet meanwhile. Results are the same to
    rounding. Run it again after an update of PyTorch or of this package. To time anew, delete the file that it
    names last.
    """


@dataclass(kw_only=True)
class DemoOptions:
    """Train softmax and StableMask side by side, and report."""

    out: Path = option(Path("runs/demo"), "folder for both runs, the results and the report")
    steps: int = option(300, "optimizer steps of each training")
    data: str = option("builtin", SOURCE)
    resume: bool = option(False, "go on with the demo in --out; what is finished is used again")


@dataclass(kw_only=True)
class MergeOptions:
    """An adapter and its model as one ordinary model.

    StableMask settings are kept.
    """

    adapter: str = option(MISSING, "folder or hub name of the adapter", positional=True)
    out: Path = option(MISSING, "folder for the merged model; must not hold anything")


@dataclass(kw_only=True)
class GenerateOptions(ModelOptions):
    """Continue prompts with a trained model.

    It does so greedily or by sampling, with some prompts, a file of them, or a stream.
    """

    prompt: list[str] = option([], "text to continue, or several", group="text")
    chat: bool = option(False, "put prompts through the tokenizer's chat template")
    stream: bool = option(False, "print the text as it comes")
    max_new_tokens: int | None = option(
        64, "add at most so many tokens; none, with --window and --stream: until the end token"
    )
    window: int | None = option(
        None, "let a token see so many tokens, and keep no more: a text may then go on for ever"
    )
    temperature: float = option(
        0.0, "0 takes the likeliest token, above it tokens are sampled", group="sampling"
    )
    top_p: float = option(1.0, "sample among the likeliest tokens that hold this probability")
    top_k: int | None = option(None, "sample among so many likeliest tokens")
    seed: int | None = option(None, "makes sampling repeatable")
    prompts: Path | None = option(
        None, "the file: .txt, a prompt a line, or .jsonl with prompt", group="a file of prompts"
    )
    out: Path | None = option(None, ".jsonl file of the answers, written as they come")
    batch_size: int = option(8, "how many run together")
    resume: bool = option(False, "go on with the file of answers")


@dataclass(kw_only=True)
class ServeOptions(ModelOptions):
    """Answer requests over HTTP, as OpenAI's API does.

    It has chat, completions and streaming. The engine is vLLM, for many users at once, or Transformers, which
    answers one request after another. What follows -- on the command line is handed to vLLM.
    """

    engine: Literal["auto", "vllm", "transformers"] = option(
        "auto", "auto is vLLM where it is installed and serves the model", group="server"
    )
    host: str = option("127.0.0.1", "address to listen at; anyone who reaches it may ask")
    port: int = option(8000, "port to listen at; 0 takes a free one")
    max_model_len: int | None = option(
        None, "most tokens of a prompt and its answer together; by default the model's context"
    )
    tensor_parallel_size: int = option(1, "how many GPUs share the model, with vLLM")
    api_key: str | None = option(
        None,
        "what requests must bring as a bearer token; by default STABLEMASK_API_KEY, if it is set",
    )
    cors_origins: list[str] = option([], "web pages that may ask, such as https://chat.example")
    engine_args: list[str] = option([], "more flags of vLLM", rest=True)


@dataclass(kw_only=True)
class EvaluateOptions(ModelOptions):
    """Perplexity of a model on a text by length, or its scores in tasks.

    The lengths are those of its context, past the training length too; tasks are those of the
    lm-evaluation-harness.
    """

    batch_size: int | None = option(
        None, "windows in a batch, by default what memory allows; of tasks, requests, by default 1"
    )
    data: str | None = option(
        None,
        f"{SOURCE}; by default what the model was trained on, where its folder says so",
        group="perplexity",
    )
    split: Literal["validation", "train", "all"] = option("validation", "which part of the data")
    text_column: str | None = option(
        None, "field of a record that holds its text; by default text, or that of the training"
    )
    lengths: list[str] = option(["1x", "2x", "4x"], "in tokens, or in training lengths")
    stride: int | None = option(None, "new tokens a window scores; by default half its length")
    max_tokens: int | None = option(None, "read so many tokens of the text at most")
    tasks: list[str] = option(
        [], "tasks or groups of the lm-evaluation-harness", group="tasks, instead"
    )
    include_path: Path | None = option(None, "folder of tasks of your own, in its YAML format")
    limit: int | None = option(None, "take the first so many examples of each task")
    num_fewshot: int | None = option(None, "solved examples before each; by default the task's own")


@dataclass(kw_only=True)
class CompareOptions:
    """Runs of your own, side by side.

    It tells losses, perplexity by length and attention sinks, with --out as an HTML page too.
    """

    runs: list[str] = option(
        [],
        "folders of runs of one preset, context and text; the others are compared with the first",
        positional=True,
    )
    out: Path | None = option(None, "HTML file to write, with figures and a sample of each run")
    max_tokens: int = option(2**17, "read so many validation tokens of a run at most")
    prompt: str | None = option(
        None, "what the samples go on with; by default the validation text's beginning"
    )


@dataclass(kw_only=True)
class InspectOptions(ModelOptions):
    """Where a model's attention goes on a text, as an HTML page.

    The page has sinks, mask ratio and attention maps.
    """

    text: str = option(MISSING, "what it reads", group="page")
    out: Path = option(MISSING, "the HTML file to write")
    against: str | None = option(None, "folder or hub name of a second model, shown side by side")
    prefix: str | None = option(
        None, "a token, or its id, that --model reads in front of the text: where it has its sink"
    )
    max_tokens: int = option(64, "read so many tokens of the text at most, 2 to 1024")


@dataclass(kw_only=True)
class ExportOptions:
    """A model as an ONNX file or a torch.export program.

    The file is run, and checked to give the model's logits.
    """

    model: str = option(MISSING, "folder or hub name of the model")
    out: Path = option(MISSING, "the file: NAME.onnx, or NAME.pt2 for torch.export")
    cache: bool = option(False, "take and give keys and values, to decode with")
    batch_size: int | None = option(None, "fix the batch, with --length; by default any")
    length: int | None = option(None, "fix the length, with --batch-size; by default any")
    dtype: Literal["float32", "float16", "bfloat16"] = option("float32", "of the weights")


@dataclass(kw_only=True)
class BenchOptions:
    """Our time over stock SDPA's on this machine, within a minute.

    A cell is the median ratio of calls that take turns, so that a noisy machine disturbs both alike. The
    outputs that are timed are held against the dense definition in float64 first, up to 2,048 tokens.
    """

    lengths: list[int] = option([512, 2048], "tokens of a sequence, and of the cache when decoding")
