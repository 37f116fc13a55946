"""Conditions as trees: guidance reaches every leaf whatever they are packed in, and what is no condition is refused by name."""

from collections import OrderedDict, UserDict, namedtuple
from collections.abc import MutableMapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep import ModelError, VarianceExploding, classifier_free
from fewstep.core.condition import check_batch, moved, repeated, with_null

Pair = namedtuple("Pair", "text pooled")


@dataclass(frozen=True)
class Given:
    text: Tensor
    steps: int = 4


@dataclass(frozen=True)
class Derived:
    text: Tensor

    @cached_property
    def doubled(self):
        return 2 * self.text


class AttributeDict(dict):
    def __init__(self, **parts):
        super().__init__(**parts)
        self.__dict__ = self


class View(MutableMapping):
    """A mapping whose copies share its values."""

    def __init__(self, **parts):
        self.parts = parts

    def __getitem__(self, key):
        return self.parts[key]

    def __setitem__(self, key, value):
        self.parts[key] = value

    def __delitem__(self, key):
        del self.parts[key]

    def __iter__(self):
        return iter(self.parts)

    def __len__(self):
        return len(self.parts)


@dataclass
class Computed:
    text: Tensor

    def __post_init__(self):
        self.doubled = 2 * self.text


X, T = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)), torch.tensor(2.0, dtype=torch.float64)
LABEL, NULL = torch.tensor([1.0, 2.0, 3.0]), torch.tensor(-1.0)
WORDS = {"one": 1.0, "two": 2.0, "three": 3.0, "": -1.0}

PACKED = {  # how the condition, and its null, reach the network; and how the network reads it
    "tensor": (LABEL, NULL, lambda c: c),
    "tuple": ((LABEL,), (NULL,), lambda c: c[0]),
    "list": ([LABEL, LABEL], [NULL, NULL], lambda c: c[1]),
    "named tuple": (Pair(LABEL, None), Pair(NULL, None), lambda c: c.text),
    "dataclass": (Given(LABEL), Given(NULL), lambda c: c.text),
    "nested": ({"a": {"b": [LABEL]}, "mode": "fast"}, {"a": {"b": [NULL]}, "mode": "fast"}, lambda c: c["a"]["b"][0]),
    "ordered": (OrderedDict(label=LABEL), {"label": NULL}, lambda c: c["label"]),
    "user's dict": (UserDict(label=LABEL), UserDict(label=NULL), lambda c: c["label"]),
    "read-only dict": (MappingProxyType({"label": LABEL}), {"label": NULL}, lambda c: c["label"]),
    "dict of attributes": (AttributeDict(label=LABEL), {"label": NULL}, lambda c: c.label),
    "array": (LABEL.numpy(), -1.0, lambda c: torch.from_numpy(c)),
    "texts": (["one", "two", "three"], "", lambda c: torch.tensor([WORDS[word] for word in c])),
    "array of texts": (np.array(["one", "two", "three"]), np.array(["", "", ""]), lambda c: torch.tensor([WORDS[str(w)] for w in c])),
    "texts in a dict": ({"prompt": ("one", "two", "three")}, {"prompt": [""] * 3}, lambda c: torch.tensor([WORDS[w] for w in c["prompt"]])),
    "whole numbers": (LABEL.long(), -1, lambda c: c.float()),
    "in float16": (LABEL.half(), NULL.double(), lambda c: c.float()),
}


@pytest.mark.parametrize("how", PACKED)
@pytest.mark.every(3, 2)
def test_guidance_reaches_a_condition_in_any_packing(how):
    cond, null, read = PACKED[how]

    class Network:
        schedule = VarianceExploding()

        def __call__(self, x, t, cond=None):
            return read(cond)[:, None] + 0.1 * x

    for scale in (1.0, 3.0, 9.0):
        expected = (-1 + scale * (LABEL + 1))[:, None] + 0.1 * X
        torch.testing.assert_close(classifier_free(Network(), scale, null)(X, T, cond), expected)


