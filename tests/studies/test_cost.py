"""The newest benchmark files are read, and the verdicts follow from what is in them."""

import json
from pathlib import Path

import pytest

from stablemask.errors import InputError
from studies import cost

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
WORK = Path()


def write(folder, benchmark, date="2030-01-02", device="cpu", **parts):
    head = {"benchmark": benchmark, "date": date, "command": f"bench {benchmark}"}
    head |= {"hardware": f"a {device}", "versions": {"torch": "2.13.0"}}
    path = folder / f"{benchmark}-{device}-{date}.json"
    path.write_text(json.dumps(head | parts))
    return path


def timed(ratio, length=1024, dtype="float32", row="stablemask", **others):
    record = {"row": row, "pass": "forward+backward", "dtype": dtype, "kv_len": length}
    return {**record, "head_dim": 64, "groups": 1, "ratio": ratio, **others}


def held(ratio, length=1024, row="stablemask", over="sdpa"):
    record = {"row": row, "dtype": "float32", "kv_len": length, "over": over}
    return {**record, "mib": 10 * ratio, "ratio": ratio}


def trained(of_softmax):
    record = {"row": "stablemask", "preset": "tiny", "dtype": "float32", "of_softmax": of_softmax}
    return {**record, "tokens_per_second": 1000.0, "of_best_other": None, "mib": None}


def generated(of_sdpa):
    record = {"row": "stablemask", "dtype": "float32", "batch": 1, "prompt": 32}
    record |= {"prompt_ms": 100.0, "prompt_of_sdpa": 0.9}
    return {**record, "tokens_per_second": 10.0, "of_sdpa": of_sdpa}


def section(folder):
    files = cost.newest(folder)
    record = cost.read(WORK, results=str(folder), files=files)
    return cost.section([json.loads(json.dumps(record))])


def verdicts(folder):
    return [claim.verdict for claim in section(folder).claims]


def test_the_newest_of_each_benchmark_and_device_counts(tmp_path):
    for date in ("2030-01-02", "2029-12-31", "2030-01-01"):
        write(tmp_path, "attention", date)
    write(tmp_path, "attention", "2020-01-01", device="cuda")
    changed = write(tmp_path, "training", "2020-01-01")
    (tmp_path / "attention-cpu-2031-01-01.png").touch()
    before = cost.newest(tmp_path)
    assert list(before) == [
        "attention-cpu-2030-01-02.json",
        "attention-cuda-2020-01-01.json",
        "training-cpu-2020-01-01.json",
    ]
    changed.write_text("{}")  # so that the job is done anew
    after = cost.newest(tmp_path)
    assert {name for name in before if before[name] != after[name]} == {changed.name}


def test_without_results_the_two_commands_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (job,) = cost.jobs("small", 3)
    with pytest.raises(InputError) as error:
        job.run(WORK, **job.arguments)
    assert "python -m benchmarks attention --save benchmarks/results" in str(error.value)
    assert "python -m benchmarks training --save benchmarks/results" in str(error.value)


@pytest.mark.parametrize("content", ["{", "[]", '{"benchmark": "attention"}'])
def test_a_damaged_file_is_named(tmp_path, content):
    path = write(tmp_path, "attention")
    path.write_text(content)
    with pytest.raises(InputError, match=path.name):
        section(tmp_path)


@pytest.mark.parametrize(
    ("times", "memory", "speeds", "expected"),
    [
        ([1.05, 0.9], [1.05], [0.98], ["reproduced", "reproduced"]),
        ([1.051, 0.9], [1.0], [1.0], ["partly reproduced", "partly reproduced"]),
        ([1.0], [1.06], [1.0], ["partly reproduced", "reproduced"]),
        ([1.0], [1.0], [0.979, 1.0], ["reproduced", "partly reproduced"]),
        ([1.2], [1.2], [0.9], ["not reproduced", "not reproduced"]),
        ([1.0], [1.0], [], ["reproduced", "open"]),
        ([], [], [], ["open", "open"]),
    ],
)
def test_verdicts_follow_the_rule(tmp_path, times, memory, speeds, expected):
    write(
        tmp_path, "attention",
        attention=[timed(ratio, dtype=f"type{i}") for i, ratio in enumerate(times)],
        memory=[held(ratio) for ratio in memory],
    )  # fmt: skip
    if speeds:
        write(tmp_path, "training", training=[trained(speed) for speed in speeds])
    assert verdicts(tmp_path) == expected


