"""The decoder against its definition, and each thing Transformers expects of a model."""

import math
import warnings

import pytest
import torch
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
    Trainer,
    TrainingArguments,
)

import stablemask
from stablemask.models import StableMaskForCausalLM
from stablemask.models import loss as loss_module
from stablemask.models.cache import CACHE
from stablemask.models.layers import StableMaskAttention
from stablemask.models.positions import sinusoidal_encoding

from .tiny import DESIGNS, random_ids, tiny_config, tiny_model


def dense_attention(module, hidden_states, rotary, sink_logits, alibi_slopes):
    """The attention's output with every score written down, (batch, length, hidden)."""
    query, key, value = module.project(hidden_states, rotary)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.mT * query.shape[-1] ** -0.5
    rows = torch.arange(query.shape[2])
    distance = rows[:, None] - rows
    if alibi_slopes is not None:
        scores = scores - alibi_slopes[:, None, None] * distance
    scores = scores.masked_fill(distance < 0, -torch.inf)
    if module.has_front:  # a row like any other
        weights = scores.softmax(-1)
    else:
        sink_logits = module.sinks[:, None] if sink_logits is None else sink_logits
        if module.sink_keys is not None:
            unrotated = module.project(hidden_states)[0]
            of_keys = torch.einsum("bhnd,hd->bhn", unrotated, module.sink_keys)
            sink_logits = of_keys * query.shape[-1] ** -0.5
        sink = sink_logits.to(scores.dtype).expand(scores.shape[:-1])[..., None]
        weights = torch.cat((scores, sink), -1).softmax(-1)[..., :-1]
    output = (weights @ value).transpose(1, 2)
    if module.head_gate is not None:
        gates = hidden_states @ module.head_gate.weight.T
        output = output / (1 + torch.exp(-gates))[..., None]
    return module.o_proj(output.flatten(2))


@pytest.mark.parametrize(("position", "kind"), DESIGNS)
def test_attention_equals_its_definition_rebuilt_from_a_hook(position, kind):
    model = tiny_model(torch.float64, position_encoding=position, attention=kind)
    calls = []
    for module in model.modules():
        if isinstance(module, StableMaskAttention):
            module.register_forward_hook(
                lambda module, args, kwargs, output: calls.append((module, args, kwargs, output)),
                with_kwargs=True,
            )
    with torch.no_grad():
        model(random_ids(2, 11), use_cache=False)
    assert len(calls) == 2
    for module, (hidden_states,), kwargs, output in calls:
        expected = dense_attention(
            module, hidden_states, kwargs["rotary"], kwargs["sink_logits"], kwargs["alibi_slopes"]
        )
        # RoPE's angles are float32, and a sink key is rotated with the row that the definition leaves alone.
        rounded = (position, kind) == ("rope", "key-sink")
        near = 1e-6 * expected.abs().max() if rounded else 1e-12
        torch.testing.assert_close(output, expected, rtol=0, atol=float(near))


@pytest.mark.parametrize("position", ["rope", "alibi", "nope"])
@pytest.mark.parametrize("kind", ["learned-token", "fixed-token"])
def test_a_front_token_is_a_token_in_front_of_a_softmax_model(kind, position):
    model = tiny_model(torch.float64, position_encoding=position, attention=kind)
    softmax = tiny_model(torch.float64, position_encoding=position, attention="softmax")
    softmax.load_state_dict(model.state_dict(), strict=False)
    input_ids = random_ids(2, 9)
    front = model.model.front_token
    if kind == "fixed-token":
        assert front is None
        front = torch.full((32,), 0.3, dtype=torch.float64)
    embeds = model.get_input_embeddings()(input_ids)
    inputs = torch.cat((front.expand(2, 1, 32), embeds), 1)
    with torch.no_grad():
        expected = softmax(inputs_embeds=inputs).logits[:, 1:]
        # One further on in the other, where RoPE's angles are float32.
        near = 1e-5 if position == "rope" else 1e-10
        torch.testing.assert_close(model(input_ids).logits, expected, rtol=0, atol=near)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("stablemask-paper", 0),
        ("stablemask-zero", 0),
        ("learned-sink", 2 * 4),  # layers x heads
        ("key-sink", 2 * 4 * 8),  # x head_dim
        ("learned-token", 32),  # hidden_size
        ("fixed-token", 0),
        ("head-gate", 2 * 4 * 32),  # layers x heads x hidden_size
    ],
)
def test_what_a_kind_adds_in_parameters_and_that_all_of_it_trains(kind, more):
    sizes = [
        sum(p.numel() for p in tiny_model(attention=name).parameters())
        for name in ("softmax", kind)
    ]
    assert sizes[1] - sizes[0] == more
    model = tiny_model(attention=kind, position_encoding="alibi")
    input_ids = random_ids(2, 9)
    model(input_ids, labels=input_ids).loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def masses_of_layers(model, length):
    """exp of the sink logits that each layer is given for one sequence, (layers, heads, length)."""
    masses = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: masses.append(kwargs["sink_logits"][0].exp()),
            with_kwargs=True,
        )
    model(random_ids(1, length), use_cache=False)
    heads = model.config.num_attention_heads
    return torch.stack([mass.expand(heads, length) for mass in masses])


