"""Items of data sets as people see them."""

import dataclasses
from collections import namedtuple

import numpy as np
import pytest
import torch
from torch.utils.data import Subset, TensorDataset

from lightning_dtda.attribution import Shown
from lightning_dtda.attribution.gallery.pictures import SIGNATURE
from lightning_dtda.attribution.gallery.showing import Vocabulary, class_name, show_item


class Named(TensorDataset):
    classes = ("cat", "dog")
    feature_names = ("age", "bmi")


class Graph:
    """Lists its attributes, as a graph of PyTorch Geometric does."""

    def __init__(self):
        self._store = {"x": torch.zeros(12, 7), "edge_index": torch.zeros(2, 30).long(), "y": torch.tensor([[1.5]])}

    def to_dict(self):
        return self._store


class Tokenizer:
    def decode(self, ids, skip_special_tokens=False):
        return " ".join(f"<{token}>" for token in ids if token or not skip_special_tokens)


class OldTokenizer:
    def decode(self, ids):
        return f"{len(ids)} tokens"


def has_image(shown):
    return shown.image is not None and shown.image.startswith(SIGNATURE)


def test_features_have_the_names_of_the_data_set():
    data = Named(torch.tensor([[50.0, 21.25]]), torch.tensor([1]))
    expected = Shown(label="dog", fields=(("age", "50"), ("bmi", "21.25")))
    assert show_item(data[0], Vocabulary(data)) == expected
    below = Subset(Subset(data, [0]), [0])
    assert show_item(below[0], Vocabulary(below)) == expected
    assert show_item(below[0], Vocabulary(None, object(), data)) == expected
    assert show_item(data[0]) == Shown(label="1", fields=(("x1", "50"), ("x2", "21.25")))
    assert show_item((torch.zeros(3), 1), Vocabulary(data)).fields[0][0] == "x1"  # the names are those of two features


def test_many_features_are_counted():
    fields = show_item((torch.arange(64.0), torch.tensor(0))).fields
    assert fields[:2] == (("x1", "0"), ("x2", "1"))
    assert fields[29:] == (("x30", "29"), ("...", "34 more"))


def test_images_have_labels():
    Image = pytest.importorskip("PIL.Image")  # noqa: N806
    for item in (
        (torch.zeros(1, 28, 28), 1),
        [np.zeros((32, 32, 3), np.uint8), np.int64(1)],
        (Image.new("RGB", (500, 375)), 1),
        {"image": Image.new("RGB", (500, 375)), "label": 1},
        {"pixel_values": torch.randn(3, 224, 224), "labels": torch.tensor(1)},
        {"x": torch.rand(8, 8), "y": torch.tensor([1])},
        (1, torch.zeros(28, 28)),
        (torch.zeros(28, 28), torch.zeros(28, 28), 1),
    ):
        shown = show_item(item, Vocabulary(Named()))
        assert has_image(shown)
        assert (shown.label, shown.text, shown.fields) == ("dog", None, ())
    assert has_image(show_item(Image.new("L", (8, 8))))
    assert has_image(show_item(torch.zeros(28, 28)))


def test_rows_of_hugging_face():
    class Row(Subset):
        @property
        def features(self):
            return {"idx": object(), "label": type("ClassLabel", (), {"names": ["negative", "positive"]})()}

    row = {"sentence": "a fine film", "label": 1, "idx": 17}
    assert show_item(row, Vocabulary(Row([row], [0]))) == Shown(name="17", label="positive", text="a fine film")
    row = {"premise": "It rains.", "hypothesis": "It is wet.", "label": 0, "attention_mask": [1, 1, 1]}
    assert show_item(row) == Shown(label="0", text="It rains.", fields=(("hypothesis", "It is wet."),))


