"""One import makes the Auto classes know our model; without it they refuse, loudly."""

import importlib
import subprocess
import sys

import pytest
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import stablemask.hf
from stablemask.models import StableMaskForCausalLM, StableMaskModel

from ..models.tiny import tiny_model
from .families import Family

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
    llama = Family("Llama", "LlamaForCausalLM")
    adapted = llama.model_class(llama.config(stablemask={"gamma": 0.02}))
    adapted.save_pretrained(folder / "adapted")
    program = (
        "import stablemask\nfrom transformers import AutoModelForCausalLM\n"
        f"for path in {[str(folder), str(folder / 'adapted')]!r}:\n"
        "    try:\n        AutoModelForCausalLM.from_pretrained(path)\n"
        "    except ValueError as error:\n        print(error)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "model type `stablemask`" in run.stdout, run.stderr
    assert 'attn_implementation="stablemask"` is not supported' in run.stdout
