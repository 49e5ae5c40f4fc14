"""`stablemask env`: what it says must be what is."""

import json
import platform

import pytest
import torch

from stablemask import __version__
from stablemask.backends import BACKENDS, choice
from stablemask.cli import env
from stablemask.cli.main import main
from stablemask.models import StableMaskForCausalLM


@pytest.fixture
def report(capsys):
    assert main(["env", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_report(report):
    assert report["versions"]["stablemask"] == __version__
    assert report["versions"]["torch"] == torch.__version__
    assert report["versions"]["python"] == platform.python_version()
    assert report["cpu"]["threads"] == torch.get_num_threads()
    assert "cpu" in report["devices"]


def test_every_backend_is_checked_on_every_device(report):
    checked = [(check["backend"], check["device"]) for check in report["backends"]]
    assert checked == [(name, device) for name in BACKENDS for device in report["devices"]]
    works = {name for name, device in checked if device == "cpu"} & {
        check["backend"] for check in report["backends"] if check["works"]
    }
    assert {"flash", "blocks", "reference"} <= works
    assert all(check["detail"] for check in report["backends"])


def test_table_has_a_line_for_each_backend_and_package(capsys):
    assert main(["env"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["torch", torch.__version__] in lines
    for name in BACKENDS:
        assert [name, "cpu"] in [line[:2] for line in lines]


def test_decoding_is_checked(report):
    assert report["decoding"]["works"]


def test_a_decoder_that_gets_no_cache_is_told(monkeypatch, capsys):
    """As when Transformers hands the cache over under another name."""
    forward = StableMaskForCausalLM.forward

    def without_cache(self, *args, past_key_values=None, cache=None, **kwargs):
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(StableMaskForCausalLM, "forward", without_cache)
    assert env.check_decoding().works is False
    main(["env"])
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("decoding"))
    assert "WRONG" in line


def test_a_private_name_that_changed_is_told(monkeypatch, capsys, report):
    assert report["changed_internals"] == []
    monkeypatch.setitem(env.PRIVATE, "torch.no_such_name", None)
    main(["env"])
    assert "CHANGED, and used here: torch.no_such_name: is not there" in capsys.readouterr().out


def test_a_newer_version_is_told_first(monkeypatch, capsys):
    monkeypatch.setattr(env, "newer_than_tested", lambda: "newer: torch 3")
    main(["env"])
    assert capsys.readouterr().out.splitlines()[0] == "newer: torch 3"


def test_the_order_of_auto_is_told(report, monkeypatch, capsys):
    assert report["auto"]["cpu"]["sequence"] == list(choice.order("cpu", False))
    monkeypatch.setattr(choice, "_stock_prefers_cudnn", lambda: True)
    monkeypatch.setattr(choice.flash_attn, "is_ahead", lambda: False)
    orders = {"sequence": choice.order("cuda", False), "one row": choice.order("cuda", True)}
    print(env._as_table(report | {"auto": {"cuda": orders}}))
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "cuda        cudnn, flash, blocks",
        "cuda        flash, blocks (one row)",
    ]


@pytest.mark.parametrize("rules", [None, {}, {"backward_in_float32": {"float16": [(9, None)]}}])
def test_what_was_timed_is_told(report, rules):
    told = env._as_table(report | {"cpu": report["cpu"] | {"library": "x.so", "rules": rules}})
    assert ("not timed" in told) == (rules is None)
    assert ("... bfloat16   the stock kernel\n" in told) == (rules is not None)
    assert ("... float16    backward in float32, rows from 9 on\n" in told) == bool(rules)


def test_a_package_that_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(env, "PACKAGES", ("no-such-package",))
    main(["env"])
    assert "no-such-package not installed" in " ".join(capsys.readouterr().out.split())


def test_a_backend_that_computes_something_else_does_not_work(monkeypatch):
    right = BACKENDS["flash"]

    def wrong(*args):
        return right.attend(*args) * 1.001

    monkeypatch.setitem(BACKENDS, "flash", type(right)(wrong, right.unsupported, ""))
    check = env.check_backend("flash", "cpu")
    assert not check.works
    assert "BEYOND" in check.detail


def test_a_backend_that_fails_says_why(monkeypatch):
    def fail(*args):
        raise RuntimeError("no kernel\nfor this")

    right = BACKENDS["flash"]
    monkeypatch.setitem(BACKENDS, "flash", type(right)(fail, right.unsupported, ""))
    assert env.check_backend("flash", "cpu") == env.BackendCheck(
        "flash", "cpu", False, "no kernel for this"
    )
