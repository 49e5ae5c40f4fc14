"""What an inspection measures, and a page that says just that."""

import base64
import html
import io
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from stablemask.data import train_tokenizer
from stablemask.errors import InputError
from stablemask.evaluation import attention_maps
from stablemask.hf import apply_stablemask
from stablemask.report import inspection as inspection_module
from stablemask.report.drawing import COLORS, lines
from stablemask.report.inspection import SHADES, HeadMaps, Inspection, inspect_model
from stablemask.report.inspection_figures import _layer_figure, layer_figures
from stablemask.report.inspection_page import (
    MEANINGS,
    attention_in_words,
    render_inspection,
    summary_rows,
    takeaway,
)
from stablemask.report.page import PAPER

from ..evaluation.families import tiny_transformer
from ..models.tiny import tiny_model
from .test_page import Reader

TEXT = "the quick brown <fox> jumps\nover the $lazy$ dog & the fox sleeps"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT * 20], 280)


def make(family: str, tokenizer, **overrides):
    return tiny_transformer(family, vocab_size=len(tokenizer), **overrides)


@pytest.fixture(scope="module")
def pair(tokenizer) -> list[Inspection]:
    stable = apply_stablemask(make("Llama", tokenizer), gamma=0.1, start=1, shift=-0.5)
    return [
        inspect_model(model, tokenizer, TEXT, label=label)
        for label, model in (("plain", make("Llama", tokenizer)), ("stable", stable))
    ]


@pytest.fixture(scope="module")
def page(pair) -> Reader:
    return Reader(render_inspection(pair))


def images(text: str) -> list[np.ndarray]:
    found = re.findall(r"data:image/png;base64,([^\"]+)", text)
    return [np.array(Image.open(io.BytesIO(base64.b64decode(data)))) for data in found]


def test_the_numbers_are_the_models(tokenizer):
    model = make("Llama", tokenizer)
    inspection = inspect_model(model, tokenizer, TEXT, label="a", max_tokens=20)
    every = tokenizer(TEXT)["input_ids"]
    ids = torch.tensor(every[:20])
    with torch.no_grad():
        output = model(ids[None], labels=ids[None], output_hidden_states=True)
    assert inspection.total_tokens == len(every) > 20
    assert "".join(inspection.tokens) == tokenizer.decode(ids)
    assert inspection.perplexity == pytest.approx(math.exp(output.loss))
    # Their last hidden state has been through the last norm.
    largest = [state.abs().max().item() for state in output.hidden_states[1:-1]]
    assert inspection.outliers.largest[:-1].tolist() == pytest.approx(largest, rel=1e-5)
    maps = attention_maps(model, ids)
    assert inspection.first_token == pytest.approx(maps.real[:, :, 1:, 0].mean().item())
    for head_maps, real in zip(inspection.maps, maps.real, strict=True):
        seen = torch.ones(20, 20, dtype=torch.bool).tril().expand_as(real)
        shares = (head_maps.real / (SHADES - 1)) ** 2
        assert (head_maps.real[~seen] == SHADES).all()
        # Half a shade, as far as it reaches at a share of 1.
        assert np.abs(shares - real.numpy())[seen].max() <= 1.01 / (SHADES - 1)


def test_with_a_token_in_front_the_same_tokens_are_scored(tokenizer):
    model, prefix = make("Llama", tokenizer), 5
    inspection = inspect_model(model, tokenizer, TEXT, label="a", max_tokens=20, prefix=prefix)
    ids = torch.tensor([[prefix, *tokenizer(TEXT)["input_ids"][:20]]])
    with torch.no_grad():
        losses = F.cross_entropy(model(ids).logits[0, 1:-1], ids[0, 2:])
    assert inspection.perplexity == pytest.approx(losses.exp().item(), rel=1e-5)
    assert inspection.tokens == [tokenizer.decode([token]) for token in ids[0]]
    assert inspection.prefix == inspection.tokens[0]
    assert inspection.first_token == pytest.approx(
        attention_maps(model, ids[0]).real[:, :, 1:, 0].mean().item()
    )
    other = inspect_model(model, tokenizer, TEXT, label="b", max_tokens=20)
    text = html.unescape(render_inspection([inspection, other]))
    assert f"a reads {inspection.prefix} in front of the text" in text
    assert "different tokens" not in text
    begins = tokenizer(TEXT)["input_ids"][0]
    same = inspect_model(model, tokenizer, TEXT, label="b", max_tokens=20, prefix=begins)
    assert (same.prefix, same.tokens) == (None, other.tokens)


