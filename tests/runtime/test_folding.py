"""Edits folded into weights, against the same edits run by hooks, and what cannot be folded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reftlab as rl
from reftlab.interventions.reft import LoReFT
from tests.models import WIDTH, batch_of, build, build_model, hook_count
from tests.oracle import VECTOR, assert_close, loreft, randomise, raw_blocks

BATCH = batch_of((7, 4, 9), "left")
REAL = BATCH["attention_mask"].bool()
AFFINE: dict[str, Callable[[], rl.Intervention]] = {
    "LoReFT": lambda: rl.LoReFT(rank=3, scale=0.5),
    "NoReFT": lambda: rl.NoReFT(rank=3, bias=False),
    "DiReFT": lambda: rl.DiReFT(rank=3),
    "NodiReFT": lambda: rl.NodiReFT(rank=3),
    "ConsReFT": lambda: rl.ConsReFT(rank=3),
    "LobiReFT": lambda: rl.LobiReFT(rank=3),
    "Add": lambda: rl.Add(VECTOR),
    "Scale": lambda: rl.Scale(-0.5),
    "Zero": lambda: rl.Zero(),
    "Mean": lambda: rl.Mean(VECTOR),
    "Adapter": lambda: rl.Adapter(4, activation=None),
}
MLP = "blocks[*].mlp.output"


def edit(name: str = "a", at: str = MLP, **options: Any) -> rl.Edit:
    options = {"positions": "all", "phase": "both", "intervention": rl.LoReFT(rank=3), **options}
    return rl.Edit(name, at=at, **options)


def bound(model: nn.Module, *edits: rl.Edit) -> rl.BoundModel:
    reft = rl.InterventionGraph(*(edits or (edit(),))).bind(model).eval()
    randomise(reft)
    return reft


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_as_before(model: nn.Module, before: dict[str, Tensor]) -> None:
    now = model.state_dict()
    assert list(now) == list(before)
    assert all(torch.equal(now[key], value) for key, value in before.items())


@torch.no_grad()
@pytest.mark.parametrize(
    "family", ["llama", "qwen3", "gemma3", "gpt2", "bert", "bloom", "gpt_neox", "phi3", "olmo2"]
)
@pytest.mark.parametrize("site", [MLP, "blocks[*].attn.output"])
def test_a_folded_edit_gives_the_numbers_of_the_hooks_and_comes_out_bit_for_bit(
    family: str, site: str
) -> None:
    model = build(family)
    reft, before, parameters = bound(model, edit(at=site)), weights(model), dict(model.named_parameters())
    expected, bare = reft(**BATCH).logits[REAL], model(**BATCH).logits
    assert not torch.allclose(expected, bare[REAL], atol=0.1)
    assert reft.fold() is reft
    assert_close(reft(**BATCH).logits[REAL], expected, 2e-5)
    # Nothing runs besides the model.
    assert torch.equal(model(**BATCH).logits, reft(**BATCH).logits)
    assert hook_count(model) == 0
    reft.unfold()
    assert_as_before(model, before)
    assert all(own is parameters[name] for name, own in model.named_parameters())
    assert torch.equal(model(**BATCH).logits, bare)
    assert_close(reft(**BATCH).logits[REAL], expected, 0.0)


@torch.no_grad()
def test_folded_weights_are_the_formula_written_out() -> None:
    for family in ("llama", "gpt2"):
        model = build_model(family)
        mlp = raw_blocks(model)[1].mlp
        linear = mlp.down_proj if family == "llama" else mlp.c_proj
        old = linear.weight.clone() if family == "llama" else linear.weight.T.clone()
        bias = torch.zeros(WIDTH) if linear.bias is None else linear.bias.clone()
        reft = bound(model, edit(at="blocks[1].mlp.output", strength=0.5))
        built = reft.interventions["a"]
        with reft.folded():
            new = linear.weight if family == "llama" else linear.weight.T
            # Half the edit of each column as a vector, less what the edit makes of nothing.
            nothing = loreft(built, torch.zeros(1, WIDTH))
            columns = 0.5 * old.T + 0.5 * (loreft(built, old.T) - nothing)
            assert_close(new, columns.T)
            assert_close(linear.bias, 0.5 * bias + 0.5 * loreft(built, bias[None])[0])
        assert (linear.bias is None) == (family == "llama")


@torch.no_grad()
@pytest.mark.parametrize("name", AFFINE)
def test_every_affine_intervention_folds(llama: Any, name: str) -> None:
    reft, before = bound(llama, edit(intervention=AFFINE[name](), at="blocks[1].mlp.output")), weights(llama)
    expected = reft(**BATCH).logits[REAL]
    with reft.folded():
        assert_close(llama(**BATCH).logits[REAL], expected, 2e-5)
    assert_as_before(llama, before)


@torch.no_grad()
def test_bfloat16_is_no_further_from_float32_than_the_hooks_are() -> None:
    exact, errors = build_model("llama"), {}
    model = copy.deepcopy(exact).bfloat16()
    exact.load_state_dict(model.state_dict())
    truth_reft, reft = bound(exact), bound(model)
    truth = truth_reft(**BATCH).logits[REAL]
    errors["hooks"] = (reft(**BATCH).logits[REAL] - truth).norm()
    before = weights(model)
    with reft.folded():
        assert model.model.layers[0].mlp.down_proj.weight.dtype == torch.bfloat16
        errors["folded"] = (model(**BATCH).logits[REAL] - truth).norm()
    assert errors["folded"] < 1.5 * errors["hooks"]
    assert errors["folded"] / truth.norm() < 0.05
    assert_as_before(model, before)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generation_writes_the_same_text_folded(request: pytest.FixtureRequest, family: str) -> None:
    model = request.getfixturevalue(family)
    reft = bound(model)
    options: dict[str, Any] = {
        "max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True,
    }  # fmt: skip
    expected = reft.generate(**BATCH, **options)
    with reft.folded():
        got = reft.generate(**BATCH, **options)
    assert torch.equal(got.sequences, expected.sequences)
    for mine, other in zip(got.logits, expected.logits, strict=True):
        assert_close(mine, other, 1e-4)


@torch.no_grad()
def test_several_edits_of_one_module_fold_in_their_order_and_others_run_on(llama: Any) -> None:
    edits = [
        edit("inner", "model.layers[1].mlp.down_proj.output", intervention=rl.Scale(0.5)),
        edit("first", "blocks[1].mlp.output"),
        edit("second", "blocks[1].mlp.output", intervention=rl.Mean(VECTOR), strength=0.25),
        edit("last", "blocks[1].mlp.output", positions="last", phase="prompt"),
    ]
    reft, before = bound(llama, *edits), weights(llama)
    expected = reft(**BATCH).logits[REAL]
    for names in (("inner",), ("inner", "first"), ("inner", "first", "second")):
        with reft.folded(*names):
            assert_close(reft(**BATCH).logits[REAL], expected, 2e-5)
    with reft.folded("inner"):
        reft.fold("first")
        assert_close(reft(**BATCH).logits[REAL], expected, 2e-5)
    assert_as_before(llama, before)
    for names, blocking in ((("first",), "inner"), (("inner", "second"), "first")):
        with pytest.raises(rl.RunError, match=rf"edit '{blocking}' acts there before it and is not folded"):
            reft.fold(*names)
        assert_as_before(llama, before)


class Doubled(LoReFT):
    """Says what LoReFT says in `affine`, and does something else."""

    def forward(self, base: Any, source: Any = None, *, subspace: Any = None) -> Any:
        return base + 2.0 * (super().forward(base, source, subspace=subspace) - base)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "positions": ({"positions": "last"}, "positions are 'last', not 'all'"),
    "prompt": ({"phase": "prompt"}, "phase='prompt' leaves out generated tokens and answers"),
    "decode": ({"phase": "decode"}, "phase='decode' leaves out the prompt"),
    "condition": ({"when": rl.norm("embed.output") > 1.0}, "it has a condition"),
    "tasks": ({"tasks": ["x", "y"]}, r"it is for tasks \(x, y\)"),
    "activation": ({"intervention": rl.LoReFT(3, activation="relu")}, "is not an affine map"),
    "clamp": ({"intervention": rl.Clamp(low=0.0)}, r"Clamp\(low=0\) is not an affine map"),
    "function": ({"intervention": rl.Function(torch.sin)}, "is not an affine map"),
    "dishonest": ({"intervention": Doubled(3)}, r"affine\(\) of Doubled says is not what it does"),
    "subspace": ({"subspace": [0]}, "some directions of its basis"),
    "block": ({"at": "blocks[1].output"}, "a LlamaDecoderLayer, returns is not what one linear module makes"),
    "norm": ({"at": "final_norm.output"}, "a LlamaRMSNorm, returns is not"),
    "embedding": ({"at": "embed.output"}, "an? Embedding, returns is not"),
    "input": ({"at": "model.layers[1].mlp.input"}, "not the output of a module"),
    "heads": ({"at": "blocks[1].attn.q", "heads": [0]}, "it acts on a view of its site"),
    "features": ({"features": [0, 1, 5]}, "it acts on a view of its site"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_folded_is_refused_with_its_reason(llama: Any, kind: str) -> None:
    options, reason = REFUSED[kind]
    reft = bound(llama, edit("fine", "blocks[0].attn.output"), edit("wrong", **options))
    before, parameters = weights(llama), list(llama.parameters())
    with pytest.raises(rl.RunError, match=rf"edit 'wrong.*cannot be folded: .*{reason}"):
        reft.fold()
    assert_as_before(llama, before)
    assert all(a is b for a, b in zip(parameters, llama.parameters(), strict=True))
    reft.fold("fine").unfold()


class Around(nn.Module):
    """A module that returns what its linear module makes, or does more with that."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.linear, self.relu = kind, nn.Linear(4, 4), nn.ReLU(inplace=True)
        if kind == "two names":
            self.also = self.linear

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if self.kind == "in place":
            return self.relu(y)
        if self.kind == "used":
            self.kept = torch.stack([y, y]).sum()
        if self.kind == "twice":
            return self.linear(y)
        return y


