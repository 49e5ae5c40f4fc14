"""What cannot be read is one line, whatever the reason."""

import pytest

from stablemask.errors import InputError
from stablemask.reading import parse_json, read_json, user_path

DEEP = "[" * 100_000 + "]" * 100_000


def unreadable_paths(folder, suffix=".json"):
    """Paths by the reason that the system gives, as a user may write them."""
    names = ("none", "folder", "file", "loop", "a" * 300)
    missing, directory, file, loop, long = (folder / f"{name}{suffix}" for name in names)
    directory.mkdir()
    file.write_text("{}")
    loop.symlink_to(loop.name)
    return {
        "No such file": missing,
        "Is a directory": directory,
        "Not a directory": file / f"a{suffix}",
        "symbolic links": loop,
        "name too long": long,
    }


def test_a_path_that_cannot_be_read_is_named_with_the_reason(tmp_path):
    for reason, path in unreadable_paths(tmp_path).items():
        with pytest.raises(InputError, match=reason) as info:
            read_json(path)
        assert str(path) in str(info.value)
        assert "\n" not in str(info.value)


@pytest.mark.parametrize("text", ["", "{", '{"a": 1} x', DEEP, "caf\xe9", "[1" + "0" * 5000])
def test_what_is_no_json_is_a_value_error(text, tmp_path):
    data = text.encode("latin-1")
    with pytest.raises(ValueError):
        parse_json(data)
    path = tmp_path / "a.json"
    path.write_bytes(data)
    with pytest.raises(InputError, match="is not JSON: ") as info:
        read_json(path)
    assert "\n" not in str(info.value)


def test_json_is_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"né": [1, 2.5, null]}', encoding="utf-8")
    assert read_json(path) == {"né": [1, 2.5, None]}


def test_homes():
    assert user_path("a/b").as_posix() == "a/b"
    with pytest.raises(InputError, match="~nobody-of-that-name/a"):
        user_path("~nobody-of-that-name/a")
    with pytest.raises(InputError, match="null character"):
        user_path("a\0b")
