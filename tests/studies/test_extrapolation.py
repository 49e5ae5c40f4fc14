"""Reading past the context: what is measured is what the caches read, and the claims follow from it."""

import math
from itertools import pairwise

import pytest
import torch

from stablemask.hf import load_model
from studies import extrapolation
from studies.language import training_options
from studies.models import corpus_of

CONTEXT = 16


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.txt").write_text("one two three four five six seven eight nine ten\n" * 1200)
    return {
        "source": str(folder), "position": "rope", "seed": 0, "label": "stablemask",
        "context": CONTEXT, "group": "grid", "settings": {"attention": "stablemask"},
        "preset": "nano", "steps": 1, "tokens": 32, "learning_rate": 1e-3,
    }  # fmt: skip


def test_each_cache_is_read_to_sixteen_times_the_context(run, tmp_path, monkeypatch):
    # The recipe's vocabulary is larger than so small a text can fill.
    monkeypatch.setattr(
        extrapolation, "training_options", lambda run: training_options(run) | {"vocab_size": 300}
    )
    scaled = extrapolation.ALL + extrapolation.SCALED
    caches = [*extrapolation._caches("stablemask", True), scaled]
    assert set(caches) == {*extrapolation.SHOWN, scaled}
    record = extrapolation.read_past_the_context(tmp_path, texts=2, caches=caches, **run)

    bins = record["bins"]
    assert bins[0][0] == 1
    assert bins[-1][1] == 16 * CONTEXT + 1
    assert all(end == start for (_, end), (start, _) in pairwise(bins))
    assert any(end == CONTEXT for _, end in bins)

    (folder,) = (tmp_path / "models").iterdir()
    tokens = corpus_of(training_options(run) | {"vocab_size": 300}).validation.tokens
    length = 16 * CONTEXT + 1
    ids = torch.stack(
        [torch.from_numpy(t.astype("int64")) for t in (tokens[:length], tokens[-length:])]
    )
    with torch.no_grad():
        logits = load_model(str(folder))(ids).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    ).view(2, -1)
    for (start, end), nats in zip(bins, record["nats"]["all keys"], strict=True):
        assert nats == pytest.approx(losses[:, start - 1 : end - 1].mean().item(), abs=2e-4)
    # At the far end the scores of the last row are twice as large: log 256 to the base 16.
    assert record["nats"][scaled][-1] != record["nats"]["all keys"][-1]
    inside = [i for i, (_, end) in enumerate(bins) if end <= CONTEXT]
    for cache in caches:  # the same as long as all keys are kept
        for index in inside:
            assert record["nats"][cache][index] == pytest.approx(
                record["nats"]["all keys"][index], abs=2e-4
            )


def made_up(nats, seeds=3):
    records = []
    for job in extrapolation.jobs("small", seeds):
        arguments = dict(job.arguments)
        bins = extrapolation._bins(arguments["context"])
        noise = 0.001 * ((arguments["seed"] * 5 + len(job.name)) % 3)
        found = {
            cache: [nats(cache, arguments["label"], start) + noise for start, _ in bins]
            for cache in arguments["caches"]
        }
        records.append({"job": job.name, **arguments, "bins": bins, "nats": found})
    return records


def flat(cache, kind, start):
    return 3.0


def test_the_claims_follow_from_the_losses():
    def verdicts(nats, seeds=3):
        return [claim.verdict for claim in extrapolation.section(made_up(nats, seeds)).claims]

    def softmax_fails(cache, kind, start):
        lost = kind == "softmax" and start >= 128 and cache != "StreamingLLM"
        return 3.0 + lost

    no, yes = "not reproduced", "reproduced"
    assert verdicts(softmax_fails) == 5 * [yes] + [no] + 5 * [yes]
    assert verdicts(flat)[:5] == 5 * [no]

    def scaling_helps_softmax(cache, kind, start):
        return softmax_fails(cache, kind, start) - 2 * (kind == "softmax" and "log" in cache)

    assert verdicts(scaling_helps_softmax)[:5] == 3 * [yes] + 2 * [no]

    def falling_mass_fails(cache, kind, start):
        fails = cache.endswith("falling on") and start >= 128
        return 3.0 + fails - 0.1 * (kind == "stablemask")

    assert verdicts(falling_mass_fails) == [no, no, yes, no, yes, yes, no, yes, no, yes, yes]


def test_the_table_holds_perplexities_inside_and_past_the_context():
    records = made_up(flat, seeds=1)
    for record in records:
        for cache in record["nats"]:
            record["nats"][cache] = [
                math.log(50 if start < 128 else 70) for start, _ in record["bins"]
            ]
    told = extrapolation.section(records)
    assert "| StableMask | 50.0 | 70.0 | 50.0 | 70.0 | 50.0 | 70.0 |" in told.tables["perplexities"]
    assert told.tables["gaps"].count("| 0.000 | 0.000 | 0.000 |") == 9
    assert "| nano, all keys, log-length | rope, 1x | rope, 8x to 16x |\n" in told.tables["perplexities"]  # fmt: skip
    assert set(told.figures) == {"positions"}
    assert all(claim.verdict == "open" for claim in extrapolation.section(made_up(flat, 1)).claims)
