"""Folders of prepared data, found again by a fingerprint of all that they were made from."""

import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import filelock

from launch.common.errors import UserError
from launch.common.paths import PARTIAL
from launch.process.ranks import say

CODE = Path(__file__).parent
FOLDER = "sft"


def fingerprint(facts: dict[str, Any]) -> str:
    """Return a hash of facts that JSON can hold, and of the code that prepares rows."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for file in sorted(CODE.rglob("*.py")):
        digest.update(file.relative_to(CODE).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:32]


class Cache:
    """Entries under one directory, each written whole by one process, also if several want it at once."""

    def __init__(self, directory: str | None):
        try:
            self.root = Path(directory or Path(datasets.config.HF_DATASETS_CACHE) / FOLDER).expanduser()
        except RuntimeError as error:  # the home of a user that does not exist
            raise UserError(f"--data_cache {directory} is not a usable path ({error}); name another") from None

    def find_or_make(
        self, name: str, problem: Callable[[Path], str | None], make: Callable[[Path], None]
    ) -> tuple[Path, bool]:
        """Return the folder of an entry, and whether it was there.

        Args:
            name: Its fingerprint.
            problem: Says what is wrong with a folder that is there, None if nothing is.
            make: Writes the entry into an empty folder.

        Raises:
            UserError: If the cache cannot be written; and what `make` raises.
        """
        folder, partial = self.root / name, self.root / f"{name}{PARTIAL}"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with self._locked(name):
                if folder.exists():
                    damage = problem(folder)
                    if damage is None:
                        return folder, True
                    say(f"data: {folder} is damaged ({damage}), so it is made again")
                    shutil.rmtree(folder)
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                try:
                    make(partial)
                    partial.rename(folder)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
        except OSError as error:
            raise UserError(
                f"prepared data cannot be kept in {self.root} ({error.strerror or error}); name another directory "
                "with --data_cache"
            ) from error
        return folder, False

    @contextmanager
    def _locked(self, name: str):
        lock = filelock.FileLock(self.root / f".{name}.lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            say(f"data: another run prepares the same rows in {self.root}; waiting for it")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()
