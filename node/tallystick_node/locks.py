"""One process at a time in a folder of state."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import IO

from tallystick_protocol.errors import ConfigError


def lock_state(folder: Path) -> IO[str]:
    """Hold the node's folder: two processes with one key would contradict each other. Raises ConfigError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / "lock").open("w")
    except OSError as error:
        raise ConfigError(
            f"state = {str(folder)!r} cannot be written ({error.strerror}); choose another folder"
        ) from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ConfigError(
            f"another tallystick-node runs in {folder}; stop it, or give this one a folder of its own"
        ) from None
    return handle
