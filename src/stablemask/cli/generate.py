"""Continue prompts with a trained model, greedily or by sampling."""

from dataclasses import MISSING, dataclass
from functools import partial

from stablemask.data import load_tokenizer
from stablemask.hf.loading import load_model
from stablemask.inference import generate
from stablemask.inference.model import choose_device
from stablemask.options import option

SUMMARY = "continue a prompt with a trained model"


@dataclass(kw_only=True)
class GenerateOptions:
    model: str = option(MISSING, "folder or hub name of the model")
    prompt: list[str] = option(MISSING, "text to continue, or several")
    max_new_tokens: int = option(64, "add at most so many tokens")
    temperature: float = option(0.0, "0 takes the likeliest token, above it tokens are sampled")
    top_p: float = option(1.0, "sample among the likeliest tokens that hold this probability")
    top_k: int | None = option(None, "sample among so many likeliest tokens")
    seed: int | None = option(None, "makes sampling repeatable")
    prefill_chunk_size: int | None = option(None, "read the prompt so many tokens at a time")
    stream: bool = option(False, "print the text as it comes")
    device: str | None = option(None, "such as cpu or cuda; by default the GPU if there is one")


def run(options: GenerateOptions) -> None:
    device = choose_device(options.device)
    model = load_model(options.model, device=device)
    tokenizer = load_tokenizer(options.model)

    answer = partial(
        generate,
        model,
        tokenizer,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        seed=options.seed,
        prefill_chunk_size=options.prefill_chunk_size,
    )

    def answer_aloud(prompt: str) -> None:
        # With the first piece, so that a prompt that is refused is not shown.
        start = iter([prompt])
        answer([prompt], stream=lambda text: print(next(start, "") + text, end="", flush=True))
        print(next(start, ""))

    if options.stream:
        for prompt in options.prompt:
            answer_aloud(prompt)
    else:
        for prompt, text in zip(options.prompt, answer(options.prompt), strict=True):
            print(prompt + text)
