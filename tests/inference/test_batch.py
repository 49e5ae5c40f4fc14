"""A file of prompts: read strictly, answered line by line, and gone on with wherever it was cut."""

import json

import pytest

from stablemask.errors import InputError
from stablemask.inference.batch import answer_prompts, open_answers, read_prompts

from ..test_reading import DEEP, unreadable_paths

PROMPTS = ["one", "zwei 漢字", 'three "quoted"\\', "four", "five", "six", "seven"]
RECORDS = [{"id": number, "prompt": prompt} for number, prompt in enumerate(PROMPTS)]


def answer(prompts, *, seed):
    """Depends on what a model's answer depends on: the whole batch, the place in it and the seed."""
    return [f"{place} of {prompts} by {seed}\nü" for place in range(len(prompts))]


def complete(out, *, resume=False, answer=answer, seed=None, batch_size=3):
    done = open_answers(out, RECORDS, resume=resume)
    answer_prompts(RECORDS, out, answer, done=done, batch_size=batch_size, seed=seed)


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_a_prompt_a_line(write):
    path = write("prompts.txt", "\ufeffone\r\n\n  zwei 漢字 \n \nthree")
    assert read_prompts(path) == {
        1: {"prompt": "one"},
        3: {"prompt": "  zwei 漢字 "},
        5: {"prompt": "three"},
    }


def test_a_record_a_line(write):
    lines = [json.dumps(record) for record in RECORDS]
    path = write("prompts.jsonl", "\n".join([lines[0], "", *lines[1:]]))
    assert list(read_prompts(path).values()) == RECORDS
    assert list(read_prompts(path)) == [1, 3, 4, 5, 6, 7, 8]


def test_messages(write):
    record = {"prompt": [{"role": "user", "content": "hello"}]}
    path = write("prompts.jsonl", json.dumps(record))
    assert read_prompts(path, chat=True) == {1: record}
    with pytest.raises(InputError, match="line 1: 'prompt' holds list; text is wanted"):
        read_prompts(path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.csv", "a", "must be a .txt or .jsonl file, got"),
        ("p.txt", "\n \n", "holds no prompts"),
        ("p.txt", b"a\n\xff\nb\n\xff", "line 2: not UTF-8 text; wrong too: 4"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": "b"', "line 2: not a JSON record: "),
        ("p.jsonl", '{"prompt": "a"}\n["b"]\n', "line 2: a JSON object with the field 'prompt'"),
        ("p.jsonl", '{"text": "a"}', "line 1: a JSON object with the field 'prompt'"),
        ("p.jsonl", '{"prompt": 3}', "line 1: 'prompt' holds int; text is wanted"),
        ("p.jsonl", '{"prompt": "\\ud800"}', "line 1: not UTF-8 text"),
        ("p.jsonl", '{"prompt": "a", "generated_text": "b"}', "'generated_text' is there already"),
        ("p.jsonl", '{"prompt": ' + DEEP + "}", "line 1: not a JSON record: it is nested too deep"),
        ("p.jsonl", "x\n" * 23, "line 1: .*; wrong too: 2, 3, .*, 21 and 2 more"),
    ],
)
def test_bad_files(write, name, content, words):
    path = write(name, content)
    with pytest.raises(InputError, match=words) as error:
        read_prompts(path)
    assert str(path) in str(error.value)


def test_no_file(tmp_path):
    for reason, path in unreadable_paths(tmp_path, ".txt").items():
        with pytest.raises(InputError, match=f"cannot read '{path}': .*{reason}"):
            read_prompts(path)


@pytest.mark.parametrize(
    "content",
    [
        '{"prompt": ' + DEEP + "}\n",
        "[1]\n",
        "precious",
        '{"id": 0, "prompt": "one"}',
        '{"id": 0, "prompt": "one", "generated_text": 1}\n',
    ],
)
def test_what_is_no_answer_is_neither_gone_on_with_nor_cut(tmp_path, content):
    out = tmp_path / "answers.jsonl"
    out.write_text(content)
    with pytest.raises(InputError, match="line 1 is no answer"):
        open_answers(out, RECORDS, resume=True)
    assert out.read_text() == content


