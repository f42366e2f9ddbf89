"""Writes the files of a cluster. Whoever wants others changes the command, never a file."""

import shlex
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any
from uuid import uuid4

import yaml

from knet_platform.cluster.aws import aws_access, aws_launcher
from knet_platform.cluster.description import Description
from knet_platform.cluster.gcp import gcp_head_role, gcp_launcher
from knet_platform.cluster.kuberay import (
    access_resources,
    cluster_resource,
    job_resource,
    monitoring_resources,
)
from knet_platform.cluster.machines import Cluster

_MAKERS: dict[str, dict[str, Callable[[Cluster], Any]]] = {
    "aws": {"cluster.yaml": aws_launcher, "access.yaml": aws_access},
    "gcp": {"cluster.yaml": gcp_launcher, "head-role.yaml": gcp_head_role},
    "kuberay": {
        "access.yaml": access_resources,
        "raycluster.yaml": cluster_resource,
        "rayjob.yaml": job_resource,
        "monitoring.yaml": monitoring_resources,
    },
}
"""By provider and file: what makes its document, or the list of its documents."""


def render(cluster: Cluster) -> dict[str, str]:
    """Return the files of a cluster by their names."""
    heading = f"# Made by: {command(cluster.description)}\n# Change that command, not this file.\n"
    makers = _MAKERS[cluster.description.provider]
    return {name: heading + _as_yaml(make(cluster)) for name, make in makers.items()}


def write_files(files: Mapping[str, str], folder: Path) -> list[Path]:
    """Write files into a folder, each whole, over those of the same names."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, text in files.items():
        unfinished = folder / f".{name}.{uuid4().hex}"
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(folder / name)
        paths.append(folder / name)
    return paths


def command(description: Description) -> str:
    """Return the command that makes the files of a description."""
    words = ["knet", "cluster", "render"]
    for field in fields(Description):
        value = getattr(description, field.name)
        flag = f"--{field.name.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif value != field.default:
            words += [flag, f"{value:g}" if isinstance(value, float) else str(value)]
    return shlex.join(words)


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Writes texts of several lines as such, and equal parts in full."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def _as_yaml(documents: Any) -> str:
    listed = documents if isinstance(documents, list) else [documents]
    text: str = yaml.dump_all(
        listed, Dumper=_Dumper, sort_keys=False, width=99, allow_unicode=True
    )
    return text
