"""The range of versions: its newest end in the package, its oldest in pyproject.toml."""

import re
from pathlib import Path

import pytest

from stablemask import versions
from tests import marks

PYPROJECT = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
# What runs: "name[extra]>=1.2", from `dependencies` to the tools of developers.
REQUIREMENTS = re.findall(
    r'"(?!stablemask)([\w-]+)(?:\[[\w,]+\])?([^"]*)"',
    PYPROJECT[PYPROJECT.index("\ndependencies") : PYPROJECT.index("\ndev = ")],
)
FLOORS = {name: rest.removeprefix(">=") for name, rest in reversed(REQUIREMENTS)}


@pytest.mark.parametrize("package", versions.NEWEST_TESTED)
def test_what_was_tested_is_a_dependency_and_not_below_its_floor(package):
    tested = versions.NEWEST_TESTED[package]
    assert re.fullmatch(r"\d+\.\d+\.\d+", tested)
    assert versions.release(tested) >= versions.release(FLOORS[package])


def test_every_dependency_has_a_floor():
    assert {"torch", "transformers", "matplotlib", "lm-eval"} <= FLOORS.keys()
    assert [name for name, rest in REQUIREMENTS if not re.fullmatch(r">=[\d.]+", rest)] == []


@marks.server
def test_where_the_server_can_run_its_tests_do():
    from stablemask.inference.serving import build_app

    assert callable(build_app)


@pytest.fixture
def with_versions(monkeypatch):
    def install(**changes):
        monkeypatch.setattr(versions, "installed", (versions.NEWEST_TESTED | changes).get)

    return install


def test_a_newer_version_is_told_in_one_line(with_versions, capsys):
    with_versions(transformers="5.99.1", torch="2.99.0+cpu")
    assert versions.newer_than_tested() == (
        "newer than what stablemask was tested with: "
        f"torch 2.99.0+cpu (tested up to {versions.NEWEST_TESTED['torch']}), "
        f"transformers 5.99.1 (tested up to {versions.NEWEST_TESTED['transformers']})"
    )
    versions.tell_newer.cache_clear()
    versions.tell_newer()
    versions.tell_newer()
    versions.tell_newer.cache_clear()
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_on_the_named_and_on_older_versions_nothing_is_told(with_versions, capsys):
    with_versions(torch=versions.NEWEST_TESTED["torch"] + "+cu130", peft="0.0.1", datasets=None)
    assert versions.newer_than_tested() is None
    versions.tell_newer.cache_clear()
    versions.tell_newer()
    assert capsys.readouterr().err == ""
