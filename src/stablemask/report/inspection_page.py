"""The page of an inspection: one model on a text, or two side by side."""

import unicodedata
from collections.abc import Callable, Sequence
from html import escape

import torch
import transformers
from torch import Tensor

from .. import __version__
from ..evaluation.perplexity import perplexity_text
from ..evaluation.sinks import even_first_token
from ..models.settings import in_short
from .inspection import HeadMaps, Inspection
from .inspection_figures import (
    PANEL_WIDTH,
    SCALE_TICKS,
    head_map,
    layer_figures,
    ratio_panels,
    shade,
    sink_figures,
)
from .page import PAPER, page, paragraphs, swatch

_STYLE = """\
.pair { display: grid; gap: 1.5rem 2.5rem; margin-top: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); }
.pair > * { min-width: 0; max-width: 38rem; }
.pair h4, .map h4 { font-size: .95rem; margin: 0 0 .4rem; overflow-wrap: anywhere; }
.pair img, .map img { min-width: 0; }
.panels { display: grid; gap: .8rem 1.1rem; margin-top: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(8.2rem, 1fr)); }
.panels figcaption, .map figcaption { font-size: .78rem; margin: 0; line-height: 1.5; }
.panels svg { display: block; width: 100%; height: 4.6rem; }
.tokens { line-height: 1.95; margin: .3rem 0 1.2rem; }
.tokens span { display: inline-block; white-space: pre-wrap; overflow-wrap: anywhere; max-width: 100%;
  line-height: 1.5; padding: 0 .12em; margin: 0 1px 1px 0; border-radius: .2em;
  font: .84rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.scale { max-width: 24rem; margin: 1rem 0 .2rem; font-size: .78rem; color: var(--soft); }
.scale i { display: block; height: .7rem; border-radius: .2rem; border: 1px solid var(--line); }
.scale div { position: relative; height: 1.3rem; }
.scale b { position: absolute; font-weight: 400; transform: translateX(-50%); }
.scale b:first-child { transform: none; }
.scale b:last-child { transform: translateX(-100%); white-space: nowrap; }
details { border-bottom: 1px solid var(--line); }
summary { cursor: pointer; padding: .45rem 0; font-variant-numeric: tabular-nums; }
summary span { color: var(--soft); font-size: .88rem; display: inline-block;
  margin-left: .6rem; }
.heads { display: grid; gap: .9rem 1.6rem; padding: .4rem 0 1.2rem;
  grid-template-columns: repeat(auto-fill, minmax(calc(var(--maps) * 6.6rem), 1fr)); }
.map div { display: grid; gap: .35rem; grid-template-columns: repeat(var(--maps), 1fr); }
.map img { width: 100%; image-rendering: pixelated; }
#larger:checked ~ details .heads { grid-template-columns: repeat(auto-fill, minmax(min(100%,
  calc(var(--maps) * 17rem)), 1fr)); }
@media (max-width: 40rem) { #larger:checked ~ details .map div { grid-template-columns: 1fr; } }
"""


def render_inspection(inspections: Sequence[Inspection]) -> str:
    """The whole page, of one model or two."""
    title = "Inside " + " and ".join(one.label for one in inspections)
    parts = (_lead, _table, _layers, _sinks, _ratio, _text, _maps, _made)
    return page(title, [part(inspections) for part in parts], _STYLE)


def summary_rows(inspections: Sequence[Inspection]) -> list[tuple[str, list[str]]]:
    """The table: a name, and a value of each model."""

    def row(name: str, value: Callable[[Inspection], str]) -> tuple[str, list[str]]:
        return name, [value(one) for one in inspections]

    return [
        row("family", lambda one: one.family),
        row("attention", attention_in_words),
        row("parameters", lambda one: f"{one.parameters:,} in {one.dtype}"),
        row("layers × heads", _sizes),
        row("tokens read", _tokens_read),
        row(
            "in front of the text",
            lambda one: _visible(one.prefix or "") if one.prefix else "nothing",
        ),
        row("perplexity of them", lambda one: perplexity_text(one.perplexity)),
        row("attention on the first token", lambda one: f"{one.first_token:.1%}"),
        row("pseudo share", lambda one: f"{one.pseudo:.1%}"),
        row("largest activation", lambda one: _peak(one.outliers.largest)),
        row("... but for the first token", lambda one: _peak(one.outliers.largest_later)),
        row("largest kurtosis of a layer", lambda one: _peak(one.outliers.kurtosis)),
    ]


