"""Pre-shared keys: 32 random bytes, in base64 where people see them."""

import base64
import binascii
import os
import secrets
from pathlib import Path

KEY_BYTES = 32
_FILE_BYTES_MAX = 4096
_READABLE_BY_OTHERS = 0o004


class KeyMistake(ValueError):
    """Not a key; the text says what was found instead, and nothing of it."""


def new_key() -> str:
    """A fresh key in base64."""
    return base64.b64encode(secrets.token_bytes(KEY_BYTES)).decode()


def decode(text: str) -> bytes:
    """The key that `text` is, white space around it aside. Raises KeyMistake."""
    try:
        key = base64.b64decode(text.strip(), validate=True)
    except (binascii.Error, ValueError):
        raise KeyMistake(f"{len(text.strip())} characters that are not base64") from None
    if len(key) != KEY_BYTES:
        raise KeyMistake(f"{len(key)} bytes")
    return key


def read_key_file(file: Path) -> tuple[bytes, bool]:
    """The key in `file`, and whether every user of this host may read it. Raises KeyMistake, OSError."""
    with file.open("rb") as stream:
        data = stream.read(_FILE_BYTES_MAX + 1)
    if len(data) > _FILE_BYTES_MAX:
        raise KeyMistake(f"more than {_FILE_BYTES_MAX} bytes")
    return decode(data.decode("ascii", "replace")), is_exposed(file)


def is_exposed(file: Path) -> bool:
    """Whether every user of this host may read `file`, which holds a key. Raises OSError."""
    return bool(file.stat().st_mode & _READABLE_BY_OTHERS)


def write_key_file(file: Path, key: str) -> None:
    """Writes a new file that only its owner can read. Raises FileExistsError, OSError."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w") as stream:
        stream.write(key + "\n")
