"""What is taken by which way: decided from timings made by hand, kept whole, and read strictly."""

import json
import math
from contextlib import nullcontext
from unittest.mock import Mock

import pytest
import torch

from stablemask.backends import native
from stablemask.backends.native import tuning
from stablemask.backends.native.tuning import SPANS, Timing, decide, is_faster, read, write
from stablemask.cli.main import main
from tests.marks import native_library

RULES = {
    "forward_by_tiles": {"float32": [(33, 1024), (4097, None)]},
    "backward_in_float32": {"bfloat16": [(17, 256)], "float16": [(9, None)]},
}


def timings(ratio, way="forward_by_tiles", dtype="float32", most=8192):
    """Three rounds at the ends of every span, of a rival that takes a second."""
    return [
        Timing(way, dtype, rows, [ratio(rows)] * 3, [1.0] * 3)
        for span in SPANS
        for rows in span
        if rows <= most
    ]


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        (lambda rows: 0.9, [(9, None)]),
        (lambda rows: 1.1, []),
        (lambda rows: 0.98, []),  # too little to be told from noise
        (lambda rows: 0.9 if rows > 100 else 1.5, [(129, None)]),
        # A Xeon with AVX-512 and no AMX, in float32: 0.65, 0.88, 1.06, 1.18, 1.27 from 512 on.
        (lambda rows: 0.65 * 1.18 ** (rows / 512 - 1), [(9, 1024)]),
        # Faster at both ends of lengths, and not between.
        (lambda rows: 1.2 if 200 < rows < 600 else 0.5, [(9, 128), (1025, None)]),
        # One row more than a power of two is one tile more.
        (lambda rows: 0.9 if rows % 2 == 0 or rows > 500 else 1.1, [(513, None)]),
    ],
)
def test_intervals(ratio, expected):
    rules = decide(timings(ratio))
    assert rules == ({"forward_by_tiles": {"float32": expected}} if expected else {})
    for rows in (1, 8, 9, 100, 128, 129, 1000, 1024, 1025, 8192, 10**6):
        inside = any(first <= rows and (last is None or rows <= last) for first, last in expected)
        assert is_faster(rules, "forward_by_tiles", torch.float32, rows) == inside


def test_ways_and_dtypes_are_apart():
    rules = decide(
        timings(lambda rows: 0.5, "backward_in_float32", "float16", most=2048)
        + timings(lambda rows: 0.5 if rows < 300 else 2.0, "backward_in_float32", "bfloat16")
        + timings(lambda rows: 2.0)
    )
    assert rules == {"backward_in_float32": {"float16": [(9, None)], "bfloat16": [(9, 256)]}}
    assert is_faster(rules, "backward_in_float32", torch.float16, 5000)
    assert not is_faster(rules, "backward_in_float32", torch.float32, 64)
    assert not is_faster(rules, "backward_by_tiles", torch.float16, 64)


def test_one_head_dim_that_is_slower_is_enough():
    slower = [
        cell._replace(ours=[1.3] * 3) for cell in timings(lambda rows: 0.5) if cell.rows > 999
    ]
    assert decide(timings(lambda rows: 0.5) + slower) == {
        "forward_by_tiles": {"float32": [(9, 512)]}
    }


def test_noise_chooses_the_stock_kernel():
    noisy = [cell._replace(ours=[0.5, 1.4, 1.2]) for cell in timings(lambda rows: 0.5)]
    assert decide(noisy) == {}
    noisy = [cell._replace(theirs=[0.4, 1.4, 1.2]) for cell in timings(lambda rows: 0.5)]
    assert decide(noisy) == {}


def test_how_long_threads_waited():
    """In long calls, where a thread does not wait for Python."""
    assert tuning.delay(timings(lambda rows: 0.5)) == 1.0
    slow = [
        cell._replace(delay=9.0 if cell.rows < 999 else 2.0) for cell in timings(lambda rows: 0.5)
    ]
    assert tuning.delay(slow) == 2.0
    assert tuning.delay([]) == math.inf


def test_what_was_not_timed_is_the_stock_kernels():
    assert decide([]) == {}
    known = timings(lambda rows: 0.5, most=2048)
    assert decide(cell for cell in known if cell.rows != 129)["forward_by_tiles"] == {
        "float32": [(9, 128), (257, None)]
    }


def test_they_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "rules.json"
    for rules in ({}, RULES):
        write(rules, path)
        assert read(path) == rules
        assert list(tmp_path.iterdir()) == [path]
    assert tuning.digest(read(path)) == tuning.digest(RULES) != tuning.digest({})


