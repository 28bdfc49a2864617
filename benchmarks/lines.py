"""Files of one line of JSON for each result, which nothing that happens later can take away."""

import json
import os
from pathlib import Path


def append(file: Path, line: dict) -> None:
    """Adds a line to a file that others may write too, and waits until it is on the disk."""
    with file.open("ab", buffering=0) as lines:
        lines.write(json.dumps(line).encode() + b"\n")  # in one call, so that lines of two processes don't mix
        os.fsync(lines.fileno())
