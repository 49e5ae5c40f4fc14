"""What a run records while it goes: its speed, its sinks. The Trainer is real, the model tiny."""

import json
import time
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    TrainerCallback,
)

from stablemask.training.callbacks import Probe, Record, training_flops
from stablemask.training.callbacks import progress as progress_module

from ..models.tiny import random_ids, tiny_model
from .loop import BLOCK, make_loop


class Spy(TrainerCallback):
    """Keeps what is logged, as TensorBoard would get it."""

    def __init__(self):
        self.training, self.evaluations = [], []

    def on_log(self, args, state, control, logs=None, **_):
        rows = self.evaluations if "eval_loss" in logs else self.training
        rows.append(dict(logs, step=state.global_step))


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def llama(**settings) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**{
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "initializer_range": 0.3, "attn_implementation": "eager",
    } | settings)  # fmt: skip
    return LlamaForCausalLM(config)


def test_a_log_carries_what_a_long_run_needs_and_passes_it_on(tmp_path, capsys):
    waited = iter(range(100))
    record = Record(
        tmp_path / "metrics.jsonl", flops_per_token=1e6, peak_flops=1e12,
        data_seconds=lambda: next(waited) * 1e-4,
    )  # fmt: skip
    spy = Spy()
    make_loop(
        tiny_model(), tmp_path / "c", record, spy, eval_strategy="steps", eval_steps=4
    ).train()
    training = [row for row in rows_of(record.path) if "loss" in row]
    for row, logged in zip(
        training, spy.training, strict=False
    ):  # which ends with the run's summary
        assert row.items() <= logged.items()
        assert row["tokens"] == row["step"] * 2 * BLOCK
        assert row["mfu"] == pytest.approx(row["tokens_per_second"] * 1e-6, abs=1e-4)
        assert 50e6 < row["memory"] < 50e9  # PyTorch alone takes some 200 MB
        assert row["data_wait"] == pytest.approx(
            1e-4 * row["tokens_per_second"] / (4 * BLOCK), rel=1e-2, abs=1e-4
        )
    assert [row["step"] for row in training] == [2, 4, 6, 8]
    assert training[-1]["seconds_left"] == 0
    evaluated = [row for row in rows_of(record.path) if "eval_loss" in row]
    assert [row["step"] for row in evaluated] == [4, 8]
    assert spy.evaluations[0]["eval_perplexity"] == evaluated[0]["eval_perplexity"]
    assert " % of peak, 00:00 left" in capsys.readouterr().err


def test_what_is_not_known_is_left_out(tmp_path):
    record = Record(tmp_path / "metrics.jsonl", flops_per_token=1e6)
    make_loop(tiny_model(), tmp_path / "c", record, steps=2).train()
    (row,) = rows_of(record.path)
    assert row.keys() == {
        "step", "loss", "grad_norm", "learning_rate", "tokens", "tokens_per_second", "memory",
        "seconds_left",
    }  # fmt: skip