def test_columns_of_a_dictionary_are_fields():
    row = {"id": "a7", "age": 50, "bmi": 21.25, "smoker": True, "scores": torch.zeros(20), "y": 151.0, "none": None}
    fields = (("age", "50"), ("bmi", "21.25"), ("smoker", "True"), ("scores", "float32 20"))
    assert show_item(row) == Shown(name="a7", label="151", fields=fields)


@pytest.mark.parametrize("ids", [[7, 8, 0], torch.tensor([7, 8, 0])])
def test_tokens_are_decoded_by_the_tokenizer_of_data_set_or_module(ids):
    module = type("Module", (), {"tokenizer": Tokenizer()})()
    item = {"input_ids": ids, "attention_mask": ids, "labels": 1}
    assert show_item(item, Vocabulary([], module)) == Shown(label="1", text="<7> <8>")
    assert show_item((torch.tensor([7, 8, 0]), 1), Vocabulary(module)) == Shown(label="1", text="<7> <8>")
    old = type("Module", (), {"tokenizer": OldTokenizer()})()
    assert show_item(item, Vocabulary(old)).text == "3 tokens"
    assert show_item(item).text == "7 8 0"


def test_texts_and_other_columns():
    assert show_item("a text") == Shown(text="a text")
    assert show_item(("a text", 0)) == show_item((0, "a text")) == Shown(label="0", text="a text")
    assert show_item(("question", "answer")) == Shown(label="answer", text="question")
    shown = show_item((torch.zeros(1), torch.tensor(2.5), torch.tensor(0.5)))  # with a weight
    assert shown == Shown(label="2.5", fields=(("column 2", "0.5"), ("x1", "0")))
    assert show_item(({"text": "a"}, 3)) == Shown(label="3", text="a")


def test_labels_of_several_classes():
    assert show_item(("a", torch.tensor([1.0, 1.0])), Vocabulary(Named())).label == "cat, dog"
    assert show_item(("a", torch.tensor([0.25, 1.0])), Vocabulary(Named())).label == "0.25, 1"
    assert show_item(("a", torch.zeros(100)), Vocabulary(Named())).label is None
    assert show_item(("a", 7), Vocabulary(Named())).label == class_name(7, Named.classes) == "7"


def test_graphs_and_other_objects_show_their_attributes():
    fields = (("x", "float32 12 x 7"), ("edge_index", "int64 2 x 30"))
    assert show_item(Graph()) == Shown(label="1.5", fields=fields)

    made = dataclasses.make_dataclass("Sample", ["values", "label"])(torch.zeros(2), 3)
    assert show_item(made) == Shown(label="3", fields=(("values", "0, 0"),))
    assert show_item(namedtuple("Pair", "text y")("a", 1)) == Shown(label="1", text="a")
    assert show_item(object()) == Shown(text="object")


def test_numbers():
    assert show_item(3.0) == show_item(np.float32(3)) == show_item(torch.tensor(3.0)) == Shown(fields=(("x1", "3"),))
    assert show_item([1.0, 2.0, 4.0]).fields == (("x1", "1"), ("x2", "2"), ("x3", "4"))
    assert show_item(torch.zeros(2, 3, 4, 5)) == Shown(text="float32 2 x 3 x 4 x 5")


class Hostile:
    """Nothing that is asked of it works."""

    def __getattribute__(self, name):
        raise RuntimeError(name)

    def __repr__(self):
        raise RuntimeError("repr")


def test_anything_else_is_shown_somehow():
    for item in (None, (), [], {}, set(), Hostile(), (Hostile(), Hostile()), {"x": Hostile()}, b"bytes", {1: 2}):
        assert isinstance(show_item(item, Vocabulary(Hostile())), Shown)
    assert show_item(("a", 1), Vocabulary(Hostile())) == Shown(label="1", text="a")


def test_long_texts_are_cut_and_broken_ones_mended():
    shown = show_item({"text": "ab" * 5000, "label": "c" * 500, "name": "\ud800"})
    assert (len(shown.text), len(shown.label), shown.name) == (1000, 100, "?")
