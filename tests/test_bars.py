"""Bars are shown on a terminal and in a notebook, and nowhere else."""

import sys

import pytest
from tqdm.std import tqdm

from stablemask import bars
from stablemask.bars import progress_bar
from stablemask.training.callbacks import Record

from .models.tiny import tiny_model
from .training.loop import make_loop


@pytest.fixture
def notebook(monkeypatch):
    """What tqdm.auto gives in a notebook, less the widgets: a bar of tqdm.notebook's."""
    made = []

    class Widget(tqdm):
        __module__ = "tqdm.notebook"

        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            made.append(self)
            self.shown = not self.disable  # which closing it forgets

    monkeypatch.setattr(bars, "tqdm", Widget)
    return made


@pytest.mark.parametrize("is_terminal", [True, False])
def test_on_a_terminal(monkeypatch, is_terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal, raising=False)
    with progress_bar(total=1) as bar, progress_bar(total=1, show=False) as hidden:
        assert bar.disable == (not is_terminal)
        assert hidden.disable


def test_in_a_notebook(notebook, tmp_path, capsys):
    record = Record(tmp_path / "metrics.jsonl")
    loop = make_loop(
        tiny_model(), tmp_path / "c", record, steps=2, eval_strategy="steps", eval_steps=2
    )
    loop.train()
    training, evaluation = notebook
    assert training.shown
    assert evaluation.shown
    assert (training.n, training.total) == (2, 2)
    assert training.postfix.startswith("loss ")
    assert "step 2/2: " not in capsys.readouterr().err  # the line that stands for a bar elsewhere
