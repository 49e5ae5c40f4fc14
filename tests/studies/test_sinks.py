"""The study of attention sinks: what it measures, and what it makes of its records."""

import math

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from stablemask.data import train_tokenizer
from stablemask.evaluation.sinks import even_first_token
from studies import sinks, sinks_section
from studies.kinds import LABELS
from studies.study import SCALES

from ..models.tiny import random_ids, tiny_model

KINDS = sinks.KINDS
EVEN = even_first_token(128)


def record(kind, seed, first_token=0.4, **replaced):
    """Of a model of two layers whose head with the most gives the first token ``first_token``."""
    jitter = 1 + 0.02 * seed
    layers = [0.01 * jitter, first_token * jitter]
    return {
        "kind": kind,
        "seed": seed,
        "preset": "nano",
        "start": "end",
        "context": 128,
        "steps": 10,
        "batch_size": 4,
        "learning_rate": 5e-3,
        "curve": {"step": [0, 10], "first_token": [0.03, 0.1], "first_token_head": [0.04, 0.2]},
        "first_token": layers,
        "first_token_head": layers,
        "first_token_real": layers,
        "first_token_real_head": layers,
        "delimiters": [1.1, 1.2],
        "others": [0.9, 0.8],
        "mask_ratio": [0.0, 0.0],
        "largest": [3.0 * jitter, 9.0 * jitter],
        "kurtosis": [3.0 * jitter, 9.0 * jitter],
        "perplexity": 20.0,
        "perplexity_int8_dynamic": 20.1,
        "perplexity_int8_static": 20 + jitter,
        **replaced,
    }


def records(seeds, sink=0.4, mended=0.1, **replaced):
    """``replaced`` is of StableMask's."""
    first_token = dict.fromkeys(KINDS, mended) | {"softmax": sink}
    return [
        record(kind, seed, first_token[kind], **(replaced if kind == "stablemask" else {}))
        for seed in range(seeds)
        for kind in KINDS
    ]


def verdicts(found):
    return [claim.verdict for claim in sinks_section.section(found).claims]


def test_even_attention_is_the_harmonic_mean():
    assert even_first_token(3) == pytest.approx((1 / 2 + 1 / 3) / 2)
    # The approximation that the probe of a training gives.
    assert pytest.approx((math.log(128) - 0.42) / 127, rel=0.01) == EVEN


@torch.no_grad()
def test_a_model_that_attends_evenly_has_no_sink():
    model = tiny_model(attention="softmax", position_encoding="nope")
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.zero_()
    found = sinks.attention_by_layer(model, random_ids(3, 16), torch.arange(61) % 3 == 0)
    even = pytest.approx([even_first_token(16)] * 2)
    for name in ("first_token", "first_token_head", "first_token_real", "first_token_real_head"):
        assert found[name] == even
    assert found["delimiters"] == pytest.approx([1, 1])
    assert found["others"] == pytest.approx([1, 1])
    assert found["mask_ratio"] == [0, 0]


@torch.no_grad()
def test_real_attention_leaves_out_what_goes_to_no_token():
    model = tiny_model(attention="softmax1", position_encoding="nope")
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.zero_()  # scores of 0, as the sink's: a row of i gives it 1 / (i + 1)
    found = sinks.attention_by_layer(model, random_ids(2, 3), torch.arange(61) % 2 == 0)
    assert found["first_token"] == pytest.approx([(1 / 3 + 1 / 4) / 2] * 2)
    assert found["first_token_real"] == pytest.approx([(1 / 2 + 1 / 3) / 2] * 2)
    assert found["mask_ratio"] == pytest.approx([(1 / 2 + 1 / 3 + 1 / 4) / 3] * 2)


def test_delimiters_are_marks_white_space_and_the_end_of_a_document():
    tokenizer = train_tokenizer(["def f(x):\n    return x\n" * 50], 300)
    found = sinks.delimiters_of(tokenizer)
    texts = {tokenizer.decode([token]) for token in torch.arange(len(found))[found].tolist()}
    assert {"(", "\n", " ", "<|endoftext|>"} <= texts
    assert not any(text.isalnum() for text in texts)


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_section_shows_every_kind_and_draws(seeds):
    section = sinks_section.section(records(seeds))
    measures = section.tables["measures"]
    for kind in KINDS:
        assert f"| {LABELS[kind]} |" in measures
    assert ("±" in measures) == (seeds > 1)
    assert set(section.figures) == {"steps", "layers"}
    for figure in section.figures.values():
        FigureCanvasAgg(figure).draw()
        for axes in figure.axes:
            assert axes.get_xlabel()
            assert len(axes.lines) == len(KINDS) + 1  # and even attention


