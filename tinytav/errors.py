"""The one class of errors that the user can fix."""


class InputError(ValueError):
    """What the user gave cannot be used. The message is a sentence: what is wrong, where, and what to do."""