def test_numbers_that_json_does_not_have(write, tmp_path):
    records = list(read_prompts(write("p.jsonl", '{"prompt": "a", "x": [NaN, 1e999]}')).values())
    out = tmp_path / "out.jsonl"
    answer_prompts(records, out, answer, batch_size=1)
    line = json.loads(out.read_text(), parse_constant=pytest.fail)
    assert line == {"prompt": "a", "x": [None, None], "generated_text": "0 of ['a'] by None\nü"}
    assert open_answers(out, records, resume=True) == 1


@pytest.mark.parametrize("prompt", ["hello", [], ["hello"], [{"role": "user"}]])
def test_bad_messages(write, prompt):
    path = write("p.jsonl", json.dumps({"prompt": [prompt]}))
    with pytest.raises(InputError, match="a list of messages with role and content is wanted"):
        read_prompts(path, chat=True)


def test_answers_stand_beside_what_was_asked(tmp_path):
    out = tmp_path / "new" / "answers.jsonl"
    complete(out)
    lines = out.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {**record, "generated_text": text}
        for start in (0, 3, 6)
        for record, text in zip(
            RECORDS[start : start + 3], answer(PROMPTS[start : start + 3], seed=None), strict=True
        )
    ]


def test_cut_anywhere_a_run_ends_in_the_same_file(tmp_path):
    whole = tmp_path / "whole.jsonl"
    complete(whole, seed=7)
    content = whole.read_bytes()
    out = tmp_path / "out.jsonl"
    for cut in range(len(content) + 1):
        out.write_bytes(content[:cut])
        complete(out, resume=True, seed=7)
        assert out.read_bytes() == content, cut


def test_batches_and_runs_have_seeds_of_their_own(tmp_path):
    seeds = []

    def watch(prompts, *, seed):
        seeds.append(seed)
        return prompts

    for seed in (0, 1, -1):
        complete(tmp_path / f"{seed}.jsonl", answer=watch, seed=seed, batch_size=1)
    assert len(set(seeds)) == 3 * len(PROMPTS)


def test_what_is_done_is_on_disk_when_a_run_is_stopped(tmp_path):
    out = tmp_path / "out.jsonl"
    calls = []

    def stop_at_the_third(prompts, *, seed):
        calls.append(prompts)
        if len(calls) == 3:
            raise KeyboardInterrupt
        assert len(out.read_text().splitlines()) == 3 * (len(calls) - 1)
        return answer(prompts, seed=seed)

    with pytest.raises(KeyboardInterrupt):
        complete(out, answer=stop_at_the_third)
    assert len(out.read_text().splitlines()) == 6
    complete(out, resume=True)
    whole = tmp_path / "whole.jsonl"
    complete(whole)
    assert out.read_bytes() == whole.read_bytes()


def test_a_file_that_is_there_is_not_touched(tmp_path):
    out = tmp_path / "out.jsonl"
    out.write_text("precious\n")
    with pytest.raises(InputError, match="exists; go on with it by --resume"):
        open_answers(out, RECORDS, resume=False)
    with pytest.raises(InputError, match="line 1 is no answer to the prompt of its place"):
        open_answers(out, RECORDS, resume=True)
    assert out.read_text() == "precious\n"


def test_answers_to_other_prompts(tmp_path):
    out = tmp_path / "out.jsonl"
    complete(out)
    other = [*RECORDS[:4], {"id": 4, "prompt": "fünf"}, *RECORDS[5:]]
    with pytest.raises(InputError, match="line 5 is no answer"):
        open_answers(out, other, resume=True)
    with pytest.raises(InputError, match="line 6 is no answer"):
        open_answers(out, RECORDS[:5], resume=True)
    assert open_answers(out, RECORDS, resume=True) == len(RECORDS)


def test_a_folder_in_the_way(tmp_path):
    (tmp_path / "out.jsonl").mkdir()
    with pytest.raises(InputError, match="cannot write"):
        open_answers(tmp_path / "out.jsonl", RECORDS, resume=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        open_answers(tmp_path / "file" / "out.jsonl", RECORDS, resume=False)