def sums_of_columns(gamma, length, columns=100_000):
    """The pseudo mass of each row, summed column by column, (length,)."""
    scores = torch.exp(-gamma * torch.arange(columns, dtype=torch.float64))
    return scores.flip(0).cumsum(0).flip(0)[1 : length + 1]


def test_a_floor_a_hold_and_layers_are_what_they_say():
    length, gamma = 12, 0.1
    falling = sums_of_columns(gamma, length)
    for settings, expected in (
        ({"floor": 2.5}, falling + 2.5),
        ({}, falling),  # the context is 32
        ({"hold": 0}, falling[0].expand(length)),
        ({"hold": 4, "floor": 0.5}, falling[[0, 1, 2, 3] + [4] * 8] + 0.5),
        ({"floor": 1.0, "start": 3}, (falling + 1.0) * (torch.arange(length) >= 3)),
    ):
        model = tiny_model(stablemask={"gamma": gamma, **settings})
        mass = masses_of_layers(model, length).double()
        torch.testing.assert_close(mass, expected.expand_as(mass), rtol=1e-6, atol=0)

    for settings, expected in (({}, falling[[0, 1, 2, 3, 4] + [5] * 7]), ({"hold": None}, falling)):
        model = tiny_model(max_position_embeddings=6, stablemask={"gamma": gamma, **settings})
        mass = masses_of_layers(model, length).double()
        torch.testing.assert_close(mass, expected.expand_as(mass), rtol=1e-6, atol=0)

    mass = masses_of_layers(tiny_model(stablemask={"gamma": gamma, "layers": [1]}), length)
    assert not mass[0].any()
    torch.testing.assert_close(mass[1, 0].double(), falling, rtol=1e-6, atol=0)


def test_gamma_is_learned_for_each_head_and_layer():
    model = tiny_model(torch.float64, stablemask={"gamma": "learned"})
    default = tiny_model(torch.float64)
    default.load_state_dict(model.state_dict(), strict=False)
    ids = random_ids(2, 12)
    torch.testing.assert_close(model(ids).logits, default(ids).logits, rtol=0, atol=1e-6)

    # The closed form is kept in float32: a step that it resolves.
    model(input_ids=ids, labels=ids).loss.backward()
    gradient, step = model.model.log_gamma.grad.clone(), 1e-2
    assert gradient.shape == (2, 4)
    for layer, head in ((0, 1), (1, 3)):
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                model.model.log_gamma[:] = -math.log(32)
                model.model.log_gamma[layer, head] += sign * step
                losses.append(model(input_ids=ids, labels=ids).loss.item())
        slope = (losses[0] - losses[1]) / (2 * step)
        assert gradient[layer, head].item() == pytest.approx(slope, rel=1e-2)

    with torch.no_grad():
        model.model.log_gamma[1, 2] = math.log(8 / 32)
    mass = masses_of_layers(model, 12)[1, 2].double()
    torch.testing.assert_close(mass, sums_of_columns(8 / 32, 12), rtol=1e-6, atol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_rope_with_softmax_is_transformers_llama(tied):
    model = tiny_model(attention="softmax", tie_word_embeddings=tied)
    settings = model.config.to_dict()
    for ours in ("attention", "position_encoding", "stablemask", "model_type"):
        del settings[ours]
    llama = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    llama.load_state_dict(model.state_dict())
    input_ids = random_ids(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids).logits, llama(input_ids).logits, rtol=1e-4, atol=1e-4
        )


