"""What the method rests on, measured: real decoders on identical tokens, and parameters counted.

The statements themselves are proved with symbols, in ``tests/studies/test_proofs.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

from stablemask.evaluation.attention_maps import last_hidden_state
from stablemask.models import StableMaskConfig, StableMaskForCausalLM
from stablemask.models.configuration import preset_config
from stablemask.models.cost import count_parameters
from stablemask.models.presets import PRESETS

from .kinds import KINDS, config_fields
from .study import Claim, Job, Record, Section
from .tables import kinds_table

ENCODINGS = ("rope", "alibi", "nope")
LENGTH = 64
# Rounding in float64 stays below the first, and whatever tells positions apart is above the second.
SAME, DIFFERENT = 1e-12, 1e-6


def measure_spread(work: Path, seed: int, kinds: Sequence[str] = KINDS) -> dict[str, Any]:
    """How far the outputs of identical tokens are apart, in float64, by position encoding and kind."""
    spread: dict[str, dict[str, float]] = {}
    for encoding, kind in product(ENCODINGS, kinds):
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


def measure_parameters(work: Path, kinds: Sequence[str] = KINDS) -> dict[str, Any]:
    """Parameters of every preset, by kind of attention."""
    return {
        "parameters": {
            preset: {
                kind: count_parameters(
                    preset_config(preset, **config_fields(kind, fields["max_position_embeddings"]))
                )
                for kind in kinds
            }
            for preset, fields in PRESETS.items()
        }
    }


def jobs(scale: str, seeds: int) -> list[Job]:
    kinds = {"kinds": list(KINDS)}
    spreads = [
        Job(f"spread-{seed}", measure_spread, {"seed": seed, **kinds}) for seed in range(seeds)
    ]
    return [*spreads, Job("parameters", measure_parameters, kinds)]


def section(records: list[Record]) -> Section:
    spreads = [record["spread"] for record in records if "spread" in record]
    (parameters,) = (record["parameters"] for record in records if "parameters" in record)
    stablemask = [kind for kind in KINDS if kind.startswith("stablemask")]

    def worst(kind: str, encoding: str) -> float:
        """Of all seeds: the largest where it should vanish, else the smallest."""
        values = [spread[encoding][kind] for spread in spreads]
        return max(values) if kind == "softmax" else min(values)

    def more_parameters(kind: str, preset: str) -> str:
        more = parameters[preset][kind] - parameters[preset]["softmax"]
        return "" if kind == "softmax" else f"{more:+,}"

    return Section(
        [
            Claim(
                "Softmax with relative positions alone cannot encode absolute position.",
                [worst("softmax", encoding) < SAME for encoding in ENCODINGS],
            ),
            Claim(
                "The mask ratio falls strictly, which encodes absolute position.",
                [
                    min(worst(kind, encoding) for kind in stablemask) > DIFFERENT
                    for encoding in ENCODINGS
                ],
            ),
            Claim(
                "StableMask is parameter-free.",
                [counts["stablemask"] == counts["softmax"] for counts in parameters.values()],
            ),
        ],
        {
            "spread": kinds_table("", ENCODINGS, lambda *place: f"{worst(*place):.2g}"),
            "parameters": kinds_table("", list(parameters), more_parameters),
        },
        facts={"length": LENGTH, "same": SAME, "different": DIFFERENT},
    )