def test_a_chart_by_layer_for_each_of_four_numbers(pair):
    charts = dict(layer_figures(pair))
    assert list(charts) == [
        "Attention on the first token", "Mask ratio", "Largest activation", "Kurtosis",
    ]  # fmt: skip
    text = render_inspection(pair)
    for title, uri in charts.items():
        svg = base64.b64decode(uri.partition(",")[2]).decode().lower()
        assert COLORS["softmax"] in svg
        assert COLORS["stablemask"] in svg
        assert f'alt="{title}, by layer" src="{uri}"' in text
    assert "Mask ratio" not in dict(layer_figures(pair[:1]))


@pytest.mark.parametrize("largest", [0.03, 3.3, 47, 1300])
def test_each_number_on_an_axis_has_its_own_label(largest):
    curves = [([0, 1], [largest, largest / 2])]
    (axes,) = _layer_figure(curves, lines(["softmax"]), as_share=False).axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert len(set(labels)) == len(labels) > 2
    assert [float(label.replace(",", "")) for label in labels] == pytest.approx(axes.get_yticks())


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        (lambda tok: make("Llama", tok), "softmax"),
        (lambda tok: make("GptOss", tok), "learned-sink"),
        (lambda tok: apply_stablemask(make("GPT2", tok)), "stablemask"),
        (lambda tok: make("Llama", tok, attention="stablemask"), "stablemask"),
        *(
            (lambda tok, kind=kind: tiny_model(attention=kind, vocab_size=len(tok)), kind)
            for kind in COLORS
        ),
    ],
)
def test_kinds_of_attention(model, kind, tokenizer):
    model = model(tokenizer)
    inspection = inspect_model(model, tokenizer, TEXT, label="a", max_tokens=12)
    assert inspection.attention == kind.removesuffix("-paper").removesuffix("-zero")
    assert (inspection.settings is not None) == kind.startswith("stablemask")
    assert (inspection.pseudo > 0) == (kind not in ("softmax", "head-gate"))


def test_long_texts_are_drawn_in_blocks_by_their_largest_share(tokenizer):
    model, text = make("Llama", tokenizer, max_position_embeddings=128), TEXT * 4
    arguments = {"label": "a", "max_tokens": 100}
    whole = inspect_model(model, tokenizer, text, **arguments)
    small = inspect_model(model, tokenizer, text, **arguments, map_bytes=12 * 900)
    assert (whole.block, small.block) == (1, 4)
    for fine, coarse in zip(whole.maps, small.maps, strict=True):
        assert coarse.real.shape == (4, 25, 25)
        blocks = np.where(fine.real == SHADES, 0, fine.real).reshape(4, 25, 4, 25, 4).max((2, 4))
        seen = np.tril(np.ones((25, 25), dtype=bool))
        assert (coarse.real[:, seen] == blocks[:, seen]).all()
        assert (coarse.real[:, ~seen] == SHADES).all()
        assert (coarse.pseudo == fine.pseudo.reshape(4, 25, 4).max(-1)).all()
    assert "4 × 4 tokens" in render_inspection([small])


def test_self_contained(page):
    assert page.open == []
    assert not {"script", "link", "iframe"} & set(page.tags)
    outside = [target for target in page.references if not target.startswith("data:")]
    assert outside == [PAPER]