REFUSED = {
    "an object": (lambda: with_null(object(), object(), 3), "the condition is a object, which cannot be put together for a batch"),
    "an object inside": (lambda: with_null({"a": {1}}, {"a": {1}}, 3), r"the condition\['a'\] is a set"),
    "a number": (lambda: with_null(0, 1, 3), "needs a condition for each sample, as labels .*, got 1"),
    "a text": (lambda: with_null("", "a cat", 3), "needs a condition for each sample"),
    "no condition": (lambda: with_null(0, None, 3), "needs a condition for each sample"),
    "nothing in a dict": (lambda: with_null({}, {}, 3), "needs a condition for each sample, and {} has options alone"),
    "options alone": (lambda: with_null({"a": 3}, {"a": 3}, 3), "needs a condition for each sample"),
    "another option": (lambda: with_null((NULL, 2), (LABEL, 3), 3), r"the condition\[1\] is 3, but in the null condition 2"),
    "True is no 1": (lambda: with_null((NULL, 1), (LABEL, True), 3), "an option is the same in both"),
    "another form": (lambda: with_null(NULL, (LABEL,), 3), r"the form of the condition, a tuple of \[0\]; got -1.0"),
    "other keys": (lambda: with_null({"b": NULL}, {"a": LABEL}, 3), r"the form of the condition, a dict of \['a'\]; got a dict of 1"),
    "a longer null": (
        lambda: with_null({"text": torch.zeros(120, 8)}, {"text": torch.zeros(3, 77, 8)}, 3),
        r"does not fit the condition\['text'\], a Tensor of shape \(3, 77, 8\): it is a Tensor of shape \(120, 8\)",
    ),
    "a fraction for labels": (lambda: with_null(2.5, LABEL.long(), 3), "does not fit the condition, .*: it is 2.5"),
    "nan for labels": (lambda: with_null(float("nan"), LABEL.long(), 3), "does not fit the condition"),
    "a text for labels": (lambda: with_null("none", LABEL, 3), "does not fit the condition, .*: it is 'none'"),
    "one for all": (lambda: with_null(NULL, LABEL[:1], 3), r"shape \(1,\), which is not one for each of 3 samples"),
    "one for all, in a dict": (lambda: check_batch({"a": LABEL[:1]}, 3), r"the condition\['a'\] is a Tensor of shape \(1,\)"),
    "a tensor of a number": (lambda: check_batch((NULL,), 3), r"the condition\[0\] is -1.0, which is not one for each"),
    "too few texts": (lambda: check_batch(["one"], 3), "not one for each of 3 samples"),
    "too few null texts": (lambda: with_null(["", ""], ["one"] * 3, 3), "3 texts, and its null condition a text or one for each"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_condition_is_refused_with_shapes_only(case):
    ask, says = REFUSED[case]
    with pytest.raises(ModelError, match=says) as error:
        ask()
    assert len(str(error.value)) < 400


def test_what_learners_do_with_a_condition_reaches_every_leaf():
    cond = {"label": LABEL, "words": ["a", "b", "c"], "more": (LABEL.numpy(), 5)}
    twice = repeated(cond, 2)
    assert twice["label"].tolist() == [1, 2, 3] * 2 and twice["words"] == ["a", "b", "c"] * 2 and len(twice["more"][0]) == 6
    assert moved(cond, torch.device("meta"))["label"].device.type == "meta"
    assert isinstance(twice["more"][0], np.ndarray)


def test_what_a_condition_has_computed_of_its_parts_is_computed_again():
    given = Derived(LABEL[:1])
    assert float(given.doubled) == 2  # kept from now on
    both = with_null(Derived(NULL), given, 1)
    assert both.doubled.tolist() == [-2, 2] and given.doubled.tolist() == [2]


@pytest.mark.parametrize(
    ("cond", "null", "says"),
    [
        (Computed(LABEL), Computed(NULL), "a Computed that holds tensors in doubled, which is no field of it"),
        (View(text=LABEL), View(text=NULL), "a View, which cannot be copied .*: pass a dict"),
        (LABEL.to_sparse(), NULL, "a Tensor of sparse_coo, which cannot be put together .*to_dense"),
        (LABEL.numpy().astype(object), -1.0, "a ndarray of object, which cannot be put together"),
        (np.array(["one", "two", "three"]), 3.0, "3 texts, and its null condition a text or one for each"),
    ],
    ids=["beside its fields", "shared", "sparse", "objects", "texts"],
)
def test_what_cannot_be_put_together_is_refused_by_name_and_left_as_it_is(cond, null, says):
    with pytest.raises(ModelError, match=says):
        with_null(null, cond, 3)
    assert not isinstance(cond, View) or cond["text"] is LABEL
