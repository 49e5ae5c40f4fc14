import collections
import csv
import errno
import gzip
import json
import os
import tempfile
import time
from pathlib import Path

import datasets
import huggingface_hub
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from stablemask.data import load_documents, load_tokenizer
from stablemask.data.records import read_records
from stablemask.data.sources import open_source, read_documents
from stablemask.data.splitting import cut_documents
from stablemask.errors import InputError

from ..test_reading import DEEP, unreadable_paths
from .conftest import sides_of, write_json_lines


def write_parquet(path: Path, columns: dict[str, list]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path)
    return path


# What is read


def test_builtin_is_the_library_without_its_tests():
    documents = load_documents("builtin")
    assert 5e6 < sum(map(len, documents)) < 30e6
    assert any("class OrderedDict(dict)" in text for text in documents)  # collections
    assert not any("class MinidomTest(" in text for text in documents)  # test.test_minidom
    assert documents == load_documents("builtin")
    held_out = sum(map(len, load_documents("builtin", split="validation")))
    assert 0.02 < held_out / sum(map(len, documents)) < 0.09


def install(folder: Path, name: str, version: str, files: dict[str, str]) -> None:
    """A package as an installer leaves it."""
    about = folder / f"{name}-{version}.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (about / "RECORD").write_text(
        "".join(f"{file},,\n" for file in [*files, "gone.py", "../run.py"])
    )
    for file, text in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)


def test_builtin_packages_are_the_library_and_each_text_of_the_packages_once(tmp_path, monkeypatch):
    (tmp_path / "run.py").write_text("a script")
    site = tmp_path / "site"
    install(site, "Zeta", "2.0", {"zeta/a.py": "zeta = 1\n", "zeta/copy.py": "one = 1\n"})
    install(site, "alpha", "1.5", {"alpha/b.py": "one = 1\n", "alpha/b.txt": "text",
                                   "alpha/tests/c.py": "tested = 1\n"})  # fmt: skip
    monkeypatch.setattr("sys.path", [str(site)])
    library = load_documents("builtin")
    source = open_source("builtin:packages")
    documents = [document.text for document in source.documents()]
    assert documents[-2:] == ["one = 1\n", "zeta = 1\n"]
    assert documents[:-2] == list(dict.fromkeys(library))
    assert source.packages == {"alpha": "1.5", "zeta": "2.0"}
    before = list(source.fingerprint())
    install(site, "Beta", "3", {"beta.py": "beta = 1\n"})
    assert list(open_source("builtin:packages").fingerprint()) != before


def test_folder_is_read_in_order_of_names(text_folder):
    (text_folder / ".hidden.txt").write_text("not a source")
    (text_folder / "part0" / "blank.txt").write_text(" \n")
    paths = sorted(text_folder.rglob("[0-9]*.txt"), key=lambda path: path.as_posix())
    assert load_documents(str(text_folder)) == [path.read_text() for path in paths]


