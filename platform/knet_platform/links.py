"""Pages of the tracking server about a sweep, kept in the store for whoever reports on it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from knet_platform.storage import Store

_FILE = "links.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A page elsewhere."""

    name: str
    """What is to be seen there."""
    url: str


def write_links(store: Store, sweep: str, links: Mapping[str, str | None]) -> None:
    """Keep addresses by name, besides those known before; None is no address.

    Raises:
        StorageError: The store cannot be used.
        DiskFullError: It is full.
    """
    known = {link.name: link.url for link in read_links(store, sweep)}
    found = known | {name: url for name, url in links.items() if url is not None}
    if found != known:
        store.sweep(sweep).write_bytes(_FILE, json.dumps(found, indent=1).encode())


def read_links(store: Store, sweep: str) -> tuple[Link, ...]:
    """Return the pages of a sweep; none before it ran with a tracking server.

    Raises:
        StorageError: The store cannot be read.
    """
    folder = store.sweep(sweep)
    if _FILE not in folder.list():
        return ()
    values = json.loads(folder.read_bytes(_FILE))
    return tuple(Link(name=name, url=url) for name, url in values.items())
