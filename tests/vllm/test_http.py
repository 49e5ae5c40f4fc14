"""`stablemask serve --engine vllm` as a user starts it: compiled layers, prompts in chunks, many clients at once."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pydoc_data.topics import topics

import openai
import pytest
import torch

from stablemask.data import train_tokenizer
from tests import marks
from tests.vllm import models

pytestmark = marks.vllm

PROMPTS = models.prompts()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A client of the server, the name of its model, and the answers under Transformers."""
    from benchmarks.serving.servers import running

    torch.manual_seed(0)
    folder = models.save(models.MODELS["shifts by layer"](), tmp_path_factory.mktemp("served"))
    train_tokenizer(topics.values(), models.VOCABULARY).save_pretrained(folder)
    options = {
        "model": str(folder),
        "engine": "vllm",
        "dtype": "float32",
        "engine_args": ["--max-num-batched-tokens=96", "--max-num-seqs=16", "--block-size=32"],
    }
    (folder / "serve.json").write_text(json.dumps(options))
    command = [sys.executable, "-m", "stablemask", "serve", "--config", str(folder / "serve.json")]
    wanted = models.reference(folder, PROMPTS)
    with (
        running(command, folder / "log", threads=1) as (url, _),
        openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=300) as client,
    ):
        yield client, str(folder), wanted


@pytest.mark.parametrize("stream", [True, False])
def test_sixteen_clients_at_once_are_answered_as_under_transformers(served, stream):
    client, name, wanted = served

    def ask(prompt):
        answer = client.completions.create(
            model=name,
            prompt=prompt,
            max_tokens=models.NEW,
            temperature=0,
            logprobs=1,
            stream=stream,
            extra_body={"min_tokens": models.NEW, "return_token_ids": True},
        )
        pieces = list(answer) if stream else [answer]  # in how many, the load decides
        choices = [piece.choices[0] for piece in pieces]
        return models.Answer(
            [token for choice in choices for token in choice.token_ids],
            [logprob for choice in choices for logprob in choice.logprobs.token_logprobs],
        )

    assert len(PROMPTS) == 16
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        models.assert_same(list(pool.map(ask, PROMPTS)), wanted)