def test_a_module_that_does_more_than_return_its_linear_modules_output_is_refused() -> None:
    for kind in ("plain", "in place", "used", "twice", "two names"):
        model = nn.Sequential(Around(kind), nn.Tanh()).eval()
        made = rl.Edit("a", at="[0].output", positions="all", intervention=rl.LoReFT(rank=2))
        reft, x = made_bound(made, model), torch.randn(3, 4)
        expected = reft(x).detach()
        if kind == "plain":
            with reft.folded():
                assert_close(model(x).detach(), expected)
        else:
            reason = (
                "several places, 0.linear and 0.also"
                if kind == "two names"
                else "returns is not what one linear"
            )
            with pytest.raises(rl.RunError, match=reason):
                reft.fold()


def made_bound(made: rl.Edit, model: nn.Module) -> rl.BoundModel:
    reft = rl.InterventionGraph(made).bind(model, example=torch.randn(2, 4))
    randomise(reft)
    return reft


class Quantised(nn.Linear):
    """As those of other packages, a subclass whose weight may mean anything."""


@pytest.mark.parametrize("kind", ["tied", "subclass", "hook", "source run", "read", "training", "disabled"])
def test_models_and_graphs_in_which_weights_mean_more_are_refused(kind: str) -> None:
    model = build_model("gpt2" if kind == "tied" else "llama")
    nodes: list[Any] = [edit(at="unembed" if kind == "tied" else "blocks[1].mlp.output")]
    reason = {
        "tied": "lm_head.weight are one tensor",
        "subclass": "is a Quantised, not a plain nn.Linear",
        "hook": "somebody else's hooks are on model.layers.1.mlp.down_proj",
        "source run": "the graph has source runs",
        "read": "down_proj.output is read before it acts",
        "training": "training mode",
        "disabled": r"disabled\(\) leaves it out",
    }[kind]
    if kind == "subclass":
        model.model.layers[1].mlp.down_proj.__class__ = Quantised
    if kind == "hook":
        model.model.layers[1].mlp.down_proj.register_forward_hook(lambda module, args, output: output + 1.0)
    if kind == "source run":
        swap = rl.Edit(
            "s", at="blocks[0].output", positions="last", intervention=rl.Swap(), source=rl.Read(run="o")
        )
        nodes += [rl.Source("o"), swap]
    if kind == "read":
        nodes.append(rl.Read("model.layers[1].mlp.down_proj.output", "last", name="inner"))
    reft, before = rl.InterventionGraph(*nodes).bind(model), weights(model)
    if kind == "training":
        reft.train()
    with (
        reft.disabled("a") if kind == "disabled" else reft.replaced("a", reft.interventions["a"]),
        pytest.raises(rl.RunError, match=f"edit 'a' at .* cannot be folded: .*{reason}"),
    ):
        reft.fold("a")
    assert_as_before(model, before)


