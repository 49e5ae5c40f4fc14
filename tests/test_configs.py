"""Every recipe under configs/ is read by the parser that its command uses."""

import re
from pathlib import Path

import pytest

from stablemask.cli.parser import parse_options
from stablemask.errors import InputError
from stablemask.models.presets import PRESETS
from stablemask.options import load_yaml
from stablemask.training.dry_run import describe_cost
from stablemask.training.finetune_options import FinetuneOptions
from stablemask.training.options import TrainingOptions
from stablemask.training.pretrain_options import PretrainOptions

CONFIGS = Path(__file__).parents[1] / "configs"
# Which command reads the files of a folder, and what it cannot do without.
COMMANDS = {
    "pretrain": (PretrainOptions, []),
    "finetune": (FinetuneOptions, ["--model", "m", "--data", "d"]),
}
RECIPES = sorted(path for path in CONFIGS.rglob("*") if path.is_file())
PRETRAINING = [path for path in RECIPES if path.parent.name == "pretrain"]


def parse(path: Path, *flags: str) -> TrainingOptions:
    options_class, required = COMMANDS[path.relative_to(CONFIGS).parts[0]]
    return parse_options(options_class, ["--config", str(path), *required, *flags])


def recipe_name(path: Path) -> str:
    return path.relative_to(CONFIGS).as_posix()


def test_each_preset_of_a_language_model_has_a_recipe():
    assert {load_yaml(path)["preset"] for path in PRETRAINING} == set(PRESETS) - {"nano", "micro"}


@pytest.mark.parametrize("path", RECIPES, ids=recipe_name)
def test_recipe_is_valid_and_means_what_it_says(path, tmp_path):
    options = parse(path, "--out", str(tmp_path)).resolved()
    written = load_yaml(path)
    assert {name: getattr(options, name) for name in written} == written
    assert options.warmup < options.steps
    assert f"--config configs/{recipe_name(path)} " in path.read_text()


@pytest.mark.parametrize("path", PRETRAINING, ids=recipe_name)
def test_a_recipe_describes_its_preset(path, tmp_path):
    options = parse(path, "--out", str(tmp_path)).resolved()
    assert path.stem.endswith(options.preset.removeprefix("paper-"))
    assert path.stem.startswith("paper-") == options.preset.startswith("paper-")
    config = options.model_config()
    assert options.context == config.max_position_embeddings
    ours = {"gamma": 1 / options.context, "horizon": None, "hold": options.context - 1}
    published = {"gamma": "slopes", "horizon": options.context, "suffix": True}
    assert config.stablemask == (published if path.stem.startswith("paper-") else ours)


# Of the paper's table of training settings: sequences a step, steps, the learning rate from, to, its shape,
# weight decay, and the lengths it names.
PAPER = {
    "wikitext103": (64, 50_000, 1e-6, 6e-4, "linear", 0.01, {512}),
    "minipile": (128, 2 * 22_000, 1e-6, 4e-4, "linear", 0.1, {512, 1024}),
    "pile": (128, 200_000, 5e-6, 2e-4, "cosine", 0.1, {1024}),
}


@pytest.mark.parametrize(
    "path", [p for p in PRETRAINING if p.stem.startswith("paper")], ids=recipe_name
)
def test_a_recipe_of_the_papers_has_its_settings(path, tmp_path):
    options = parse(path, "--out", str(tmp_path)).resolved()
    sequences, steps, start, peak, shape, decay, lengths = PAPER[path.stem.split("-")[1]]
    assert (options.global_batch_size, options.steps) == (sequences, steps)
    assert options.learning_rate == peak
    assert options.learning_rate * options.start_learning_rate == pytest.approx(start)
    assert (options.schedule, options.weight_decay, options.warmup) == (shape, decay, 4000)
    assert (options.beta2, options.clip, options.context in lengths) == (0.98, 1.0, True)


@pytest.mark.parametrize("path", PRETRAINING, ids=recipe_name)
def test_the_preset_of_a_recipe_has_the_context_it_names(path):
    written = load_yaml(path)
    assert written["context"] == PRESETS[written["preset"]]["max_position_embeddings"]


@pytest.mark.parametrize("path", PRETRAINING, ids=recipe_name)
@pytest.mark.parametrize("attention", ["softmax", "stablemask"])
@pytest.mark.parametrize("position", ["rope", "alibi"])
def test_each_design_dry_runs_on_one_device_and_on_eight(path, attention, position):
    flags = ("--attention", attention, "--position", position, "--dry-run", "--dtype", "bfloat16")
    flags += ("--peak-flops", "989e12")
    costs = [describe_cost(parse(path, *flags, "--devices", devices)) for devices in ("1", "8")]
    for cost, where in zip(costs, ("one device", "each of 8 devices")):
        assert f"{attention} attention, {position} positions" in cost
        assert f" on {where}\n" in cost
        assert re.search(r"time, estimate .* at 40 % of 989 TFLOP/s each$", cost)
    if "global_batch_size" in load_yaml(path):  # the same run, however many devices there are
        step, steps = (re.search(r"^tokens a step +([\d,]+)", cost, re.M)[1] for cost in costs)
        assert step == steps


@pytest.mark.parametrize("path", PRETRAINING, ids=recipe_name)
def test_the_memory_that_a_recipe_names_is_the_estimate(path):
    named = re.search(r"by the estimate\s+# one needs ([\d.]+) GiB", path.read_text())
    if named is None:
        assert path.stem == "tiny"
        return
    cost = describe_cost(parse(path, "--dry-run"))
    estimate = re.search(r"memory, estimate +([\d.]+) GiB", cost)
    assert float(named[1]) == pytest.approx(float(estimate[1]), abs=0.06)


@pytest.mark.parametrize("path", RECIPES, ids=recipe_name)
def test_a_recipe_leaves_out_to_the_user_and_flags_win(path):
    with pytest.raises(InputError, match="out must be given"):
        parse(path).resolved()
    options = parse(path, "--out", "x", "--batch-size", "2", "--steps", "700", "--warmup", "1")
    assert (options.batch_size, options.steps, options.resolved().warmup) == (2, 700, 1)


@pytest.mark.parametrize("path", RECIPES, ids=recipe_name)
def test_an_unknown_key_is_refused_by_name(path, tmp_path):
    changed = tmp_path / path.parent.name / path.name
    changed.parent.mkdir()
    changed.write_text(path.read_text() + "learning_rat: 1.0e-3\n")
    options_class, _ = COMMANDS[path.parent.name]
    with pytest.raises(InputError, match=r"'learning_rat'.*learning_rate"):
        parse_options(options_class, ["--config", str(changed), "--out", "x"])
