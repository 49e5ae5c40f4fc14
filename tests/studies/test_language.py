"""What the page says of language models follows from the records, and every training is one of its own."""

import math

import pytest
import torch
from matplotlib.figure import Figure

from stablemask.models.settings import pseudo_sink_logits
from stablemask.training.pretrain_options import PretrainOptions
from studies import language
from studies.kinds import KINDS
from studies.language_section import section

TEXT = "wiki.txt"


def made_up(loss, seeds=3, text=TEXT):
    """The records of the small scale, with a loss that is ``loss(record)``."""
    records = []
    for job in language.jobs("small", seeds, text):
        record = {"job": job.name, **job.arguments, "model": "m", "mask_ratio": 0.5}
        record["loss"] = loss(record)
        record["curve"] = [[step, record["loss"] + 1 / step] for step in (100, 200, 800)]
        records.append(record)
    return records


def claim(records, start):
    (found,) = [c for c in section(records).claims if c.statement.startswith(start)]
    return found


def noisy(record):
    return 0.001 * ((record["seed"] * 7 + len(record["job"])) % 3)


def test_each_training_is_one_of_its_own_and_its_options_are_valid():
    jobs = language.jobs("small", 2, TEXT)
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names)
    trainings = {language.model_name(job.arguments) for job in jobs}
    assert len(trainings) == len(jobs)
    for job in jobs:
        options = language.training_options(job.arguments)
        resolved = PretrainOptions(out="-", **options).resolved()
        assert resolved.global_batch_size * resolved.context == job.arguments["tokens"]
    assert {job.arguments["label"] for job in jobs if job.arguments["group"] == "grid"} == set(
        KINDS
    )


def test_the_constant_mass_is_the_mean_of_the_default_one():
    config = PretrainOptions(
        out="-", steps=1, preset="nano", attention="stablemask",
        **language.ablations("nano")["constant mass"],
    ).resolved().model_config()  # fmt: skip
    rows = torch.arange(128)
    constant = pseudo_sink_logits(config.stablemask, 4, rows).exp()
    falling = pseudo_sink_logits({"gamma": 1 / 128, "horizon": None}, 4, rows).exp()
    torch.testing.assert_close(constant.mean(), falling.mean(), rtol=1e-5, atol=0)
    assert constant.max() == constant.min()


def test_verdicts_follow_from_the_losses():
    statement = "StableMask lowers"
    better = made_up(lambda r: 3 + noisy(r) - 0.1 * (r["label"] == "stablemask"))
    assert claim(better, statement).verdict == "reproduced"
    worse = made_up(lambda r: 3 + noisy(r) + 0.1 * (r["label"] == "stablemask"))
    assert claim(worse, statement).verdict == "not reproduced"
    only_nope = made_up(
        lambda r: 3 + noisy(r) - 0.1 * (r["label"] == "stablemask" and r["position"] == "nope")
    )
    assert claim(only_nope, statement).verdict == "partly reproduced"
    assert claim(better, "It does so on another text").verdict == "reproduced"


def test_the_best_gamma_is_told_and_judged_at_each_context():
    def loss(best):
        return lambda r: (
            3
            + noisy(r)
            + (
                0.1 * abs(math.log(float(r["label"]) / best))
                if r["group"] == "gamma" and r["label"] != "softmax"
                else 0.5
            )
        )

    assert claim(made_up(loss(1.0)), "The best gamma").verdict == "reproduced"
    off = made_up(loss(0.1))
    assert claim(off, "The best gamma").verdict == "not reproduced"
    assert section(off).tables["best_gamma"].count(" tokens | 0.1 | -0.2") == 2


def test_each_kind_is_given_its_best_learning_rate():
    """StableMask is ahead at the size's rate, softmax catches up at twice that of nano."""

    def loss(record):
        ahead = 0.1 * (record["label"] == "stablemask")
        fast = record["preset"] == "nano" and record["learning_rate"] > 3e-3
        return 3 + noisy(record) - ahead - 0.2 * (fast and record["label"] == "softmax")

    records = made_up(loss)
    assert claim(records, "It does so where either has the best").holds == [False, True]
    nano, micro = section(records).tables["best_rates"].split("\n")[2:]
    assert nano.split(" | ")[2] == "0.006"
    assert micro.split(" | ")[3].startswith("-0.1")
    assert claim(made_up(loss, seeds=1), "It does so where either").verdict == "open"


def test_the_decay_is_judged_against_a_constant_mass_and_the_default_against_floors():
    records = made_up(lambda r: 3 + noisy(r) - 0.1 * (r["label"] in ("constant mass", "floor 10")))
    assert claim(records, "The decay helps").verdict == "not reproduced"
    assert claim(records, "A floor").verdict == "partly reproduced"


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_section_has_its_tables_and_figures_at_any_number_of_seeds(seeds):
    records = made_up(lambda r: 3 + noisy(r), seeds=seeds)
    told = section(records)
    assert set(told.figures) == {"difference", "curves", "gamma"}
    assert all(isinstance(figure, Figure) for figure in told.figures.values())
    assert all(told.tables.values())
    assert "± nan" not in "".join(told.tables.values())
    assert (seeds == 1) == all(claim.verdict == "open" for claim in told.claims[:1])


def test_the_grid_alone_is_told_too():
    records = [r for r in made_up(lambda r: 3 + noisy(r)) if r["group"] == "grid"]
    told = section(records)
    assert len(told.claims) == 1
    assert [name for name, table in told.tables.items() if table] == ["trainings", "perplexities"]


@pytest.mark.parametrize("loss", [400.0, 800.0])  # the square of exp(400) is no float either
def test_a_loss_past_all_bounds_stops_no_page(loss):
    body = "".join(section(made_up(lambda record: loss + noisy(record))).tables.values())
    assert ("| inf" in body) == (loss > 709.8)
    assert "nan |" not in body
    assert "0000000000" not in body
