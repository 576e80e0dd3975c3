"""What the README and the pages say about each other and about the library; tests/docs runs their code."""

import ast
import importlib
import re
import tomllib
from pathlib import Path

import make_notebook

README = Path(__file__).resolve().parent.parent.parent / "README.md"


def blocks_of(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def test_the_chinese_readme_has_the_same_code():
    def code(page: Path) -> list[str]:
        return [ast.dump(ast.parse(re.sub(r'""".*?"""', '""""""', block))) for block in blocks_of(page)]

    assert code(README) == code(README.with_suffix(".zh.md"))


def test_the_notebook_is_the_page_of_recipes():
    assert make_notebook.NOTEBOOK.read_text(encoding="utf-8") == make_notebook.text(), "python tests/make_notebook.py"


def test_links_of_the_readme_and_the_pages_lead_somewhere():
    missing = []
    for page in [README, README.with_suffix(".zh.md"), *(README.parent / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target and not (page.parent / target).exists():
                missing.append(f"{page.name}: {target}")
    assert not missing
    assert len(README.read_text().splitlines()) <= 120


def test_the_messages_of_the_questions_are_those_of_the_library():
    source = " ".join(path.read_text() for path in (README.parent / "rnncore").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # strings over several lines
    titles = re.findall(r"^### (.*)$", (README.parent / "docs" / "questions.md").read_text(), re.MULTILINE)
    assert len(titles) > 10
    symptoms = {
        "float64 where float32 was expected",
        "The first call takes 5 to 15 seconds",
        "My gradient under vmap is wrong",
        "Can't access variables on unbound modules",
        'needs PRNG for "dropout"',
        "Attempted boolean conversion of traced array",
        "missing 1 required positional argument: 'inputs'",
    }
    assert [title for title in titles if title not in symptoms and title not in source] == []


def test_the_pictures_are_there():
    for path in re.findall(r"!\[[^\]]*\]\(([^)]+\.png)\)", README.read_text()):
        assert (README.parent / path).stat().st_size > 10_000


def test_the_badges_are_true():
    project = tomllib.loads((README.parent / "pyproject.toml").read_text())["project"]
    (jax_lowest,) = (d.removeprefix("jax>=") for d in project["dependencies"] if d.startswith("jax>="))
    for name, fact in (
        ("python", project["requires-python"].removeprefix(">=") + "+"),
        ("jax", jax_lowest + " to "),
        ("licence", project["license"]),
    ):
        assert f">{fact}" in (README.parent / "docs" / f"badge_{name}.svg").read_text()


def test_the_page_of_the_api_names_everything_public():
    page = set(re.findall(r"^::: (\S+)$", (README.parent / "docs" / "api.md").read_text(), re.MULTILINE))
    missing = []
    parts = ("analysis", "analysis.plots", "online", "parallel", "training")
    for name in ("rnncore", *(f"rnncore.{part}" for part in parts)):
        module = importlib.import_module(name)
        for own in dir(module):
            made_in = getattr(getattr(module, own), "__module__", "")
            helper = name == "rnncore.training" and made_in != name
            if not own.startswith("_") and str(made_in).startswith("rnncore") and not helper:
                missing += [f"{name}.{own}"] if f"{name}.{own}" not in page else []
    assert not missing
