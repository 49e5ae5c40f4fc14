"""What a training says at its end, and in its card."""

import math
from pathlib import Path

import pytest

from stablemask.cli.outcome import report
from stablemask.training.card import write_finetune_card, write_pretrain_card
from stablemask.training.finetune_options import FinetuneOptions
from stablemask.training.pretrain_options import PretrainOptions
from stablemask.training.run import RunResult


def test_a_loss_whose_exponential_is_no_float(tmp_path, capsys):
    result = RunResult(Path("runs/wild"), 3, 800.0)
    assert result.perplexity == math.inf
    options = PretrainOptions(steps=3, out="runs/wild").resolved()
    assert report(result, options) == 0
    said = "runs/wild: 3 steps, validation perplexity inf (loss 800.0000)\n"
    assert capsys.readouterr().out == said

    record = {
        "result": {"eval_loss": 800.0}, "train_tokens": 1, "validation_tokens": 1, "command": "c",
        "conversations": {},
    }  # fmt: skip
    write_pretrain_card(tmp_path, options, record)
    assert "800.0000 nats a token (perplexity inf)" in (tmp_path / "README.md").read_text()
    options = FinetuneOptions(steps=3, out="o", model="m", data="builtin", context=8).resolved()
    write_finetune_card(tmp_path, options, None, record)
    assert "800.0000 nats a token (perplexity inf)" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("perplexity_nats", "shown"), [(math.log(12.345), "12.35"), (100, "2.69e+43")]
)
def test_a_perplexity_as_it_is_read(perplexity_nats, shown, capsys):
    options = PretrainOptions(steps=3, out="o").resolved()
    report(RunResult(Path("o"), 3, perplexity_nats), options)
    assert f"validation perplexity {shown} (" in capsys.readouterr().out