def attention_in_words(inspection: Inspection) -> str:
    """Such as "stablemask: gamma 0.001, infinite horizon"."""
    settings = inspection.settings
    if settings is None:
        return inspection.attention
    gamma = settings["gamma"]
    words = [
        f"gamma {gamma:.4g}" if isinstance(gamma, float | int)
        else "gamma of ALiBi's slopes" if gamma == "slopes"
        else "learned gamma" if gamma == "learned"
        else f"gamma {min(gamma):.4g} to {max(gamma):.4g} by head",
        "infinite horizon" if settings["horizon"] is None else f"horizon {settings['horizon']:,}",
    ]  # fmt: skip
    if settings.get("start"):
        words.append(f"from position {settings['start']}")
    if shift := in_short(settings).get("shift"):
        words.append(f"log mass shifted by {shift if isinstance(shift, str) else f'{shift:.4g}'}")
    if settings.get("hold") is not None:
        words.append(f"constant from position {settings['hold']}")
    if "floor" in settings:
        words.append(f"floor {settings['floor']:.4g}")
    if "layers" in settings:
        words.append(f"in layers {', '.join(map(str, settings['layers']))}")
    return f"{inspection.attention}: {', '.join(words)}"


def _lead(inspections: Sequence[Inspection]) -> str:
    notes = [
        f"{one.label} reads the first {len(one.tokens):,} of the text's {one.total_tokens:,} tokens; "
        "the rest is cut off (--max-tokens)."
        for one in inspections
        if one.total_tokens > len(one.tokens)
    ]
    notes += [
        f"{one.label} reads {_visible(one.prefix)} in front of the text, which is then its first token and "
        "is not scored."
        for one in inspections
        if one.prefix is not None
    ]
    if len(inspections) == 2 and inspections[0].text_tokens != inspections[1].text_tokens:
        notes.append(
            "The models cut the text into different tokens, so each is shown on its own; their "
            "perplexities do not compare."
        )
    return f"""<p class="lead">Where the attention of a language model goes, token by token: to the
tokens before it, to the first of them, which models use as a sink, and, in a
<a href="{PAPER}">StableMask</a> model, to the <em>pseudo mass</em>, which takes part in the softmax and
carries no value.</p>
{paragraphs(notes, "soft")}"""


def _table(inspections: Sequence[Inspection]) -> str:
    heads = "".join(f'<th scope="col">{_name(one)}</th>' for one in inspections)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f"<td>{escape(value)}</td>" for value in values)
        + "</tr>"
        for name, values in summary_rows(inspections)
    )
    return f"""<h2>In numbers</h2>
<div class="scroll"><table><thead><tr><th></th>{heads}</tr></thead><tbody>{body}</tbody></table></div>
<p class="soft">Attention on the first token: mean over layers, heads and the rows after the first, which
sees nothing else. Pseudo share: what a row gives to the pseudo mass, or to a learned sink, mean over
layers, heads and rows. Largest activation: of the hidden states behind each layer.</p>"""


def _layers(inspections: Sequence[Inspection]) -> str:
    charts = "".join(
        f'<figure><h4>{title}</h4><img alt="{title}, by layer" src="{uri}"></figure>'
        for title, uri in layer_figures(inspections)
    )
    return f"""<section><h2>Layer by layer</h2>
<p>{_names(inspections)}</p>
<div class="pair">{charts}</div>
<p class="soft">Shares are means over the heads of a layer and over rows. Activations are those of the
hidden states behind a layer; their kurtosis is 3 for a normal distribution, and grows with outliers.</p>
</section>"""


def _sinks(inspections: Sequence[Inspection]) -> str:
    sentences = []
    for one in inspections:
        means = {layer.layer: float(layer.first_token.mean()) for layer in one.layers}
        most = max(means, key=means.__getitem__)
        above = sum(mean > 2 * _even(one) for mean in means.values())
        sentences.append(
            f"In {one.label} layer {most} gives the first token most, {means[most]:.1%}; {above} of "
            f"{len(means)} layers give it more than twice the {_even(one):.1%} of an even spread."
        )
    figures = sink_figures(inspections)
    return f"""<section><h2>Attention on the first token</h2>
{_pair(inspections, lambda one: _image(figures[inspections.index(one)], "first-token attention"))}
<p class="soft">{escape(" ".join(sentences))} Colours follow the square root of the share.</p>
</section>"""