def test_sinusoidal_encoding_is_that_of_the_paper():
    position, dim = 13, 10
    expected = []
    for i in range(dim // 2):
        angle = position / 10000 ** (2 * i / dim)
        expected += [math.sin(angle), math.cos(angle)]
    encoding = sinusoidal_encoding(torch.tensor([[0, position]]), dim)
    torch.testing.assert_close(encoding[0, 1], torch.tensor(expected))
    torch.testing.assert_close(encoding[0, 0], torch.tensor([0.0, 1.0] * (dim // 2)))


@pytest.mark.parametrize("position", ["rope", "alibi", "nope"])
def test_identical_tokens_look_alike_under_softmax_only(position):
    """method: a softmax row of equal scores averages equal values, wherever it stands."""
    spread = {}
    for kind in ("softmax", "stablemask"):
        model = tiny_model(position_encoding=position, attention=kind, initializer_range=0.1)
        with torch.no_grad():
            hidden = model.model(torch.full((1, 24), 7)).last_hidden_state[0]
        spread[kind] = (hidden - hidden[:1]).abs().max().item()
    assert spread["softmax"] < 5e-6
    assert spread["stablemask"] > 1e-3


@pytest.mark.parametrize(("position", "kind"), DESIGNS)
def test_padding_on_either_side_changes_nothing(position, kind):
    model = tiny_model(torch.float64, position_encoding=position, attention=kind)
    input_ids = random_ids(1, 7)
    with torch.no_grad():
        alone = model(input_ids).logits
        for sides in ((4, 0), (0, 4)):
            padded = torch.nn.functional.pad(input_ids, sides)
            mask = torch.nn.functional.pad(torch.ones_like(input_ids), sides)
            logits = model(padded, attention_mask=mask).logits
            assert logits.isfinite().all()
            torch.testing.assert_close(logits[mask.bool()][None], alone, rtol=0, atol=1e-9)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(("position", "kind"), DESIGNS)
def test_packed_documents_are_kept_apart(position, kind, use_cache):
    model = tiny_model(torch.float64, position_encoding=position, attention=kind)
    documents = [random_ids(1, length) for length in (5, 1, 8)]
    positions = torch.cat([torch.arange(d.shape[1]) for d in documents])[None]
    with torch.no_grad():
        packed = model(torch.cat(documents, 1), position_ids=positions, use_cache=use_cache).logits
        alone = torch.cat([model(document).logits for document in documents], 1)
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-9)


@pytest.mark.parametrize("padding", [0, 2])
def test_packed_documents_that_a_mask_or_a_cache_merges_are_told_of(padding):
    model = tiny_model()
    ids, positions = (
        random_ids(1, 8 + padding),
        torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4] + padding * [0]]),
    )
    mask = (torch.arange(8 + padding) < 8).long()[None]
    for given in ({"attention_mask": mask}, {CACHE: DynamicCache()}):
        with pytest.warns(UserWarning, match="each document sees those before it"):
            model(ids, position_ids=positions, **given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(ids, position_ids=positions)
        left = mask.flip(1)
        model(ids, attention_mask=left, position_ids=(left.cumsum(-1) - 1).clamp(min=0))
        model(ids, attention_mask=mask, position_ids=torch.arange(8 + padding)[None] * mask)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("position", ["rope", "alibi"])
def test_a_mask_ready_for_attention_is_taken_bool_or_additive(position, static):
    model = tiny_model(torch.float64, position_encoding=position)
    input_ids = random_ids(1, 6)
    padding = torch.tensor([[0, 0, 1, 1, 1, 1]])
    positions = torch.tensor([[0, 0, 0, 1, 2, 3]])
    length = 9 if static else 6
    ready = torch.ones(6, length, dtype=torch.bool).tril() & (torch.arange(length) >= 2)
    additive = torch.zeros(ready.shape, dtype=torch.float64).masked_fill(~ready, -torch.inf)
    with torch.no_grad():
        expected = model(input_ids, attention_mask=padding).logits
        for mask in (ready, additive):
            past = StaticCache(model.config, max_cache_len=length) if static else None
            logits = model(
                input_ids,
                attention_mask=mask[None, None],
                position_ids=positions,
                **{CACHE: past},
            ).logits
            torch.testing.assert_close(logits[:, 2:], expected[:, 2:], rtol=0, atol=1e-9)


def test_inputs_embeds_equal_input_ids():
    model = tiny_model(position_encoding="sinusoidal")
    input_ids = random_ids(2, 5)
    with torch.no_grad():
        logits = model(inputs_embeds=model.get_input_embeddings()(input_ids)).logits
        torch.testing.assert_close(logits, model(input_ids).logits)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["stablemask", "learned-sink", "learned-gamma"])
