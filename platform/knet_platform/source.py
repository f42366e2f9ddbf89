"""The code in use, as git knows it: the commit, and what was changed since."""

import base64
import os
import shutil
import subprocess
import tempfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from knet_platform.redaction import clean_patch

MAX_PATCH = 2**20
"""Bytes of uncommitted changes that are recorded."""
MAX_UNTRACKED = 100 * 2**10
"""Bytes of a new file that is taken for code."""
CODE_SUFFIXES = frozenset((".py", ".yaml", ".yml", ".toml", ".json", ".md", ".sh", ".j2", ".txt"))
"""New files that count as uncommitted changes, where git does not ignore them."""
MAX_SENT = 32 * 2**10
"""Characters of a patch that travel with a job: Ray hands settings on as a program's argument."""

_SHA = "KNET_GIT_SHA"
_PATCH = "KNET_GIT_PATCH"
_DIFF = (
    *("diff", "HEAD", "--no-color", "--no-ext-diff", "--no-textconv", "--no-renames"),
    *("--ignore-submodules", "--src-prefix=a/", "--dst-prefix=b/"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What it takes to have the same code again."""

    git_sha: str | None
    """None outside a repository."""
    patch: str
    """Uncommitted changes as `git apply` takes them, without secrets; empty if there are none.

    Lines before the first `diff --git` begin with `#` and say what is not in it.
    """

    @property
    def has_changes(self) -> bool:
        """Whether the patch changes anything, and is not only notes."""
        return "diff --git " in self.patch

    @property
    def notes(self) -> tuple[str, ...]:
        """Return what could not be recorded, and why."""
        head = self.patch.partition("diff --git ")[0]
        return tuple(line.removeprefix("# ") for line in head.splitlines())

    def as_environment(self) -> dict[str, str]:
        """Return the variables by which a job is told what its copy of the code came from."""
        if self.git_sha is None:
            return {}
        packed = _pack(self.patch)
        if len(packed) > MAX_SENT:
            note = "# the uncommitted changes were too large to travel with a job\n"
            packed = _pack(_notes_only(self.patch) + note)
        return {_SHA: self.git_sha, _PATCH: packed}


def read_source(file: Path = Path(__file__)) -> Source:
    """Return the state of the repository that tracks `file`.

    A job runs an unpacked copy without history; `knet submit` tells it `KNET_GIT_SHA` and
    `KNET_GIT_PATCH`. The repository is only read.
    """
    stated = os.environ.get(_SHA)
    if stated:
        packed = os.environ.get(_PATCH)
        unknown = f"# {_SHA} was given without {_PATCH}: uncommitted changes are unknown\n"
        return Source(git_sha=stated, patch=unknown if packed is None else _unpack(packed))
    try:
        # An installed copy inside someone's repository is not that repository's code.
        _git(file.parent, "ls-files", "--error-unmatch", file.name)
        root = Path(_git(file.parent, "rev-parse", "--show-toplevel").strip())
        return Source(
            git_sha=_git(root, "rev-parse", "HEAD").strip(), patch=_uncommitted_changes(root)
        )
    except (OSError, subprocess.SubprocessError):
        note = (
            "# no git repository holds this code: commit and uncommitted changes are unknown "
            "(`knet submit` records them where it is typed)\n"
        )
        return Source(git_sha=None, patch=note)


def git_sha() -> str:
    """Return the commit of this code, or "unknown"."""
    return read_source().git_sha or "unknown"


def _uncommitted_changes(root: Path) -> str:
    notes = []
    new, left_out = _new_files(root)
    notes += [f"{name} is not recorded: {reason}" for name, reason in left_out.items()]
    with tempfile.TemporaryDirectory(prefix="knet-index-") as folder:
        # In an index of its own, new files can be part of the diff without touching the user's.
        index = Path(folder, "index")
        shutil.copy(Path(_git(root, "rev-parse", "--absolute-git-dir").strip(), "index"), index)
        environment = {"GIT_INDEX_FILE": str(index)}
        if new:
            listed = "\0".join(new)
            add = ("add", "--intent-to-add", "--pathspec-from-file=-", "--pathspec-file-nul")
            _git(root, *add, environment=environment, stdin=listed)
        counts = _git(root, *_DIFF, "--numstat", "-z", environment=environment).split("\0")
        binary = [line.split("\t", 2)[2] for line in counts if line.startswith("-\t-\t")]
        notes += [f"{name} is not recorded: it is not text" for name in binary]
        others = [f":(top,exclude,literal){name}" for name in binary]
        patch = _git(root, *_DIFF, "--", ":(top)", *others, environment=environment)
    patch, cleaned = clean_patch(patch)
    notes += [f"{name}: a secret was replaced by ***" for name in cleaned]
    size = len(patch.encode(errors="surrogateescape"))
    if size > MAX_PATCH:
        notes.append(
            f"uncommitted changes of {size / 2**20:.1f} MiB are not recorded; at most "
            f"{MAX_PATCH / 2**20:g} MiB are: commit them"
        )
        patch = ""
    return "".join(f"# {note}\n" for note in notes) + patch


def _new_files(root: Path) -> tuple[list[str], dict[str, str]]:
    """Return untracked files that count as code, and others that look like it with a reason."""
    found = _git(root, "ls-files", "--others", "--exclude-standard", "-z").split("\0")
    code = [name for name in found if Path(name).suffix in CODE_SUFFIXES]
    large = {name for name in code if (root / name).stat().st_size > MAX_UNTRACKED}
    reason = f"a new file of more than {MAX_UNTRACKED // 2**10} KiB"
    return [name for name in code if name not in large], dict.fromkeys(sorted(large), reason)


def _git(
    folder: Path,
    *arguments: str,
    environment: Mapping[str, str] | None = None,
    stdin: str = "",
) -> str:
    # Other encodings than UTF-8 come through unchanged: the patch must apply to the very bytes.
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments],
        input=stdin.encode(errors="surrogateescape"),
        env=os.environ | (environment or {}),
        capture_output=True,
        timeout=60,  # seconds
        check=True,
    )
    return done.stdout.decode(errors="surrogateescape")


def _notes_only(patch: str) -> str:
    return patch.partition("diff --git ")[0]


def _pack(patch: str) -> str:
    return base64.b64encode(zlib.compress(patch.encode(errors="surrogateescape"), 9)).decode()


def _unpack(packed: str) -> str:
    return zlib.decompress(base64.b64decode(packed)).decode(errors="surrogateescape")
