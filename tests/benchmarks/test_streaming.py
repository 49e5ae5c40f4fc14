"""The study of bounded caches, run whole on a small model."""

import json
import math

import pytest
import torch

from benchmarks import streaming
from stablemask.inference.streaming import cached_logits, window_cache

from ..cli.conftest import save_model
from ..models.tiny import random_ids, tiny_model


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streaming")
    for kind in ("softmax", "stablemask"):
        save_model(folder / kind, attention=kind)
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 1000)
    models = [f"{kind}={folder / kind}" for kind in ("softmax", "stablemask")]
    streaming.main([
        "--models", *models, "--data", str(text), "--window", "16", "--length", "100",
        "--texts", "3", "--out", str(folder / "out"),
    ])  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "DECODED_PER_ROW", 10)
        streaming.main([
            "--models", models[0], "--data", str(text), "--window", "8", "--decode", "30",
            "--out", str(folder / "decode"),
        ])  # fmt: skip
    return folder, json.loads((folder / "out.json").read_text())


def test_results(measured):
    folder, result = measured
    softmax, stablemask = (result["models"][kind]["caches"] for kind in ("softmax", "stablemask"))
    assert list(softmax) == ["all keys", "window", "StreamingLLM"]
    assert list(stablemask) == [*softmax, "window, mass held"]
    for caches in (softmax, stablemask):
        for rows in caches.values():
            assert (rows["bins"][0]["start"], rows["bins"][-1]["end"]) == (1, 100)
            assert [row["start"] for row in rows["octaves"]] == [1, 16, 32, 64]
            assert all(math.isfinite(row["nats"]) for row in rows["bins"])
        # What fits the window is the same from every cache.
        first = [rows["octaves"][0]["nats"] for rows in caches.values()]
        assert max(first) - min(first) < 1e-4
    assert {row["nats"] for row in softmax["window"]["less than the window"]} == {0}
    assert (folder / "out.png").read_bytes().startswith(b"\x89PNG")


def test_decoding(measured):
    folder, _ = measured
    rows = json.loads((folder / "decode.json").read_text())["models"]["softmax"]["decoding"]
    assert [row["tokens"] for row in rows] == [10, 20, 30]
    assert len({row["cache_bytes"] for row in rows}) == 1
    assert all(row["milliseconds"] > 0 for row in rows)
    assert not (folder / "decode.png").exists()


def test_the_cache_of_a_window_is_as_large_as_the_window():
    model = tiny_model()
    cache = window_cache(model, 8)
    with torch.no_grad():
        for token in random_ids(1, 20).split(1, 1):
            cached_logits(model, token, cache)
    # Layers, keys and values, rows, key heads, width of a head, bytes of a number.
    assert streaming.cache_bytes(cache) == 2 * 2 * 8 * 2 * 8 * 4