def test_what_a_folder_has_beside_text_is_told(tmp_path):
    for name in ("a.txt", "b.md", "deep/c.MD", "d.html", "e.htm", "f.html", "g.tar.gz", "README"):
        (tmp_path / "mix" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mix" / name).write_text(f"text of {name}")
    (tmp_path / "mix/.hidden.html").write_text("")
    (tmp_path / "mix/other").symlink_to(tmp_path)
    counts = "2 .html, 1 .htm, 1 .tar.gz, 1 without extension, 1 link to a folder"
    for _ in range(2):
        with pytest.warns(match="of 9 files in '.*mix', 3 are read; not read: .*") as told:
            documents = load_documents(str(tmp_path / "mix"))
        assert documents == ["text of a.txt", "text of b.md", "text of deep/c.MD"]
        (warning,) = told
        found = str(warning.message).partition("not read: ")[2].split(", ")
        assert sorted(found) == sorted(counts.split(", "))


def test_a_folder_of_text_alone_tells_nothing(text_folder, recwarn):
    load_documents(str(text_folder))
    assert not recwarn


def test_text_is_kept_as_it_is(tmp_path):
    path = tmp_path / "a.TXT"
    path.write_bytes(b"\xef\xbb\xbfline\r\n\ttab \xc3\xa9\n")  # a byte order mark is not text
    assert load_documents(str(path)) == ["line\r\n\ttab é\n"]


def test_documents_are_read_one_at_a_time(tmp_path, records):
    """What is damaged behind them does not keep the first ones from being read."""
    path = write_json_lines(tmp_path / "a.jsonl", records)
    path.write_text(path.read_text() + '{"text": "cut')
    documents = read_documents(str(path))
    assert [next(documents).text for _ in records] == records
    with pytest.raises(InputError, match="line 201: not a JSON record"):
        next(documents)


def compress(path: Path) -> list[Path]:
    """The file at ``path`` beside itself, by gzip and by zstandard, in two members or frames each."""
    half = path.stat().st_size // 2
    parts = path.read_bytes()[:half], path.read_bytes()[half:]
    packed = [path.with_name(f"gz-{path.name}.gz"), path.with_name(f"zst-{path.name}.zst")]
    packed[0].write_bytes(b"".join(map(gzip.compress, parts)))
    packed[1].write_bytes(b"".join(map(zstandard.compress, parts)))
    return packed


def write_delimited(path: Path, texts: list[str], delimiter: str) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(
            [("id", "text"), *((str(number), text) for number, text in enumerate(texts))]
        )
    return path


def test_record_files_agree(tmp_path, records):
    records[7] = 'a "quoted",\ttext\r\nof two lines, and a long one: ' + "na " * 60_000
    plain = write_json_lines(tmp_path / "a.jsonl", records)
    rows = [json.loads(line) for line in plain.read_text().splitlines()]
    (tmp_path / "array.json").write_text(json.dumps(rows))
    (tmp_path / "pretty.json").write_text("\ufeff\n" + json.dumps(rows, indent=2))
    (tmp_path / "lines.json").write_text("\n" + plain.read_text())
    comma = write_delimited(tmp_path / "b.csv", records, ",")
    tab = write_delimited(tmp_path / "b.tsv", records, "\t")
    parquet = write_parquet(tmp_path / "c.parquet", {"text": records, "id": range(200)})
    array, pretty, lines = (tmp_path / f"{name}.json" for name in ("array", "pretty", "lines"))
    packed = [*compress(plain), *compress(comma), *compress(array)]
    for path in (plain, parquet, array, pretty, lines, comma, tab, *packed):
        assert load_documents(str(path)) == records
        assert sides_of(str(path)) == sides_of(str(plain))
        ids = [record.fields["id"] for record in read_records(str(path))]
        assert list(map(int, ids)) == list(range(200))


def test_one_record_over_several_lines(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"text": "one", "id": 1}, indent=2))
    assert load_documents(str(tmp_path)) == ["one"]


def test_compressed_text(tmp_path):
    plain = tmp_path / "a.txt"
    plain.write_text("line\n" * 99 + "你好")
    for path in compress(plain):
        assert load_documents(str(path)) == [plain.read_text()]
    assert load_documents(str(tmp_path)) == [plain.read_text()] * 3


def test_position_goes_to_the_end(tmp_path, records):
    """What the time left is told by."""
    path = write_json_lines(tmp_path / "mix/a.jsonl", records)
    compress(path)
    write_parquet(tmp_path / "mix/c.parquet", {"text": records})
    write_delimited(tmp_path / "mix/c.csv", records, ",")
    (tmp_path / "mix/b.json").write_text(json.dumps([{"text": text} for text in records]))
    (tmp_path / "mix/d.txt").write_text("the end")
    source = open_source(str(tmp_path / "mix"))
    assert source.num_bytes == sum(file.stat().st_size for file in (tmp_path / "mix").iterdir())
    positions = [source.position for _ in source.documents()]
    assert positions == sorted(positions)
    assert 0 < positions[0] < positions[-1] == source.num_bytes


def test_text_column_and_missing_text(tmp_path):
    parquet = write_parquet(tmp_path / "a.parquet", {"body": ["one", None, "", "two"]})
    assert load_documents(str(parquet), text_column="body") == ["one", "two"]
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"body": "one"}\n\n{"body": null}\n{"body": "two"}')
    assert load_documents(str(lines), text_column="body") == ["one", "two"]


