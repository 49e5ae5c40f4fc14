"""What `examples/adapting.py` measures, against its parts; its table and its figures."""

import json
import math

import numpy as np
import pytest
import torch

from stablemask.data import train_tokenizer
from stablemask.errors import InputError
from stablemask.evaluation import attention_maps, perplexity, sink_summary
from stablemask.evaluation.streaming import compare_streaming
from stablemask.hf import apply_stablemask

from .. import marks
from ..evaluation.families import tiny_transformer
from ..evaluation.test_activations import tiny_llama
from ..models.tiny import random_ids
from ..training.conftest import TEMPLATE


def measured(over: float = 0.0, layers: int = 3) -> dict:
    """As `measure` prints it, its numbers made up."""
    text = {
        "tokens": 512, "perplexity": 20.0 * (1 + over), "first_token": [0.01, 0.02 + over, 0.03],
        "own_first_token": [0.01] * layers, "top_token": [0.1] * layers, "pseudo": [0.2] * layers,
        "largest": [10.0, 100.0, 900.0 + over], "kurtosis": [3.0, 9.0, 8.0],
    }  # fmt: skip
    return {
        "stablemask": {"gamma": 0.1} if over else None,
        "prefix": None,
        "texts": {"wiki": text, "code": {**text, "perplexity": 5.0}},
        "int8": {"dynamic": 0.01, "static": 0.5},
        "int4_cache": {"0": 0.02 - over, "4": 0.014 - over},
        "streaming": {"full": 3.0, "window": 1.2, "StreamingLLM": 0.43},
    }


@marks.torchao
def test_measure(monkeypatch):
    import adapting

    monkeypatch.setattr(adapting, "STREAM_LENGTH", 64)
    monkeypatch.setattr(adapting, "WINDOW", 8)
    monkeypatch.setattr(adapting, "SCORED_FROM", 16)
    model, ids = apply_stablemask(tiny_llama(), gamma=0.1), random_ids(4, 64)
    found = adapting.measure(model, {"a": ids, "b": ids[:1]}, 7, sequences=2, streams=2)
    expected = sink_summary(model, ids, 7, progress=False)
    assert found["texts"]["a"]["perplexity"] == expected.perplexity
    assert found["texts"]["a"]["first_token"] == expected.first_token
    assert found["texts"]["b"]["tokens"] == 64
    maps = [attention_maps(model, row) for row in torch.nn.functional.pad(ids, (1, 0), value=7)]
    own = torch.stack([one.real[:, :, 2:, 1].mean((1, 2)) for one in maps]).mean(0)
    assert found["texts"]["a"]["own_first_token"] == pytest.approx(own.tolist(), rel=1e-5)
    streamed = compare_streaming(model, ids[:2], window=8, scored_from=16, prefix=7, progress=False)
    assert found["streaming"]["window"] == streamed.window - streamed.full
    assert found["streaming"]["StreamingLLM"] == streamed.sinks - streamed.full
    assert found["stablemask"]["gamma"] == 0.1
    costs = [*found["int8"].values(), *found["int4_cache"].values()]
    assert all(0 < abs(cost) < 0.05 for cost in costs)
    json.dumps(found, allow_nan=False)
    with pytest.raises(InputError, match="the first text has 32 tokens; give at least 64"):
        adapting.measure(model, {"a": ids[:1, :32]})


def test_texts_are_scored_as_perplexity_scores_them(tmp_path):
    from adapting import read_text

    rows = random_ids(3, 40).numpy().astype(np.int32)
    np.save(tmp_path / "chats.npy", rows)
    ids = read_text(tmp_path / "chats.npy", None, 90)
    assert torch.equal(ids, torch.from_numpy(rows[:2]).long())
    model = tiny_llama()
    whole = perplexity(model, ids.flatten(), length=40, stride=40)
    assert sink_summary(model, ids, progress=False).perplexity == pytest.approx(whole.perplexity)


def test_chats_are_those_of_the_template(tmp_path, monkeypatch):
    import adapting

    monkeypatch.setattr(adapting, "LENGTH", 24)
    tokenizer = train_tokenizer(["the fox and the dog\n" * 20], 280)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "model")
    tiny_transformer("Llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    path = adapting.write_chats(str(tmp_path / "model"), None, 3, tmp_path / "chats")
    chats = adapting.read_text(path, tokenizer, 48)
    assert chats.shape == (2, 24)
    assert all(tokenizer.decode(chat).startswith("<|user|>\n") for chat in chats)


def test_the_table_compares_with_the_teacher_over_seeds():
    from adapting import table

    results = {"teacher": [measured()], "adapted": [measured(s) for s in (0.01, 0.02, 0.03)]}
    lines = {
        line.split(" | ")[0].strip("| "): line for line in table(results, "teacher").split("\n")
    }
    # Student's t with two degrees of freedom: 4.303 standard errors.
    half_width = 4.303 * 1.0 / math.sqrt(3)
    assert (
        f"| 0.0 | 2.0 ± {half_width:.1f} | at most 1.0 |" in lines["over the teacher's, wiki (%)"]
    )
    assert lines["over the teacher's, code (%)"].endswith("| 0.0 | 0.0 ± 0.0 | at most 1.0 |")
    first = lines["first token, most in a layer, wiki (%)"]
    assert first.startswith("| first token, most in a layer, wiki (%) | 3.0 | 4.0 ± ")
    assert lines["streaming, nothing kept (nats)"].endswith("| at most 0.430 |")
    assert lines["int4 cache (nats)"].endswith("| at most 0.014 |")
    activation = next(
        line for line in table(results, "teacher").split("\n") if "activation" in line
    )
    assert activation.startswith("| largest activation | 100 | 100 ± 0 |")
    assert "nan" not in "".join(lines.values())


def test_draw(tmp_path):
    from adapting_figures import draw
    from PIL import Image

    results = {
        "before": [measured(0.1)],
        "teacher": [measured()],
        "adapted": [measured(0.01), measured(0.02)],
    }
    names = [path.name for path in draw(results, "teacher", tmp_path)]
    assert names == ["adapting-layers.png", "adapting-costs.png"]
    assert all(Image.open(tmp_path / name).size[0] == 880 for name in names)