@pytest.mark.usefixtures("users_call")
def test_calls_that_ask_a_folded_edit_for_something_else_are_refused() -> None:
    llama = build_model("llama")
    reft = bound(llama, edit("a", "blocks[1].mlp.output"), edit("b", "blocks[0].attn.output"))
    site = "model.layers[1].mlp.down_proj.output"
    expected = reft(**BATCH).logits.detach()[REAL]
    reft.fold("a")
    with torch.no_grad():
        allowed: dict[str, Any] = {"tasks": ["a+b", "b+a", "a+b"], "scale": {"a": 1.0}, "select": ["a", "b"]}
        assert_close(reft(**BATCH, **allowed).logits[REAL], expected, 2e-5)
    refusals: list[tuple[dict[str, Any], str]] = [
        ({"tasks": ["a", "b", None]}, "not all rows have its task"),
        ({"select": ["b"]}, "this call leaves it out"),
        ({"scale": {"a": 0.5}}, "another strength"),
        ({"subspace": {"a": [0]}}, "another strength, positions or directions"),
        ({"positions": {"a": "last"}}, "another strength, positions or directions"),
    ]
    for options, reason in refusals:
        message = rf"edit 'a' is folded into model.layers.1.mlp.down_proj.*{reason}.*; unfold\(\) first"
        with pytest.raises(rl.RunError, match=message):
            reft(**BATCH, **options)
        with pytest.raises(rl.RunError, match=message):
            reft.generate(**BATCH, **options, max_new_tokens=2)
    with reft.disabled("a"), pytest.raises(rl.RunError, match="leaves it out"):
        reft(**BATCH)
    with reft.watching(lambda *seen: None), pytest.raises(rl.RunError, match="nobody can watch"):
        reft(**BATCH)
    with reft.replaced("a", LoReFT(1).build(WIDTH)), pytest.raises(rl.RunError, match="another intervention"):
        reft(**BATCH)
    with pytest.raises(rl.RunError, match="comes before edit 'a' acts"):
        reft.read(f"{site} @ last", **BATCH)
    for derive in (lambda: reft.select("b"), lambda: reft.scale("a", 0.5), lambda: reft + reft.select("b")):
        with pytest.raises(
            rl.BindError, match=r"edit 'a' is folded into the weights of .*down_proj.*unfold\(\) first"
        ):
            derive()
    again = {"a": reft.interventions["a"]}
    with pytest.raises(rl.BindError, match="where they would act a second time"):
        rl.BoundModel(rl.InterventionGraph(edit("a", "blocks[2].mlp.output")), llama, built=again)
    with pytest.raises(rl.RunError, match="edit 'a' is folded already"):
        reft.fold("a")
    with pytest.raises(rl.RunError, match=r"no edit 'aa'.*Did you mean 'a'"):
        reft.fold("aa")
    other = bound(llama, edit("c", "blocks[1].mlp.output"))
    with pytest.raises(rl.RunError, match="another bound model"):
        other.fold()
    reft.train()
    with pytest.raises(rl.RunError, match="training mode"):
        reft(**BATCH)
    reft.eval()
    with torch.no_grad():
        reft.interventions["a"].linear.weight.mul_(2.0)
    with pytest.raises(rl.RunError, match="its numbers have changed"):
        reft(**BATCH)
    reft.unfold()
    reft(**BATCH)