@pytest.mark.parametrize("saved", [False, True], ids=["files", "save_to_disk"])
def test_dataset_folder_keeps_its_own_validation(tmp_path, records, saved):
    folder = tmp_path / "dataset"
    if saved:
        datasets.DatasetDict(
            train=datasets.Dataset.from_dict({"text": records[:150]}),
            validation=datasets.Dataset.from_dict({"text": records[150:]}),
        ).save_to_disk(str(folder))
    else:
        write_json_lines(folder / "train.jsonl", records[:150])
        write_json_lines(folder / "validation.jsonl", records[150:])
    source = f"hub:{folder}"
    assert load_documents(source, split="train") == records[:150]
    assert load_documents(source, split="validation") == records[150:]
    assert load_documents(source) == records


def test_dataset_without_validation_is_split_as_its_files_are(tmp_path, records):
    path = write_json_lines(tmp_path / "dataset/train.jsonl", records)
    assert sides_of(f"hub:{path.parent}") == sides_of(str(path))


def test_dataset_configuration(tmp_path):
    write_json_lines(tmp_path / "dataset/en/a.jsonl", ["english"])
    write_json_lines(tmp_path / "dataset/fr/a.jsonl", ["français"])
    (tmp_path / "dataset/README.md").write_text(
        "---\nconfigs:\n- config_name: en\n  data_files: en/*.jsonl\n"
        "- config_name: fr\n  data_files: fr/*.jsonl\n---\n"
    )
    assert load_documents(f"hub:{tmp_path / 'dataset'}:fr") == ["français"]
    with pytest.raises(InputError, match="de"):
        load_documents(f"hub:{tmp_path / 'dataset'}:de")


# How it is split


def test_split_of_files_goes_by_relative_name(text_folder):
    _, before = sides_of(str(text_folder), validation_fraction=0.2)
    moved = text_folder.rename(text_folder.with_name("moved"))
    for path in moved.rglob("*.txt"):
        path.write_text(path.read_text().replace("counts", "still counts"))
    (moved / "new.txt").write_text("one more")
    _, after = sides_of(str(moved), validation_fraction=0.2)
    assert [text.replace("still ", "") for text in after if text != "one more"] == before


def test_names_that_are_no_unicode_are_split_too(text_folder):
    (text_folder / os.fsdecode(b"caf\xe9.txt")).write_text("a text from an old machine")
    train, validation = sides_of(str(text_folder), validation_fraction=0.2)
    assert "a text from an old machine" in train + validation


def test_split_of_records_goes_by_content(tmp_path, records):
    twice = write_json_lines(tmp_path / "a.jsonl", records[::-1] + records)
    train, validation = sides_of(str(twice))
    assert validation
    assert not set(train) & set(validation)


def test_one_text_file_is_cut_at_a_line(tmp_path):
    path = tmp_path / "a.txt"
    text = "".join(f"line {number}\n" for number in range(1000))
    path.write_text(text)
    (train,), (validation,) = sides_of(str(path))
    assert train + validation == text
    assert validation.startswith("line")
    assert 0.045 * len(text) < len(validation) <= 0.05 * len(text)
    assert load_documents(str(path)) == [text]


@given(
    documents=st.lists(st.text("ab\n", min_size=1), min_size=1, max_size=5),
    fraction=st.floats(0.01, 0.99),
)
def test_cut_loses_nothing_and_fills_both_sides(documents, fraction):
    train, validation = cut_documents(documents, fraction)
    assert "".join(train + validation) == "".join(documents)
    assert all(train + validation)
    if sum(map(len, documents)) > 1:
        assert train
        assert validation


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(min_size=1).filter(lambda text: not text.isspace()), min_size=1))
def test_any_records_are_split_without_loss(texts):
    with tempfile.TemporaryDirectory() as folder:
        path = write_json_lines(Path(folder) / "a.jsonl", texts)
        train, validation = sides_of(str(path), validation_fraction=0.5)
        assert load_documents(str(path)) == texts
    was_cut = "".join(train + validation) == "".join(texts)  # all had fallen on one side
    assert was_cut or collections.Counter(train + validation) == collections.Counter(texts)


# What is refused