def test_every_layer_and_head_is_drawn_beside_its_mask_ratio(page, pair):
    assert page.tags.count("details") == 3
    text = render_inspection(pair)
    drawn = images(text)
    assert len(drawn) == 2 * 3 * 4
    n = len(pair[0].tokens)
    for index, image in enumerate(drawn):
        layer, (head, side) = index // 8, divmod(index % 8, 2)
        maps = pair[side].maps[layer]
        assert (image[:, :n] == maps.real[head]).all()
        assert (image[:, -2:] == maps.pseudo[head][:, None]).all()
    assert text.count("<svg ") == 3
    assert {"plain", "stable"} <= {cell.strip() for row in page.rows for cell in row}
    for color in ("softmax", "stablemask"):
        assert COLORS[color] in text


def test_a_model_without_pseudo_mass_has_no_strip(pair):
    text = render_inspection(pair[:1])
    assert all(image.shape == (len(pair[0].tokens),) * 2 for image in images(text))
    assert "<svg " not in text


def test_the_table_holds_what_was_measured(page, pair):
    shown = {row[0]: row[1:] for row in page.rows if row}
    for name, values in summary_rows(pair):
        assert shown[name] == values
    assert shown["perplexity of them"] == [f"{one.perplexity:.2f}" for one in pair]
    assert shown["attention"] == [
        "softmax",
        "stablemask: gamma 0.1, infinite horizon, from position 1, log mass shifted by -0.5, "
        "constant from position 63",
    ]
    assert shown["layers × heads"] == ["3 × 4"] * 2


def test_it_opens_with_where_attention_goes_and_what_that_does_not_show(pair):
    def told(inspections, share):
        layers = [
            replace(one, first_token=torch.full((4,), share)) for one in inspections[0].layers
        ]
        return takeaway([replace(inspections[0], layers=layers), *inspections[1:]])

    tokens = len(pair[0].tokens)
    even = sum(1 / row for row in range(2, tokens + 1)) / (tokens - 1)
    assert told(pair[:1], 2.1 * even) == (
        f"plain gives its first token {2.1 * even:.1%} of its attention, where an even spread gives "
        f"{even:.1%}, and makes it a sink in 3 of 3 layers."
    )
    assert told(pair[:1], 1.9 * even).endswith(f"{even:.1%}, and has no sink.")
    assert told(pair, even).endswith(f"; {pair[1].pseudo:.1%} goes to its pseudo mass.")
    text = html.unescape(render_inspection(pair))
    lead = re.findall("<p.*?>(.*?)</p>", text)[:2]
    assert lead[0] == takeaway(pair)
    assert lead[1].startswith(f"This is one text of {tokens} tokens: it does not show")


def test_every_number_says_what_it_means(pair):
    assert MEANINGS.keys() < dict(summary_rows(pair)).keys()
    assert render_inspection(pair).count("<small>") == len(MEANINGS)


def test_what_was_cut_is_said(tokenizer, pair):
    cut = inspect_model(make("Llama", tokenizer), tokenizer, TEXT, label="a", max_tokens=8)
    total = len(tokenizer(TEXT)["input_ids"])
    text = html.unescape(render_inspection([cut]))
    assert f"a reads the first 8 of the text's {total} tokens; the rest is cut off" in text
    assert "cut off" not in render_inspection(pair)


def test_different_tokenizers_are_shown_apart_and_said(tokenizer, pair):
    coarse = train_tokenizer([TEXT * 20], 260)
    other = inspect_model(make("Llama", coarse), coarse, TEXT, label="b")
    assert len(other.tokens) > len(pair[0].tokens)
    assert "different tokens" in render_inspection([pair[0], other])
    assert "different tokens" not in render_inspection(pair)


def test_models_of_other_depths_and_widths(tokenizer, pair):
    sizes = {"num_hidden_layers": 5, "num_attention_heads": 8, "num_key_value_heads": 8}
    deep = inspect_model(make("Llama", tokenizer, **sizes), tokenizer, TEXT, label="deep")
    text = render_inspection([pair[1], deep])
    assert Reader(text).tags.count("details") == 5
    assert len(images(text)) == 3 * 4 + 5 * 8


def test_text_is_escaped(pair):
    evil = ["<script>alert(1)</script>", '"><b>', "\u202e", "\x00", "$a$", "\n", ""]
    tokens = [*evil, *pair[0].tokens[len(evil) :]]
    text = render_inspection([replace(pair[0], tokens=tokens, label="<i>&"), pair[1]])
    assert not {"script", "i>&"} & set(Reader(text).tags)
    assert "\u202e" not in text
    assert "\x00" not in text


