"""The one class of errors that the user can fix, and the one check of every file that is read."""
import errno
import os


class InputError(ValueError):
    """What the user gave cannot be used. The message is a sentence: what is wrong, where, and what to do."""


def check_file(path):
    """Raises OSError unless a regular file is at `path`. Reading a pipe or a device may never end."""
    if not os.path.isfile(path):
        raise FileNotFoundError(errno.ENOENT, "no regular file is there", str(path))
