"""Reading a checkpoint's config.json, and the one class of errors that are the user's to mend."""
from dataclasses import fields

import torch

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class InputError(ValueError):
    """What the user gave cannot be used. The message is a sentence that says what, where and what to do."""


class Config:
    """Base of the frozen dataclasses that mirror a config.json: same names, defaults where old files omit a key.

    `ONLY` maps each setting of which just some values are implemented to those values, the default first.
    """
    ONLY = {}

    @classmethod
    def from_json(cls, d):
        """`d`: the parsed JSON object. Raises InputError, naming the setting, for what is not implemented."""
        if not isinstance(d, dict):
            raise InputError(f"{cls.__name__}: a JSON object is expected, not {type(d).__name__}.")
        for name, values in cls.ONLY.items():
            if (value := d.get(name, values[0])) not in values:
                raise InputError(f"{cls.__name__}: {name} = {value!r} is not implemented; only "
                                 f"{' or '.join(map(repr, values))} is. Such a model cannot be used here.")
        return cls(**{f.name: cls._checked(f, d[f.name]) for f in fields(cls) if f.name in d})

    @classmethod
    def _checked(cls, field, value):
        value = tuple(value) if isinstance(value, list) else value
        kinds = (int, float) if field.type is float else field.type
        if not isinstance(value, kinds) or (isinstance(value, bool) and field.type is not bool):
            raise InputError(f"{cls.__name__}: {field.name} = {value!r} is not a {getattr(field.type, '__name__', field.type)}.")
        like = field.default[0] if isinstance(field.default, tuple) else field.default
        most = 100 if "layers" in field.name else 2 ** 20
        for v in value if isinstance(value, tuple) else (value,):
            if isinstance(value, tuple) and not isinstance(v, (int, type(like))):
                raise InputError(f"{cls.__name__}: {field.name} = {value!r} is not all {type(like).__name__}.")
            if isinstance(v, (int, float)) and not isinstance(v, bool) and not 0 < v <= most:
                raise InputError(f"{cls.__name__}: {field.name} = {value!r} is not above 0 and up to {most}.")
        return value
