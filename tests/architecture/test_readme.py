"""What the README points at exists, and the verbs it shows are the command line's."""

import re
from pathlib import Path

from knet_platform.cli.main import VERBS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_every_link_to_a_file_leads_somewhere():
    broken = [
        f"{page.name}: {target}"
        for page in PAGES
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text())
        if "://" not in target and not (page.parent / target).exists()
    ]
    assert broken == []


def test_the_readme_shows_only_verbs_that_exist():
    shown = set(
        re.findall(r"^\$? ?knet ([a-z-]+)", (ROOT / "README.md").read_text(), re.MULTILINE)
    )
    assert shown
    assert shown <= set(VERBS)
