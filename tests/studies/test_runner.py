"""Studies are run job by job, each record kept, and gone on with after any stop."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from stablemask.errors import InputError, RunError
from stablemask.writing import only_writer
from studies import runner
from studies.__main__ import main
from studies.page import write_page
from studies.runner import run_studies
from studies.study import Job

from .. import marks
from . import jobs as made
from .jobs import squares, study_of

ROOT = Path(__file__).parents[2]


def run(out, *studies, workers=1, **more):
    run_studies(
        studies, scale="small", seeds=1, workers=workers, out=out, command="the command", **more
    )


def squared(out):
    """Which numbers have been squared, over all runs."""
    return sorted(map(int, (out / "work" / "squared.txt").read_text().split()))


def test_what_is_done_is_not_done_again_and_what_has_changed_is(tmp_path):
    run(tmp_path, study_of(*squares(1, 2)))
    assert squared(tmp_path) == [1, 2]
    document = json.loads((tmp_path / "squares.json").read_text())
    assert [record["square"] for record in document["records"]] == [1, 4]
    assert document["command"] == "the command"
    assert {"hardware", "versions", "date", "seeds", "scale", "workers"} <= document.keys()

    # Gone on with on another machine, both are named.
    path = tmp_path / "work/records/squares/square-1.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hardware": "another"}))
    changed = Job("square-2", made.square, {"number": 5})
    run(tmp_path, study_of(*squares(1), changed, *squares(3)))
    assert squared(tmp_path) == [1, 2, 3, 5]
    again = json.loads((tmp_path / "squares.json").read_text())
    assert [record["square"] for record in again["records"]] == [1, 25, 9]
    assert again["hardware"] == f"another; {document['hardware']}"
    logs = "".join(path.read_text() for path in (tmp_path / "work").glob("jobs-*.log"))
    assert "squaring 5" in logs


def test_what_stands_in_a_written_study_is_not_done_again(tmp_path):
    """Where the records of its jobs are gone, as from a folder that was committed."""
    run(tmp_path, study_of(*squares(1, 2)))
    path = tmp_path / "squares.json"
    document = json.loads(path.read_text())
    for record in document["records"]:  # as they were before they said what had made them
        for name in ("date", "hardware", "python", "torch", "transformers"):
            del record[name]
    earlier = {"date": "2020-01-01", "hardware": "another"}
    earlier["versions"] = document["versions"] | {"torch": "1.0"}
    path.write_text(json.dumps(document | earlier))
    shutil.rmtree(tmp_path / "work")

    run(tmp_path, study_of(*squares(2, 3)))
    assert squared(tmp_path) == [3]
    again = json.loads(path.read_text())
    assert [record["square"] for record in again["records"]] == [4, 9]
    assert again["date"] == f"2020-01-01; {document['date']}"
    assert again["hardware"] == f"another; {document['hardware']}"
    assert again["versions"]["torch"] == f"1.0; {document['versions']['torch']}"
    assert again["versions"]["python"] == document["versions"]["python"]
    # A damaged one is written anew.
    path.write_text("{")
    run(tmp_path, study_of(*squares(3)))
    assert squared(tmp_path) == [3]
    assert [r["square"] for r in json.loads(path.read_text())["records"]] == [9]


def test_a_job_is_given_the_records_of_those_it_waits_for(tmp_path):
    last = Job("sum", made.add, {"number": 100}, after=("square-2", "square-3"))
    run(tmp_path, study_of(*squares(2, 3), last), workers=2)
    records = json.loads((tmp_path / "squares.json").read_text())["records"]
    assert [record["square"] for record in records] == [4, 9, 113]
    assert "before" not in records[-1]


def test_what_is_kept_for_good_is_not_done_again_elsewhere(tmp_path):
    """Of a study that stands alone, such as a training that another machine has made."""
    kept, first, second = (tmp_path / name for name in ("kept", "first", "second"))
    alone = replace(study_of(*squares(2)), alone=True)
    run(first, alone, kept=kept)
    assert json.loads((kept / "squares/square-2.json").read_text())["square"] == 4
    run(second, replace(study_of(*squares(2, 3)), alone=True), kept=kept)
    assert squared(second) == [3]
    records = json.loads((second / "squares.json").read_text())["records"]
    assert [record["square"] for record in records] == [4, 9]
    run(tmp_path / "third", study_of(*squares(2)), kept=tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_study_that_stands_alone_is_told_as_far_as_it_is_done(tmp_path):
    last = Job("sum", made.add, {"number": 100}, after=("square-2",))
    refused = Job("refuse", made.refuse, {"number": 7})
    halfway = replace(study_of(*squares(2), refused, last), alone=True)
    with pytest.raises(InputError, match="7 is not wanted"):
        run(tmp_path, halfway, kept=tmp_path / "kept")
    assert not (tmp_path / "squares.json").exists()  # the trial alone says nothing

    halfway = replace(study_of(*squares(2), last, refused), alone=True)
    with pytest.raises(InputError, match="7 is not wanted"):
        run(tmp_path, halfway, kept=tmp_path / "kept")
    page = tmp_path / "page.md"
    write_page({"squares": halfway}, tmp_path, page)
    assert (
        "## All squares\n\n*2 of 3 trainings are done. This tells of those.*\n\nThe sum is 108."
        in page.read_text()
    )


def test_a_job_that_fails_is_named_and_the_others_are_kept(tmp_path, monkeypatch):
    def result(*arguments):
        try:
            return runner_result(*arguments)
        finally:
            # What waits beside the failure ends only after the runner has seen it.
            (tmp_path / "work" / "stopped-7").touch()

    runner_result = runner._result
    monkeypatch.setattr(runner, "_result", result)
    refused = Job("refuse", made.refuse, {"number": 7})
    with pytest.raises(InputError, match="squares, refuse: 7 is not wanted"):
        run(tmp_path, study_of(made.waiting(7), refused, *squares(1)), workers=2)
    assert (tmp_path / "work/records/squares/wait-7.json").exists()
    assert not (tmp_path / "work/records/squares/square-1.json").exists()
    assert not (tmp_path / "squares.json").exists()
    with pytest.raises(RunError, match="the process of squares, die died"):
        run(tmp_path, study_of(Job("die", made.die, {})))


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=marks.nightly)]
)
def test_a_signal_stops_the_jobs_and_they_go_on_later(tmp_path, number):
    script = (
        "from pathlib import Path\n"
        "from studies.runner import Stopped, run_studies\n"
        "from tests.studies.jobs import *\n"
        "if __name__ == '__main__':\n"
        "    try:\n"
        "        run_studies([study_of(*squares(1), waiting(1), waiting(2), waiting(3))], scale='small',\n"
        "                    seeds=1, workers=2, out=Path(sys.argv[1]), command='')\n"
        "    except Stopped as stop:\n"
        "        sys.exit(40 + stop.signal)\n"
    )
    program = tmp_path / "program.py"
    program.write_text("import sys\n" + script)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "src")))}
    out = tmp_path / "out"
    command = [sys.executable, str(program), str(out)]
    process = subprocess.Popen(command, env=environment)
    begun = [out / "work" / f"begun-{i}" for i in (1, 2)]
    deadline = time.monotonic() + 120
    while not all(path.exists() for path in begun):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(number)
    assert process.wait(60) == 40 + number
    assert (out / "work" / "stopped-1").exists()
    assert (out / "work" / "stopped-2").exists()
    assert not (out / "work" / "begun-3").exists()
    assert not (out / "squares.json").exists()

    (out / "work" / "stopped-3").touch()
    again = study_of(*squares(1), *map(made.waiting, (1, 2, 3)))
    run(out, again)
    assert squared(out) == [1]
    assert (out / "squares.json").exists()


def test_the_page_is_made_of_the_records_alone(tmp_path):
    study = study_of(*squares(1, 2, 3))
    out, page = tmp_path / "out", tmp_path / "docs" / "results.md"
    with pytest.raises(InputError, match="holds no results"):
        write_page({"squares": study}, out, page)
    run(out, study)
    lines = write_page({"squares": study, "cubes": study_of(name="cubes")}, out, page)
    assert lines == ["reproduced           1 + 4 + 9 = 14"]
    text = page.read_text()
    assert "| 1 + 4 + 9 = 14 | 2 of 2 | **reproduced** |\n\nAs I said: reproduced." in text
    assert (
        "\n## All squares\n\nThe sum is 14.\n\n| number | square |\n| --- | --- |\n| 1 | 1 |\n"
        in text
    )
    assert "\n\n\n" not in text
    assert "Not run here: cubes." in text
    assert "the command" in text
    write_page({"squares": study, "cubes": study_of(name="cubes")}, out, page)
    assert page.read_text() == text

    document = json.loads((out / "squares.json").read_text())
    document["records"][0]["square"] = 2
    (out / "squares.json").write_text(json.dumps(document))
    assert write_page({"squares": study}, out, page)[0].startswith("not reproduced")
    del document["records"][0]["square"]
    (out / "squares.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match="squares are of another version"):
        write_page({"squares": study}, out, page)
    (out / "squares.json").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        write_page({"squares": study}, out, page)


def test_verdicts_are_compared_with_those_of_another_machine(tmp_path, capsys):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    text = (ROOT / "docs" / "results" / "reproduce" / "theory.json").read_text()
    for folder in (ours, theirs):
        folder.mkdir()
        (folder / "theory.json").write_text(text)
    command = ["page", "--out", str(ours), "--against", str(theirs)]
    assert main(command) == 0
    said = capsys.readouterr().out
    claims = said.count("reproduced ")
    assert claims > 1
    assert f"verdicts {claims} of {claims} as in {theirs}" in said

    document = json.loads(text)
    for record in document["records"]:
        for spread in record.get("spread", {}).values():
            spread["softmax"] = 0.5
    (theirs / "theory.json").write_text(json.dumps(document))
    assert main(command) == 1
    said = capsys.readouterr().out
    assert "differs  theory: " in said
    assert ": reproduced, there not reproduced" in said

    (theirs / "theory.json").unlink()
    assert main(command) == 2
    assert f"{theirs} holds no results" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cubes"], "'cubes' is not one of theory, position, language"),
        (["--seeds", "0"], "seeds must be at least 1, got 0"),
        (["--scale", "huge"], "'huge' is not one of small, gpu"),
        (["--text", "nowhere.txt"], "no file or folder 'nowhere.txt'"),
        (["page"], "holds no results"),
        (["--against", "nowhere"], "nowhere holds no results of a study"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, words, message):
    assert main(["--out", str(tmp_path / "out"), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()


def test_a_folder_with_results_is_not_written_over(tmp_path, capsys):
    (tmp_path / "cost.json").write_text("{}")
    assert main(["cost", "--out", str(tmp_path)]) == 2
    assert "is not empty; add --resume" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["cost.json"]


def test_the_folder_that_is_written_to_is_held(tmp_path, capsys):
    with only_writer(tmp_path):
        assert main(["theory", "--out", str(tmp_path), "--resume"]) == 2
    assert "another process is writing to" in capsys.readouterr().err
