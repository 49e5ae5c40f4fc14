"""Options as dataclasses: one definition serves Python callers, the command line and YAML files.

    @dataclass(kw_only=True)
    class GenerateOptions:
        model: str = option(MISSING, "folder or hub name of the model")
        max_new_tokens: int = option(64, "how many tokens to add")

``stablemask.cli.parser`` makes the flags of a command out of such a class.
"""

import dataclasses
import numbers
import os
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from stablemask.errors import InputError


def option(
    default: Any, help: str, *, choices: Sequence[str] | None = None, positional: bool = False
) -> Any:
    """A dataclass field that carries its help text and, where limited, its allowed values.

    Pass ``dataclasses.MISSING`` as the default of a required option. The value of a ``positional`` one,
    or the values of its list, stand on the command line without a flag.
    """
    metadata = {"help": help, "choices": choices, "positional": positional}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class OptionField:
    """What the parser and the YAML reader need to know of one option."""

    name: str
    kind: Any
    help: str
    choices: tuple[str, ...] | None
    default: Any
    positional: bool = False

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
        choices = field.metadata.get("choices")
        factory = field.default_factory
        fields.append(
            OptionField(
                name=field.name,
                kind=kinds[field.name],
                help=field.metadata.get("help", ""),
                choices=tuple(choices) if choices else None,
                default=field.default if factory is dataclasses.MISSING else factory(),
                positional=field.metadata.get("positional", False),
            )
        )
    return fields


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


def convert_text(text: str, kind: Any, choices: Sequence[str] | None = None) -> Any:
    """The value a flag's text stands for; ValueError says what would be right."""
    return _convert(text, kind, choices, _text_as)


def convert_value(value: Any, kind: Any, choices: Sequence[str] | None = None) -> Any:
    """The same for a value read from YAML, which has a type of its own already."""
    return _convert(value, kind, choices, _value_as)


def _convert(value: Any, kind: Any, choices: Sequence[str] | None, convert_as: Any) -> Any:
    # "none" must not become the text of a `str | None`, so None is tried first.
    members = sorted(union_members(kind), key=lambda member: member is not type(None))
    for member in members:
        try:
            converted = convert_as(value, member)
        except (ValueError, TypeError):
            continue
        for item in converted if isinstance(converted, list) else [converted]:
            if choices and item is not None and item not in choices:
                raise ValueError(f"{item!r} is not one of {', '.join(choices)}")
        return converted
    raise ValueError(f"{value!r} is not {kind_name(kind)}")


def _text_as(text: str, kind: Any) -> Any:
    if kind is type(None):
        if text.lower() == "none":
            return None
    elif get_origin(kind) is Literal:
        for choice in get_args(kind):
            if text == str(choice):
                return choice
    elif kind in (int, float, str, Path):
        return kind(text)
    raise ValueError


def _value_as(value: Any, kind: Any) -> Any:
    if get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
    elif get_origin(kind) is list:
        items = value if isinstance(value, list | tuple) else [value]
        return [convert_value(item, get_args(kind)[0]) for item in items]
    elif kind is bool or isinstance(value, bool):
        if kind is bool and isinstance(value, bool):
            return value
    elif kind is float:
        # YAML 1.1 reads 1e-4 as text: only 1.0e-4 is a number to it.
        if isinstance(value, numbers.Real | str):
            return float(value)
    elif kind is int:
        if isinstance(value, numbers.Integral):  # NumPy's too
            return int(value)
    elif kind is str:
        if isinstance(value, str | int | Path):
            return str(value)
    elif kind is Path:
        if isinstance(value, str):
            return Path(value)
    elif isinstance(value, kind):
        return value
    raise ValueError


def check_values(options: Any) -> None:
    """Give the fields of a dataclass of options the types they declare.

    Raises:
        InputError: the value of one is of another type, or not one of its choices.
    """
    for field in option_fields(type(options)):
        try:
            value = convert_value(getattr(options, field.name), field.kind, field.choices)
        except ValueError as error:
            raise InputError(f"{field.name}: {error}") from None
        setattr(options, field.name, value)


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
            known = ", ".join(fields)
            raise InputError(f"{source}: unknown option {key!r}; the options are {known}")
        if name in checked:
            raise InputError(f"{source}: the option {name!r} is given twice")
        try:
            checked[name] = convert_value(value, fields[name].kind, fields[name].choices)
        except ValueError as error:
            raise InputError(f"{source}: {key}: {error}") from None
    return checked


def load_yaml(path: str | os.PathLike) -> dict[str, Any]:
    """The mapping in a YAML file; InputError where it cannot be read or is no mapping."""
    import yaml  # not a core dependency: `stablemask env` must run without it

    path = Path(path)
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; give a YAML file of options") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder; give a YAML file of options") from None
    except RecursionError:
        raise InputError(f"{path} is not valid YAML: it is nested too deep") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML: {error}") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise InputError(f"{path} holds no options; write one 'name: value' a line")
    return loaded


def save_yaml(options: Any, path: str | os.PathLike) -> None:
    """Write a dataclass of options as YAML that ``--config`` reads back, whole or not at all."""
    import yaml

    path = Path(path)
    values = {
        field.name: _plain(getattr(options, field.name)) for field in dataclasses.fields(options)
    }
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), "utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
