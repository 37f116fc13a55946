"""A docstring opens with a verb and its object (a function's) or with a noun (everything else's), never with a pronoun."""

import ast
import functools
from pathlib import Path

import pytest

import fewstep

ROOT = Path(fewstep.__file__).parent
PRONOUNS = {"That", "Those", "What", "Whose", "Who", "Which", "It", "Its", "Their", "They", "This", "These", "There"}
NO_VERBS = {"A", "All", "An", "As", "At", "Between", "By", "Each", "Every", "For", "From", "How", "If", "In", "None", "Of", "On", "One"}
NO_VERBS |= {"Over", "The", "Through", "To", "Under", "Until", "When", "Where", "Whether", "With", "Without"}


@functools.cache
def openings():
    """Kind, place and first word of every docstring."""
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                continue
            text = ast.get_docstring(node)
            decorators = {getattr(one, "id", getattr(one, "attr", "")) for one in getattr(node, "decorator_list", [])}
            noun = not isinstance(node, ast.FunctionDef) or decorators & {"property", "cached_property"}
            if text:
                where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"
                found.append(("noun" if noun else "verb", where, text.split()[0].rstrip(".,:;")))
    return found


@pytest.mark.parametrize("kind", ["noun", "verb"])
def test_a_docstring_opens_in_the_fields_words(kind):
    banned = PRONOUNS if kind == "noun" else PRONOUNS | NO_VERBS
    found = [(where, word) for one, where, word in openings() if one == kind]
    bad = [f"{where} {word}" for where, word in found if word in banned or (kind == "verb" and not word.isalpha())]
    assert not bad, "\n".join(bad)


def test_examples_are_a_section_that_the_site_shows_as_code():
    """It is called Examples: a section Example is a quotation there, without its prompts."""
    bad = [path for path in sorted(ROOT.rglob("*.py")) for line in path.read_text().splitlines() if line.strip() == "Example:"]
    assert not bad
