"""One import makes the Auto classes know our model; without it they refuse, loudly."""

import importlib
import subprocess
import sys

import pytest
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import stablemask.hf
from stablemask.models import StableMaskForCausalLM, StableMaskModel

from ..models.tiny import tiny_model

SETTINGS = {"gamma": 0.02, "horizon": 9, "shift": [[0.5, -1, 2.0, 0.0], [1.5, -0.5, 0.1, -3.0]]}


@pytest.fixture
def folder(tmp_path):
    tiny_model(stablemask=SETTINGS).save_pretrained(tmp_path)
    return tmp_path


def test_auto_classes_load_our_model(folder):
    assert AutoConfig.from_pretrained(folder).stablemask == SETTINGS
    assert type(AutoModel.from_pretrained(folder)) is StableMaskModel
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is StableMaskForCausalLM
    assert model.config._attn_implementation == "stablemask"
    assert type(AutoModelForCausalLM.from_config(model.config)) is StableMaskForCausalLM


def test_importing_it_again_changes_nothing(folder):
    importlib.reload(stablemask.hf)
    assert type(AutoModelForCausalLM.from_pretrained(folder)) is StableMaskForCausalLM


def test_without_the_import_loading_fails_loudly(folder):
    program = (
        "import stablemask\nfrom transformers import AutoModelForCausalLM\n"
        f"AutoModelForCausalLM.from_pretrained({str(folder)!r})"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 1, run.stderr
    assert "model type `stablemask`" in run.stderr
