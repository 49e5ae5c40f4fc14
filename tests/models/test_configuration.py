import copy

import pytest
from transformers import AutoConfig

from stablemask.errors import InputError
from stablemask.models import PRESETS, StableMaskConfig, preset_config

from .tiny import tiny_config


def test_defaults():
    config = tiny_config(num_key_value_heads=None)
    assert config.stablemask == {"gamma": 1 / 32, "horizon": None, "hold": 31}
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert (config.num_key_value_heads, config.head_dim) == (4, 8)
    assert tiny_config(attention="softmax").stablemask is None
    assert tiny_config(position_encoding="nope").rope_parameters is None


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"stablemask": {"gamma": 0.003, "horizon": None}},
        {"stablemask": {"hold": None}},
        {"stablemask": {"gamma": "slopes", "horizon": 77}},
        {"attention": "stablemask-paper"},
        {"stablemask": {"gamma": [0.1, 0.2, 0.0, 0.4], "horizon": 12}},
        {"stablemask": {"gamma": "learned", "hold": 0, "floor": 0.5, "layers": [1, 0]}},
        {"attention": "learned-sink", "position_encoding": "alibi"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "head_dim": 6},
    ],
)
def test_settings_survive_saving(settings, tmp_path):
    config = tiny_config(**settings)
    config.save_pretrained(tmp_path)
    assert StableMaskConfig.from_pretrained(tmp_path).to_dict() == config.to_dict() | {
        "transformers_version": StableMaskConfig.from_pretrained(tmp_path).transformers_version
    }


def test_gamma_stays_when_the_context_is_overridden_on_loading(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    config = StableMaskConfig.from_pretrained(tmp_path, max_position_embeddings=128)
    assert config.stablemask == {"gamma": 1 / 32, "horizon": None, "hold": 31}


def by_override(folder, settings):
    tiny_config().save_pretrained(folder)
    return StableMaskConfig.from_pretrained(folder, **settings)


def by_auto(folder, settings):
    tiny_config().save_pretrained(folder)
    config, unused = AutoConfig.from_pretrained(folder, **settings, return_unused_kwargs=True)
    assert not unused
    return config


def by_writing(folder, settings):
    config = copy.deepcopy(tiny_config())
    before = config.to_dict()
    try:
        for name, value in settings.items():
            setattr(config, name, value)
    except ValueError:
        if len(settings) == 1:
            assert config.to_dict() == before
        raise
    return config


WAYS = pytest.mark.parametrize("way", [by_override, by_auto, by_writing])


@WAYS
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"attention": "softmax"}, {"attention": "softmax", "stablemask": None}),
        ({"position_encoding": "nope"}, {"position_encoding": "nope", "rope_parameters": None}),
        ({"stablemask": {"gamma": 5.0}}, {"stablemask": {"gamma": 5.0}}),
        ({"stablemask": None}, {}),
        (
            {"attention": "stablemask-paper"},
            {"stablemask": {"gamma": "slopes", "horizon": 32, "suffix": True}},
        ),
        ({"attention": "stablemask-zero"}, {"stablemask": {"gamma": 0.0, "horizon": 32}}),
        ({"rope_parameters": {"rope_theta": 500.0}}, {"rope_parameters": {"rope_theta": 500.0}}),
        ({"rope_theta": 500.0}, {"rope_parameters": {"rope_theta": 500.0}}),
        (
            {"num_key_value_heads": 4, "vocab_size": 70},
            {"num_key_value_heads": 4, "vocab_size": 70},
        ),
    ],
)
def test_overrides_and_writes_give_what_construction_gives(way, settings, expected, tmp_path):
    import stablemask.hf  # noqa: F401  # the Auto classes know our model by it

    config = way(tmp_path, settings).to_dict()
    changed = config.keys() & {"transformers_version", "_name_or_path"}
    truth = tiny_config(**expected).to_dict()
    assert config == truth | {name: config[name] for name in changed}


def test_a_choice_written_back_has_its_defaults_again():
    config = tiny_config(stablemask={"gamma": 0.5})
    config.attention, config.position_encoding = "softmax", "alibi"
    with pytest.raises(ValueError, match="stablemask must be None with attention='softmax'"):
        config.stablemask = {"gamma": 0.5}
    assert config.stablemask is config.rope_parameters is None
    config.attention, config.position_encoding = "stablemask", "rope"
    assert config.to_dict() == tiny_config().to_dict()


