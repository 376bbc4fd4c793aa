"""README and docs: examples run as they stand, links lead somewhere, and every public name is in them."""
import re
import urllib.parse

import pytest

import gradmill
from gradmill import cli, functional, nn, ops, optim, recipes

from .conftest import ROOT

PAGES = sorted(p.relative_to(ROOT).as_posix() for p in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "bench/results").glob("*.md")))
WRITTEN = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
GUIDE = "\n".join(text for page, text in WRITTEN.items() if page != "CHANGELOG.md" and "results/" not in page)


def test_examples_of_readme(run_page):
    plain, projected, wrapped = run_page("README.md")
    assert type(plain["model"][0]) is nn.Linear and plain["optimizer"].state
    assert isinstance(projected["model"][0].weight, gradmill.QuantizedWeight)
    assert [g["projection"] and g["projection"].rank for g in projected["optimizer"].param_groups] == [128, None]
    assert [g["projection"].rank for g in wrapped["optimizer"].param_groups] == [0.25]


def test_examples_of_optimizers(run_page):
    first, _ = run_page("docs/optimizers.md")
    assert first["optimizer"].param_groups[0]["offload"]


def slug(heading):
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", WRITTEN[page], flags=re.S)):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = urllib.parse.unquote(target).partition("#")
        there = (ROOT / page).parent / path if path else ROOT / page
        assert there.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in {slug(h) for h in re.findall(r"^#+ (.*)", there.read_text(encoding="utf-8"), re.M)}, f"{page}: {target}"


@pytest.mark.parametrize("module", [gradmill, nn, optim, ops, functional, recipes], ids=lambda m: m.__name__)
def test_every_public_name_is_in_readme_or_docs(module):
    names = [name.lower() if isinstance(getattr(module, name), recipes.Recipe) else name for name in module.__all__ if name != "__version__"]
    assert not [name for name in names if not re.search(rf"\b{name}\b", GUIDE)]
