from __future__ import annotations

import pytest

from reftlab.runtime.saving import save
from tests.store import cases


@pytest.fixture(scope="session")
def small_model():
    return cases.build_model()


@pytest.fixture(scope="session")
def tokenizer():
    return cases.build_tokenizer()


@pytest.fixture
def bound(small_model, tokenizer):
    return cases.example(small_model, tokenizer)


@pytest.fixture
def folder(bound, tmp_path):
    """A saved artifact."""
    return save(bound, tmp_path / "artifact")
