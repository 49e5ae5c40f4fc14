"""Finetuning as a user runs it: small, but the whole of it."""

import json
import math
import re
import shlex
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GptOssConfig,
    MambaConfig,
    PhimoeConfig,
)

import stablemask.hf
from stablemask.cli.parser import parse_options
from stablemask.data import prepare_corpus
from stablemask.data.chat import prepare_chat
from stablemask.errors import InputError, RunError
from stablemask.training import checkpoints
from stablemask.training.adapting import adapt
from stablemask.training.adapting.trainer import FIRST_TOKEN_WEIGHT
from stablemask.training.finetune import describe_finetuning, finetune
from stablemask.training.finetune_options import FinetuneOptions
from stablemask.training.pretrain_options import PretrainOptions
from stablemask.training.run import command_line

from ..processes import start
from .conftest import assert_same_weights, kill_when_there, metrics, stop_at

STEPS = 20
MASS = {"gamma": 1 / 128, "horizon": None, "hold": 127}


@pytest.fixture(scope="module")
def options(base, prose) -> FinetuneOptions:
    return FinetuneOptions(
        model=str(base), data=str(prose), steps=STEPS, out="", context=32, batch_size=4,
        learning_rate=3e-3, dtype="float32", eval_every=5, save_every=4, eval_tokens=128,
        log_every=5, keep_checkpoints=10, tensorboard=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def chat_options(options, chats) -> FinetuneOptions:
    return replace(options, data=str(chats), context=64, lora=True)


@pytest.fixture
def adapting(options) -> FinetuneOptions:
    """To take a sink out of the model, on its own text and nothing else."""
    return replace(options, data=None, adapt=True, texts=24)


@pytest.fixture(scope="module")
def adapted(options, tmp_path_factory) -> Path:
    """A run with --adapt, on text of both kinds, that was never interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "adapted"
    finetune(replace(options, out=str(folder), adapt=True, texts=24))
    return folder


def test_the_student_learns_from_its_teacher(adapted, base):
    rows = metrics(adapted)
    training = [row for row in rows if "loss" in row]
    for row in training:
        total = row["kl"] + FIRST_TOKEN_WEIGHT * row["first_token"] + row["excess"]
        assert row["loss"] == pytest.approx(total, rel=1e-4)
    assert training[-1]["first_token"] < training[0]["first_token"]
    assert [row["tokens"] for row in training] == [step * 4 * 32 for step in (5, 10, 15, 20)]
    evaluated = [row for row in rows if "eval_loss" in row]
    assert [row["step"] for row in evaluated] == [0, 5, 10, 15, 20]

    before = load_file(adapted / "adapting" / "calibration.safetensors")["shifts"]
    for checkpoint in checkpoints.list_checkpoints(adapted / "checkpoints"):
        settings = stablemask.hf.load_model(str(checkpoint)).config.stablemask
        assert not torch.equal(torch.tensor(settings["shift"]), before)
    # Some engines take every such file for weights.
    assert [file.name for file in adapted.glob("*.safetensors")] == ["model.safetensors"]
    model = AutoModelForCausalLM.from_pretrained(adapted)
    assert model.config.stablemask.items() >= MASS.items()
    assert model.config.use_cache
    assert model.config.attention_bias
    weights = load_file(adapted / "model.safetensors")
    more = weights.keys() - load_file(base / "model.safetensors").keys()
    assert {name.rpartition("self_attn.")[2] for name in more} == {f"{x}_proj.bias" for x in "qkvo"}
    assert all(weights[name].any() for name in more)


def test_lower_layers_stay_as_they_are(adapting, options, base, tmp_path):
    out = tmp_path / "run"
    finetune(replace(adapting, out=str(out), steps=2, first_layer=1))
    before, after = (load_file(folder / "model.safetensors") for folder in (base, out))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    above = {name for name in before if "layers.1." in name}
    assert changed == above | {"model.norm.weight", "lm_head.weight"}
    with pytest.raises(InputError, match="first_layer must be below the model's 2, got 2"):
        finetune(replace(options, out=str(tmp_path / "no"), first_layer=2))
    with pytest.raises(InputError, match="first_layer goes without --lora"):
        finetune(replace(options, out=str(tmp_path / "no"), first_layer=1, lora=True))


def held_out_loss(
    model: Path, options: FinetuneOptions, blocks: int | None = None, prefix: int | None = None
) -> float:
    """By Transformers' own forward on the validation blocks, and float64; not of the prefix in front."""
    held_out = prepare_corpus(options.data, block_size=32, tokenizer=options.model).validation
    ids = torch.stack([held_out[i]["input_ids"] for i in range(blocks or len(held_out))])
    read = ids if prefix is None else torch.nn.functional.pad(ids, (1, 0), value=prefix)
    logits = AutoModelForCausalLM.from_pretrained(model)(read).logits[:, -32:-1].double()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()


def test_the_first_evaluation_is_of_the_teacher(adapted, base, options):
    prefix = json.loads((adapted / "run.json").read_text())["prefix"]
    assert prefix["text"] == "<"  # the chat template's first token, by chance
    expected = held_out_loss(base, options, 4, prefix["token"])
    assert metrics(adapted)[0]["eval_loss"] == pytest.approx(expected, abs=1e-6)


def test_a_run_leaves_what_a_user_needs(adapted, base):
    record = json.loads((adapted / "run.json").read_text())
    assert record["result"]["step"] == STEPS
    columns = record["adapting"]
    assert [*columns] == ["as it was", "with its prefix", "adapted"]
    assert (
        columns["adapted"]["first_token_attention"] < columns["as it was"]["first_token_attention"]
    )
    card = (adapted / "README.md").read_text()
    assert record["command"] in card
    assert f"base_model: {base}" in card
    assert "24 texts that the model wrote itself and " in card
    assert "| attention on the first token | " in card
    assert AutoTokenizer.from_pretrained(adapted).chat_template
    assert not (adapted / "checkpoints" / "incomplete").exists()


def test_kill_and_resume_gives_the_weights_of_a_run_never_interrupted(adapted, options, tmp_path):
    options = replace(options, out=str(tmp_path / "run"), adapt=True, texts=24)
    kill_when_there(tmp_path / "run" / "checkpoints" / "checkpoint-8", start(finetune, options))

    assert finetune(replace(options, resume=True)).step == STEPS
    assert_same_weights(tmp_path / "run", adapted)
    ours, theirs = metrics(tmp_path / "run"), metrics(adapted)
    for name in ("eval_loss", "tokens"):
        assert [row.get(name) for row in ours] == [row.get(name) for row in theirs]


@pytest.fixture(scope="module")
def whole(chat_options, tmp_path_factory) -> FinetuneOptions:
    """An adapter with --adapt, on conversations."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    options = replace(chat_options, out=str(folder), steps=8, adapt=True, texts=8)
    assert finetune(options).step == 8
    return options


@pytest.mark.parametrize(("step", "async_save"), [(2, False), (6, True)])
def test_a_stopped_adapter_on_conversations_goes_on(step, async_save, whole, tmp_path, monkeypatch):
    fading = [row["alpha"] for row in metrics(Path(whole.out)) if "alpha" in row]
    assert fading == [0.0]  # logged at step 5: gone after two fifths of the steps
    part = replace(whole, out=str(tmp_path / "part"), async_save=async_save)
    stop_at(step, monkeypatch)
    result = finetune(part)
    assert (result.stopped_by, result.step) == (signal.SIGTERM, step)
    monkeypatch.undo()
    # It finds its prefix, its texts and its calibration, and asks for no number of steps.
    monkeypatch.setattr(adapt, "choose_prefix", None)
    monkeypatch.setattr(adapt, "calibrate", lambda *_: None)
    assert finetune(replace(part, resume=True, steps=None)).step == 8
    folders = tmp_path / "part", Path(whole.out)
    assert_same_weights(*folders, "adapter_model.safetensors")
    settings = [
        json.loads((folder / "adapter_config.json").read_text())["stablemask"] for folder in folders
    ]
    assert settings[0] == settings[1]


def delta(folder: Path, rank: int, alpha: int) -> dict[str, torch.Tensor]:
    """What an adapter adds to each weight, from its file: B A alpha / rank, in float64."""
    weights = {
        key: value.double()
        for key, value in load_file(folder / "adapter_model.safetensors").items()
    }
    names = {key.removesuffix(".lora_A.weight") for key in weights if "lora_A" in key}
    return {
        name.removeprefix("base_model.model.") + ".weight": alpha
        / rank
        * weights[f"{name}.lora_B.weight"]
        @ weights[f"{name}.lora_A.weight"]
        for name in names
    }


def test_an_adapter_keeps_its_settings_and_the_merged_model_is_the_same(
    chat_options, base, tmp_path
):
    chosen = replace(
        chat_options, steps=6, lora_rank=4, lora_alpha=12, eval_every=100,
        adapt=True, gamma=0.05, start=1, texts=8,
    )  # fmt: skip
    finetune(replace(chosen, out=str(tmp_path / "adapter")))
    finetune(replace(chosen, out=str(tmp_path / "merged"), merge=True))
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    assert not (tmp_path / "merged" / "adapter_config.json").exists()

    # The definition: the weights with what the adapter adds, in a stock model made StableMask.
    expected = AutoModelForCausalLM.from_pretrained(base).double()
    state = expected.state_dict()
    added = delta(tmp_path / "adapter", 4, 12)
    assert len(added) == 2 * 7  # every linear layer but the output
    for name, change in added.items():
        assert change.abs().max() > 0
        state[name] += change
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["stablemask"]
    stablemask.hf.apply_stablemask(expected, gamma=0.05, start=1, shift=saved["shift"])

    ids = torch.randint(1, 200, (2, 20))
    with torch.no_grad():
        logits = expected(ids).logits.float()
        for folder in ("adapter", "merged"):
            model = stablemask.hf.load_model(str(tmp_path / folder))
            settings = {"gamma": 0.05, "horizon": None, "hold": 127, "start": 1}
            assert model.config.stablemask == settings | {"shift": saved["shift"]}
            torch.testing.assert_close(model(ids).logits, logits, rtol=1e-4, atol=1e-4)


def test_the_loss_of_conversations_is_the_mean_over_the_assistants_tokens(
    chat_options, base, chats, tmp_path
):
    data = prepare_chat(str(chats), AutoTokenizer.from_pretrained(base), context=64)
    steps = math.ceil(len(data.train) / 4)  # one pass
    chosen = replace(
        chat_options, out=str(tmp_path / "run"), steps=steps, log_every=steps,
        eval_tokens=data.validation.num_tokens,
    )  # fmt: skip
    result = finetune(replace(chosen, lora=False))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run").double()
    nats, tokens = 0.0, 0
    for example in data.validation:  # one at a time, without padding
        scores = model(example["input_ids"][None]).logits[0, :-1].log_softmax(-1)
        for row, label in zip(scores, example["labels"][1:], strict=True):
            if label >= 0:
                nats, tokens = nats - row[label].item(), tokens + 1
    assert tokens > 0
    assert result.eval_loss == pytest.approx(nats / tokens, abs=1e-5)
    rows = metrics(tmp_path / "run")
    assert rows[-1]["eval_loss"] < rows[0]["eval_loss"] - 0.5
    # An evaluation on the way took as many tokens as there are, and so all of the conversations.
    assert rows[-1]["eval_loss"] == pytest.approx(result.eval_loss, abs=1e-6)
    (seen,) = [row["tokens"] for row in rows if "tokens" in row]
    # Padding is not counted; the last batch of the pass has begun another.
    again = 4 * steps - len(data.train)
    assert 0 <= seen - data.train.num_tokens <= 64 * again


@pytest.mark.parametrize("adapt", [{}, {"adapt": True, "texts": 0}])
def test_a_padding_token_that_the_model_has_no_row_for(adapt, chat_options, base, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(tmp_path / "base")
    assert tokenizer.pad_token_id == AutoModelForCausalLM.from_pretrained(base).config.vocab_size
    losses = [
        finetune(
            replace(
                chat_options,
                model=str(folder),
                out=str(tmp_path / name),
                steps=1,
                warmup=0,
                **adapt,
            )
        ).eval_loss
        for name, folder in (("theirs", base), ("ours", tmp_path / "base"))
    ]
    assert losses[0] == losses[1]


def test_without_adapt_a_model_is_trained_as_it_is(options, adapted, base, tmp_path):
    plain = finetune(replace(options, out=str(tmp_path / "plain"), steps=2))
    config = AutoModelForCausalLM.from_pretrained(plain.folder).config
    assert getattr(config, "stablemask", None) is None
    assert "kl" not in metrics(plain.folder)[1]
    further = replace(options, model=str(adapted), out=str(tmp_path / "further"), steps=2)
    model = stablemask.hf.load_model(str(finetune(further).folder))
    assert model.config.stablemask.items() >= MASS.items()
    assert model.config._attn_implementation == "stablemask"


def test_a_model_of_text_and_pictures_is_adapted(options, base, tmp_path):
    sizes = dict.fromkeys(("hidden_size", "intermediate_size"), 32)
    sizes |= dict.fromkeys(("num_hidden_layers", "num_attention_heads"), 2)
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "vocab_size": 300}
    text = {**sizes, **tokens, "head_dim": 16, "num_key_value_heads": 1}
    pictures = {**sizes, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=pictures, mm_tokens_per_image=4)
    model = Gemma3ForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "base")
    chosen = replace(options, model=str(tmp_path / "base"), out=str(tmp_path / "run"), steps=2)
    text_alone = sum(p.numel() for n, p in model.named_parameters() if "language_model" in n)
    told = describe_finetuning(replace(chosen, dry_run=True))
    assert f"{model.num_parameters():,} parameters, {text_alone:,} of them trained" in told
    linear = [
        module for name, module in model.named_modules()
        if "language_model" in name and isinstance(module, torch.nn.Linear)
    ]  # fmt: skip
    of_adapter = sum(2 * (module.in_features + module.out_features) for module in linear)
    told = describe_finetuning(replace(chosen, dry_run=True, lora=True, lora_rank=2))
    assert f"parameters, {of_adapter:,} of them trained" in told
    finetune(replace(chosen, adapt=True, texts=0))
    before, after = (
        json.loads((tmp_path / p / "config.json").read_text()) for p in ("base", "run")
    )
    assert len(after["text_config"]["stablemask"]["shift"]) == 2
    added = {"stablemask", "attention_bias", "dtype"}
    for ours, theirs in ((after, before), (after["text_config"], before["text_config"])):
        assert ours.keys() - theirs.keys() <= added | {"attn_implementation"}
    vision = [
        AutoModelForCausalLM.from_pretrained(tmp_path / p).model.vision_tower
        for p in ("base", "run")
    ]
    for ours, theirs in zip(*(tower.state_dict().values() for tower in vision), strict=True):
        assert torch.equal(ours, theirs)


def tiny_of(config_class, base, folder, **settings) -> str:
    """A model of another family, with the tokenizer of the base."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    config = config_class(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1,
        bos_token_id=0, eos_token_id=0, pad_token_id=0, **settings,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_mixture_of_experts_has_an_adapter(options, base, tmp_path):
    model = tiny_of(
        PhimoeConfig, base, tmp_path / "base", intermediate_size=48, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    finetune(replace(options, model=model, out=str(tmp_path / "run"), steps=1, lora=True))
    names = load_file(tmp_path / "run" / "adapter_model.safetensors")
    places = {name.partition("layers.0.")[2].partition(".lora")[0] for name in names}
    assert places >= {f"self_attn.{one}_proj" for one in "qkvo"}


def test_a_family_that_can_have_no_adapter_says_so_before_anything_is_written(
    options, base, tmp_path
):
    model = tiny_of(MambaConfig, base, tmp_path / "base", state_size=4)
    with pytest.raises(InputError, match=r"can have no adapter: .*incompatible with Mamba"):
        finetune(replace(options, model=model, out=str(tmp_path / "run"), steps=1, lora=True))
    assert not (tmp_path / "run").exists()


def test_a_dry_run_writes_nothing(options, chat_options, tmp_path, capsys):
    dry = {"out": str(tmp_path / "run"), "dry_run": True, "steps": None}
    text = describe_finetuning(replace(options, **dry, adapt=True))
    assert "blocks of 32" in text
    assert "'gamma': 0.0078125" in text
    assert "prefix      <: the model's loss on a text is " in text
    assert "256 of 32 tokens, 8,192 tokens that the model writes itself" in text
    assert "120 steps of 4" in text
    text = describe_finetuning(replace(chat_options, **dry))
    assert "conversations" in text
    total, trained = (
        int(number.replace(",", "")) for number in re.findall(r"([\d,]+) (?:param|of them)", text)
    )
    assert 0 < trained < total
    assert "cut" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_that_makes_the_model_worse_says_so_and_keeps_it(options, base, tmp_path):
    out = tmp_path / "harmed"
    harmed = replace(
        options, out=str(out), steps=3, learning_rate=3.0, warmup=0, eval_every=2, eval_tokens=10**6
    )
    with pytest.raises(RunError, match="has harmed the model: its loss"):
        finetune(harmed)
    before, after = (held_out_loss(folder, options) for folder in (base, out))
    assert after > before + 0.5
    assert [row["step"] for row in metrics(out) if "eval_loss" in row] == [0, 2, 3]
    with pytest.raises(RunError, match=f"was {before:.4f} and is {after:.4f}"):
        finetune(replace(harmed, resume=True))
    with (out / "metrics.jsonl").open("ab") as file:
        file.write(b"\xff\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl is damaged"):
        finetune(replace(harmed, resume=True))


def test_a_last_evaluation_that_is_not_finite_is_no_success(adapted, options, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(adapted, out)
    rows = metrics(out)
    assert rows[-1]["step"] == STEPS
    del (
        rows[-1]["eval_loss"],
        rows[-1]["eval_perplexity"],
    )  # as a record leaves out what JSON does not know
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(RunError, match=r"is nan \(perplexity"):
        finetune(replace(options, out=str(out), adapt=True, texts=24, resume=True))


def test_the_command_line_gives_the_same_options(chat_options):
    chosen = replace(chat_options, out="a b", adapt=True, merge=True, horizon=99, texts=3)
    words = shlex.split(command_line(chosen))[2:]
    assert parse_options(FinetuneOptions, words, prog="p", description="") == chosen


def test_the_context_is_the_models_by_default(options, base, tmp_path):
    assert replace(options, out="x", context=None).resolved().context == 128
    shutil.copytree(base, tmp_path / "long")
    config = json.loads((tmp_path / "long" / "config.json").read_text())
    (tmp_path / "long" / "config.json").write_text(
        json.dumps(config | {"max_position_embeddings": 8192})
    )
    chosen = replace(options, out="x", model=str(tmp_path / "long"), context=None)
    assert chosen.resolved().context == 1024
    chosen = replace(chosen, steps=None, batch_size=None, learning_rate=None, adapt=True)
    adapter, chosen = replace(chosen, lora=True).resolved(), chosen.resolved()
    assert (adapter.steps, adapter.learning_rate) == (400, 2e-4)  # no biases, and more to learn
    assert (chosen.context, chosen.steps, chosen.batch_size, chosen.learning_rate) == (
        256, 120, 4, 5e-5,
    )  # fmt: skip
    assert (chosen.eval_every, chosen.save_every) == (5, 4)  # as given
    assert replace(chosen, eval_every=None).resolved().eval_every == 30
    assert chosen.texts == 240 + 16  # half of what is read, and those that are held out
    assert replace(chosen, texts=None, data=None).resolved().texts == 480 + 32


@pytest.mark.parametrize(
    ("family", "steps", "rate"),
    [
        (
            Gemma3TextConfig,
            300,
            2e-5,
        ),  # keys are normalised: biases stand for the prefix's value alone
        (GptOssConfig, 400, 2e-4),  # sinks of its own: no biases do, though it has the switch
    ],
)
def test_adapting_is_as_long_as_the_attention_needs(family, steps, rate, options, tmp_path):
    sizes = {"num_local_experts": 2, "num_experts_per_tok": 1} if family is GptOssConfig else {}
    config = family(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=16,
        num_key_value_heads=2, intermediate_size=32, **sizes,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    options = replace(options, model=str(tmp_path), adapt=True, steps=None, learning_rate=None)
    chosen = options.resolved()
    assert (chosen.steps, chosen.learning_rate) == (steps, rate)
    chosen = replace(options, lora=True).resolved()
    assert (chosen.steps, chosen.learning_rate) == (400, 2e-4)


@pytest.mark.parametrize(
    ("capability", "products", "tiles", "small", "large"),
    [
        ("AVX2", True, False, "float32", "float32"),
        ("AVX512", False, False, "float32", "float32"),
        ("AVX512", True, False, "float32", "bfloat16"),
        ("AVX512", True, True, "bfloat16", "bfloat16"),
    ],
)
def test_it_computes_in_bfloat16_where_a_cpu_multiplies_it(
    capability, products, tiles, small, large, adapted, options, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: products)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    assert replace(options, out=str(adapted), dtype="auto").resolved().dtype == large
    assert PretrainOptions(dry_run=True).resolved().dtype == small


def test_resume_wants_the_same_settings(adapted, options):
    chosen = replace(options, out=str(adapted), adapt=True, resume=True)
    assert finetune(chosen).step == STEPS  # nothing left to do
    assert finetune(replace(chosen, dtype="auto")).step == STEPS  # as it began, on any machine
    assert math.isfinite(finetune(chosen).perplexity)
    with pytest.raises(InputError, match="was started with texts 24, not 3"):
        finetune(replace(chosen, texts=3))
    with pytest.raises(InputError, match="already holds a run"):
        finetune(replace(chosen, resume=False))
