"""Files of a run that are the old ones or the new ones, whatever happens meanwhile."""

import os
from pathlib import Path

from launch.common.paths import PARTIAL


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file aside, bring it to disk, and rename it to its place. Raises `OSError`."""
    partial = path.with_name(f".{path.name}{PARTIAL}")
    with partial.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