def refused(source: object, *parts: str, **options) -> None:
    with pytest.raises(InputError) as info:
        sides_of(str(source), **options)
    message = str(info.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_missing_path(tmp_path):
    refused(tmp_path / "nope.txt", "nope.txt", "builtin", "hub:OWNER/NAME")
    refused("", "no file or folder ''")


def test_empty_folder(tmp_path):
    refused(tmp_path, str(tmp_path), "no file that can be read", ".txt, .md, .jsonl")


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        ("a.docx", b"text", ".csv and .tsv, each also with .gz or .zst, and .parquet"),
        ("a.txt", b" \n", "holds no text"),
        *(("a.txt", data, "UTF-8") for data in (b"ELF\0\1\2", b"caf\xe9 noir", b"\xff\xfea\0b\0")),
        ("a.jsonl", b'{"text": "cut', "line 2: not a JSON record"),
        ("a.jsonl", b"\xff", "line 2: not a JSON record"),
        ("a.jsonl", b'["text"]', "line 2: a JSON object is wanted, not list"),
        ("a.jsonl", b'{"body": "x", "id": 1}', "2: no column 'text'; the columns are: body, id"),
        ("a.jsonl", b'{"text": 5}', "line 2: column 'text' holds int"),
        ("a.jsonl", b'{"text": "\\ud800"}', "line 2: column 'text' is not valid Unicode"),
        (
            "a.jsonl",
            b'{"text": ' + DEEP.encode() + b"}",
            "not a JSON record: it is nested too deep",
        ),
        ("a.json", b'[{"text": "a"}, ["b"]]', "record 2: a JSON object is wanted, not list"),
        ("a.json", b'[{"text": "a"}, {"body": "b"}]', "2: no column 'text'; the columns are: body"),
        ("a.json", b'{"text": "a"}\n{"text": ', "line 2: not a JSON record"),
        ("a.json", b'[{"text": "a"},', "neither an array nor lines of JSON"),
        ("a.json", b'{"text": ', "neither an array nor lines of JSON"),
        ("a.json", b'"text"', "record 1: a JSON object is wanted, not str"),
        ("a.json", DEEP.encode(), "nested too deep"),
        ("a.json", b"", "holds no text"),
        ("a.csv", b"body,id\nx,1\n", "no column 'text'; the columns are: body, id"),
        ("a.csv", b"text,id\nx,1\ny\n", "line 3: not as many fields as the 2 columns"),
        ("a.csv", b"text,id\nx,1\ny, z,2\n", "line 3: not as many fields as the 2 columns"),
        ("a.csv", b'text,id\n"x,1\ny,2\n', "unexpected end of data"),
        ("a.csv", b'text,id\n"x" y,1\n', "line 2: "),
        ("a.csv", b"text,id\ncaf\xe9,1\n", "not UTF-8"),
        ("a.csv", b"", "holds no text"),
    ],
)
def test_malformed_files(tmp_path, name, data, problem):
    first = b'{"text": "fine"}\n' if name == "a.jsonl" else b""
    (tmp_path / name).write_bytes(first + data)
    refused(tmp_path / name, name, problem)
    if name == "a.csv":
        (tmp_path / "a.tsv").write_bytes(data.replace(b",", b"\t"))
        refused(tmp_path / "a.tsv", "a.tsv", problem)


def test_conversations_without_text_are_told_where_they_are_read(tmp_path):
    for columns in ("messages", "conversations", "prompt completion", "instruction output input"):
        path = tmp_path / "a.jsonl"
        path.write_text(json.dumps(dict.fromkeys(columns.split(), "x")))
        refused(path, "no column 'text'", "conversations", "stablemask finetune")


