"""Compiled models are native code: those that this user has built are opened, others only by leave.

What is built gets a seal, the HMAC (RFC 2104) of its digest under a random key that only this user can read.
A manifest from elsewhere cannot have one that fits, whatever else it says.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import tempfile
from pathlib import Path
from typing import Final

from hamerspace._rooms import user_folder
from hamerspace.artifact import Manifest, digest_of, inside
from hamerspace.exceptions import UnsafeModelError
from hamerspace.runtimes.base import RunOptions

NATIVE: Final = ("aot_inductor", "tvm")
"""Runtimes whose artifacts are native code."""
_KEY_BYTES: Final = 32


def seal_of(digest: str) -> str | None:
    """Return the seal of a file's SHA-256; None where this user's key can neither be read nor made."""
    with contextlib.suppress(OSError, RuntimeError):
        return hmac.digest(_key(), digest.encode(), "sha256").hex()
    return None


def check_native(manifest: Manifest, folder: Path, options: RunOptions) -> None:
    """Raise unless this user has built the artifact, or the caller allows native code.

    Raises:
        UnsafeModelError: with how it can be opened.
    """
    if options.allow_native:
        return
    path = inside(folder, manifest.main, str(folder))
    mine = seal_of(digest_of(path)) if manifest.seal is not None else None
    if mine is None or not hmac.compare_digest(mine.encode(), (manifest.seal or "").encode()):
        raise UnsafeModelError(
            f"{path} is native code of {manifest.runtime}, which was not built by this user on this machine, "
            "and it can do anything once it is opened. If you trust whoever made it, say allow_native=True"
        )


def _key() -> bytes:
    path = user_folder("XDG_STATE_HOME", ".local/state") / "key"
    with contextlib.suppress(FileNotFoundError):
        return _read(path)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Several processes may be the first, and one key has to win.
    with tempfile.NamedTemporaryFile(dir=path.parent) as file:
        file.write(secrets.token_bytes(_KEY_BYTES))
        file.flush()
        with contextlib.suppress(FileExistsError):
            os.link(file.name, path)
    return _read(path)


def _read(path: Path) -> bytes:
    key = path.read_bytes()
    if len(key) != _KEY_BYTES:
        raise OSError(f"{path} is no key of hamerspace; delete it to have a new one made")
    return key