def _ratio(inspections: Sequence[Inspection]) -> str:
    heading = "<section><h2>Pseudo share by position</h2>"
    if not any(one.pseudo for one in inspections):
        return (
            f'{heading}<p class="soft">Softmax has no pseudo mass: the share is 0 everywhere.</p>'
            "</section>"
        )
    longest = max(len(one.tokens) for one in inspections)
    thinned = " Neighbouring positions are averaged." * (longest > PANEL_WIDTH)
    panels = "".join(
        f"<figure><figcaption>layer {layer}</figcaption>{svg}</figure>"
        for layer, svg in ratio_panels(inspections)
    )
    return f"""{heading}
<p>{_names(inspections)}</p>
<div class="panels">{panels}</div>
<p class="soft">What each row gives to the pseudo mass: median of the layer's heads, and a band from the
10th to the 90th percentile. Every panel goes from position 0 to {longest - 1:,}, and from 0 (bottom) to
100% (top).{thinned}</p>
</section>"""


def _text(inspections: Sequence[Inspection]) -> str:
    return f"""<section><h2>The text, token by token</h2>
{_scale()}
<h3>Surplus</h3>
{_pair(inspections, _surplus)}
<p class="soft">The share that a token's own row gives to the pseudo mass, because nothing that it sees is
of use.</p>
<h3>Attention received</h3>
{_pair(inspections, _received)}
<p class="soft">What the rows after a token give it, mean over these rows; the last token has none. Both
are means over layers and heads; point at a token to read its value.</p>
</section>"""


def _surplus(inspection: Inspection) -> str:
    if not inspection.pseudo:
        return '<p class="soft">None: without a pseudo mass every row spends itself on tokens.</p>'
    shares = torch.stack([layer.pseudo.mean(0) for layer in inspection.layers]).mean(0)
    return _tokens(inspection.tokens, shares.tolist())


def _received(inspection: Inspection) -> str:
    shares = torch.stack([layer.received.mean(0) for layer in inspection.layers]).mean(0)
    return _tokens(inspection.tokens, [*shares.tolist(), None])


def _tokens(tokens: Sequence[str], shares: Sequence[float | None]) -> str:
    spans = []
    for position, (token, share) in enumerate(zip(tokens, shares, strict=True)):
        style, value = "color:var(--soft)", "none"
        if share is not None:
            background, ink = shade(share)
            style, value = f"background:{background};color:{ink}", f"{share:.1%}"
        spans.append(
            f'<span style="{style}" title="position {position}: {value}">'
            f"{escape(_visible(token))}</span>" + "<br>" * token.endswith("\n")
        )
    return f'<div class="tokens">{"".join(spans)}</div>'


def _visible(token: str) -> str:
    """The token with what would not be seen, or would upset the line, made visible."""
    shown = (
        {"\n": "↵", "\t": "→", "\r": "↵"}.get(
            c, "□" if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp") else c
        )
        for c in token
    )
    return "".join(shown) or "□"


def _maps(inspections: Sequence[Inspection]) -> str:
    with_pseudo = any(one.pseudo for one in inspections)
    by_layer: dict[int, list[tuple[Inspection, int]]] = {}
    for one in inspections:
        for index, layer in enumerate(one.layers):
            by_layer.setdefault(layer.layer, []).append((one, index))
    most = max(
        by_layer,
        key=lambda number: max(
            float(one.layers[index].first_token.mean()) for one, index in by_layer[number]
        ),
    )
    details = "\n".join(
        _layer(number, found, with_pseudo, number == most)
        for number, found in sorted(by_layer.items())
    )
    notes = [
        "Rows are the tokens that attend, from the top; columns the tokens attended to, from the left. "
        "Gray is the future, which no row sees."
    ]
    if with_pseudo:
        notes.append("The strip at the right of a map is the pseudo share of each row.")
    for block in sorted({one.block for one in inspections if one.block > 1}):
        names = " and ".join(one.label for one in inspections if one.block == block)
        notes.append(
            f"In {names} a pixel is the largest share among {block} × {block} tokens, to keep the page "
            "small."
        )
    if len(inspections) == 2:
        notes.append(
            f"Left {inspections[0].label}, right {inspections[1].label}; heads of one number do the "
            "same work only where one model was trained from the other."
        )
    return f"""<section><h2>Attention by layer and head</h2>
<p class="soft">{escape(" ".join(notes))}</p>
{_scale()}
<input type="checkbox" id="larger"> <label for="larger">larger maps</label>
{details}
</section>"""