def test_columns_are_named_in_few_words(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(",".join(f"{'long' * 99}{number}" for number in range(99)) + "\n")
    with pytest.raises(InputError, match=r"and 79 more$") as info:
        load_documents(str(path))
    assert len(str(info.value)) < 1200


def test_paths_that_cannot_be_read(tmp_path):
    paths = unreadable_paths(tmp_path)
    for reason in ("symbolic links", "name too long", "Not a directory", "No such file"):
        told = "no file or folder" if reason == "No such file" else reason
        refused(paths[reason], str(paths[reason]), told)
    (tmp_path / "mix").mkdir()
    (tmp_path / "mix/a.txt").symlink_to("a.txt")
    refused(tmp_path / "mix", "mix/a.txt", "symbolic links")
    os.mkfifo(tmp_path / "pipe.jsonl")
    refused(tmp_path / "pipe.jsonl", "pipe.jsonl", "no regular file")
    refused("~nobody-of-that-name/a.txt", "~nobody-of-that-name")
    refused("hub:~nobody-of-that-name/a", "~nobody-of-that-name")
    refused(f"hub:{'a' * 300}", "hub:")


def test_a_folder_that_cannot_be_read_is_not_passed_over(text_folder, monkeypatch):
    def scandir(path, scandir=os.scandir):
        if str(path).endswith("part1"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scandir)
    refused(text_folder, "part1", "Permission denied")


def test_parquet_of_what_python_cannot_hold(tmp_path):
    import pyarrow as pa

    damaged = pa.array([b"caf\xe9"]).view(pa.string())
    path = write_parquet(tmp_path / "a.parquet", {"text": damaged})
    refused(path, "a.parquet", "not a readable Parquet file")
    far = pa.array([2**60], pa.timestamp("ms"))
    path = write_parquet(tmp_path / "b.parquet", {"text": ["fine"], "time": far})
    assert load_documents(str(path)) == ["fine"]
    with pytest.raises(InputError, match=r"b\.parquet"):
        list(read_records(str(path)))


def test_malformed_parquet(tmp_path):
    whole = write_parquet(tmp_path / "a.parquet", {"body": ["x"], "n": [1]})
    refused(whole, "no column 'text'; the columns are: body, n")
    refused(whole, "holds int", text_column="n")
    whole.write_bytes(whole.read_bytes()[:-20])
    refused(whole, "a.parquet", "not a readable Parquet file")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.txt.gz", "a.txt.zst"])
def test_malformed_compressed_files(tmp_path, name):
    path = tmp_path / name
    lines = [json.dumps({"text": os.urandom(999).hex()}) + "\n" for _ in range(999)]
    zstd = zstandard.ZstdCompressor(write_checksum=True)
    data = (gzip.compress if name.endswith("gz") else zstd.compress)("".join(lines).encode())
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 0xFF
    for damaged in (data[:-1], data[: len(data) // 2], data + data[:99], b"plain\n", flipped):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"^[^\n]*$") as info:
            collections.deque(read_documents(str(path)), maxlen=0)
        if damaged is not flipped:  # which may first give a line that is none
            assert str(info.value).startswith(f"cannot read '{path}': ")


def test_datasets_that_do_not_load(tmp_path):
    write_json_lines(tmp_path / "other/test.jsonl", ["x"])
    refused(f"hub:{tmp_path / 'other'}", "no 'train' split", "test")
    write_json_lines(tmp_path / "column/train.jsonl", ["x"], column="body")
    refused(f"hub:{tmp_path / 'column'}", "no column 'text'; the columns are: body, id")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/train.jsonl").write_text('{"text": "a"}\n{"text": \n')
    refused(f"hub:{tmp_path / 'damaged'}", "cannot load", "JSON")
    (tmp_path / "empty").mkdir()
    refused(f"hub:{tmp_path / 'empty'}", "cannot load", "empty")
    for name in ("", "a/b/c", "/no/folder", "./none"):
        refused(f"hub:{name}", "neither a folder nor a name on the Hub")


def test_hub_out_of_reach_is_told_at_once():
    start = time.monotonic()
    refused(
        "hub:owner/name:config",
        "'hub:owner/name:config': cannot reach http://127.0.0.1:9;",
        "network",
    )
    assert time.monotonic() - start < 8


def test_hub_offline_looks_in_the_cache_alone(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    refused("hub:owner/name", "cannot load 'hub:owner/name'")
    with pytest.raises(InputError, match="tokenizer 'owner/name' is missing or damaged"):
        load_tokenizer("owner/name")


def test_settings(tmp_path):
    for fraction in (0, 1, -0.5, 2, float("nan")):
        refused("builtin", f"validation fraction {fraction}", validation_fraction=fraction)
    with pytest.raises(InputError, match="split 'test'"):
        load_documents("builtin", split="test")