def test_gradient_checkpointing_gives_the_same_gradients(kind, reentrant):
    design = {"attention": kind}
    if kind == "learned-gamma":
        design = {"stablemask": {"gamma": "learned"}}
    # In float64, in which the norm has one way with gradients and without.
    model = tiny_model(torch.float64, position_encoding="alibi", **design).train()
    input_ids = random_ids(2, 9)
    gradients = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(input_ids, labels=input_ids).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0].values())


def test_learned_sinks_start_small_and_get_a_gradient():
    model = tiny_model(attention="learned-sink", initializer_range=0.02)
    sinks = [layer.self_attn.sinks for layer in model.model.layers]
    assert all(0 < sink.abs().max() < 0.1 for sink in sinks)
    input_ids = random_ids(2, 9)
    model(input_ids, labels=input_ids).loss.backward()
    assert all((sink.grad != 0).all() for sink in sinks)
    assert tiny_model(attention="softmax1").model.layers[0].self_attn.sinks is None


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_embeddings(tied, tmp_path):
    model = tiny_model(tie_word_embeddings=tied)
    same = model.lm_head.weight is model.model.embed_tokens.weight
    assert same == tied
    model.save_pretrained(tmp_path)
    loaded = StableMaskForCausalLM.from_pretrained(tmp_path).eval()
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    input_ids = random_ids(1, 6)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_grouped_heads_equal_repeated_ones(kv_heads):
    model = tiny_model(torch.float64, num_key_value_heads=kv_heads)
    full = tiny_model(torch.float64, num_key_value_heads=4)
    state = model.state_dict()
    for name, weight in state.items():
        if "k_proj" in name or "v_proj" in name:
            heads = weight.unflatten(0, (kv_heads, 8)).repeat_interleave(4 // kv_heads, 0)
            state[name] = heads.flatten(0, 1)
    full.load_state_dict(state)
    input_ids = random_ids(1, 7)
    with torch.no_grad():
        torch.testing.assert_close(full(input_ids).logits, model(input_ids).logits)


@pytest.mark.parametrize("position", ["rope", "alibi", "sinusoidal"])
@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16(position, autocast):
    model = tiny_model(position_encoding=position, initializer_range=0.05)
    input_ids = random_ids(2, 20)
    with torch.no_grad():
        exact = model(input_ids).logits
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            low = (model if autocast else model.bfloat16())(input_ids).logits
    assert low.dtype == torch.bfloat16
    assert (low.float() - exact).norm() < 0.03 * exact.norm()


def test_bfloat16_sink_logits_and_angles_stay_float32():
    model = tiny_model().bfloat16()
    seen = {}
    model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    model(random_ids(1, 5))
    assert seen["sink_logits"].dtype == torch.float32
    assert seen["rotary"][0].dtype == torch.float32
    expected = stablemask.pseudo_logsumexp(torch.arange(5)[None], 1 / 32)
    assert torch.equal(seen["sink_logits"], expected)


@pytest.mark.parametrize(
    ("position", "kind", "chunked"),
    [("rope", "stablemask", False), ("alibi", "learned-sink", True)],
)
def test_compiles_into_one_graph(position, kind, chunked, monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 10 * 61)  # two chunks of the 18 tokens
    model = tiny_model(position_encoding=position, attention=kind).train()
    model.chunked_loss = chunked
    input_ids = random_ids(2, 9)
    torch.compiler.reset()  # all models share the code that is counted against its limit
    found = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        loss = run(input_ids, labels=input_ids, use_cache=False).loss
        loss.backward()
        found.append([loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    torch.testing.assert_close(found[1], found[0])


def test_compiled_decoding_with_a_static_cache():
    model = tiny_model(position_encoding="learned", num_hidden_layers=1)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    input_ids = random_ids(1, 5)
    expected = model.generate(input_ids, **options)
    torch.compiler.reset()
    model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    tokens = model.generate(input_ids, cache_implementation="static", **options)
    assert torch.equal(tokens, expected)


def test_learned_positions_end_with_a_clear_error():
    model = tiny_model(position_encoding="learned", max_position_embeddings=16)
    model(random_ids(1, 16))
    message = r"17 tokens .* learned position table of 16"
    with pytest.raises(ValueError, match=message):
        model(random_ids(1, 17))
    # Known before the first token, though the prompt itself fits.
    with pytest.raises(ValueError, match=r"20 tokens .* learned position table of 16"):
        model.generate(random_ids(1, 10), max_new_tokens=11, pad_token_id=0)
    assert model.generate(random_ids(1, 10), max_new_tokens=7, pad_token_id=0).shape == (1, 17)
    # Padding takes no position.
    mask = torch.tensor([[0] * 4 + [1] * 16])
    model(random_ids(1, 20), attention_mask=mask)


@pytest.mark.parametrize("position", ["rope", "alibi", "nope", "sinusoidal"])
def test_other_positions_run_past_the_training_context(position):
    model = tiny_model(position_encoding=position)
    assert model(random_ids(1, 70)).logits.isfinite().all()


def test_logits_to_keep_and_hidden_states():
    model = tiny_model()
    input_ids = random_ids(2, 6)
    with torch.no_grad():
        outputs = model(input_ids, output_hidden_states=True)
        torch.testing.assert_close(
            model(input_ids, logits_to_keep=2).logits, outputs.logits[:, -2:]
        )
        rows = torch.tensor([0, 3])
        kept = model(input_ids, logits_to_keep=rows).logits
    torch.testing.assert_close(kept, outputs.logits[:, rows])
    assert len(outputs.hidden_states) == 3
    assert outputs[CACHE].get_seq_length() == 6
    assert CACHE not in model(input_ids, use_cache=False)
    assert isinstance(model(input_ids, return_dict=False), tuple)


def test_loss_is_the_shifted_cross_entropy_over_the_items_in_the_batch():
    model = tiny_model()
    input_ids = random_ids(2, 6)
    labels = input_ids.clone()
    labels[0, :3] = -100
    outputs = model(input_ids, labels=labels)
    per_token = torch.nn.functional.cross_entropy(
        outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )
    torch.testing.assert_close(outputs.loss, per_token / 8)
    counted = model(input_ids, labels=labels, num_items_in_batch=torch.tensor(40)).loss
    torch.testing.assert_close(counted, per_token / 40)


def test_trainer_accumulates_gradients_exactly(tmp_path):
    """Two steps of one sequence train as one batch of two, whatever the number of labels in each."""
    data = [{"input_ids": ids, "labels": ids.clone()} for ids in random_ids(2, 8)]
    data[0]["labels"][:6] = -100
    weights = []
    for batch, accumulation in ((2, 1), (1, 2)):
        torch.manual_seed(0)
        model = tiny_model()
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            learning_rate=0.1,
            optim="sgd",
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        Trainer(model, arguments, train_dataset=data).train()
        weights.append(model.lm_head.weight.detach())
    torch.testing.assert_close(weights[0], weights[1])


@pytest.mark.parametrize("name", ["eager", "flash_attention_2"])
def test_another_attention_is_refused(name, tmp_path):
    message = f"attn_implementation must be 'stablemask', 'sdpa' or not given.*{name}"
    with pytest.raises(ValueError, match=message):
        StableMaskForCausalLM(tiny_config(attn_implementation=name))
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        model.set_attn_implementation(name)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        StableMaskForCausalLM.from_pretrained(tmp_path, attn_implementation=name)


@pytest.mark.parametrize("kind", ["stablemask", "softmax"])
def test_sdpa_and_stablemask_both_mean_what_the_configuration_says(kind, tmp_path):
    model, input_ids = tiny_model(attention=kind), random_ids(1, 6)
    logits = model(input_ids).logits
    model.save_pretrained(tmp_path)
    for name in ("sdpa", "stablemask"):
        loaded = StableMaskForCausalLM.from_pretrained(tmp_path, attn_implementation=name).eval()
        assert torch.equal(loaded(input_ids).logits, logits)
        model.set_attn_implementation(name)
        assert torch.equal(model(input_ids).logits, logits)
        assert model.config._attn_implementation == "stablemask"


def test_attention_maps_are_refused():
    with pytest.raises(ValueError, match="output_attentions"):
        tiny_model()(random_ids(1, 4), output_attentions=True)


def test_a_mask_that_forgets_the_cache_is_refused():
    model = tiny_model()
    past = model(random_ids(1, 4))[CACHE]
    with pytest.raises(ValueError, match="attention_mask must cover the cache and the input, 6"):
        model(random_ids(1, 2), attention_mask=torch.ones(1, 2), **{CACHE: past})


def test_dropout_acts_in_training_only():
    model = tiny_model(attention_dropout=0.5)
    input_ids = random_ids(1, 8)
    assert torch.equal(model(input_ids).logits, model(input_ids).logits)
    model.train()
    assert not torch.equal(model(input_ids).logits, model(input_ids).logits)
