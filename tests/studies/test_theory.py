"""What real decoders do on identical tokens, and verdicts that follow from the records."""

import json
import re
from pathlib import Path

import pytest

from studies import theory
from studies.kinds import KINDS

WORK = Path()


def replaced(records, **fields):
    """The records, with each field in place of the one that has it."""
    return [
        {**record, **{k: v for k, v in fields.items() if k in record}}
        for record in map(dict, records)
    ]


@pytest.fixture(scope="module")
def records():
    done = [
        {"job": job.name, **job.arguments, **job.run(WORK, **job.arguments)}
        for job in theory.jobs("small", 1)
    ]
    return json.loads(json.dumps(done))


def test_only_softmax_cannot_tell_positions_apart():
    spread = theory.measure_spread(WORK, seed=3)["spread"]
    assert list(spread) == ["rope", "alibi", "nope"]
    for by_kind in spread.values():
        assert by_kind.pop("softmax") < 1e-12
        assert len(by_kind) == len(KINDS) - 1
        assert min(by_kind.values()) > 1e-2


def test_jobs_have_names_fit_for_files():
    names = [job.name for job in theory.jobs("small", 3)]
    assert len(set(names)) == len(names) == 3 + 1
    assert all(re.fullmatch(r"[a-z0-9-]+", name) for name in names)


def verdicts(records):
    return [claim.verdict for claim in theory.section(records).claims]


def test_all_claims_hold_here(records):
    assert verdicts(records) == ["reproduced"] * 3


@pytest.mark.parametrize(
    ("kind", "value", "claim"), [("softmax", 1e-9, 0), ("stablemask-slopes", 1e-9, 1)]
)
def test_a_decoder_that_does_otherwise_costs_the_claim(records, kind, value, claim):
    (spread,) = (record["spread"] for record in records if "spread" in record)
    other = {**spread, "alibi": {**spread["alibi"], kind: value}}
    changed = replaced(records, spread=other)
    assert verdicts(changed)[claim] == "partly reproduced"
    assert f"{value:.2g}" in theory.section(changed).tables["spread"]


def test_one_more_parameter_costs_the_claim(records):
    (parameters,) = (record["parameters"] for record in records if "parameters" in record)
    more = {**parameters["tiny"], "stablemask": parameters["tiny"]["softmax"] + 1}
    section = theory.section(replaced(records, parameters={**parameters, "tiny": more}))
    assert section.claims[2].holds.count(False) == 1
    assert "| StableMask | +0 | +0 | +1 | +0 |" in section.tables["parameters"]
