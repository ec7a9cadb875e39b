"""What a map says of itself in a line: what was fitted, and in which form texts were read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from reftlab.probing import probe
from tests.models import word_tokenizer
from tests.probing.planted_vectors import QUICK, random_activations

TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }}{% endfor %} :"
TEXTS = [
    f"{first} {last}" for first in ("the", "a", "who", "John") for last in ("cat", "dog", "book", "Paris")
]
LABELS = [number % 2 for number in range(16)]
LIGHT: dict[str, Any] = {**QUICK, "estimator": "mean_difference", "sites": "blocks[0].output", "folds": 2}


def _scaled(head: Any) -> Any:
    return make_pipeline(StandardScaler(), head)


@pytest.mark.parametrize(
    ("estimator", "name"),
    [
        ("lda", "lda"),
        (_scaled(LogisticRegression(C=0.5, max_iter=500, class_weight="balanced")), "LogisticRegression"),
        (_scaled(_scaled(LogisticRegression())), "LogisticRegression"),
        (GridSearchCV(_scaled(LogisticRegression()), {"logisticregression__C": [1.0]}, cv=2), "LogisticRegression"),
        (RandomForestClassifier(2), "RandomForestClassifier"),
    ],
)  # fmt: skip
def test_one_s_own_estimator_is_named_by_what_decides_and_its_text_is_kept(estimator: Any, name: str) -> None:
    found = random_activations(np.random.default_rng(0), 40, 4, 1)
    result = probe(found, labels=np.arange(40) % 2, estimator=estimator, **QUICK)
    assert repr(result).startswith(f"ProbeMap(1 site × 1 position; {name}; best")
    assert result.estimator_name == name
    assert result.estimator == " ".join(repr(estimator).split()) if name != "lda" else "lda"
    assert f"Probes: {name}, 5 folds" in result.plot().get_suptitle()


def test_texts_that_went_through_the_chat_template_are_said_to_have(llama: Any) -> None:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    plain = probe(llama, TEXTS, LABELS, tokenizer=tokenizer, chat=False, **LIGHT)
    spoken = probe(llama, TEXTS, LABELS, tokenizer=tokenizer, system="the <dog>", **LIGHT)
    assert (plain.settings["chat"], spoken.settings["chat"]) == (False, True)
    assert spoken.settings["system"] == "the <dog>"
    assert "; chat template; " in repr(spoken)
    assert "chat template, with the system message &#x27;the &lt;dog&gt;&#x27;." in spoken._repr_html_()
    assert "chat template" in spoken.plot().get_suptitle()
    assert "chat template" not in repr(plain) + plain._repr_html_() + plain.plot().get_suptitle()


@pytest.mark.parametrize("form", ["lists", "tensors", "encoded", "batches", "tensor"])
def test_token_ids_go_through_no_template(form: str, llama: Any) -> None:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    rows = [[7, 10 + number, 40] for number in range(16)]
    data: Any = {
        "lists": rows,
        "tensors": [torch.tensor(row) for row in rows],
        "encoded": {"input_ids": rows, "attention_mask": [[1, 1, 1]] * 16},
        "batches": [{"input_ids": torch.tensor(rows)}],
        "tensor": torch.tensor(rows),
    }[form]
    result = probe(llama, data, LABELS, tokenizer=tokenizer, **LIGHT)
    assert result.settings["chat"] is False
    assert "chat" not in repr(result)


@pytest.mark.parametrize("form", ["pairs", "table", "examples"])
def test_texts_in_any_form_go_through_it(form: str, llama: Any) -> None:
    import pandas as pd

    import reftlab as rl

    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    data: Any = {
        "pairs": [(text, "Paris") for text in TEXTS],
        "table": pd.DataFrame({"text": TEXTS}),
        "examples": [rl.Example(text) for text in TEXTS],
    }[form]
    result = probe(llama, data, LABELS, tokenizer=tokenizer, **LIGHT)
    assert "; chat template; " in repr(result)


def test_of_vectors_that_were_there_already_nothing_is_said() -> None:
    found = random_activations(np.random.default_rng(0), 40, 4, 1)
    result = probe(found, labels=np.arange(40) % 2, **QUICK)
    assert result.settings["chat"] is None
    assert "chat" not in repr(result)
