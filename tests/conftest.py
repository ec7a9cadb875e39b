"""What all tests share: shapes checked by beartype, one thread, tiny models made from a config."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jaxtyping

# Before anything imports reftlab: from here on every annotation in it is checked at each call.
jaxtyping.install_import_hook("reftlab", "tests.check")

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402
from transformers import PreTrainedModel, PreTrainedTokenizerFast  # noqa: E402

from tests.models import FAMILIES, build_model, hook_count, word_tokenizer  # noqa: E402

torch.set_num_threads(1)
settings.register_profile("reftlab", deadline=None, derandomize=True)
settings.load_profile("reftlab")

_MODELS: dict[str, PreTrainedModel] = {}


def _model(family: str) -> PreTrainedModel:
    """One model a family for the whole session; it comes in eval mode, and must come without hooks."""
    if family not in _MODELS:
        _MODELS[family] = build_model(family)
    assert hook_count(_MODELS[family]) == 0, f"an earlier test left hooks on the shared {family}"
    return _MODELS[family].eval().requires_grad_(True)


def pytest_configure(config: pytest.Config) -> None:
    # beartype looks at random items of a list, inside strategies too.
    config.addinivalue_line("filterwarnings", "ignore::hypothesis.errors.HypothesisDeprecationWarning")
    config.addinivalue_line(
        "filterwarnings", "ignore:.*is deprecated and will be removed in v6:FutureWarning"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The notebooks take longest; begun first, they leave no worker alone at the end.
    items.sort(key=lambda item: item.path.name != "test_notebooks.py")


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)


@pytest.fixture
def users_call() -> Iterator[None]:
    """Calls as users make them, without beartype, so that reftlab's own checks answer for wrong types."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(params=FAMILIES)
def any_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """Each of the five families in turn."""
    return _model(request.param)


@pytest.fixture
def llama() -> PreTrainedModel:
    return _model("llama")


@pytest.fixture
def qwen3() -> PreTrainedModel:
    return _model("qwen3")


@pytest.fixture
def gemma3() -> PreTrainedModel:
    return _model("gemma3")


@pytest.fixture
def gpt2() -> PreTrainedModel:
    return _model("gpt2")


@pytest.fixture
def bert() -> PreTrainedModel:
    return _model("bert")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()
