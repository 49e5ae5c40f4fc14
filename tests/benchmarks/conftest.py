"""Memory is measured in processes of their own, whatever fork server other tests have started."""

import multiprocessing

import pytest

from benchmarks import memory


@pytest.fixture(autouse=True)
def no_fork_server(monkeypatch):
    monkeypatch.setattr(memory, "_FRESH", multiprocessing.get_context("spawn"))
