"""Options as Python values: checked and converted by the parsers of the commands, so that both accept the same."""

from __future__ import annotations

from argparse import SUPPRESS, Action, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from numbers import Real
from os import PathLike
from pathlib import Path

from netship.compile.frontend.preprocessing import Overrides, parse_option
from netship.targets.errors import UserError
from netship.targets.escapes import shown

_PIXELS = Overrides.model_fields


def check_known(
    function: str, given: Iterable[str], known: Collection[str], pixels: bool = False
) -> None:
    """Refuse options that a function does not have.

    Args:
        pixels: whether it has ``preprocessing``, into which some of them may belong.
    """
    for name in given:
        if name in known:
            continue
        if pixels and name in _PIXELS:
            todo = f"give it in preprocessing={{{name!r}: …}}"
        elif near := get_close_matches(name, known, 1):
            todo = f"did you mean {near[0]}?"
        else:
            todo = f"its options are {', '.join(sorted(known))}"
        raise UserError(f"{function}: has no option {shown(name)}; {todo}")


def arguments(parser: ArgumentParser, given: Mapping[str, object]) -> Namespace:
    """A command's options: its defaults, and what is given; None leaves an option out.

    Args:
        given: by the name that the parsed option has; lists as one value or several.

    Raises:
        UserError: the command would refuse a value.
    """
    actions = {each.dest: each for each in parser._actions}
    stated = {name for name, value in given.items() if value is not None}
    for group in parser._mutually_exclusive_groups:
        names = [x.dest for x in group._group_actions if x.dest in stated]
        if len(names) > 1:
            raise UserError(f"{' and '.join(names)}: exclude each other; give one")
    found = Namespace(
        **{n: each.default for n, each in actions.items() if each.default != SUPPRESS}
    )
    for name, value in given.items():
        if value is not None:
            setattr(found, name, _converted(actions[name], name, value))
        elif actions[name].required:
            raise _refused(name, value, "is needed")
    return found


def overrides(given: Mapping[str, object] | str) -> Overrides:
    """The preprocessing that a user states: a preset's name, or options by name.

    Raises:
        UserError: no such option, or not one of its values.
    """
    if isinstance(given, str):
        given = {"preprocessing": given}
    parsed = {}
    for key, value in mapping("preprocessing", given).items():
        name = key.replace("-", "_")
        check_known("preprocessing", [name], _PIXELS)
        try:
            text = str(value) if isinstance(value, PathLike) else value
            parsed[name] = parse_option(name, text)
        except ValueError as error:
            raise UserError(f"preprocessing {name!r}: {shown(error, 200)}") from None
    return Overrides(**parsed)


def mapping(name: str, value: object) -> Mapping[str, object]:
    """A dictionary that has text as keys."""
    if not isinstance(value, Mapping) or not all(isinstance(x, str) for x in value):
        raise _refused(name, value, "takes a dictionary by name")
    return value


def path(name: str, value: object) -> Path:
    """A path that is no empty text."""
    if not isinstance(value, str | Path) or value == "":
        raise _refused(name, value, "takes a path")
    return Path(value)


def several(value: object) -> tuple[object, ...]:
    """One value or several, as several."""
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        return (value,)
    return tuple(value)


def _converted(action: Action, name: str, value: object) -> object:
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise _refused(name, value, "takes True or False")
        return value
    # Options that may be repeated, or take several values.
    if isinstance(action.default, list):
        return [_one(action, name, each) for each in several(value)]
    return _one(action, name, value)


def _one(action: Action, name: str, value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, str | PathLike | Real):
        raise _refused(name, value, "takes text, a number or a path")
    text = str(value)
    try:
        found: object = action.type(text) if callable(action.type) else text
    except (ArgumentTypeError, ValueError) as error:
        raise UserError(f"{name}={shown(repr(value))}: {error}") from None
    if action.choices is not None and found not in action.choices:
        raise _refused(name, value, f"takes {' or '.join(map(repr, action.choices))}")
    return found


def _refused(name: str, value: object, takes: str) -> UserError:
    return UserError(f"{name}={shown(repr(value))}: {takes}")
