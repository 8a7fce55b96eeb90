"""The manifest of a checkpoint: the size and SHA-256 of every other file in it, and facts of the run that wrote it.

It may come from somebody else, so its types are checked, and that its files are inside the checkpoint.
"""

import hashlib
import json
import os
from pathlib import Path, PurePath
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, NonNegativeInt, ValidationError

MANIFEST = "manifest.json"


def _inside(name: str) -> str:
    path = PurePath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in name:
        raise ValueError("does not name a file inside")
    return name


class Entry(BaseModel):
    """Size and digest of one file."""

    model_config = ConfigDict(strict=True, extra="forbid")
    bytes: NonNegativeInt
    sha256: str

    @classmethod
    def of(cls, path: Path, flush: bool = False) -> "Entry":
        """Read a file as it is now; `flush`: flush it to disk. Raises `OSError`."""
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            if flush:
                os.fsync(file.fileno())
        return cls(bytes=path.stat().st_size, sha256=digest)

    def problem(self, path: Path) -> str | None:
        """Return how the file at `path` differs, or None."""
        try:
            if not path.is_file():
                return "is not a file" if path.exists() else "is missing"
            if (size := path.stat().st_size) != self.bytes:
                return f"has {size} bytes where {self.bytes} were written"
            return None if Entry.of(path) == self else "has other contents than were written"
        except OSError as error:
            return f"cannot be read ({error.strerror})"


class Manifest(BaseModel):
    """All entries by name, sealed: `digest` is the SHA-256 of the rest."""

    model_config = ConfigDict(strict=True, extra="forbid")
    facts: dict[str, bool | int | str]
    files: dict[Annotated[str, AfterValidator(_inside)], Entry]
    digest: str = ""

    def write(self, folder: Path) -> None:
        """Seal it and flush it to disk. Raises `OSError`."""
        self.digest = self._sealed()
        with (folder / MANIFEST).open("w", encoding="utf-8") as file:
            json.dump(self.model_dump(), file, indent=1)
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def read(cls, folder: Path) -> "Manifest | str":
        """Return the manifest of a checkpoint, or what is wrong with it."""
        try:
            manifest = cls.model_validate_json((folder / MANIFEST).read_bytes())
        except FileNotFoundError:
            return f"it has no {MANIFEST}"
        except OSError as error:
            return f"{MANIFEST} cannot be read ({error.strerror})"
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "it"
            return f"{MANIFEST} cannot be read ({place}: {first['msg']})"
        if manifest.digest != manifest._sealed():
            return f"the contents of {MANIFEST} are not those that were written"
        return manifest

    def _sealed(self) -> str:
        content = self.model_dump(include={"facts", "files"})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
