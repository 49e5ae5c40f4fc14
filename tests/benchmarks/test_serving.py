"""The load test of servers, against a server of this process."""

import asyncio
import importlib
import json
import os

import pytest

from stablemask.errors import RunError
from tests import marks

pytestmark = marks.server


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    import stablemask.hf
    from stablemask.data import load_tokenizer

    from ..cli.conftest import save_model
    from ..inference.serving.conftest import serving

    folder = save_model(tmp_path_factory.mktemp("ours"), max_position_embeddings=256)
    tokenizer = load_tokenizer(folder)
    with serving(stablemask.hf.load_model(folder), tokenizer, "ours") as client:
        yield str(client.base_url).rstrip("/"), tokenizer, folder


def test_a_load_is_measured(server):
    from benchmarks.serving import _as_table, _row
    from benchmarks.serving.clients import load, prompts

    url, tokenizer, _ = server
    texts = prompts(tokenizer, [16, 32], 6, seed=0)
    assert {len(tokenizer(text).input_ids) for text in texts} <= set(range(14, 35))
    asked = {"model": "ours", "max_tokens": 12, "temperature": 0}
    answers, seconds = asyncio.run(load(url, [{**asked, "prompt": text} for text in texts], 3))
    assert len(answers) == 6
    row = _row("ours", 3, [(answers, seconds)])
    assert row["tokens_per_second"] == pytest.approx(6 * 12 / seconds, abs=0.01)
    assert 0 < row["first"][0] <= row["first"][1] <= seconds
    assert 0 < row["between"][0] <= row["between"][1]
    assert "| ours | 3 |" in _as_table([row], "a CPU")


def test_answers_without_text_are_counted_and_not_timed():
    from benchmarks.serving import _row
    from benchmarks.serving.clients import Told

    answers = [Told([], 8), Told([0.5], 8), Told([1.0, 3.0], 8)]
    row = _row("ours", 1, [(answers, 4.0)])
    assert row["tokens_per_second"] == 24 / 4
    assert row["first"] == [1.0, 1.0]
    assert row["between"] == pytest.approx([2 / 7, 2 / 7], abs=1e-4)


def test_a_soak_tells_whether_the_server_lasts(server, monkeypatch):
    module = importlib.import_module("benchmarks.serving.soak")
    soak, (url, _, _) = module.soak, server
    run = [url, os.getpid(), "ours", ["the quick", "dog"]]
    told = asyncio.run(soak(*run, clients=8, seconds=3))
    assert sum(told.get(kind, 0) for kind in ("answered", "left", "refused")) > 0
    monkeypatch.setattr(module, "NONSENSE", [{}])  # which is none
    monkeypatch.setattr(module.random.Random, "choices", lambda *_: ["refused"])
    with pytest.raises(RunError, match="requests failed that should not have"):
        asyncio.run(soak(*run, clients=4, seconds=1))


def test_the_softmax_copy_of_a_model(server, tmp_path):
    from transformers import AutoConfig

    from benchmarks.serving.servers import without_mass

    _, _, folder = server
    copy = without_mass(folder, tmp_path)
    kinds = [AutoConfig.from_pretrained(path).attention for path in (folder, copy)]
    assert kinds == ["stablemask", "softmax"]


def test_the_softmax_copy_of_an_adapted_model(tmp_path):
    from transformers import LlamaConfig

    from benchmarks.serving.servers import without_mass

    adapted = LlamaConfig(architectures=["LlamaForCausalLM"], stablemask={"gamma": 0.1})
    adapted.save_pretrained(tmp_path / "adapted")
    (tmp_path / "copy").mkdir()
    without_mass(str(tmp_path / "adapted"), tmp_path / "copy")
    content = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert content["architectures"] == ["LlamaForCausalLM"]
    assert not {"stablemask", "attn_implementation"} & set(content)
