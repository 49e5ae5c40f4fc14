"""Options as dataclasses: one definition serves Python callers, the command line and YAML files.

    @dataclass(kw_only=True)
    class GenerateOptions:
        model: str = option(MISSING, "folder or hub name of the model")
        max_new_tokens: int = option(64, "how many tokens to add")

``stablemask.cli.parser`` makes the flags of a command out of such a class.
"""

import dataclasses
import difflib
import numbers
import os
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from stablemask.errors import InputError
from stablemask.reading import reading, user_path
from stablemask.writing import write_whole


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] | None = None,
    positional: bool = False,
    rest: bool = False,
    group: str | None = None,
) -> Any:
    """A dataclass field that carries its help text and, where its text is limited, the allowed values.

    Pass ``dataclasses.MISSING`` as the default of a required option. The value of a ``positional`` one,
    or the values of its list, stand on the command line without a flag; those of a ``rest`` are all that
    follows ``--``. A ``group`` is a heading in the help, of this option and those that follow.
    """
    metadata = {
        "help": help, "choices": choices, "positional": positional, "rest": rest, "group": group,
    }  # fmt: skip
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class OptionField:
    """What the parser and the YAML reader need to know of one option."""

    name: str
    kind: Any
    default: Any
    help: str
    positional: bool
    rest: bool
    group: str | None

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def required(self) -> bool:
        return self.default is dataclasses.MISSING

    @property
    def item_kind(self) -> Any:
        """The type of one item of a list option, None for an option that is not a list."""
        for member in union_members(self.kind):
            if get_origin(member) is list:
                return get_args(member)[0]
        return None


def option_fields(options_class: type) -> list[OptionField]:
    """The options of a dataclass, in the order they are written."""
    kinds = get_type_hints(options_class)
    fields = []
    for field in dataclasses.fields(options_class):
        factory, metadata = field.default_factory, dict(field.metadata)
        kind, choices = kinds[field.name], metadata.pop("choices")
        if choices is not None:
            kind = _with_choices(kind, tuple(choices))
        default = field.default if factory is dataclasses.MISSING else factory()
        fields.append(OptionField(field.name, kind, default, **metadata))
    return fields


def _with_choices(kind: Any, choices: tuple[str, ...]) -> Any:
    """The choices in place of ``str``, wherever it stands in a type."""
    if kind is str:
        return Literal[choices]
    if get_origin(kind) is list:
        return list[_with_choices(get_args(kind)[0], choices)]  # type: ignore[misc]
    if len(members := union_members(kind)) > 1:
        return Union[tuple(_with_choices(member, choices) for member in members)]  # noqa: UP007
    return kind


def union_members(kind: Any) -> tuple[Any, ...]:
    """``int | None`` -> (int, NoneType); any other type stands alone."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def kind_name(kind: Any) -> str:
    """A type in a user's words: ``int | None`` -> "a whole number or none"."""
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    if get_origin(kind) is list:
        return f"a list, each item {kind_name(get_args(kind)[0])}"
    if kind in _KIND_NAMES:
        return _KIND_NAMES[kind]
    members = union_members(kind)
    if len(members) == 1:
        raise TypeError(f"an option cannot have the type {kind!r}")
    return " or ".join(kind_name(member) for member in members)


_KIND_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    type(None): "none",
}


def convert(value: Any, kind: Any, *, is_flag: bool = False) -> Any:
    """What a value of a YAML file or of a caller stands for, or the text of a flag.

    Raises:
        ValueError: it is nothing of this type; it says what would be right.
    """
    # "none" must not become the text of a `str | None`, so None is tried first.
    for member in sorted(union_members(kind), key=lambda member: member is not type(None)):
        try:
            return _convert(value, member, is_flag)
        except (ValueError, TypeError, OverflowError):
            continue
    raise ValueError(f"{value!r} is not {kind_name(kind)}")


