"""Two finished micro runs, and what a comparison makes of them."""

from dataclasses import replace
from pathlib import Path

import pytest

from stablemask.report.comparison import Comparison, compare
from stablemask.training.pretrain import pretrain
from stablemask.training.pretrain_options import PretrainOptions

TEXT = "\n".join(f"the row {i} gives token {i * i % 97} its own mask" for i in range(1500))
COMMAND = "stablemask demo --data 'a & b'"


@pytest.fixture(scope="package")
def options(tmp_path_factory) -> PretrainOptions:
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text(TEXT)
    return PretrainOptions(
        steps=6, out="", data=str(text), vocab_size=300, context=32, batch_size=2, dtype="float32",
        eval_every=2, log_every=2, eval_tokens=64, tensorboard=False,
    )  # fmt: skip


@pytest.fixture(scope="package")
def folders(options, tmp_path_factory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("runs")
    found = {}
    for kind in ("softmax", "stablemask"):
        found[kind] = out / kind
        pretrain(replace(options, attention=kind, out=str(out / kind)))
    return found


@pytest.fixture(scope="package")
def comparison(folders) -> Comparison:
    return compare(folders, max_tokens=1000, prompt="the ", command=COMMAND)
