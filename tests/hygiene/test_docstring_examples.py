"""The examples in docstrings run, and give what they show."""

import ast
import doctest
from pathlib import Path

import pytest

import fewstep

ROOT = Path(fewstep.__file__).parent
FAST = ("core", "solvers", "sampling", "models", "integrations")  # learners and benchmarks take seconds


def _examples():
    """Name and text of each docstring with an example, found without an import."""
    for path in sorted(ROOT.rglob("*.py")):
        source = path.read_text()
        for node in ast.walk(ast.parse(source)) if ">>> " in source else ():
            text = ast.get_docstring(node) if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.Module) else None
            if text and ">>> " in text:
                name = f"{path.relative_to(ROOT).with_suffix('').as_posix().replace('/', '.')}.{getattr(node, 'name', '')}"
                yield pytest.param(name, text, id=name, marks=[] if name.startswith(FAST) else [pytest.mark.slow])


@pytest.mark.parametrize(("name", "text"), list(_examples()))
def test_an_example_gives_what_it_shows(name, text):
    said: list[str] = []
    example = doctest.DocTestParser().get_doctest(text, {}, name, None, None)
    result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example, out=said.append)
    assert result.attempted and result.failed == 0, "".join(said)