@WAYS
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "must hold rope_type 'default'"),
        ({"stablemask": {"gamma": -1}}, r"\['gamma'\] must be greater than 0"),
        ({"num_key_value_heads": 3}, r"num_key_value_heads must divide .*\(4\), got 3"),
        ({"sliding_window": 5}, "sliding_window must be None: .*, got 5"),
    ],
)
def test_bad_overrides_and_writes_are_refused_as_in_construction(way, settings, message, tmp_path):
    for make in (lambda: tiny_config(**settings), lambda: way(tmp_path, settings)):
        with pytest.raises(ValueError, match=message):
            make()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"position_encoding": "rotary"},
            "position_encoding must be one of rope, alibi, .*'rotary'",
        ),
        ({"attention": "flash"}, "attention must be one of stablemask, .*softmax, .*'flash'"),
        ({"num_attention_heads": 5}, r"num_attention_heads must divide hidden_size \(32\).*got 5"),
        ({"hidden_size": 0}, "hidden_size must be an integer of at least 1, got 0"),
        ({"vocab_size": 3.5}, "vocab_size must be an integer of at least 1, got 3.5"),
        (
            {"num_hidden_layers": True},
            "num_hidden_layers must be an integer of at least 1, got True",
        ),
        ({"head_dim": 7}, "head_dim must be even with rope positions, got 7"),
        (
            {"attention_dropout": 0.1, "attention": "fixed-token"},
            "attention_dropout must be 0 with attention='fixed-token', got 0.1",
        ),
        ({"attention_dropout": 1.0}, r"attention_dropout must be in \[0, 1\), got 1.0"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be a positive number, got 0"),
        (
            {"hidden_size": 33, "head_dim": 8, "position_encoding": "sinusoidal"},
            "hidden_size must be even with sinusoidal positions, got 33",
        ),
        (
            {"stablemask": {"gamma": 0}},
            r"\['gamma'\] must be greater than 0 with an infinite .*got 0",
        ),
        (
            {"stablemask": {"gamma": -0.1, "horizon": 9}},
            r"\['gamma'\] must be at least 0, got -0.1",
        ),
        (
            {"stablemask": {"gamma": "steep"}},
            "must be a number, 'slopes', 'learned', or a list .*'steep'",
        ),
        (
            {"stablemask": {"gamma": float("nan")}},
            "must be a number, 'slopes', 'learned', or a list .*nan",
        ),
        ({"stablemask": {"gamma": [0.1, 0.2]}}, r"one number per head \(4\), got \[0.1, 0.2\]"),
        ({"stablemask": {"gamma": 10**400}}, "must be a number, 'slopes', 'learned', or a list "),
        *(
            ({"stablemask": {name: 10**30}}, rf"\['{name}'\] must be below 2.*63, got 10{{30}}$")
            for name in ("horizon", "start", "hold")
        ),
        ({"stablemask": {"gamma": []}}, r"one number per head \(4\), got \[\]"),
        ({"stablemask": {"suffix": True}}, r"\['suffix'\] must be False with an infinite horizon"),
        ({"stablemask": {"suffix": 1, "horizon": 9}}, r"\['suffix'\] must be True or False, got 1"),
        (
            {"attention": "stablemask-paper", "stablemask": {"gamma": 0.1}},
            "stablemask must be None with attention='stablemask-paper'",
        ),
        ({"stablemask": {"horizon": 0}}, r"\['horizon'\] must be an integer .* or None, got 0"),
        (
            {"stablemask": {"hold": -1}},
            r"\['hold'\] must be an integer of at least 0, or None .*never.*got -1",
        ),
        ({"stablemask": {"floor": -1.0}}, r"\['floor'\] must be a number of at least 0, got -1.0"),
        ({"stablemask": {"layers": [2]}}, r"\['layers'\] must be .* from 0 to 1, got \[2\]"),
        ({"stablemask": {"layers": 1}}, r"\['layers'\] must be a list of numbers .*got 1"),
        (
            {"stablemask": {"decay": 1}},
            "stablemask must be a dict of gamma, horizon, suffix, start, shift, hold, floor, layers, got",
        ),
        (
            {"stablemask": 0.1},
            "stablemask must be a dict of gamma, horizon, suffix, start, shift, hold, floor, layers, got 0.1",
        ),
        (
            {"attention": "softmax", "stablemask": {"gamma": 0.1}},
            "stablemask must be None with attention='softmax'",
        ),
        (
            {"position_encoding": "alibi", "rope_parameters": {"rope_theta": 1e4}},
            "rope_parameters must be None with position_encoding='alibi'",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
            "must hold rope_type 'default'",
        ),
        ({"rope_parameters": {"rope_theta": -1}}, "rope_theta must be a positive number, got -1"),
    ],
)
def test_bad_settings_are_refused_at_construction(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**settings)


def test_presets_take_overrides_and_unknown_names_list_the_known():
    config = preset_config("tiny", attention="softmax", max_position_embeddings=64)
    assert (config.hidden_size, config.attention, config.max_position_embeddings) == (
        192,
        "softmax",
        64,
    )
    assert preset_config("tiny").stablemask == {"gamma": 1 / 256, "horizon": None, "hold": 255}
    with pytest.raises(
        InputError,
        match=r"must be one of nano, micro, tiny, 71m, 160m, 410m, 1.4b, paper-71m, .*'huge'",
    ):
        preset_config("huge")
    assert set(PRESETS) == {
        "nano", "micro", "tiny", "71m", "160m", "410m", "1.4b",
        "paper-71m", "paper-160m", "paper-400m", "paper-1.4b",
    }  # fmt: skip