def _layer(
    number: int, found: Sequence[tuple[Inspection, int]], with_pseudo: bool, is_open: bool
) -> str:
    digests = []
    for one, index in found:
        layer = one.layers[index]
        digest = f"first token {layer.first_token.mean():.0%}"
        if one.pseudo:
            digest += f", pseudo {layer.pseudo.mean():.0%}"
        digests.append(f"<span>{swatch(one.attention)}{digest}</span>")
    heads = max(len(one.maps[index].real) for one, index in found)
    figures = "".join(
        f'<figure class="map"><div>{"".join(_head(one, index, head, with_pseudo) for one, index in found)}'
        f"</div><figcaption>head {head}</figcaption></figure>"
        for head in range(heads)
    )
    return (
        f"<details{' open' if is_open else ''}><summary>layer {number}{''.join(digests)}</summary>"
        f'<div class="heads" style="--maps:{len(found)}">{figures}</div></details>'
    )


def _head(inspection: Inspection, index: int, head: int, with_pseudo: bool) -> str:
    maps: HeadMaps = inspection.maps[index]
    if head >= len(maps.real):
        return "<span></span>"
    layer = inspection.layers[index]
    text = (
        f"{inspection.label}, layer {layer.layer}, head {head}: first token "
        f"{layer.first_token[head]:.1%}, pseudo {layer.pseudo[head].mean():.1%}"
    )
    image = head_map(maps.real[head], maps.pseudo[head], with_pseudo)
    return f'<img alt="{escape(text)}" title="{escape(text)}" src="{image}">'


def _made(inspections: Sequence[Inspection]) -> str:
    line = (
        f"Made by stablemask {__version__}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}. Weights computed densely in float32 from the "
        "queries and keys of each layer."
    )
    return f"<h2>How it was made</h2>{paragraphs([line], 'soft')}"


def _pair(inspections: Sequence[Inspection], content: Callable[[Inspection], str]) -> str:
    columns = "".join(f"<div><h4>{_name(one)}</h4>{content(one)}</div>" for one in inspections)
    return f'<div class="pair">{columns}</div>'


def _names(inspections: Sequence[Inspection]) -> str:
    """The models with their colours, and which of two of one kind is dashed."""
    first, *others = inspections
    dashed = (" (dashed)" * (one.attention == first.attention) for one in others)
    return ", ".join([_name(first), *(_name(one) + word for one, word in zip(others, dashed))])


def _name(inspection: Inspection) -> str:
    return swatch(inspection.attention) + escape(inspection.label)


def _image(uri: str, alt: str) -> str:
    return f'<figure><img alt="{alt}" src="{uri}"></figure>'


def _scale() -> str:
    """The colours of a share."""
    stops = ",".join(shade((i / 16) ** 2)[0] for i in range(17))
    ticks = "".join(
        f'<b style="left:{100 * tick**0.5:.1f}%">{tick:.0%}</b>' for tick in SCALE_TICKS
    )
    return (
        f'<div class="scale"><i style="background:linear-gradient(to right,{stops})"></i>'
        f"<div>{ticks}</div></div>"
    )


def _sizes(inspection: Inspection) -> str:
    heads = {len(layer.first_token) for layer in inspection.layers}
    return f"{len(inspection.layers)} × {' or '.join(map(str, sorted(heads)))}"


def _tokens_read(inspection: Inspection) -> str:
    read, total = len(inspection.tokens), inspection.total_tokens
    return f"{read:,}" if read == total else f"{read:,} of {total:,}"


def _peak(by_layer: Tensor) -> str:
    layer = int(by_layer.argmax())
    size = float(by_layer[layer])
    return f"{size:,.0f} (layer {layer})" if size >= 100 else f"{size:.3g} (layer {layer})"


def _even(inspection: Inspection) -> float:
    return even_first_token(len(inspection.tokens))
