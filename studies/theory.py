"""The statements the method rests on, checked by machine, and two measurements beside them.

Real decoders on identical tokens, and parameters counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from .kinds import KINDS, LABELS, config_fields
from .page import table
from .proofs import STATEMENTS
from .study import Claim, Job, Record, Section, Study, verdict

ENCODINGS = ("rope", "alibi", "nope")
LENGTH = 64
# Rounding in float64 stays below the first, and whatever tells positions apart is above the second.
SAME, DIFFERENT = 1e-12, 1e-6


def prove(work: Path, statement: str) -> dict[str, Any]:
    proven = STATEMENTS[statement]
    return {"text": proven.text, "method": proven.method, "holds": proven.check()}


def measure_spread(work: Path, seed: int) -> dict[str, Any]:
    """How far the outputs of identical tokens are apart, in float64, by position encoding and kind."""
    import torch

    from stablemask.evaluation.attention_maps import last_hidden_state
    from stablemask.models import StableMaskConfig, StableMaskForCausalLM

    spread: dict[str, dict[str, float]] = {}
    for encoding, kind in product(ENCODINGS, KINDS):
        torch.manual_seed(seed)
        config = StableMaskConfig(
            vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=LENGTH, initializer_range=0.3,
            position_encoding=encoding, **config_fields(kind, LENGTH),
        )  # fmt: skip
        model = StableMaskForCausalLM(config).double()
        outputs = last_hidden_state(model, torch.full((LENGTH,), 7))
        spread.setdefault(encoding, {})[kind] = (outputs - outputs[0]).abs().max().item()
    return {"spread": spread}


def measure_parameters(work: Path) -> dict[str, Any]:
    """Parameters of every preset, by kind of attention."""
    from stablemask.models.cost import count_parameters
    from stablemask.models.presets import PRESETS, preset_config

    return {
        "parameters": {
            preset: {
                kind: count_parameters(
                    preset_config(preset, **config_fields(kind, fields["max_position_embeddings"]))
                )
                for kind in KINDS
            }
            for preset, fields in PRESETS.items()
        }
    }


def jobs(scale: str, seeds: int) -> list[Job]:
    proofs = [
        Job(name.replace(", ", "-").replace(" ", "-"), prove, {"statement": name})
        for name in STATEMENTS
    ]
    spreads = [Job(f"spread-{seed}", measure_spread, {"seed": seed}) for seed in range(seeds)]
    return [*proofs, *spreads, Job("parameters", measure_parameters, {})]


def section(records: list[Record]) -> Section:
    proofs = [record for record in records if "statement" in record]
    holds = {record["statement"]: record["holds"] for record in proofs}
    spreads = [record["spread"] for record in records if "spread" in record]
    (parameters,) = (record["parameters"] for record in records if "parameters" in record)

    # The worst of all seeds and encodings: the largest where it should vanish, else the smallest.
    softmax = max(spread[encoding]["softmax"] for spread in spreads for encoding in ENCODINGS)
    kinds = [kind for kind in KINDS if kind.startswith("stablemask")]
    stablemask = min(
        spread[encoding][kind] for spread in spreads for encoding, kind in product(ENCODINGS, kinds)
    )
    blind = holds["equal values"] and holds["identical tokens"] and softmax < SAME
    rises = all(held for name, held in holds.items() if name.startswith("rise"))
    same_size = [counts["stablemask"] == counts["softmax"] for counts in parameters.values()]
    claims = [
        Claim(
            "Softmax with relative positions alone cannot encode absolute position.",
            "proved for identical tokens; real decoders (RoPE, ALiBi, none; float64) give outputs at "
            f"most {softmax:.0e} apart",
            verdict([blind]),
        ),
        Claim(
            "The mask ratio falls strictly, which encodes absolute position.",
            "proved for equal scores and those of identical tokens; real decoders give outputs at "
            f"least {stablemask:.1f} apart. Not the decay's alone: a constant sink has it too",
            verdict([rises and holds["norm"] and stablemask > DIFFERENT]),
        ),
        Claim(
            "StableMask is parameter-free.",
            f"as many parameters as softmax in {sum(same_size)} of {len(same_size)} presets",
            verdict([all(same_size)]),
        ),
    ]
    body = "\n\n".join(
        (
            "Checked with symbols (SymPy) or fractions, never floating point; "
            "[method.md](method.md) has the proofs on paper.",
            table(
                ["statement", "method", "holds"],
                [[r["text"], r["method"], "yes" if r["holds"] else "**no**"] for r in proofs],
            ),
            f"Real decoders (2 layers, random weights, float64) on {LENGTH} identical tokens: the "
            f"largest distance of an output from the first one. Of {len(spreads)} seeds, softmax has "
            f"its largest here and the others their least; the claims ask for less than {SAME:.0e} of "
            f"softmax and more than {DIFFERENT:.0e} of StableMask.",
            table(
                ["", *ENCODINGS],
                [
                    [LABELS[kind], *(_worst(spreads, encoding, kind) for encoding in ENCODINGS)]
                    for kind in KINDS
                ],
            ),
            "Parameters, beyond those of softmax:",
            table(
                ["", *parameters],
                [
                    [
                        LABELS[kind],
                        *(
                            f"{counts[kind] - counts['softmax']:+,}"
                            for counts in parameters.values()
                        ),
                    ]
                    for kind in KINDS
                    if kind != "softmax"
                ],
            ),
        )
    )
    return Section(claims, body)


STUDY = Study("theory", "Theory, checked by machine", jobs, section)


def _worst(spreads: Sequence[dict[str, dict[str, float]]], encoding: str, kind: str) -> str:
    values = [spread[encoding][kind] for spread in spreads]
    return f"{max(values) if kind == 'softmax' else min(values):.2g}"