@torch.no_grad()
def test_reading_a_folded_site_gives_what_the_hooks_made(llama: Any) -> None:
    reft = bound(llama, edit(at="blocks[1].mlp.output"))
    site = "blocks[1].mlp.output @ last"
    expected = reft.read(site, **BATCH)[site]
    with reft.folded():
        assert_close(reft.read(site, **BATCH)[site], expected, 2e-5)


@torch.no_grad()
def test_saving_writes_the_edits_and_the_models_own_fingerprint(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    model = build_model("llama")
    reft = bound(model)
    expected = reft(**BATCH).logits
    with reft.folded():
        folded = weights(model)
        reft.save(tmp_path / "folded")
        assert_as_before(model, folded)
    reft.save(tmp_path / "plain")
    files = {path.name for path in (tmp_path / "plain").iterdir()}
    assert files == {path.name for path in (tmp_path / "folded").iterdir()}
    name = "interventions.safetensors"
    assert (tmp_path / "folded" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    again = rl.load(tmp_path / "folded", build_model("llama"))
    assert_close(again(**BATCH).logits, expected)
    assert not [warning for warning in recwarn if "other weights" in str(warning.message)]


@torch.no_grad()
def test_copies_moves_and_casts_of_a_folded_model_come_out_right() -> None:
    model = build_model("llama")
    before, reft = weights(model), bound(model)
    with reft.folded():
        expected = reft(**BATCH).logits
        twin = copy.deepcopy(reft)
        assert torch.equal(twin(**BATCH).logits, expected)
        twin.unfold()
        assert_as_before(twin.model, before)
        assert torch.equal(reft(**BATCH).logits, expected)
        model.double().requires_grad_(False)
    assert all(not p.requires_grad and p.dtype == torch.float64 for p in model.parameters())
    assert_as_before(model, {key: value.double() for key, value in before.items()})


def test_state_dict_has_the_folded_weights_and_writing_to_them_is_undone_with_a_warning() -> None:
    model = build_model("llama")
    before, reft = weights(model), bound(model, edit(at="blocks[1].mlp.output"))
    key = "model.layers.1.mlp.down_proj"
    reft.fold()
    assert set(model.state_dict()) - set(before) == {f"{key}.bias"}
    assert not torch.equal(model.state_dict()[f"{key}.weight"], before[f"{key}.weight"])
    with torch.no_grad():
        model.get_submodule(key).weight.add_(1.0)
    with pytest.warns(UserWarning, match="were written to while edits were folded"):
        reft.unfold()
    assert_as_before(model, before)


def test_gradients_reach_what_comes_before_a_folded_edit(llama: Any) -> None:
    reft = bound(llama, edit(at="blocks[1].mlp.output"))
    embeds = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1))
    found = []
    for folded in (False, True):
        inputs = embeds.clone().requires_grad_()
        if folded:
            reft.fold()
        reft(inputs_embeds=inputs).logits.logsumexp(-1).sum().backward()
        found.append(inputs.grad)
    reft.unfold()
    assert_close(found[1], found[0], 1e-4)