def test_waiting_for_data_takes_time_and_evaluating_and_saving_do_not(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(
        progress_module, "time", SimpleNamespace(perf_counter=lambda: clock.now, sleep=time.sleep)
    )

    class Passing(TrainerCallback):
        """Comes before the record, so that the record sees the time after each event."""

        def on_step_begin(self, *_, **__):
            clock.now += 1.0  # for data, which comes before the step begins

        def on_step_end(self, *_, **__):
            clock.now += 3.0

        def on_evaluate(self, *_, **__):
            clock.now += 1000.0

        def on_save(self, *_, **__):
            clock.now += 1000.0

    record = Record(tmp_path / "metrics.jsonl")
    make_loop(
        tiny_model(), tmp_path / "c", Passing(), record, eval_strategy="steps", eval_steps=1,
        save_steps=3,
    ).train()  # fmt: skip
    training = [row for row in rows_of(record.path) if "loss" in row]
    assert [row["tokens_per_second"] for row in training] == [2 * BLOCK / 4] * 4
    # What is left takes as long as what was: two steps and an evaluation before the first log.
    assert training[0]["seconds_left"] == (2 * 4 + 1000) / 2 * 6


def test_what_a_crash_left_of_a_line_is_dropped(tmp_path):
    record = Record(tmp_path / "metrics.jsonl")
    record.path.write_bytes(b'{"step": 1}\n\xff\x00\n')
    make_loop(tiny_model(), tmp_path / "c", record, steps=2).train()
    assert [row["step"] for row in rows_of(record.path)] == [2]


def test_a_number_that_json_does_not_know_is_left_out(tmp_path):
    record = Record(tmp_path / "metrics.jsonl")
    loop = make_loop(tiny_model(), tmp_path / "c", record, steps=2)
    loop.factor = lambda step: float("nan")
    loop.train()
    (line,) = record.path.read_text().splitlines()
    row = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert "learning_rate" in row
    assert "loss" not in row


def with_pictures():
    """A model whose vision tower reads no text."""
    sizes = dict.fromkeys(("hidden_size", "intermediate_size"), 32)
    sizes |= dict.fromkeys(("num_hidden_layers", "num_attention_heads"), 2)
    text = {**sizes, "vocab_size": 61, "head_dim": 24, "num_key_value_heads": 1}
    pictures = {**sizes, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(
        text_config=text, vision_config=pictures, mm_tokens_per_image=4, attn_implementation="eager"
    )
    return Gemma3ForConditionalGeneration(config)


@pytest.mark.parametrize(
    "build",
    [
        llama,
        lambda: llama(tie_word_embeddings=True),
        lambda: llama(head_dim=24),  # all heads are wider than the hidden states
        with_pictures,
    ],
)
def test_flops_are_those_that_pytorch_counts(build):
    model = build()
    ids = random_ids(3, 24)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    of_text = {
        n: p
        for n, p in model.named_parameters()
        if not {"vision_tower", "multi_modal_projector"} & {*n.split(".")}
    }
    norms = sum(p.numel() for n, p in of_text.items() if "norm" in n)
    rotary = 3 * 2 * 4 * 24  # the angles, a small matrix product of its own; 3 for good measure
    counted = counter.get_total_flops() / ids.numel()
    assert training_flops(model, 24) - 6 * norms == pytest.approx(counted, abs=rotary)


def test_flops_of_our_model_are_those_of_its_llama():
    ours = tiny_model(attention="softmax", position_encoding="rope")
    norms = sum(p.numel() for n, p in llama().named_parameters() if "norm" in n)
    tied = llama(tie_word_embeddings=ours.config.tie_word_embeddings)
    assert training_flops(ours, 24) == training_flops(tied, 24) - 6 * norms


def test_an_adapter_needs_no_gradients_of_the_weights_beneath():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llama(), LoraConfig(r=2, target_modules="all-linear"))
    ids = random_ids(3, 24)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    # It also leaves out the gradients of the first layer's inputs, and has norms to pass through.
    counted = counter.get_total_flops() / ids.numel()
    assert training_flops(model, 24) == pytest.approx(counted, rel=0.1)
    assert training_flops(model, 24) < 0.85 * training_flops(llama(), 24)


def evaluated(model, probe, tmp_path, **arguments) -> dict:
    """What the one evaluation of a short run logs."""
    spy = Spy()
    arguments = {"eval_strategy": "steps", "eval_steps": 2, "steps": 2} | arguments
    make_loop(model, tmp_path, probe, spy, **arguments).train()
    (logged,) = spy.evaluations
    return logged


def test_the_probe_sees_what_transformers_attends_to(tmp_path):
    model, ids = llama(), random_ids(24)
    logged = evaluated(model, Probe(ids), tmp_path)
    with torch.no_grad():
        maps = torch.stack(model.eval()(ids[None], output_attentions=True).attentions)
    first = maps[:, 0, :, 1:, 0].mean(dim=(1, 2))  # by layer
    assert logged["eval_first_token_attention"] == pytest.approx(first.mean().item(), abs=1e-5)
    assert logged["eval_first_token_attention_max"] == pytest.approx(first.max().item(), abs=1e-5)
    assert logged["eval_mask_ratio"] == 0.0


def test_even_attention_gives_what_the_documentation_says(tmp_path):
    model = llama()
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data.zero_()
    logged = evaluated(model, Probe(random_ids(60)), tmp_path, learning_rate=0.0)
    expected = (torch.tensor(60.0).log().item() - 0.42) / 59
    assert logged["eval_first_token_attention"] == pytest.approx(expected, rel=5e-3)


def test_the_probe_shows_the_mask_ratio_in_the_record(tmp_path, capsys):
    model, ids = tiny_model(stablemask={"gamma": 0.1, "horizon": None}), random_ids(BLOCK)
    for layer in model.model.layers:  # all scores 0: M / (Z + M) is known
        layer.self_attn.q_proj.weight.data.zero_()
    record = Record(tmp_path / "metrics.jsonl")
    make_loop(
        model, tmp_path / "c", Probe(ids), record, steps=1, learning_rate=0.0,
        eval_strategy="steps", eval_steps=1,
    ).train()  # fmt: skip
    (row,) = [row for row in rows_of(record.path) if "eval_loss" in row]
    seen = torch.arange(1, BLOCK + 1, dtype=torch.float64)
    mass = torch.stack([torch.exp(-0.1 * torch.arange(n, 2000)).sum() for n in range(1, BLOCK + 1)])
    ratio = (mass / (seen + mass)).mean().item()
    assert row["eval_mask_ratio"] == pytest.approx(ratio, abs=1e-5)
    assert f"mask ratio {100 * ratio:.1f} %" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["stablemask", "softmax"])
