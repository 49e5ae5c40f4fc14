"""The numbers of a comparison against direct calls of what measures them."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from stablemask.data import load_tokenizer, prepare_corpus
from stablemask.errors import InputError
from stablemask.evaluation import (
    attention_maps,
    first_token_attention,
    identical_token_spread,
    perplexity,
    real_share,
)
from stablemask.hf.loading import load_model
from stablemask.inference import generate
from stablemask.options import load_yaml, save_yaml
from stablemask.report.comparison import ATTENTION_BLOCKS, compare
from stablemask.training.pretrain import pretrain
from stablemask.training.pretrain_options import PretrainOptions
from tests.test_reading import DEEP

KINDS = ("softmax", "stablemask")


@pytest.fixture(scope="module")
def corpus(options):
    return prepare_corpus(options.data, block_size=32, vocab_size=300)


@pytest.fixture(params=KINDS)
def measured(request, folders, comparison):
    return load_model(str(folders[request.param])), comparison.runs[request.param]


def test_perplexity(measured, corpus):
    model, run = measured
    assert [row["length"] for row in run.perplexity] == [32, 64, 128]
    for row in run.perplexity:
        length = row["length"]
        expected = perplexity(
            model, corpus.validation.tokens, length=length, stride=length, max_tokens=1000
        )
        assert row["perplexity"] == pytest.approx(expected.perplexity)
        assert row["tokens"] == expected.tokens


def test_attention_over_blocks(measured, corpus):
    model, run = measured
    blocks = [i * len(corpus.validation) // ATTENTION_BLOCKS for i in range(ATTENTION_BLOCKS)]
    maps = [attention_maps(model, corpus.validation[i]["input_ids"]) for i in blocks]
    first = torch.stack([first_token_attention(one) for one in maps]).mean(0)
    assert run.first_token == pytest.approx(first.tolist(), rel=1e-5)
    assert np.mean(run.real_share) == pytest.approx(np.mean([real_share(one) for one in maps]))
    ratio = torch.stack([one.pseudo for one in maps]).mean(0)
    np.testing.assert_allclose(run.mask_ratio, ratio, atol=1e-5)
    layers = len(run.first_token)
    for layer in range(layers):
        received = 1 - np.mean(run.mask_ratio[layer])
        assert run.real_share[layer] == pytest.approx(received, abs=1e-4)
        assert run.first_token_of_real[layer] > run.first_token[layer] - 1e-6


def test_maps_of_the_head_with_most_on_the_first_token(folders, comparison, corpus):
    snippet = torch.from_numpy(corpus.validation.tokens[:32].astype(np.int64))
    maps = {kind: attention_maps(load_model(str(folders[kind])), snippet) for kind in KINDS}
    on_first = sum(one.real[:, :, 1:, 0].mean(-1) for one in maps.values())
    assert on_first[comparison.layer, comparison.head] == on_first.max()
    for kind, run in comparison.runs.items():
        real, pseudo = np.array(run.map_real), np.array(run.map_pseudo)
        np.testing.assert_allclose(real, maps[kind].real[comparison.layer], atol=1e-5)
        np.testing.assert_allclose(real.sum(-1) + pseudo, 1, atol=1e-3)
    assert "".join(comparison.snippet) == load_tokenizer(str(folders["softmax"])).decode(snippet)


def test_identical_tokens(measured, corpus):
    model, run = measured
    common = int(np.bincount(corpus.validation.tokens[:1000]).argmax())
    expected = identical_token_spread(model, 32, common)
    assert run.identical_spread == pytest.approx(expected.spread, rel=1e-3, abs=1e-6)
    assert max(run.identical_distance) == pytest.approx(run.identical_spread, rel=1e-3)
    assert (run.identical_spread < 1e-4) == (run.attention == "softmax")


def test_sample_and_training(measured, folders):
    model, run = measured
    folder = folders[run.attention]
    tokenizer = load_tokenizer(str(folder))
    [sample] = generate(model, tokenizer, ["the "], max_new_tokens=16, temperature=0.8, seed=0)
    assert run.sample == sample
    assert [point["step"] for point in run.validation] == [2, 4, 6]
    assert [point["step"] for point in run.training] == [2, 4, 6]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    speeds = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    assert run.tokens_per_second == np.median(speeds)
    assert run.parameters == model.num_parameters()


def test_plain_data(comparison):
    plain = json.loads(comparison.to_json())
    assert list(plain["runs"]) == list(KINDS)
    assert plain["differences"] == ["attention"]
    assert plain["runs"]["stablemask"]["gamma"] == 1 / 32
    assert plain["runs"]["softmax"]["gamma"] is None
    assert plain["runs"]["stablemask"]["record"]["versions"]["torch"] == torch.__version__


def test_a_length_the_text_does_not_fill_says_why(folders):
    comparison = compare(folders, max_tokens=100)
    *scored, long = comparison.runs["stablemask"].perplexity
    assert all(row["perplexity"] for row in scored)
    assert long["perplexity"] is None
    assert "100 tokens, less than a window of 128" in long["note"]


def load_options(run):
    return PretrainOptions(**load_yaml(run / "pretrain.yaml"))


def test_runs_that_cannot_be_compared(folders, options, tmp_path):
    softmax = folders["softmax"]
    with pytest.raises(InputError, match="two runs or more, got 1"):
        compare({"one": softmax})
    with pytest.raises(InputError, match="holds no run"):
        compare({"one": softmax, "two": tmp_path})
    other = tmp_path / "other"
    pretrain(replace(options, context=16, steps=1, out=str(other)))
    with pytest.raises(InputError, match=r"their context is 32 and 16"):
        compare({"one": softmax, "two": other})
    unfinished = tmp_path / "unfinished"
    shutil.copytree(softmax, unfinished)
    finished = json.loads((unfinished / "run.json").read_text())
    record = {name: value for name, value in finished.items() if name != "result"}
    (unfinished / "run.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="has not finished"):
        compare({"one": softmax, "two": unfinished})
    (unfinished / "run.json").write_text(json.dumps(finished))
    save_yaml(replace(load_options(unfinished), steps=12), unfinished / "pretrain.yaml")
    with pytest.raises(InputError, match="has not finished its 12 steps"):  # it goes on to more
        compare({"one": softmax, "two": unfinished})
    save_yaml(load_options(softmax), unfinished / "pretrain.yaml")
    (unfinished / "run.json").write_text(json.dumps({**finished, "corpus": "another"}))
    with pytest.raises(InputError, match="text or tokenizer differs"):
        compare({"one": softmax, "two": unfinished})
    (unfinished / "run.json").write_text(DEEP)
    with pytest.raises(InputError, match=r"run\.json' is not JSON: it is nested too deep"):
        compare({"one": softmax, "two": unfinished})