def test_the_page_stays_below_8_mib(pair):
    generator = np.random.default_rng(0)
    noise = generator.integers(0, SHADES, (32, 64, 64), dtype=np.uint8)
    future = np.triu(np.ones((64, 64), dtype=bool), 1)
    maps = HeadMaps(np.where(future, np.uint8(SHADES), noise), noise[:, 0])
    layer = pair[1].layers[0]
    wide = replace(
        layer,
        first_token=torch.rand(32),
        pseudo=torch.rand(32, layer.pseudo.shape[1]),
        received=torch.rand(32, layer.received.shape[1]),
    )
    layers = [replace(wide, layer=number) for number in range(32)]
    big = replace(pair[1], layers=layers, maps=[maps] * 32)
    assert len(render_inspection([big, replace(big, label="other")])) < 8 * 2**20


def doubled(*args, **kwargs):
    output, _ = sdpa_attention_forward(*args, **kwargs)
    return 2 * output, None


AttentionInterface.register("test_doubled", doubled)
AttentionMaskInterface.register("test_doubled", sdpa_mask)


@pytest.mark.parametrize(
    ("family", "overrides", "text", "max_tokens", "words"),
    [
        ("Llama", {}, "", 64, "has 0 tokens for a; give at least 2"),
        ("Llama", {}, "t", 64, "has 1 token for a; give at least 2"),
        ("Llama", {}, TEXT, 1, "max_tokens must be from 2 to 1024, got 1"),
        ("Llama", {}, TEXT, 1025, "max_tokens must be from 2 to 1024, got 1025"),
        ("Llama", {}, "half \ud800", 64, "not valid Unicode"),
        (
            "GPT2",
            {"max_position_embeddings": 16, "n_positions": 16},
            TEXT,
            20,
            "needs 20 positions",
        ),
        ("Bloom", {}, TEXT, 20, "BloomForCausalLM cannot be captured"),
        ("Llama", {"attention": "test_doubled"}, TEXT, 20, "changes the loss by"),
    ],
)
def test_bad_input(tokenizer, family, overrides, text, max_tokens, words):
    model = make(family, tokenizer, **overrides)
    with pytest.raises(InputError, match=words):
        inspect_model(model, tokenizer, text, label="a", max_tokens=max_tokens)


def test_damaged_weights(tokenizer):
    model = make("Llama", tokenizer)
    model.lm_head.weight.data[0] = math.nan
    with pytest.raises(InputError, match="not finite"):
        inspect_model(model, tokenizer, TEXT, label="a")


def test_every_setting_of_the_mass_is_told(tokenizer):
    settings = {"gamma": "learned", "layers": [1], "floor": 2.0, "hold": 7}
    model = tiny_model(stablemask=settings, vocab_size=len(tokenizer))
    inspection = inspect_model(model, tokenizer, TEXT, label="own")
    assert attention_in_words(inspection) == (
        "stablemask: learned gamma, infinite horizon, constant from position 7, floor 2, in layers 1"
    )
    shift = [[-3.0, 0.0, 1.0, 4.5]] * 3
    model = apply_stablemask(make("Llama", tokenizer), gamma=0.1, shift=shift, hold=0)
    inspection = inspect_model(model, tokenizer, TEXT, label="other")
    assert attention_in_words(inspection) == (
        "stablemask: gamma 0.1, infinite horizon, log mass shifted by -3 to 4.5 by layer and head, "
        "constant from position 0"
    )


def test_a_loss_whose_exponential_is_no_float(tokenizer, monkeypatch):
    model = make("Llama", tokenizer)
    losses = inspection_module.token_losses
    monkeypatch.setattr(inspection_module, "token_losses", lambda *given: losses(*given) + 800)
    inspection = inspect_model(model, tokenizer, TEXT, label="a", max_tokens=8)
    assert inspection.perplexity == math.inf
    assert "<td>inf</td>" in render_inspection([inspection])
