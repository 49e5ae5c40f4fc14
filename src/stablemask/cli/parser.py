"""Turn a dataclass of options into an argparse parser and a YAML reader."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin

from stablemask.errors import InputError
from stablemask.options import (
    OptionField,
    convert_text,
    load_yaml,
    option_fields,
    options_from_values,
    union_members,
)

Options = TypeVar("Options")


def parse_options(
    options_class: type[Options],
    argv: Sequence[str] | None = None,
    *,
    prog: str | None = None,
    description: str | None = None,
) -> Options:
    """Read the options of a command from its flags and, with ``--config``, from a YAML file.

    A flag wins over the file, the file over the default. Anything wrong raises InputError;
    ``--help`` prints and exits with 0.
    """
    fields = option_fields(options_class)
    positional = next((field for field in fields if field.positional), None)
    usage = "%(prog)s [options]"
    if positional:
        one = _metavar(positional)
        usage += f" {one}" if positional.item_kind is None else f" [{one} ...]"
    parser = _Parser(prog=prog, usage=usage, description=description, allow_abbrev=False)
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="YAML file of options; flags win over it"
    )
    for field in fields:
        _add_flag(parser, field)

    # The plain way would take no value before the first flag for no value at all.
    parse = parser.parse_intermixed_args if positional else parser.parse_args
    flags = vars(parse(argv))
    config = flags.pop("config")
    values = {}
    if config is not None:
        values = options_from_values(options_class, load_yaml(config), str(config))
    values |= flags
    missing = [field for field in fields if field.required and field.name not in values]
    if missing:
        names = [_metavar(field) if field.positional else field.flag for field in missing]
        parser.error(f"{' and '.join(names)} must be given")
    return options_class(**values)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see `{self.prog} --help`")

    def print_help(self, file: Any = None) -> None:
        print(self.format_help(), end="", file=file)  # argparse's own swallows a full disk


def _add_flag(parser: argparse.ArgumentParser, field: OptionField) -> None:
    # A flag that is not given leaves no trace, so that the YAML file and the defaults can speak.
    common: dict[str, Any] = {
        "dest": field.name,
        "default": argparse.SUPPRESS,
        "help": _help(field),
    }
    if bool in union_members(field.kind):
        parser.add_argument(field.flag, action=argparse.BooleanOptionalAction, **common)
        return
    common["metavar"] = _metavar(field)
    if field.positional:
        del common["dest"]
        convert = _converter(field.item_kind or field.kind, field.choices)
        nargs = "?" if field.item_kind is None else "*"
        parser.add_argument(field.name, nargs=nargs, type=convert, **common)
    elif field.item_kind is not None:
        convert = _converter(field.item_kind, field.choices)
        parser.add_argument(field.flag, nargs="+", action="extend", type=convert, **common)
    else:
        parser.add_argument(field.flag, type=_converter(field.kind, field.choices), **common)


def _converter(kind: Any, choices: Sequence[str] | None) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        try:
            return convert_text(text, kind, choices)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def _help(field: OptionField) -> str:
    text, default = field.help, field.default
    if field.required:
        text += " (required)"
    elif isinstance(default, bool):
        text += " (default: on)" if default else ""
    elif default is not None and default != []:
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        text += f" (default: {shown})"
    return text.replace("%", "%%")


def _metavar(field: OptionField) -> str:
    if field.choices:
        return "{" + ",".join(field.choices) + "}"
    if field.positional and field.item_kind is None:
        return field.name.upper()
    words: list[str] = []
    for member in union_members(field.item_kind or field.kind):
        if get_origin(member) is Literal:
            words += map(str, get_args(member))
        elif member is not type(None):
            words.append(_METAVARS[member])
    return "|".join(words)


_METAVARS = {int: "N", float: "X", str: "TEXT", Path: "PATH"}
