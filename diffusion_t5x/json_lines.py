"""JSON that people and other programs write."""

import json
from typing import Any


def parse(line: str | bytes) -> Any:
    """What a line of JSON says.

    Raises:
      ValueError: it is no JSON; or no program could go on with it: nested without end, or text that is no Unicode.
    """
    try:
        value = json.loads(line)
        # Half of a surrogate pair, as in "\ud800", is JSON but no text.
        json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError:
        raise ValueError("JSON that is nested too deep") from None
    except UnicodeEncodeError as error:
        raise ValueError(f"text that is not Unicode ({error.reason})") from error
    return value
