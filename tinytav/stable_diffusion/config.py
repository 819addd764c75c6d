"""Reading a checkpoint's config.json."""
import json
import types
import typing
from dataclasses import MISSING, fields
from pathlib import Path

from tinytav.errors import InputError, check_file

LARGEST = 2 ** 20       # no size in a published model comes near it


def read_json(path):
    """The JSON object in a file. Raises InputError."""
    try:
        check_file(path)
        d = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(d, dict):
        raise InputError(f"{path} holds a {type(d).__name__}, not a JSON object.")
    return d


class Config:
    """Base of the frozen dataclasses that mirror a JSON file: same names, and defaults where old files omit a key.

    ONLY names settings of which only some values are implemented: {name: those values, the default first}.
    LIMITS names numbers with bounds of their own: {name: (least, most)}. Every other number must be above 0 and at
    most LARGEST. No list is longer than LONGEST. For true or false, null stands for false, as in diffusers.
    """
    ONLY = {}
    LIMITS = {}
    LONGEST = 32            # more than any list of stages, of heads or of channels

    @classmethod
    def from_json(cls, d):
        """The parsed JSON object `d` -> an instance. Keys that are not fields are ignored.

        Raises InputError, naming the setting, for what is missing, of a wrong type, out of bounds or not implemented.
        """
        if not isinstance(d, dict):
            raise InputError(f"{cls.__name__}: a JSON object is expected, not {type(d).__name__}.")
        for name, values in cls.ONLY.items():
            value = d.get(name, values[0])
            if value is None and isinstance(values[0], bool):
                value = False
            if value not in values:
                raise InputError(f"{cls.__name__}: {name} = {value!r} is not implemented; only "
                                 f"{' or '.join(map(repr, values))} is.")
        settings = {}
        for field in fields(cls):
            if field.name in d:
                settings[field.name] = cls._checked(field, d[field.name])
            elif field.default is MISSING and field.default_factory is MISSING:
                raise InputError(f"{cls.__name__}: {field.name} is missing.")
        return cls(**settings)

    @classmethod
    def _checked(cls, field, value):
        """The value, with lists turned into tuples. Raises InputError if it does not suit the field."""
        if isinstance(value, list):
            value = tuple(value)
        if value is None and field.type is bool:
            value = False
        if isinstance(value, tuple) and len(value) > cls.LONGEST:
            raise InputError(f"{cls.__name__}: {field.name} has {len(value)} entries; at most {cls.LONGEST} are read.")
        if not matches(value, field.type):
            raise InputError(f"{cls.__name__}: {field.name} = {value!r} is not {type_name(field.type)}.")
        least, most = cls.LIMITS.get(field.name, (None, LARGEST))
        for number in numbers(value):
            if least is None and not 0 < number <= most:
                raise InputError(f"{cls.__name__}: {field.name} = {value!r} must be above 0 and at most {most}.")
            if least is not None and not least <= number <= most:
                raise InputError(f"{cls.__name__}: {field.name} = {value!r} must be from {least} to {most}.")
        return value


def matches(value, kind):
    """Is a value of JSON of this type? An int may stand for a float; a bool is not a number; no tuple is empty."""
    if isinstance(kind, types.UnionType):
        return any(matches(value, one) for one in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        element = typing.get_args(kind)[0]
        return isinstance(value, tuple) and len(value) > 0 and all(matches(item, element) for item in value)
    if kind in (int, float) and isinstance(value, bool):
        return False
    if kind is float:
        return isinstance(value, (int, float))
    return isinstance(value, kind)


def numbers(value):
    """The numbers in a value: itself, those of a tuple, or none."""
    items = value if isinstance(value, tuple) else (value,)
    return [item for item in items if isinstance(item, (int, float)) and not isinstance(item, bool)]


def type_name(kind):
    """A type as an error message names it."""
    if isinstance(kind, types.UnionType):
        return " or ".join(type_name(one) for one in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return f"a list of {typing.get_args(kind)[0].__name__}"
    names = {types.NoneType: "null", int: "an integer", float: "a number", str: "text", bool: "true or false"}
    return names.get(kind, f"a {kind.__name__}")
