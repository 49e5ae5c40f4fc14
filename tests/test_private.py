"""The list of private names: each is as we count on it, and none of our sources is missing in it."""

import ast
import importlib
import inspect
import pkgutil
import sys
from pathlib import Path

import pytest

import stablemask
from stablemask import private
from stablemask.private import PRIVATE, reason_against

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path
    for folder in (Path(stablemask.__file__).parent, ROOT / "benchmarks", ROOT / "studies")
    for path in folder.rglob("*.py")
)
LIBRARIES = {"torch", "transformers", "accelerate", "peft", "datasets", "tokenizers", "safetensors"}
# Undocumented as a whole: what is imported of them is listed.
INTERNAL = (
    "transformers.cli",
    "transformers.integrations.sdpa_attention",
    "transformers.utils.output_capturing",
    "transformers.utils.generic",
)
LAST = {part for name in PRIVATE for part in name.split(".")}
# Of Python itself, of flash-attn (whose backend looks before it calls), and of a model that Transformers
# shards, where it is looked for.
ELSEWHERE = {
    "_replace", "_exit", "_processes", "_flash_attn_forward", "_flash_attn_backward",
    "_flash_attn_fwd", "_flash_attn_bwd", "_hf_device_mesh",
    "_schema",
}  # fmt: skip
# Made by a metaclass, in every class.
MADE = {"_abc_impl", "_backward_cls"}


@pytest.mark.parametrize("name", PRIVATE)
def test_each_is_as_it_is_counted_on(name):
    assert reason_against(name, PRIVATE[name]) is None


def test_a_name_that_is_gone_is_told():
    assert "is not there" in reason_against("transformers.Trainer._no_such_method", "trial")
    assert "is not there" in reason_against("transformers.no_such_module.name", None)
    reason = reason_against("transformers.Trainer._save_checkpoint", "trial, model")
    assert reason == "takes (model, trial), and not (trial, model)"
    assert "and not (folder)" in reason_against("transformers.Trainer._get_output_dir", "folder")
    assert reason_against("transformers.Trainer._get_output_dir", "folder|trial") is None
    assert private.missing({"no_such_package.name": None}) == []


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def trees():
    return [(path, ast.parse(path.read_text(encoding="utf-8"))) for path in SOURCES]


def own_names() -> set[str]:
    """Private names that our sources define, whatever as."""
    names = set()
    for _, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and isinstance(node.value, ast.Name)
                and (node.value.id == "self" or node.attr.endswith("_stablemask"))
            ):
                names.add(node.attr)
    return names


def test_every_private_name_in_our_sources_is_listed():
    own, unlisted = own_names(), []
    for path, tree in trees():
        for node in ast.walk(tree):
            used = []
            if isinstance(node, ast.Import):
                used = [alias.name for alias in node.names]
                used = [name for name in used if name.partition(".")[0] in LIBRARIES]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                module = node.module or ""
                if module.partition(".")[0] in LIBRARIES:
                    used = [f"{module}.{alias.name}" for alias in node.names]
                if module.startswith(INTERNAL):
                    unlisted += [
                        f"{path.name}:{node.lineno} {name}"
                        for name in used
                        if not any(listed.startswith(name) for listed in PRIVATE)
                    ]
            elif isinstance(node, ast.Attribute):
                used = [node.attr]
            elif (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("getattr", "hasattr", "setattr")
                and isinstance(node.args[1], ast.Constant)
            ):
                used = [node.args[1].value]
            unlisted += [
                f"{path.name}:{node.lineno} {part}"
                for name in used
                for part in name.split(".")
                if is_private(part)
                and part not in own | LAST | ELSEWHERE
                and not part.startswith("_stablemask")
            ]
    assert unlisted == []


def overrides() -> list[str]:
    """Private methods and attributes of other libraries' classes that a class of ours replaces."""
    for module in pkgutil.walk_packages(stablemask.__path__, "stablemask."):
        if not module.name.endswith(("__main__", ".setup")):
            try:
                importlib.import_module(module.name)
            except ImportError:  # a package that is not installed
                continue
    found = {}
    for name, module in list(sys.modules.items()):
        if not name.startswith("stablemask"):
            continue
        for cls in vars(module).values():
            if not inspect.isclass(cls) or not cls.__module__.startswith("stablemask"):
                continue
            for attribute in filter(is_private, vars(cls)):
                for base in cls.__mro__[1:]:
                    library = base.__module__.partition(".")[0]
                    if attribute in vars(base) and library in LIBRARIES:
                        found[attribute] = f"{base.__module__}.{base.__name__}.{attribute}"
    return [name for attribute, name in found.items() if attribute not in MADE]


def test_every_private_name_that_we_override_is_listed():
    names = overrides()
    assert any(name.endswith("Trainer._save_checkpoint") for name in names)
    assert [name for name in names if name.rpartition(".")[2] not in LAST] == []
