"""Turn a dataclass of options into an argparse parser and a YAML reader."""

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from inspect import getdoc
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin

from stablemask.errors import InputError
from stablemask.options import (
    OptionField,
    convert,
    did_you_mean,
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
    ``--help`` prints and exits with 0. The description is by default the docstring of the class.
    """
    fields = option_fields(options_class)
    bare = [field for field in fields if field.positional]
    usage = ["%(prog)s"]
    usage += [
        f"{field.flag} {_metavar(field)}"
        for field in fields
        if field.required and field not in bare
    ]
    usage += ["[options]"]
    usage += [_metavar(field) if field.required else f"[{_metavar(field)} ...]" for field in bare]
    rest = next((field for field in fields if field.rest), None)
    usage += [] if rest is None else ["[-- ...]"]
    parser = _Parser(
        prog=prog,
        usage=" ".join(usage),
        description=description or getdoc(options_class),
        allow_abbrev=False,
    )
    add_options(parser, options_class)

    argv, after = list(sys.argv[1:] if argv is None else argv), []
    if rest is not None and "--" in argv:
        cut = argv.index("--")
        argv, after = argv[:cut], argv[cut + 1 :]
    # The plain way would take no value before the first flag for no value at all.
    parse = parser.parse_known_intermixed_args if bare else parser.parse_known_args
    given, unknown = parse(argv)
    if unknown:
        wrong = f"unrecognized arguments: {' '.join(unknown)}"
        if unknown[0].startswith("-"):  # compared without the dashes, which all flags share
            name = unknown[0].partition("=")[0].lstrip("-")
            if advice := did_you_mean(name, [field.flag.lstrip("-") for field in fields], "--"):
                raise InputError(f"{wrong}; {advice}")
        parser.error(wrong)
    flags = vars(given)
    config = flags.pop("config")
    values = {}
    if config is not None:
        values = options_from_values(options_class, load_yaml(config), str(config))
    values |= flags
    if rest is not None and after:
        values[rest.name] = after
    missing = [field for field in fields if field.required and field.name not in values]
    if missing:
        names = [_metavar(field) if field in bare else field.flag for field in missing]
        parser.error(f"{' and '.join(names)} must be given")
    return options_class(**values)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see `{self.prog} --help`")

    def print_help(self, file: Any = None) -> None:
        print(self.format_help(), end="", file=file)  # argparse's own swallows a full disk


def add_options(parser: argparse.ArgumentParser, options_class: type) -> None:
    """A flag for each option of a dataclass, and ``--config``."""
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="YAML file of options; flags win over it"
    )
    group: Any = parser
    for field in option_fields(options_class):
        if field.group is not None:
            group = parser.add_argument_group(field.group)
        _add_flag(group, field)


def complete(commands: Mapping[str, type]) -> None:
    """Tell a shell what may follow, where it asks as argcomplete has set it up to do, and end."""
    if "_ARGCOMPLETE" not in os.environ:
        return
    import argcomplete

    parser = argparse.ArgumentParser()
    parsers = parser.add_subparsers()
    for name, options_class in commands.items():
        add_options(parsers.add_parser(name), options_class)
    argcomplete.autocomplete(parser)


def _add_flag(group: Any, field: OptionField) -> None:
    # A flag that is not given leaves no trace, so that the YAML file and the defaults can speak.
    common: dict[str, Any] = {"default": argparse.SUPPRESS, "help": _help(field)}
    if field.rest:
        return
    if bool in union_members(field.kind):
        group.add_argument(field.flag, action=argparse.BooleanOptionalAction, **common)
        return
    kind = field.item_kind or field.kind
    common |= {"metavar": _metavar(field), "type": _converter(kind)}
    if get_origin(kind) is Literal and not field.positional:
        common["choices"] = get_args(
            kind
        )  # for a shell that completes; the converter refuses others
    if field.positional:
        group.add_argument(field.name, nargs="?" if field.item_kind is None else "*", **common)
    elif field.item_kind is not None:
        group.add_argument(field.flag, nargs="+", action="extend", **common)
    else:
        group.add_argument(field.flag, **common)


def _converter(kind: Any) -> Callable[[str], Any]:
    def converted(text: str) -> Any:
        try:
            return convert(text, kind, is_flag=True)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return converted


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
