"""Studies that train at the best of several rates: each training is its own, and what is said follows from it."""

import math

import pytest
import torch
from transformers import DynamicCache

from stablemask.evaluation import attention_maps
from stablemask.models.cache import CACHE
from stablemask.training.pretrain_options import PretrainOptions
from studies import ablation, language, long_training, scaling, sweep
from studies.page import text_of
from studies.paper import first_table

from ..models.tiny import random_ids, tiny_model

STUDIES = {"ablation": ablation, "long": long_training}


def made_up(study, loss, seeds=3):
    """Records of the small scale, with a loss that is ``loss(record)``; rates are told by the trials."""
    records = []
    for job in study.jobs("small", seeds):
        record = {
            "job": job.name,
            "learning_rate": 1e-3,
            "corpus": "k",
            "train_tokens": 9,
            **job.arguments,
        }
        noise = 0.001 * ((record["seed"] * 7 + len(job.name)) % 3)
        record["loss"] = loss(record) + noise
        record["packages"] = {"numpy": "2"}
        steps = record["steps"]
        record["curve"] = [[part * steps // 20, record["loss"] + 1 / part] for part in range(1, 21)]
        layers = {name: [0.1, 0.2, 0.3, 0.4] for name in ("first_token", "first_token_real", "delimiters", "mask_ratio")}  # fmt: skip
        record["attention"] = layers
        far = record["loss"] + 0.5
        record["far"] = {
            "as trained": [record["loss"], far],
            "log-length": [record["loss"], far - 0.1],
            "window": [record["loss"], far - 0.2],
        }
        records.append(record)
    return records


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("scale", ["small", "gpu"])
def test_each_job_has_a_name_and_options_of_its_own(name, scale):
    jobs = STUDIES[name].jobs(scale, 3)
    assert len({job.name for job in jobs}) == len(jobs)
    assert len({str(job.arguments) for job in jobs}) == len(jobs)
    known = set()
    for job in jobs:
        run = {"learning_rate": 1e-3, **job.arguments}
        options = PretrainOptions(out="-", **language.training_options(run)).resolved()
        assert options.global_batch_size * options.context == run["tokens"]
        options.model_config()
        assert set(job.after) <= known  # what it waits for stands before it
        assert len(job.after) in (0, 3)
        known.add(job.name)


def test_the_plans_are_those_that_were_asked_for():
    ends = [job.arguments for job in long_training.jobs("small", 3) if job.after]
    assert {run["steps"] for run in ends} == {20_000}
    assert len(ends) == 2 * 3 * 3  # sizes, kinds, seeds
    trials = [job.arguments for job in long_training.jobs("small", 3) if not job.after]
    assert {run["steps"] for run in trials} == {5_000}
    assert len(trials) == 2 * 3 * 3  # sizes, kinds, rates
    steps = {(job.arguments["preset"], job.arguments["steps"]) for job in ablation.jobs("small", 3)}
    assert steps == {("nano", 2000), ("micro", 1000)}
    assert ablation.PAPER.keys() <= ablation.rows(128).keys()


def test_a_training_takes_the_best_rate_of_its_trials_and_is_found_again(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("one two three four five six seven eight nine ten\n" * 1200)
    few = language.training_options
    monkeypatch.setattr(language, "training_options", lambda run: few(run) | {"vocab_size": 300})
    monkeypatch.setattr(sweep, "FINAL_TOKENS", 64)
    monkeypatch.setattr(sweep, "BLOCKS", 2)
    before = [{"loss": 3.0, "learning_rate": 1e-2}, {"loss": 2.0, "learning_rate": 2e-3}]
    run = {
        "source": str(tmp_path / "a.txt"), "position": "rope", "seed": 0, "label": "stablemask-paper",
        "context": 16, "group": sweep.FINAL, "settings": {"attention": "stablemask-paper"},
        "preset": "nano", "steps": 2, "tokens": 32, "rates": [1e-2, 2e-3],
    }  # fmt: skip
    record = sweep.train_and_score(tmp_path, before=before, **run)
    assert record["learning_rate"] == 2e-3
    assert [step for step, _ in record["curve"]] == [1, 2]
    assert len(record["attention"]["first_token"]) == 4  # layers
    again = sweep.train_and_score(tmp_path, before=before, **run)
    assert again == record


@pytest.mark.parametrize("name", STUDIES)
def test_the_text_of_a_study_names_what_its_section_has(name):
    section = STUDIES[name].section(made_up(STUDIES[name], lambda record: 3.0))
    assert all(section.tables.values())
    text = text_of(name)
    assert all(f"tables.{table}" in text for table in section.tables)
    assert "{{ claims }}" in text
    assert all(f'figure("{figure}"' in text for figure in section.figures)


def test_the_lead_at_the_end_is_that_of_the_end():
    def better(record):
        return 3.0 - 0.1 * (record["label"] == "stablemask")

    claims = long_training.section(made_up(long_training, better)).claims
    assert claims[0].statement.startswith("StableMask lowers")
    # At the end, and past the training length in three ways; ours, then as published.
    assert [claim.verdict for claim in claims] == 4 * ["reproduced", "not reproduced"]
    one_seed = long_training.section(made_up(long_training, better, seeds=1)).claims
    assert {claim.verdict for claim in one_seed} == {"open"}


def test_log_length_scaling_is_of_the_scores_from_the_training_length_on():
    model, ids, context = tiny_model(attention="softmax"), random_ids(1, 12), 4
    plain = attention_maps(model, ids).real[0]
    with scaling.log_length_scaling(model, context):
        scaled = attention_maps(model, ids).real[0]
        whole = model(ids).logits
        cache = DynamicCache(config=model.config)
        parts = [model(part, **{CACHE: cache}).logits for part in ids.split(5, 1)]
    factor = (torch.arange(1.0, 13).log() / math.log(context)).clamp(min=1)
    powers = plain.clamp(min=1e-30) ** factor[:, None] * (plain > 0)
    torch.testing.assert_close(scaled, powers / powers.sum(-1, keepdim=True), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)
    assert torch.equal(attention_maps(model, ids).real[0], plain)


def test_the_share_of_the_zero_row_is_worked_out():
    losses = {"softmax": 3.0, "stablemask-zero": 2.8, "stablemask-paper": 2.6}
    records = made_up(ablation, lambda record: losses.get(record["label"], 3.0))
    section = ablation.section(records)
    assert section.facts["shares"] == {"nano": "50%", "micro": "50%"}
    assert section.facts["paper_share"] == "71%"  # (22.5 - 21.5) / (22.5 - 21.1)
    rows = [ablation.WORDS["stablemask-paper"], ablation.WORDS["stablemask-zero"]]
    assert section.facts["ahead"] == {"nano": rows, "micro": rows}
    better, *_ = section.claims
    assert better.verdict == "reproduced"

    def in_doubt(record):  # by the spread of its seeds
        doubt = 0.3 * record.get("seed", 0) * (record["label"] == "stablemask-paper")
        return losses.get(record["label"], 3.0) + doubt

    facts = ablation.section(made_up(ablation, in_doubt)).facts
    assert facts["shares"] == {}
    assert facts["ahead"] == {
        size: [ablation.WORDS["stablemask-zero"]] for size in ("nano", "micro")
    }


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_tells_what_is_done_so_far(name):
    study = STUDIES[name]
    records = made_up(study, lambda record: 3.0)
    ends = [n for n, record in enumerate(records) if record["group"] == sweep.FINAL]
    for done in (ends[0] + 1, ends[1] + 1, ends[4] + 1):
        section = study.section(records[:done])
        assert {claim.verdict for claim in section.claims} <= {"open", "not reproduced"}
        assert "| nano, 2" in first_table({name: records[:done]}, {name: section})


def test_every_figure_of_the_papers_stands_in_the_first_table():
    empty = first_table({}, {})
    figures = (
        "15.4, 14.8, 12.4, 11.7, 10.7", "15.0, 14.6, 11.9, 11.3, 10.4", "59.4", "59.6", "67.1", "51.4",
        "51.7", "25.6", "31.4", "32.6", "53.5", "54.1", "22.5", "21.6", "22.4", "21.1", "21.5", "22.2",
        "96.7, 94.3, 97.6", "98.1, 99.1, 96.2", "21.7, 26.7, 46.5", "22.4, 24.5, 42.7", "25.3, 24.7, 43.1",
    )  # fmt: skip
    assert all(figure in empty for figure in figures)
    rows = [line.split(" | ") for line in empty.splitlines()[2:]]
    allowed = {"needs a GPU, and data from the hub", "not ours", "not run"}
    assert {row[4].strip("*| ") for row in rows} == allowed

    losses = {"softmax": 3.0, "stablemask-zero": 2.8, "stablemask-paper": 2.6, "fixed-token": 3.2}
    records = made_up(ablation, lambda record: losses.get(record["label"], 3.0))
    found = first_table({"ablation": records}, {"ablation": ablation.section(records)})
    verdicts = {row[0].strip("| "): row[4] for row in (line.split(" | ") for line in found.splitlines())}  # fmt: skip
    assert verdicts["Pseudo scores all zero (Table 3)"] == "**yes**"
    assert verdicts["One fixed token in front (Table 3)"] == "**no**"
    assert verdicts["Pseudo scores all minus infinity: softmax (Table 3)"] == "**the base**"
