"""What makes a checkpoint whole: `manifest.json`, its last file, with every other's digest.

Needs no torch.
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from knet_core.checkpoint_state import (
    FORMAT,
    RECIPE_FILE,
    STATE_FILE,
    checkpoint_format,
    read_file,
    require_known,
    unreadable,
)
from knet_core.errors import CheckpointError

MODEL_FILE = "model.safetensors"
TRAINER_FILE = "trainer.pt"
MANIFEST_FILE = "manifest.json"
MODEL_FILES = (MODEL_FILE, STATE_FILE, RECIPE_FILE)
"""What predicting needs."""
CONTENT_FILES = (*MODEL_FILES, TRAINER_FILE)
"""What a manifest lists: training goes on from all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """One file as it was written."""

    bytes: int
    sha256: str


def dump_manifest(files: Mapping[str, bytes]) -> str:
    """Return the text of `manifest.json` for files of these names and contents."""
    records = {
        name: asdict(FileRecord(bytes=len(content), sha256=hashlib.sha256(content).hexdigest()))
        for name, content in files.items()
    }
    return json.dumps({"format": FORMAT, "files": records}, indent=2) + "\n"


def parse_manifest(text: str | bytes, source: str) -> dict[str, FileRecord]:
    """Return the files that a manifest lists; `source` names it in errors.

    Raises:
        NewerFormatError: A newer version wrote it.
        CheckpointError: The text is no manifest.
    """
    try:
        values: dict[str, Any] = json.loads(text)
        require_known(values["format"], source)
        return {name: FileRecord(**record) for name, record in values["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise unreadable(source, error) from error


def verify_checkpoint(directory: Path, names: Collection[str] = CONTENT_FILES) -> None:
    """Compare files of a checkpoint with its manifest, byte for byte.

    Format 1 had no manifest; such a checkpoint is only asked for its files.

    Args:
        directory: The checkpoint.
        names: The files that are about to be used.

    Raises:
        NewerFormatError: A newer version wrote it.
        CheckpointError: A file is missing, cut short or damaged, or the checkpoint was never
            finished.
    """
    manifest = directory / MANIFEST_FILE
    if not manifest.exists():
        for name in names:
            read_file(directory, name)
        if checkpoint_format(directory) > 1:
            raise CheckpointError(
                f"{manifest}: no such file, so the checkpoint was never finished; "
                f"use another checkpoint of the run"
            )
        return
    for name, record in parse_manifest(manifest.read_bytes(), str(manifest)).items():
        if name in names:
            _verify(directory / name, record)


def _verify(file: Path, record: FileRecord) -> None:
    try:
        size = file.stat().st_size
        if size != record.bytes:
            raise unreadable(str(file), f"{size} of {record.bytes} bytes")
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{file}: no such file, though {MANIFEST_FILE} lists it; "
            f"use another checkpoint of the run"
        ) from error
    if digest != record.sha256:
        raise unreadable(str(file), f"its SHA-256 is not the one in {MANIFEST_FILE}")
