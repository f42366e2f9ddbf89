"""The token of a cluster: one secret that nodes and those who submit to it share."""

import os
import secrets
from pathlib import Path

from knet_core import ConfigError
from knet_platform.cluster.description import name_problems
from knet_platform.errors import UsageError


def secrets_folder(name: str) -> Path:
    """Return the folder of a cluster's secrets; the cluster's files mount it into its nodes."""
    return Path.home() / ".knet" / "clusters" / name


def make_token(name: str, *, renew: bool = False) -> Path:
    """Return the file with a cluster's token, made if there is none; only its owner may read it.

    The token itself is never returned: what is not known cannot be printed or logged.

    Args:
        name: The cluster's.
        renew: Replace a token that is there.

    Raises:
        ConfigError: That is no cluster's name.
        UsageError: Others may read the file.
    """
    if problems := name_problems(name):
        raise ConfigError(problems)
    folder = secrets_folder(name)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.chmod(0o700)
    path = folder / "auth_token"
    if path.exists() and not renew:
        if path.stat().st_mode & 0o077:
            raise UsageError(
                f"{path}: others may read it (mode {path.stat().st_mode & 0o777:o}), expected "
                f"600; make another: knet cluster token {name} --renew"
            )
        return path
    unfinished = folder / f".auth_token.{secrets.token_hex(8)}"
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as stream:
        stream.write(secrets.token_hex(32))
    unfinished.replace(path)
    return path