def test_a_probed_run_trains_the_same_weights(kind, tmp_path):
    """Dropout too, whose random numbers the probe must not touch."""
    states = []
    for probes in ([], [Probe(random_ids(BLOCK))]):
        torch.manual_seed(0)
        model = tiny_model(attention=kind, attention_dropout=0.1)
        make_loop(model, tmp_path, *probes, eval_strategy="steps", eval_steps=2).train()
        assert not probes or model.training is False  # as the evaluation before it left it
        states.append(model.state_dict())
    for name in states[0]:
        assert torch.equal(states[0][name], states[1][name]), name


def test_layers_that_are_compiled_are_probed_all_the_same(tmp_path):
    model, ids = tiny_model(), random_ids(BLOCK)
    plain = evaluated(model, Probe(ids), tmp_path, learning_rate=0.0)
    for layer in model.model.layers:
        layer.compile(backend="eager")
    compiled = evaluated(model, Probe(ids), tmp_path, learning_rate=0.0)
    assert compiled["eval_first_token_attention"] == plain["eval_first_token_attention"]
    assert compiled["eval_mask_ratio"] == plain["eval_mask_ratio"]


def test_an_adapter_is_probed_as_it_is(tmp_path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model, ids = get_peft_model(llama(), config), random_ids(24)
    logged = evaluated(model, Probe(ids), tmp_path)
    with torch.no_grad():
        maps = torch.stack(model.eval()(ids[None], output_attentions=True).attentions)
    expected = maps[:, 0, :, 1:, 0].mean().item()
    assert logged["eval_first_token_attention"] == pytest.approx(expected, abs=1e-5)


def test_a_model_that_cannot_be_probed_trains_on_with_one_line(tmp_path, capsys):
    config = BloomConfig(vocab_size=61, hidden_size=32, n_layer=1, n_head=2)
    spy = Spy()
    make_loop(
        BloomForCausalLM(config), tmp_path, Probe(random_ids(BLOCK)), spy, steps=4,
        eval_strategy="steps", eval_steps=2,
    ).train()  # fmt: skip
    assert [row["step"] for row in spy.evaluations] == [2, 4]
    assert capsys.readouterr().err.count("attention is not probed: ") == 1


def test_an_evaluation_past_all_bounds(tmp_path, capsys):
    record = Record(tmp_path / "metrics.jsonl")
    model = tiny_model()
    model.lm_head.weight.data *= 1e6
    make_loop(
        model, tmp_path / "c", record, steps=1, eval_strategy="steps", eval_steps=1, learning_rate=0.0
    ).train()  # fmt: skip
    (row,) = (row for row in rows_of(record.path) if "eval_loss" in row)
    assert row["eval_loss"] > 710
    assert "eval_perplexity" not in row
    assert "validation perplexity inf" in capsys.readouterr().err