def test_what_the_claims_do_not_speak_of_does_not_count(tmp_path):
    write(
        tmp_path, "attention",
        attention=[
            timed(1.0), timed(9.0, length=512), timed(9.0, row="definition"), timed(None, length=2048),
            timed(9.0, **{"pass": "forward"}), timed(9.0, row="stablemask blocks"),
        ],
        memory=[held(1.0), held(9.0, length=512), held(9.0, over="stablemask")],
    )  # fmt: skip
    write(tmp_path, "training", training=[trained(1.0), {**trained(0.1), "row": "plain"}])
    assert verdicts(tmp_path) == ["reproduced", "reproduced"]


def test_other_shapes_and_devices_do(tmp_path):
    write(tmp_path, "attention", attention=[timed(1.0), timed(1.2, groups=4)], memory=[held(1.0)])
    write(tmp_path, "training", training=[trained(1.0)])
    assert verdicts(tmp_path) == ["partly reproduced"] * 2
    write(tmp_path, "attention", "2030-01-03", attention=[timed(1.0)], memory=[held(1.0)])
    assert verdicts(tmp_path) == ["reproduced"] * 2
    write(tmp_path, "attention", device="cuda", attention=[timed(1.2)], memory=[held(1.0)])
    assert verdicts(tmp_path) == ["partly reproduced"] * 2


@pytest.mark.parametrize(
    ("speeds", "verdict"),
    [([0.98, 1.1], "reproduced"), ([0.5, 1.0], "partly reproduced"), ([0.9], "not reproduced")],
)
def test_generation_is_asked_where_it_was_measured(tmp_path, speeds, verdict):
    write(tmp_path, "attention", attention=[timed(1.0)], memory=[held(1.0)])
    assert len(verdicts(tmp_path)) == 2
    write(tmp_path, "generation", generation=[generated(speed) for speed in speeds])
    assert verdicts(tmp_path)[2:] == [verdict]


def test_the_results_of_this_repository():
    told = section(RESULTS)
    attention = json.loads(max(RESULTS.glob("attention-cpu-*.json")).read_text())
    ratios = [
        record["ratio"]
        for record in attention["attention"]
        if record["row"] == "stablemask"
        and record["pass"] == "forward+backward"
        and record["q_len"] >= 1024
    ]
    shown = told.tables["time"] + told.tables["shapes"]
    for ratio in ratios:
        assert f" {ratio:.2f} |" in shown
    for part in ("hardware", "date"):
        assert attention[part] in told.tables["sources"]
    # The files are of before the benchmarks left the package; the page names the commands of today.
    for words in ("attention", "training", "generation --model runs/smollm2"):
        assert f"`python -m benchmarks {words} --save benchmarks/results`" in told.tables["sources"]

    figure = told.figures["cpu"]
    assert told.facts["devices"] == {"cpu": attention["hardware"]}
    (line,) = (
        line
        for line in figure.axes[0].get_lines()
        if line.get_color() == "#0072b2" and line.get_linestyle() == "-"
    )
    drawn = [
        record["ratio"]
        for record in attention["attention"]
        if (record["row"], record["pass"], record["dtype"], record["head_dim"], record["groups"])
        == ("stablemask", "forward+backward", "float32", 64, 1)
    ]
    assert list(line.get_ydata()) == drawn
    for axes in figure.axes:
        assert "(tokens)" in axes.get_xlabel()
    assert all(figure.axes[i].get_ylabel() for i in (0, 2))
