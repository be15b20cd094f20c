"""Messages between the judge and a program: plain data as JSON, in frames.

JSON, because nothing in it can run: the judge can safely read whatever the program sends. Numbers, text, None and
Booleans are themselves; everything else is `[kind, content]`. Instances of subclasses become their base class, and
anything that is not plain data becomes an `["object", number]` that the receiver resolves.
"""

import builtins
import collections
import json
import os
from collections.abc import Callable
from typing import Any

MAX_FRAME = 4 << 20  # bytes
_HEADER = 4  # bytes, big endian: the length of what follows
_SEQUENCES = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "deque": collections.deque}


class TooLong(ValueError):
    """Raised for a frame of more than MAX_FRAME bytes."""


def frame(message: Any) -> bytes:
    """Returns the bytes of a message.

    Raises:
      TooLong: more than MAX_FRAME.
    """
    content = json.dumps(message).encode("ascii")
    if len(content) > MAX_FRAME:
        raise TooLong(f"more than {MAX_FRAME:,} bytes to hand over")
    return len(content).to_bytes(_HEADER) + content


def read_frame(read: Callable[[int], bytes]) -> Any:
    """Reads the next message with `read(size)`, which returns exactly `size` bytes.

    Raises:
      TooLong: more than MAX_FRAME.
      ValueError: it is not JSON.
    """
    size = int.from_bytes(read(_HEADER))
    if size > MAX_FRAME:
        raise TooLong(f"more than {MAX_FRAME:,} bytes to take over")
    return json.loads(read(size))


def read_exactly(fd: int, size: int) -> bytes:
    """Reads exactly `size` bytes from a file descriptor.

    Raises:
      EOFError: it ends before that.
    """
    parts = []
    while size:
        part = os.read(fd, size)
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def encode(value: Any, refer: Callable[[Any], int]) -> Any:
    """Returns the JSON data of a value; `refer` returns the number of an object that is not plain data."""
    if value is None or isinstance(value, bool):
        return value
    for plain in (int, float, str):
        if isinstance(value, plain):
            return plain(value)
    if isinstance(value, complex):
        return ["complex", [value.real, value.imag]]
    if isinstance(value, bytes | bytearray):
        return ["bytes", value.decode("latin-1")]
    if isinstance(value, range):
        return ["range", [value.start, value.stop, value.step]]
    if isinstance(value, dict):
        return ["dict", [[encode(key, refer), encode(item, refer)] for key, item in value.items()]]
    for kind, sequence in _SEQUENCES.items():
        if isinstance(value, sequence):
            return [kind, [encode(item, refer) for item in value]]
    if isinstance(value, type) and value.__name__ in vars(builtins) and vars(builtins)[value.__name__] is value:
        return ["type", value.__name__]
    return ["object", refer(value)]


def decode(data: Any, resolve: Callable[[Any], Any]) -> Any:
    """The value of `encode`'s data; `resolve` gives the object of a number.

    Raises:
      ValueError, TypeError: data that `encode` does not make.
    """
    if data is None or isinstance(data, bool | int | float | str):
        return data
    kind, content = data
    if kind in _SEQUENCES:
        return _SEQUENCES[kind](decode(item, resolve) for item in content)
    if kind == "dict":
        return {decode(key, resolve): decode(item, resolve) for key, item in content}
    if kind == "complex":
        return complex(*content)
    if kind == "bytes":
        return content.encode("latin-1")
    if kind == "range":
        return range(*content)
    if kind == "type" and isinstance(vars(builtins).get(content), type):
        return vars(builtins)[content]
    return resolve(content)
