"""Saving and loading bound models; artifacts themselves are tested in tests/store."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from reftlab.errors import ArtifactError, GraphError
from reftlab.interventions import Function, Intervention, intervention_types
from reftlab.runtime.saving import load, save
from tests.store import cases
from tests.store.cases import CASES, build_model, logits_of, one, randomise

ROOT = Path(__file__).parents[2]
OURS = {
    name: kind
    for name, kind in intervention_types().items()
    if kind.__module__.startswith("reftlab.interventions.")
}


@pytest.fixture(scope="module")
def model():
    return build_model()


@pytest.fixture(scope="module")
def tokenizer():
    return cases.build_tokenizer()


@pytest.fixture
def bound(model, tokenizer):
    return cases.example(model, tokenizer)


@pytest.fixture(scope="module")
def elsewhere(model, tokenizer, tmp_path_factory):
    """Logits of every case here, and those that a new process gets from the artifacts."""
    folder, output = (
        tmp_path_factory.mktemp("artifacts"),
        tmp_path_factory.mktemp("out") / "logits.safetensors",
    )
    here = {}
    for number, (name, graph) in enumerate(CASES.items()):
        bound = randomise(graph.bind(model, tokenizer), seed=number)
        here[name] = logits_of(bound, tokenizer)
        save(bound, folder / name)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tests.store.cases", str(folder), str(output)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return here, load_file(output)


@pytest.mark.parametrize("case", CASES)
def test_a_new_process_gets_the_same_bits(case, elsewhere):
    here, there = elsewhere
    assert torch.equal(here[case], there[case])


@pytest.fixture(scope="module")
def plain(model, tokenizer):
    """Logits without any edit."""
    return logits_of(cases.InterventionGraph().bind(model, tokenizer), tokenizer)


@pytest.mark.parametrize("case", CASES)
def test_the_case_changes_the_logits(case, elsewhere, plain):
    here = elsewhere[0][case]
    # Of an edit of generated tokens alone, only their logits were kept.
    assert not torch.allclose(here, plain[:, -here.shape[1] :], atol=1e-6)


@pytest.mark.parametrize("name", sorted(set(OURS) - {"Function"}))
def test_every_argument_of_every_intervention_is_among_the_cases(name):
    used = [
        e.intervention for graph in CASES.values() for e in graph.edits if type(e.intervention) is OURS[name]
    ]
    assert used
    for argument, parameter in inspect.signature(OURS[name]).parameters.items():
        values = [intervention.config[argument] for intervention in used]
        assert any(isinstance(v, torch.Tensor) or v != parameter.default for v in values), argument


def test_saving_again_what_was_loaded_changes_nothing(bound, model, tokenizer, tmp_path):
    save(bound, tmp_path / "a")
    again = load(tmp_path / "a", model, tokenizer)
    assert again.facts == bound.facts
    assert again.graph == bound.graph
    again.save(tmp_path / "b")
    for name in ("graph.yaml", "artifact.json", "README.md", "interventions.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_saving_returns_the_folder_and_leaves_the_model_alone(bound, tokenizer, tmp_path):
    before = {key: value.clone() for key, value in bound.state_dict().items()}
    assert save(bound, str(tmp_path / "deep" / "er")) == tmp_path / "deep" / "er"
    assert all(torch.equal(before[key], value) for key, value in bound.state_dict().items())


def test_only_the_interventions_are_saved(bound, tmp_path):
    save(bound, tmp_path / "a")
    saved = load_file(tmp_path / "a" / "interventions.safetensors")
    assert {n for n in saved if not n.startswith("argument:")} == set(bound.interventions.state_dict())
    assert sum(f.stat().st_size for f in (tmp_path / "a").iterdir()) < 10_000


def test_what_is_loaded_can_be_trained_on(bound, model, tokenizer, tmp_path):
    save(bound, tmp_path / "a")
    loaded = load(tmp_path / "a", model, tokenizer)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in loaded.interventions.parameters())
    assert sum(p.numel() for p in loaded.interventions.parameters()) == sum(
        p.numel() for p in bound.interventions.parameters()
    )


def test_a_bfloat16_copy_counts_as_the_same_model(bound, tokenizer, tmp_path):
    save(bound, tmp_path / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load(tmp_path / "a", build_model().to(torch.bfloat16), tokenizer)
    assert loaded.graph == bound.graph


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (lambda: build_model(layers=2), "num_hidden_layers 3 there and 2 here"),
        (lambda: build_model(width=48), "hidden_size 24 there and 48 here"),
        (lambda: GPT2LMHeadModel(GPT2Config(vocab_size=14, n_embd=24, n_layer=3, n_head=4)), "model_type llama there and gpt2 here"),
        (lambda: torch.nn.Linear(24, 24), "model_type llama there and None here"),
    ],
    ids=["layers", "width", "family", "no transformer"],
)  # fmt: skip
def test_another_model_is_refused_with_the_difference(other, says, bound, tmp_path):
    save(bound, tmp_path / "a")
    with pytest.raises(ArtifactError, match="was made for") as error:
        load(tmp_path / "a", other())
    assert says in str(error.value)
    assert "load the model that it was made for" in str(error.value)


def test_other_weights_are_a_warning(bound, tokenizer, tmp_path):
    save(bound, tmp_path / "a")
    with pytest.warns(UserWarning, match="other weights"):
        loaded = load(tmp_path / "a", build_model(seed=4), tokenizer)
    assert loaded.graph == bound.graph


def test_a_model_that_is_not_of_transformers_is_recognised(tmp_path):
    def build(width=6):
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.ReLU(), torch.nn.Linear(width, 3))

    example = torch.ones(2, 4)
    bound = randomise(
        one(cases.LoReFT(rank=2), at="[0].output", positions="all").bind(build(), example=example)
    )
    bound.save(tmp_path / "a")
    loaded = load(tmp_path / "a", build(), example=example)
    assert torch.equal(loaded(example), bound(example))
    with pytest.raises(ArtifactError, match="parameters 51 there and 59 here"):
        load(tmp_path / "a", build(7), example=example)


@pytest.mark.parametrize("function", [torch.tanh, lambda h: -h], ids=["named", "lambda"])
def test_a_function_cannot_be_saved_and_the_old_artifact_stays(function, bound, model, tokenizer, tmp_path):
    save(bound, tmp_path / "a")
    before = {file.name: file.read_bytes() for file in (tmp_path / "a").iterdir()}
    code = one(Function(function)).bind(model, tokenizer)
    with pytest.raises(GraphError, match=r"edit 'edit': Function.* holds code.*Intervention subclass"):
        save(code, tmp_path / "a")
    assert {file.name: file.read_bytes() for file in (tmp_path / "a").iterdir()} == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]
    with pytest.raises(GraphError):
        save(code, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_intervention_of_the_users_own_is_saved_and_needs_its_class_to_load(model, tokenizer, tmp_path):
    class TwiceOver(Intervention):
        def __init__(self, start: float = 0.0):
            super().__init__()
            self.start = start

        def setup(self, width):
            self.vector = torch.nn.Parameter(torch.full((width,), self.start))

        def forward(self, base, source=None):
            return base + 2 * self.vector

    from reftlab.interventions import base

    bound = one(TwiceOver(start=0.5)).bind(model, tokenizer)
    bound.save(tmp_path / "a")
    assert torch.equal(
        logits_of(load(tmp_path / "a", model, tokenizer), tokenizer), logits_of(bound, tokenizer)
    )
    del base._TYPES["TwiceOver"]
    with pytest.raises(ArtifactError, match=r"'TwiceOver' is not known.*import the module"):
        load(tmp_path / "a", model, tokenizer)


@pytest.mark.parametrize("folder", [None, 5, "", " ", "a\0b"])
def test_a_folder_that_is_none_is_refused(bound, folder, users_call):
    with pytest.raises(ArtifactError, match="expected the path of a folder"):
        bound.save(folder)


def test_an_argument_that_cannot_be_written_is_named(model, tokenizer, tmp_path):
    class WithObject(Intervention):
        def __init__(self, thing=None):
            super().__init__()
            self.thing = thing

        def forward(self, base, source=None):
            return base

    from reftlab.interventions import base

    bound = one(WithObject(thing=object())).bind(model, tokenizer)
    with pytest.raises(GraphError, match=r"'edit'.*thing"):
        bound.save(tmp_path / "a")
    assert not list(tmp_path.iterdir())
    del base._TYPES["WithObject"]