@torch.no_grad()
def test_logits_of_the_embedded_model_are_the_same_folded() -> None:
    model, tokenizer = rl.load_model()
    batch = tokenizer(["The capital of France is"], return_tensors="pt", padding=True)
    sites = ("blocks[3:30:9].mlp.output", "blocks[10].attn.output")
    reft = bound(model, *(edit(f"e{k}", at, intervention=rl.LoReFT(rank=4)) for k, at in enumerate(sites)))
    for parameter in reft.interventions.parameters():
        parameter.mul_(0.1)
    real, before = batch["attention_mask"].bool(), weights(model)
    expected, bare = reft(**batch).logits[real], model(**batch).logits[real]
    with reft.folded():
        got = reft(**batch).logits[real]
    assert (expected - bare).norm() > 0.01 * bare.norm()
    assert (got - expected).norm() < 1e-5 * expected.norm()
    assert_as_before(model, before)


def test_an_answers_tokens_are_edited_by_hooks_of_phase_both_as_by_weights(llama: Any) -> None:
    labels = torch.where(REAL, BATCH["input_ids"], -100)
    labels[:, :6] = -100
    reft = bound(llama)
    with torch.no_grad():
        loss = reft(**BATCH, labels=labels).loss
        with reft.folded():
            assert_close(reft(**BATCH, labels=labels).loss, loss, 1e-5)