def _changed(**changes):
    return json.dumps({"processor": tuning.processor(), "threads": 2, "rules": RULES} | changes)


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "null", "{}", "7", "[" * 100_000, _changed()[:-9], _changed() + "x",
        _changed(processor="another"),
        *(
            _changed(rules=rules)
            for rules in (
                [], None, {"by_magic": {}}, {"forward_by_tiles": []},
                *(
                    {"forward_by_tiles": {"float32": intervals}}
                    for intervals in (
                        [], [[]], [[1]], [[1, 2, 3]], [["1", 2]], [[1.5, 2]], [[True, 2]], [[0, 2]], [[3, 2]],
                        [[1, None], [5, 6]], [[1, 5], [5, 6]], [[7, 8], [1, 2]], [[1, 2**63]], "12", None,
                    )
                ),
                {"forward_by_tiles": {"float16": [[1, 2]]}},
            )
        ),
    ],
)  # fmt: skip
def test_a_broken_or_foreign_file_is_none(tmp_path, text):
    path = tmp_path / "rules.json"
    path.write_text(text)
    assert read(path) is None
    assert read(tmp_path) is None
    assert read(tmp_path / "missing") is None
    path.write_bytes(b"\xff\xfe")
    assert read(path) is None


def test_a_kill_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "rules.json"
    write(RULES, path)
    monkeypatch.setattr("os.replace", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write({}, path)
    assert read(path) == RULES


def test_another_processor_has_its_own(tmp_path, monkeypatch):
    library = tmp_path / "library.so"
    path = tuning.path_beside(library)
    assert path.parent == tmp_path
    assert path.name.startswith("library.so.")
    monkeypatch.setattr(tuning, "processor", lambda: "another")
    assert tuning.path_beside(library) != path


def test_words():
    assert tuning.in_words(RULES) == {
        "float32": "forward by tiles, rows 33 to 1,024 and from 4,097 on",
        "bfloat16": "backward in float32, rows 17 to 256",
        "float16": "backward in float32, rows from 9 on",
    }
    assert set(tuning.in_words({}).values()) == {"the stock kernel"}


@native_library
def test_every_way_is_timed_against_what_it_would_replace(monkeypatch):
    """The cells of one length, without asking how long they take."""
    monkeypatch.setattr(tuning, "_MAX_ROUNDS", 2)
    monkeypatch.setattr(tuning, "_SAMPLE_SECONDS", 1e-9)
    followed = []

    def follow(rules):
        followed.append(rules)
        native.set_rules(rules)

    before, threads = native.RULES, torch.get_num_threads()
    try:
        found = list(tuning.measure(native._attend, follow, lengths=[40]))
    finally:
        native.set_rules(before)
    assert [(cell.way, cell.dtype, cell.rows) for cell in found] == 2 * [
        ("forward_by_tiles", "float32", 40), ("backward_by_tiles", "float32", 40),
        ("forward_by_tiles", "bfloat16", 40), ("backward_in_float32", "bfloat16", 40),
        ("backward_by_tiles", "bfloat16", 40), ("backward_in_float32", "float16", 40),
    ]  # fmt: skip
    assert all(len(cell.ours) == len(cell.theirs) == 1 for cell in found)
    assert torch.get_num_threads() == threads
    assert {*map(str, followed)} == {
        str(tuning.everywhere(*ways)) for ways in ((), *([w] for w in tuning.WAYS))
    }


BUSY = [cell._replace(delay=2.0) for cell in timings(lambda rows: 0.5)]


# Of a machine so busy that every call was slow, not all lengths were reached.
@native_library
@pytest.mark.parametrize(
    "found", [BUSY, timings(lambda rows: 0.5, most=2048)], ids=["busy", "slow"]
)
def test_a_build_times_what_was_not_timed(found, tmp_path, monkeypatch, capsys):
    path = tmp_path / "rules.json"
    monkeypatch.setattr(native, "rules_path", lambda: path)
    monkeypatch.setattr(tuning, "measure", lambda attend, follow: found)
    before = native.RULES
    try:
        for said in (True, False):
            with pytest.warns(match="was busy") if said else nullcontext():
                assert main(["build"]) == 0
            told = capsys.readouterr().out
            assert ("timing it on this processor" in told) == said
            assert "float32   forward by tiles, rows from 9 on\n" in told
            assert told.endswith(f"{path}\n")
            assert read(path) == native.RULES == {"forward_by_tiles": {"float32": [(9, None)]}}
    finally:
        native.set_rules(before)
