"""Takes secrets out of what is recorded: the launch command and uncommitted changes.

Looks for credentials by where they stand (the userinfo of an address, the value of a name such
as `api_key`), by their look (tokens with a published prefix, private keys), and for the values of
this process's own secret environment variables. A secret that is none of these is not found, so
records deserve the same care as the code they describe.
"""

import os
import re
import shlex
from collections.abc import Mapping, Sequence

MASK = "***"

_NAME = r"(?:api|access|private|auth)[_-]?key|token|secret|passw(?:or)?d|passphrase|credential"
_WORD = rf"[\w.-]*(?:{_NAME})[\w-]*"
_QUOTED = re.compile(
    rf"(?i)({_WORD}[\"']?\]?[ \t]*(?::[ \t]*\w+[ \t]*)?[=:][ \t]*[bru]?([\"']))(?!\2).+?\2"
)
_BARE = re.compile(rf"(?i)({_WORD}[\"']?[ \t]*[=:][ \t]*)[^\s\"',;&(){{}}\[\]]+")
_FLAG = re.compile(rf"(?i)--?{_WORD}")
_USERINFO = re.compile(r"(?<=://)[^\s/@\"']+(?=@)")
_PRIVATE_KEY = re.compile(r"(?s)(-----BEGIN [A-Z ]*PRIVATE KEY-----\n).*?(?=[^\n]*-----END|\Z)")
_TOKENS = re.compile(
    r"\b(?:"
    r"(?:AKIA|ASIA)[0-9A-Z]{16}"  # AWS
    r"|gh[opsur]_\w{36,}|github_pat_\w{22,}|glpat-[\w-]{20,}"  # GitHub, GitLab
    r"|hf_\w{30,}|sk-[\w-]{20,}|AIza[\w-]{35}|xox[abeprs]-[\w-]{10,}"  # Hugging Face to Slack
    r"|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]+"  # JSON Web Token
    r")"
)
_BEARER = re.compile(r"(?i)(\bBearer\s+)[\w.~+/-]{8,}=*")
_SECRET_VARIABLE = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL")
_SHORTEST = 6
"""Characters; shorter values of variables are words such as `test`, which stand everywhere."""


def clean_text(
    text: str, *, is_python: bool = False, environment: Mapping[str, str] | None = None
) -> str:
    """Return `text` with `***` for every secret found; the number of lines stays.

    Args:
        text: Anything.
        is_python: Only quoted values of names are taken for secrets: `token = next(tokens)` is
            code, and `token: abc` in a settings file is not.
        environment: Where values of secret variables come from, this process's by default.
    """
    variables = os.environ if environment is None else environment
    values = {
        value
        for name, value in variables.items()
        if _SECRET_VARIABLE.search(name.upper()) and len(value) >= _SHORTEST
    }
    for value in sorted(values, key=len, reverse=True):
        text = re.sub(rf"(?<!\w){re.escape(value)}(?!\w)", MASK, text)
    text = _PRIVATE_KEY.sub(_masked_lines, text)
    text = _USERINFO.sub(MASK, text)
    text = _BEARER.sub(rf"\g<1>{MASK}", text)
    text = _TOKENS.sub(MASK, text)
    text = _QUOTED.sub(rf"\g<1>{MASK}\g<2>", text)
    return text if is_python else _BARE.sub(rf"\g<1>{MASK}", text)


def clean_command(words: Sequence[str]) -> str:
    """Return a command as one would type it, without the secrets in its arguments."""
    cleaned = []
    after_flag = False
    for word in words:
        cleaned.append(MASK if after_flag else clean_text(word))
        after_flag = _FLAG.fullmatch(word) is not None
    return shlex.join(cleaned)


def clean_patch(patch: str) -> tuple[str, tuple[str, ...]]:
    """Return a git diff without secrets, and the files in which some were.

    In an added line `***` stands for the secret and the diff still applies. Where a secret was in
    the commit already, the diff no longer matches it, and `git apply` says so.
    """
    parts = re.split(r"(?m)^(?=diff --git )", patch)
    cleaned, found = [], []
    for part in parts:
        heading = part.partition("\n")[0]
        clean = clean_text(part, is_python=heading.endswith(".py"))
        cleaned.append(clean)
        if clean != part:
            found.append(heading.rpartition(" b/")[2])
    return "".join(cleaned), tuple(found)


def _masked_lines(match: re.Match[str]) -> str:
    """Mask whole lines but for their first character, which in a diff is its sign."""
    lines = match[0].removeprefix(match[1]).splitlines(keepends=True)
    return match[1] + "".join(f"{line[:1].strip()}{MASK}\n" for line in lines)
