"""Where a Ray of this process's own keeps its files: a path short enough for sockets, and its token."""

from __future__ import annotations

import os
import tempfile
import uuid
from pathlib import Path

from paretoprune.cluster.scratch import process_folder, remove_folder

_SOCKET_BYTES = 107  # of a path that names one (Linux; a terminating zero follows)
_LONGEST = "/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
_SHORT_PARENTS = (Path("/tmp"), Path("/var/tmp"), Path("/dev/shm"))
_PREFIX = "paretoprune-ray-"
TOKEN_VARIABLES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


class RayPlace:
    """Made before a local Ray starts, closed after its end. It makes a folder only where one is needed."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._token = False
        self.options: dict[str, str] = {}
        """For `ray.init`."""
        self.variables: dict[str, str] = {}
        """For the workers."""
        given = os.environ.get("RAY_TMPDIR")
        base = given or tempfile.gettempdir()
        if len(os.fsencode(base + _LONGEST)) > _SOCKET_BYTES:
            short = self._own()
            self.options["_temp_dir"] = str(short / "ray")
            self.variables["TMPDIR"] = str(short)  # loading processes make sockets there, too
        elif not given:
            self.options["_temp_dir"] = f"{base}/ray"  # a TMPDIR that cannot be written counts for nobody
        if not _has_token_place():
            path = self._own() / "auth_token"
            path.touch(0o600)
            path.write_text(uuid.uuid4().hex, encoding="ascii")
            os.environ["RAY_AUTH_TOKEN_PATH"] = str(path)
            self._token = True

    def _own(self) -> Path:
        if self._folder is None:
            self._folder = process_folder(_PREFIX, _SHORT_PARENTS)
        return self._folder

    def close(self) -> None:
        """Remove what was made."""
        if self._token:
            os.environ.pop("RAY_AUTH_TOKEN_PATH", None)
        if self._folder is not None:
            remove_folder(self._folder)


def _has_token_place() -> bool:
    """Whether Ray finds a token, or can write one below $HOME."""
    if any(os.environ.get(name) for name in TOKEN_VARIABLES):
        return True
    try:
        folder = Path.home() / ".ray"
        if (folder / "auth_token").is_file():
            return os.access(folder / "auth_token", os.R_OK)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except (OSError, RuntimeError):  # RuntimeError: a user id without a home
        return False