def _convert(value: Any, kind: Any, is_flag: bool) -> Any:
    if kind is type(None):
        if value is None or (isinstance(value, str) and value.lower() == "none"):
            return None
    elif get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
    elif get_origin(kind) is list:
        items = value if isinstance(value, list | tuple) else [value]
        return [convert(item, get_args(kind)[0]) for item in items]
    elif kind is bool or isinstance(value, bool):
        if kind is bool and isinstance(value, bool):
            return value
    elif kind is float:
        # YAML 1.1 reads 1e-4 as text: only 1.0e-4 is a number to it.
        if isinstance(value, numbers.Real | str):
            return float(value)
    elif kind is int:
        if isinstance(value, str if is_flag else numbers.Integral):  # NumPy's too
            return int(value)
    elif kind is Path:
        if isinstance(value, str | Path):
            return user_path(value)
    elif isinstance(value, str | int | Path):
        return str(value)
    raise ValueError


def check_values(options: Any) -> None:
    """Give the fields of a dataclass of options the types they declare.

    Raises:
        InputError: the value of one is of another type, or not one of its choices.
    """
    for field in option_fields(type(options)):
        try:
            value = convert(getattr(options, field.name), field.kind)
        except ValueError as error:
            raise InputError(f"{field.name}: {error}") from None
        setattr(options, field.name, value)


def check_least(options: Any, **least: int) -> None:
    """Raise InputError where an option is given and below the number named here."""
    for name, bound in least.items():
        value = getattr(options, name)
        if value is not None and value < bound:
            raise InputError(f"{name} must be at least {bound}, got {value}")


def options_from_values(options_class: type, values: Mapping[str, Any], source: str) -> dict:
    """Check a mapping of option names to plain values; names may use dashes or underscores.

    Returns the typed values by field name. ``source`` is named in the InputError that an unknown
    name or a value of the wrong type raises.
    """
    fields = {field.name: field for field in option_fields(options_class)}
    checked: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in fields:
            advice = did_you_mean(name, fields) or f"the options are {', '.join(fields)}"
            raise InputError(f"{source}: unknown option {key!r}; {advice}")
        if name in checked:
            raise InputError(f"{source}: the option {name!r} is given twice")
        try:
            checked[name] = convert(value, fields[name].kind)
        except ValueError as error:
            raise InputError(f"{source}: {key}: {error}") from None
    return checked


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """A question that names the nearest of the names there are, empty where none is near."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {prefix}{near[0]}?" if near else ""


def changed(options: Any, names: Sequence[str]) -> list[str]:
    """Those of the named options that are not at their defaults."""
    defaults = {field.name: field.default for field in option_fields(type(options))}
    return [name for name in names if getattr(options, name) != defaults[name]]


def command_words(options: Any, *, without: Sequence[str] = ()) -> list[str]:
    """The words that give these options on a command line; defaults, and those of ``without``, are left out."""
    words: list[str] = []
    for field in option_fields(type(options)):
        value = getattr(options, field.name)
        if value == field.default or field.name in without:
            continue
        if isinstance(value, bool):
            words.append(field.flag if value else field.flag.replace("--", "--no-", 1))
            continue
        texts = [str(item) for item in (value if isinstance(value, list) else [value])]
        if field.positional:
            words += texts
        elif any(text.startswith("-") for text in texts):  # which the parser may take for a flag
            words += [f"{field.flag}={text}" for text in texts]
        else:
            words += [field.flag, *texts]
    return words


def load_yaml(path: str | os.PathLike) -> dict[str, Any]:
    """The mapping in a YAML file; InputError where it cannot be read or is no mapping."""
    import yaml  # not a core dependency: `stablemask env` must run without it

    with reading(path):
        content = Path(path).read_bytes()
    try:
        text = content.decode()
        loaded = yaml.safe_load(text)
        node: Any = yaml.compose(text, yaml.SafeLoader)
    except RecursionError:
        raise InputError(f"{path} is not valid YAML: it is nested too deep") from None
    # The last three come from what a value is made of, such as the month 13.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError) as error:
        raise InputError(f"{path} is not valid YAML: {error}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise InputError(f"{path} holds no options; write one 'name: value' a line")
    if len(node.value) > len(loaded):  # of which YAML keeps the last
        names = [key.value for key, _ in node.value]
        raise InputError(f"{path}: the option {max(names, key=names.count)!r} is given twice")
    return loaded


def save_yaml(options: Any, path: str | os.PathLike) -> None:
    """Write a dataclass of options as YAML that ``--config`` reads back, whole or not at all."""
    import yaml

    text = yaml.safe_dump(dataclasses.asdict(options), sort_keys=False, allow_unicode=True)
    write_whole(Path(path), text)