YES, PARTLY, NO, OPEN = "reproduced", "partly reproduced", "not reproduced", "open"
SMALLER = {"largest": [1.0, 2.0], "perplexity_int8_static": 20.1}


def with_micro(**others):
    """Two sizes, the second as told."""
    return records(3) + [{**one, "preset": "micro"} for one in records(3, **others)]


@pytest.mark.parametrize(
    ("found", "first", "expected"),
    [
        (records(3), 0, [YES, YES, NO, NO, NO]),
        (records(1), 0, [OPEN] * 5),
        # Of the sink, and of what mends it.
        (records(1, sink=2 * EVEN), 0, [OPEN, OPEN]),
        (records(3, sink=2 * EVEN), 0, [OPEN, OPEN]),
        (records(3, mended=0.9), 0, [YES, NO]),
        (records(3, first_token_real_head=[0.5, 0.5]), 0, [YES, PARTLY]),
        (with_micro(mended=0.9), 0, [YES, PARTLY]),
        (with_micro(sink=EVEN), 0, [YES, YES]),
        # Of delimiters, outliers and int8.
        (records(3, delimiters=[0.9, 1.0]), 2, [YES]),
        (records(3, **SMALLER), 3, [PARTLY, YES]),
        (records(3, **SMALLER, kurtosis=[3.0, 3.0]), 3, [YES, YES]),
    ],
)
def test_verdicts_follow_from_the_records(found, first, expected):
    assert verdicts(found)[first : first + len(expected)] == expected


def test_a_sink_in_some_seeds_is_a_part_and_none_that_is_mended():
    found = [one for one in records(3) if (one["kind"], one["seed"]) != ("softmax", 1)]
    found.insert(5, record("softmax", 1, EVEN))
    section = sinks_section.section(found)
    assert [claim.verdict for claim in section.claims[:2]] == [PARTLY, OPEN]
    assert section.tables["trainings"].endswith("| 2 of 3 |")


def test_a_sink_that_seeds_disagree_about_stays_open():
    found = records(3)
    for one in found:
        if one["kind"] == "stablemask":
            one["first_token_head"] = one["first_token_real_head"] = [(0.01, 0.3, 0.8)[one["seed"]]]
    assert verdicts(found)[1] == OPEN


def test_without_torchao_int8_stays_open():
    missing = {"perplexity_int8_dynamic": None, "perplexity_int8_static": None}
    found = [{**one, **missing} for one in records(3)]
    assert verdicts(found)[4] == OPEN
    assert "| – | – |" in sinks_section.section(found).tables["measures"]


@pytest.mark.parametrize("scale", SCALES)
def test_jobs_have_names_of_their_own(scale):
    jobs = sinks.jobs(scale, 3)
    assert len({job.name for job in jobs}) == len(jobs)
    assert {"softmax", "stablemask"} <= {job.arguments["kind"] for job in jobs}


def test_a_job_from_text_to_section(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x + 1\n" * 400)
    sizes = {"vocab_size": 280, "hidden_size": 16, "num_hidden_layers": 1}
    sizes["max_position_embeddings"] = 32
    options = {"preset": "nano", "start": "end", "source": str(text), "steps": 40, "blocks": 8}
    options |= {"batch_size": 4, "learning_rate": 1e-2, **sizes}
    found = []
    for kind in sinks.PAIR:
        arguments = {"kind": kind, "seed": 0, **options}
        found.append({"job": kind, **arguments, **sinks.run(tmp_path, **arguments)})
    softmax, stablemask = found
    assert softmax["perplexity"] < 100 < 280
    assert softmax["curve"]["step"] == [*range(0, 40, 2), 40]
    assert softmax["mask_ratio"] == [0]
    assert stablemask["mask_ratio"][0] > 0.05
    assert stablemask["first_token_real"][0] > stablemask["first_token"][0]
    assert len(sinks_section.section(found).claims) == 5
