"""``config.stablemask`` is what runs: saved, loaded, changed between steps, or refused."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from stablemask.hf import apply_stablemask
from stablemask.hf.settings import context_of

from ..models.tiny import tiny_model
from .dense import densely
from .families import MIXED, SIZES, Family

LLAMA = Family("Llama", "LlamaForCausalLM")
NEOX = Family("GPT-NeoX", "GPTNeoXForCausalLM")
EPS = torch.finfo(torch.float32).eps


def llama(settings=None, family=LLAMA, **more):
    return family.model_class(family.config(stablemask=settings, **more)).double().eval()


def random_ids(*shape):
    return torch.randint(3, 61, shape)


def test_saved_and_loaded_it_runs_without_being_named(tmp_path):
    settings = {"gamma": [0.3, 0.1, 0.05, 0.2], "horizon": 40, "start": 1, "shift": -0.5}
    model = apply_stablemask(LLAMA.model_class(LLAMA.config()).eval(), **settings)
    model.save_pretrained(tmp_path)
    ids = random_ids(1, 9)
    for name in ({}, {"attn_implementation": "stablemask"}, {"attn_implementation": "sdpa"}):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **name)
        assert loaded.config.stablemask == settings
        assert loaded(ids).logits.equal(model(ids).logits)


@pytest.mark.parametrize(
    ("kind", "given"), [("stablemask-paper", {"horizon": 7}), ("stablemask-zero", {})]
)
def test_a_kind_is_applied_by_name(kind, given):
    named = {"stablemask-paper": {"gamma": "slopes", "horizon": 7, "suffix": True},
             "stablemask-zero": {"gamma": 0.0, "horizon": 12}}[kind]  # fmt: skip
    config = LLAMA.config(max_position_embeddings=12, attn_implementation="eager")
    model, ids = LLAMA.model_class(config).double().eval(), random_ids(2, 17)
    with densely(model, torch.arange(17)[None], named):
        expected = model(ids).logits
    apply_stablemask(model, kind=kind, **given)
    assert model.config.stablemask == named
    logits = model(ids).logits
    assert (logits - expected).abs().max() < 64 * EPS * expected.abs().max()


def test_an_unknown_kind_is_refused_by_name():
    with pytest.raises(
        ValueError, match=r"kind must be one of stablemask, stablemask-paper, .*'paper'"
    ):
        apply_stablemask(llama(), kind="paper")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"gama": 0.1}, "must be a dict of gamma, horizon, suffix, start, shift"),
        ({"gamma": -1}, "must be greater than 0"),
        ({"gamma": [0.1, 0.2]}, r"a list of one number per head \(4\)"),
        ({"horizon": 0}, "must be an integer of at least 1 or None"),
        ({"shift": "low"}, "must be a finite number, or a list .* got 'low'"),
        ({"shift": [0.1, 0.2, 0.3, 0.4]}, r"got 0\.1 for layer 0"),
        ({"shift": [[0.0] * 4]}, r"for each layer \(2\) a list .*, got lists for 1 layers"),
        ({"shift": [[1.0] * 4, [1.0] * 3]}, r"per query head \(4\), got \[1.0, .*\] for layer 1"),
        ({"shift": [[1.0] * 4, [1.0, 2.0, 3.0, float("nan")]]}, r"finite .* nan\] for layer 1"),
        ("slopes", "must be a dict"),
        ({"gamma": "learned"}, "'learned' needs our own decoder"),
        ({"layers": [0]}, r"\['layers'\] \[0\] needs our own decoder"),
    ],
)
def test_what_no_model_can_run_is_refused_when_it_is_loaded(settings, match, tmp_path):
    llama().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"stablemask": settings}))
    with pytest.raises(ValueError, match=match):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_our_own_decoder_keeps_what_it_alone_can_have(tmp_path):
    settings = {"gamma": "learned", "layers": [1], "floor": 0.5, "hold": 0}
    model = tiny_model(stablemask=settings)
    with torch.no_grad():
        model.model.log_gamma.uniform_(-3, -1)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.stablemask == settings | {"horizon": None}
    ids = torch.randint(0, 61, (1, 9))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=0)


OTHERS = ("learned-sink", "key-sink", "learned-token", "fixed-token", "head-gate")


@pytest.mark.parametrize(
    ("built", "given", "match"),
    [
        *(({"attention": kind}, {}, f"attention must be {kind} in a model") for kind in OTHERS),
        ({}, {"gamma": "learned"}, r"must not be 'learned', .* built without decay rates"),
        ({"attention": "softmax"}, {"gamma": "learned"}, r"must not be 'learned'"),
        ({"stablemask": {"gamma": "learned"}}, {"gamma": 0.2}, r"must be 'learned', .* with decay"),
    ],
)
def test_our_own_decoder_refuses_what_it_has_not_the_parameters_for(built, given, match):
    model, ids = tiny_model(**built), torch.randint(1, 61, (1, 9))
    before, logits = model.config.to_dict(), model(ids).logits
    with pytest.raises(ValueError, match=match):
        apply_stablemask(model, **given)
    assert model.config.to_dict() == before
    assert torch.equal(model(ids).logits, logits)
    # Written past it, it does not run.
    if model.config.attention != "stablemask":
        model.config.attention = "stablemask"
    if given:
        model.config.stablemask = given
    with pytest.raises(ValueError, match=match):
        model(ids)


@pytest.mark.parametrize("kind", ["softmax", "softmax1"])
def test_our_own_decoder_changes_to_what_differs_in_the_sink_logits_alone(kind):
    model, ids = tiny_model(attention=kind), torch.randint(1, 61, (1, 9))
    fresh = tiny_model(stablemask={"gamma": 0.2})
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(apply_stablemask(model, gamma=0.2)(ids).logits, fresh(ids).logits)


@pytest.mark.parametrize("name", ["eager", "flash_attention_2", "flex_attention"])
def test_another_attention_is_refused(name, tmp_path):
    model = llama({"gamma": 0.1})
    model.save_pretrained(tmp_path)
    for ask in (
        lambda: AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name),
        lambda: model.set_attn_implementation(name),
    ):
        with pytest.raises(ValueError, match=f"attn_implementation='{name}' would not run it"):
            ask()
    model.config.stablemask = None
    if name == "eager":
        model.set_attn_implementation(name)


@pytest.mark.parametrize("way", ["from_pretrained", "from_config", "set", "private"])
@pytest.mark.parametrize("build", [AutoModelForCausalLM, AutoModel])
def test_a_model_that_was_given_the_name_says_so_in_its_configuration(way, build, tmp_path):
    """Held against the settings written out, which the definition holds."""
    expected = llama({"gamma": 1 / 64, "hold": 63}).float()
    expected.save_pretrained(tmp_path / "asking")
    plain = LLAMA.model_class(LLAMA.config()).eval()
    plain.load_state_dict(expected.state_dict())
    plain.save_pretrained(tmp_path / "plain")
    name, ids = "stablemask", random_ids(1, 9)
    if way == "from_pretrained":
        model = build.from_pretrained(tmp_path / "plain", attn_implementation=name)
    elif way == "from_config":
        model = build.from_config(AutoConfig.from_pretrained(tmp_path / "plain"),
                                  attn_implementation=name).eval()  # fmt: skip
        weights = build.from_pretrained(tmp_path / "plain").state_dict()
        model.load_state_dict(weights)
    else:
        model = build.from_pretrained(tmp_path / "plain")
        if way == "set":
            model.set_attn_implementation(name)
        else:
            model.config._attn_implementation = name
            model(ids)
    assert model.config.stablemask == {"gamma": 1 / 64, "horizon": None, "hold": 63}
    truth = build.from_pretrained(tmp_path / "asking")(ids)[0]
    model.save_pretrained(tmp_path / "saved")
    again = build.from_pretrained(tmp_path / "saved")
    assert again.config._attn_implementation == name
    for ours in (model, again):
        assert ours(ids)[0].equal(truth)
    # By another name it still is what the configuration asks for, and None is the way back.
    model.set_attn_implementation("sdpa")
    assert model(ids)[0].equal(truth)
    softmax = build.from_pretrained(tmp_path / "plain")(ids)[0]
    assert (softmax - truth).abs().max() > 0.01
    model.config.stablemask = None
    torch.testing.assert_close(model(ids)[0], softmax)
    model.save_pretrained(tmp_path / "back")
    assert build.from_pretrained(tmp_path / "back")(ids)[0].equal(softmax)


def test_the_name_alone_writes_nothing_beside_learned_sinks_nor_into_our_own_decoder(tmp_path):
    family = Family("Granite with sinks", "GraniteSWAForCausalLM", MIXED)
    model = family.model_class._from_config(family.config(), attn_implementation="stablemask")
    model.set_attn_implementation("stablemask")
    model(random_ids(1, 9))
    assert getattr(model.config, "stablemask", None) is None
    ours = tiny_model(attention="softmax1")
    ours.set_attn_implementation("stablemask")
    assert ours.config.stablemask is None


def against_the_definition(model, ids, positions, settings):
    exact = type(model)._from_config(LLAMA.config(), attn_implementation="eager").double().eval()
    exact.load_state_dict(model.state_dict())
    with densely(exact, positions, settings):
        truth = exact(ids, position_ids=positions).logits
    assert (
        model(ids, position_ids=positions).logits - truth
    ).abs().max() < 64 * EPS * truth.abs().max()


def test_a_schedule_takes_effect_at_once():
    """Though the forward passes be given one and the same tensor of positions."""
    settings = {"gamma": [0.3, 0.1, 0.05, 0.2], "shift": -30.0}
    model = llama(settings)
    ids, positions = random_ids(1, 9), torch.arange(9)[None]
    for shift in (-30.0, -2.0, 0.0, 1.5):
        model.config.stablemask["shift"] = shift
        against_the_definition(model, ids, positions, settings | {"shift": shift})
    model.config.stablemask["gamma"][1] = 0.7
    against_the_definition(model, ids, positions, model.config.stablemask)
    positions += 3
    against_the_definition(model, ids, positions, model.config.stablemask)
    other = llama({"gamma": 0.01})
    against_the_definition(other, ids, positions, {"gamma": 0.01})
    longer = llama(max_position_embeddings=128)
    longer.set_attn_implementation("stablemask")
    against_the_definition(longer, ids, positions, {"gamma": 1 / 128})


def test_far_below_zero_the_shift_leaves_the_plain_model_and_start_its_first_rows():
    ids = random_ids(2, 9)
    model = llama({"gamma": 0.05, "shift": -60.0}, NEOX)
    model.config.stablemask, settings = None, model.config.stablemask
    plain = model(ids).logits  # softmax, though the name is still StableMask
    model.set_attn_implementation("sdpa")
    softmax = model(ids).logits
    model.config.stablemask = settings
    torch.testing.assert_close(plain, softmax, rtol=0, atol=1e-10)
    torch.testing.assert_close(model(ids).logits, softmax, rtol=0, atol=1e-10)
    model.config.stablemask = {"gamma": 0.05, "start": 4}
    difference = (model(ids).logits - softmax).abs().amax((0, 2))
    assert difference[:4].max() < 1e-10
    assert difference[4:].min() > 0.01


TEXT = {key: value for key, value in SIZES.items() if not key.endswith("_token_id")}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def gemma(text):
    config = Gemma3Config(
        text_config=TEXT | {"head_dim": 8, "layer_types": ["full_attention"] * 2} | text,
        vision_config=VISION | {"model_type": "siglip_vision_model"},
        mm_tokens_per_image=4,
        image_token_index=60,
        boi_token_index=58,
        eoi_token_index=59,
    )
    return Gemma3ForConditionalGeneration, config


def llava(text):
    config = LlavaConfig(
        text_config=LlamaConfig(**TEXT, **text),
        vision_config=VISION | {"model_type": "siglip_vision_model"},
        image_token_index=60,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    return LlavaForConditionalGeneration, config


MULTIMODAL = pytest.mark.parametrize("family", [gemma, llava])


def pictures():
    ids = random_ids(1, 12)
    ids[ids >= 58] = 5
    ids[0, 3:7] = 60  # four places for a picture of two patches by two
    return {
        "input_ids": ids,
        "pixel_values": torch.randn(1, 3, 8, 8),
        "token_type_ids": (ids == 60).long(),
    }


def test_a_picture_whose_tokens_see_each_other_is_refused():
    """Gemma 3 lets the tokens of a picture see each other; StableMask is causal."""
    model_class, config = gemma({"stablemask": {"gamma": 0.1}})
    batch = pictures()
    message = "the mask lets a token see later ones"
    with pytest.raises(ValueError, match=message):
        model_class(config)(**batch)
    text = batch["input_ids"].clamp(max=57)
    assert model_class(config).eval()(text).logits.isfinite().all()


@MULTIMODAL
def test_in_a_multimodal_model_the_text_alone_has_a_pseudo_mass(family, tmp_path):
    torch.manual_seed(1)
    settings = {"gamma": [0.3, 0.1, 0.05, 0.2]}
    model_class, config = family({"stablemask": settings})
    model = model_class(config).eval()
    _, config = family({})
    plain = model_class(config).eval()
    plain.load_state_dict(model.state_dict())
    batch = pictures()
    del batch["token_type_ids"]  # which would let a picture's tokens see each other
    pixels = batch["pixel_values"]
    ours, theirs = (m.get_image_features(pixels).pooler_output[0] for m in (model, plain))
    assert ours.equal(theirs)
    logits, softmax = model(**batch).logits, plain(**batch).logits
    assert (logits - softmax).abs().max() > 0.01

    apply_stablemask(plain, **settings)
    assert plain.config.text_config.stablemask["gamma"] == settings["gamma"]
    assert plain(**batch).logits.equal(logits)
    plain.save_pretrained(tmp_path)
    assert model_class.from_pretrained(tmp_path)(**batch).logits.equal(logits)

    _, config = family({})
    named = model_class._from_config(config, attn_implementation="stablemask").config
    assert named.text_config.stablemask == {"gamma": 1 / 64, "horizon": None, "hold": 63}
    assert [getattr(c, "stablemask", None) for c in (named, named.vision_config)] == [None, None]


def test_settings_beside_the_text_model_are_refused():
    model_class, config = llava({})
    config.stablemask = {"gamma": 0.1}
    with pytest.raises(ValueError, match="StableMask"):
        model_class(config)


def test_positions_of_several_axes():
    """Qwen2-VL: the mass follows the first axis, which counts tokens in a text."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    config = Qwen2VLConfig(
        text_config=SIZES | {"rope_parameters": rope, "stablemask": {"gamma": 0.1}},
        vision_config={"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 32},
    )
    model = Qwen2VLForConditionalGeneration(config).double().eval()
    ids = random_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    alone = model(ids[1:, 3:]).logits
    positions = (mask.cumsum(-1) - 1).clamp(min=0).expand(3, -1, -1)
    batch = model(ids, attention_mask=mask, position_ids=positions).logits
    assert (batch[1:, 3:] - alone).abs().max() < 64 * EPS * alone.abs().max()


@pytest.mark.parametrize(
    ("named", "context"),
    [
        ({"seq_length": 9, "max_position_embeddings": 7}, 7),
        ({"max_seq_len": 8}, 8),
        ({"max_position_embeddings": None, "seq_length": 9}, 9),
        ({}, None),
    ],
)
def test_the_context_goes_by_several_names(named, context):
    assert context_of(SimpleNamespace(**named)) == context
