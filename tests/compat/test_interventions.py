"""Interventions in pyvene's representations: whose mathematics runs, in which directions, and where."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reftlab as rl
import reftlab.compat.interventions as ready
import reftlab.compat.pyreft as pyreft
import reftlab.compat.pyvene as pv
import reftlab.runtime.bind as binding
from reftlab.errors import ArtifactError, GraphError, InterventionError, PositionError, RunError
from tests.compat.hooks import hooked, outputs
from tests.compat.tiny import BASE, OTHER, SOURCE, WIDTH, tiny_gpt2, tiny_llama

DATA = Path(__file__).parent / "data"
PLACE = {"sources->base": 4}


def model_of(intervention: Any, gpt2: Any = None, **entry: Any) -> pv.IntervenableModel:
    kind = "intervention_type" if isinstance(intervention, type) else "intervention"
    given = {"layer": 0, "component": "block_output", kind: intervention, **entry}
    return pv.IntervenableModel(given, model=gpt2 or tiny_gpt2())


def logits_with(gpt2: Any, change: Any) -> Tensor:
    """The model's logits where `change(vector)` stands at column 4 of the first block's output."""

    def act(hidden: Tensor) -> Tensor:
        hidden[:, 4] = change(hidden[:, 4])
        return hidden

    with torch.no_grad(), hooked(gpt2.transformer.h[0], act):
        logits: Tensor = gpt2(**BASE).logits
    return logits


def halfway(self: Any, base: Any, source: Any = None, subspaces: Any = None) -> Any:
    return 0.5 * base + 0.5 * source


# A forward of the user's own.


@pytest.mark.parametrize("ready_made", [pv.VanillaIntervention, pyreft.LoreftIntervention])
def test_a_forward_of_ones_own_on_a_ready_made_intervention_is_refused(ready_made: Any) -> None:
    class Mixed:
        forward = halfway

    class Mine(ready_made):  # type: ignore[misc]
        forward = halfway

    class Between(Mixed, ready_made):  # type: ignore[misc]
        pass

    for kind in (Mine, Between):
        words = rf"{kind.__name__} has a forward of its own, .*: {ready_made.__name__} is ready-made.*"
        for given in (kind, kind(embed_dim=WIDTH, low_rank_dimension=2)):
            with pytest.raises(InterventionError, match=words + "subclass of SourcelessIntervention"):
                model_of(given, low_rank_dimension=2)


def test_the_same_forward_runs_where_the_message_says_to_write_it() -> None:
    class Mine(pv.LocalistRepresentationIntervention, pv.Intervention):
        forward = halfway

    gpt2 = tiny_gpt2()
    there = outputs(gpt2, gpt2.transformer.h[0], SOURCE)[:, 4]
    got = model_of(Mine, gpt2)(BASE, [SOURCE], PLACE)[1].logits
    expected = logits_with(gpt2, lambda vector: 0.5 * vector + 0.5 * there)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_ready_made_intervention_may_be_extended_otherwise_and_saved(tmp_path: Path) -> None:
    class Mine(pyreft.LoreftIntervention):
        note = "kept in the family"

    llama = tiny_llama()
    model = pyreft.get_reft_model(
        llama, pyreft.ReftConfig({"layer": 1, "intervention": Mine(embed_dim=WIDTH, low_rank_dimension=2)})
    )
    model.save(tmp_path / "x")
    again = pyreft.ReftModel.load(tmp_path / "x", llama)
    (own,) = again.interventions.values()
    assert type(own) is pyreft.LoreftIntervention
    places = {"base": [1, 3]}
    assert torch.equal(
        again(BASE, unit_locations=places)[1].logits, model(BASE, unit_locations=places)[1].logits
    )


# Directions.


def autoencoder() -> tuple[pv.AutoencoderIntervention, Any, Any]:
    """An autoencoder of 24 features with its encoder and decoder by hand."""
    generator = torch.Generator().manual_seed(0)
    into, out = (torch.randn(shape, generator=generator) for shape in ((24, WIDTH), (WIDTH, 24)))
    plus, minus = torch.linspace(3, 4, 24), torch.linspace(-0.1, 0.1, WIDTH)
    state = {"autoencoder.encoder.0.weight": into, "autoencoder.encoder.0.bias": plus}
    state |= {"autoencoder.decoder.0.weight": out, "autoencoder.decoder.0.bias": minus}
    own = pv.AutoencoderIntervention(embed_dim=WIDTH, latent_dim=24)
    own.load_state_dict(state)
    return own, lambda h: torch.relu((h - minus) @ into.T + plus), lambda z: z @ out.T + minus


@pytest.mark.parametrize("features", [11, [11], [3, 11]])
def test_an_autoencoder_swaps_the_features_that_it_is_told(features: Any) -> None:
    gpt2 = tiny_gpt2()
    own, encode, decode = autoencoder()
    own.set_interchange_dim(features)
    model = model_of(own, gpt2)
    there = encode(outputs(gpt2, gpt2.transformer.h[0], SOURCE)[:, 4])

    def swapped(vector: Tensor) -> Tensor:
        latent = encode(vector)
        latent[:, features] = there[:, features]
        return decode(latent)  # type: ignore[no-any-return]

    expected = logits_with(gpt2, swapped)
    assert not torch.allclose(expected, logits_with(gpt2, lambda vector: decode(encode(vector))), atol=1e-3)
    torch.testing.assert_close(model(BASE, [SOURCE], PLACE)[1].logits, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(InterventionError, match="set_interchange_dim before the model is made; the native"):
        own.set_interchange_dim(7)


def test_an_autoencoder_that_was_saved_swaps_the_same_features(tmp_path: Path) -> None:
    gpt2 = tiny_gpt2()
    own, *_ = autoencoder()
    own.set_interchange_dim(11)
    model = model_of(own, gpt2)
    model.save(tmp_path / "x")
    again = pv.IntervenableModel.load(tmp_path / "x", gpt2)
    assert torch.equal(again(BASE, [SOURCE], PLACE)[1].logits, model(BASE, [SOURCE], PLACE)[1].logits)


def test_first_directions_are_one_number_which_counts_at_each_call() -> None:
    gpt2 = tiny_gpt2()
    model = model_of(pv.RotatedSpaceIntervention, gpt2)
    (own,) = model.interventions.values()
    there = outputs(gpt2, gpt2.transformer.h[0], SOURCE)[:, 4]
    turn = own.rotate_layer.weight.detach()[:, :3]
    for given in (3, torch.tensor([3])):
        own.set_interchange_dim(given)
        expected = logits_with(gpt2, lambda vector: vector + (there - vector) @ turn @ turn.T)
        got = model(BASE, [SOURCE], PLACE)[1].logits
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    own.set_interchange_dim([1, 2])
    words = r"set_interchange_dim\(\[1, 2\]\): RotatedSpaceIntervention takes one number, .*subspace=\[1, 2\]"
    with pytest.raises(InterventionError, match=words):
        model(BASE, [SOURCE], PLACE)


def test_an_import_keeps_to_the_first_directions_that_it_was_saved_with(tmp_path: Path) -> None:
    folder = tmp_path / "few"
    folder.mkdir()
    for file in (DATA / "RotatedSpaceIntervention").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intervention_dimensions": [5]}))
    gpt2 = tiny_gpt2()
    compat = pv.IntervenableModel.load(folder, gpt2)(BASE, [SOURCE], PLACE)[1].logits
    reft = pv.load_artifact(folder, gpt2, positions=[4])
    assert reft.graph.edits[0].subspace == (0, 1, 2, 3, 4)
    got = reft(**BASE, sources={"source_0": SOURCE}).logits
    torch.testing.assert_close(got, compat, rtol=1e-5, atol=1e-5)


# Where they are, and what becomes of the model.


def test_an_import_leaves_the_model_free_to_learn_as_it_was() -> None:
    llama = tiny_llama().train()
    llama.model.layers[0].eval()
    llama.lm_head.weight.requires_grad_(False)
    reft = pyreft.load_artifact(DATA / "LoreftIntervention", llama, positions="last")
    still = [name for name, parameter in llama.named_parameters() if not parameter.requires_grad]
    assert still == ["lm_head.weight"]
    resting = {name for name, module in llama.named_modules() if not module.training}
    assert resting == {name for name, _ in llama.named_modules() if f"{name}.".startswith("model.layers.0.")}
    assert all(own.training for own in reft.interventions.values())


def test_interventions_that_were_made_before_go_where_the_model_is() -> None:
    llama = tiny_llama().to("meta")
    own = pyreft.LoreftIntervention(embed_dim=WIDTH, low_rank_dimension=2)
    entry = {"layer": 1, "component": "block_output", "intervention": own}
    made = pyreft.get_reft_model(llama, pyreft.ReftConfig(entry)).reft
    imported = pyreft.load_artifact(DATA / "LoreftIntervention", llama)
    for reft in (made, imported):
        tensors = [*reft.interventions.parameters(), *reft.interventions.buffers()]
        assert {tensor.device.type for tensor in tensors} == {"meta"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_interventions_that_were_made_before_run_where_the_model_is() -> None:
    llama = tiny_llama().to("cuda")
    base = {name: tensor.to("cuda") for name, tensor in BASE.items()}
    own = pyreft.LoreftIntervention(embed_dim=WIDTH, low_rank_dimension=2)
    entry = {"layer": 1, "component": "block_output", "intervention": own}
    model = pyreft.get_reft_model(llama, pyreft.ReftConfig(entry))
    _, output = model(base, unit_locations={"base": 2})
    output.logits.sum().backward()
    assert {parameter.grad.device.type for parameter in own.built.parameters()} == {"cuda"}  # type: ignore[union-attr]
    reft = pyreft.load_artifact(DATA / "LoreftIntervention", llama, positions="last")
    assert reft(**base).logits.is_cuda


def test_an_import_of_joined_tokens_takes_joined_positions() -> None:
    gpt2 = tiny_gpt2()
    with pytest.raises(PositionError, match=r"takes 2 tokens joined; expected .* 'joined\(last\(2\)\)'"):
        pv.load_artifact(DATA / "joined", gpt2, positions="last")
    with pytest.raises(PositionError, match=r"takes single tokens; expected positions such as 'last'"):
        pv.load_artifact(DATA / "RotatedSpaceIntervention", gpt2, positions="joined(last(2))")
    reft = pv.load_artifact(DATA / "joined", gpt2, positions="joined(last(2))")
    places = {"sources->base": ([[[4, 5]]], [[[4, 5]]])}
    expected = pv.IntervenableModel.load(DATA / "joined", gpt2)(BASE, [SOURCE], places)[1].logits
    got = reft(**BASE, sources={"source_0": SOURCE}).logits
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


# Native interventions in a representation.


@pytest.mark.parametrize(
    ("native", "change"),
    [
        (lambda: rl.Add(torch.linspace(-1, 1, WIDTH)), lambda h: h + torch.linspace(-1, 1, WIDTH)),
        (rl.Zero, torch.zeros_like),
        (lambda: rl.Mean(torch.ones(WIDTH)), torch.ones_like),
        (lambda: rl.Function(lambda h: 2 * h), lambda h: 2 * h),
    ],
)
def test_a_native_intervention_that_needs_no_source_runs_without_one(native: Any, change: Any) -> None:
    gpt2 = tiny_gpt2()
    got = model_of(native(), gpt2)(BASE, unit_locations={"base": 4})[1].logits
    torch.testing.assert_close(got, logits_with(gpt2, change), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("native", "change"),
    [
        (rl.Swap, lambda h, s: s),
        (rl.Add, lambda h, s: h + s),
        (lambda: rl.Function(lambda h, s: 0.5 * h + 0.5 * s), lambda h, s: 0.5 * h + 0.5 * s),
    ],
)
def test_a_native_intervention_takes_the_source_that_it_is_given(native: Any, change: Any) -> None:
    gpt2 = tiny_gpt2()
    there = outputs(gpt2, gpt2.transformer.h[0], SOURCE)[:, 4]
    got = model_of(native(), gpt2)(BASE, [SOURCE], PLACE)[1].logits
    expected = logits_with(gpt2, lambda vector: change(vector, there))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_native_intervention_is_saved_with_its_numbers_or_refused(tmp_path: Path) -> None:
    gpt2 = tiny_gpt2()
    for number, native in enumerate((rl.Zero(), rl.Add(torch.linspace(-1, 1, WIDTH)), rl.LoReFT(rank=2))):
        model = model_of(native, gpt2)
        with torch.no_grad():
            for parameter in model.get_trainable_parameters():
                parameter.add_(0.1)
        model.save(tmp_path / str(number))
        again = pv.IntervenableModel.load(tmp_path / str(number), gpt2)
        mine, theirs = (m(BASE, unit_locations={"base": 4})[1].logits for m in (model, again))
        assert torch.equal(mine, theirs)
        assert not torch.allclose(mine, gpt2(**BASE).logits, atol=1e-4)
    with pytest.raises(GraphError):
        model_of(rl.Function(lambda h: h), gpt2).save(tmp_path / "code")


def test_a_native_intervention_is_made_with_its_vector() -> None:
    (own,) = model_of(rl.Swap()).interventions.values()
    with pytest.raises(InterventionError, match=r"Swap is native, so make it with its vector, as in rl.Add"):
        own.set_source_representation(torch.ones(WIDTH))


# Calls, and what they leave behind.


def test_a_call_that_fails_leaves_nothing_for_the_next_one() -> None:
    class Told(pv.SourcelessIntervention):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs, keep_last_dim=True)

        def forward(self, base: Any, source: Any = None, subspaces: Any = None) -> Any:
            return pv.InterventionOutput(output=base, latent=(base.shape[1], subspaces))

    fails = [True]

    def sometimes(base: Tensor, source: Any, subspaces: Any = None) -> Tensor:
        if fails.pop():
            raise ZeroDivisionError
        return base

    entries = [
        {"layer": 0, "component": "block_output", "intervention_type": Told},
        {"layer": 1, "component": "block_output", "intervention": sometimes},
    ]
    model = pv.IntervenableModel(entries, model=tiny_gpt2())
    with pytest.raises(ZeroDivisionError):
        model(BASE, unit_locations={"base": [2, 3]}, subspaces=[[[1]], [[1]]])
    native = model.reft.interventions[model.reft.edits[0].module]
    assert (native.units, native.subspaces, native.returned) == (None, None, [])
    fails.append(False)
    model(BASE, unit_locations={"base": 2})
    assert [output.latent for output in model.full_intervention_outputs] == [(1, None)]


def test_with_beams_each_sequence_of_a_prompt_is_a_collected_row() -> None:
    llama = tiny_llama()
    entry = {"layer": 0, "component": "block_output", "intervention_type": pv.CollectIntervention}
    model = pv.IntervenableModel({**entry, "subspace_partition": [[0, 8], [8, 16]]}, model=llama)
    two = {"input_ids": torch.tensor([[5, 6, 7, 8], [11, 12, 13, 14]]), "attention_mask": torch.ones(2, 4)}
    how = {"max_new_tokens": 2, "num_beams": 2, "do_sample": False, "eos_token_id": 39}
    (_, (seen,)), _ = model.generate(two, unit_locations={"base": 2}, intervene_on_prompt=True, **how)
    bare = outputs(llama, llama.model.layers[0], two)[:, 2:3]
    torch.testing.assert_close(seen, bare.repeat_interleave(2, 0))
    parts = [[[0], [1]]]
    (_, (few,)), _ = model.generate(
        two, unit_locations={"base": 2}, intervene_on_prompt=True, subspaces=parts, **how
    )
    torch.testing.assert_close(few[2:], bare[1:].repeat_interleave(2, 0)[..., 8:])
    (_, (alone,)), _ = model.generate(
        two, unit_locations={"base": 2}, intervene_on_prompt=True, max_new_tokens=2
    )
    torch.testing.assert_close(alone, bare)


def test_a_loaded_model_knows_what_was_known_of_it(tmp_path: Path) -> None:
    gpt2 = tiny_gpt2()
    model = model_of(pv.RotatedSpaceIntervention, gpt2)
    model.reft.facts["training"] = {"steps": 3}
    model.save(tmp_path / "x")
    again = pv.IntervenableModel.load(tmp_path / "x", gpt2)
    assert again.reft.facts["training"] == {"steps": 3}
    assert pv.load_artifact(tmp_path / "x", gpt2).facts["training"] == {"steps": 3}
    (before,), (after,) = (m.interventions.values() for m in (model, again))
    for mark in ("trainable", "is_repr_distributed", "is_source_constant", "use_fast"):
        assert getattr(before, mark) == getattr(after, mark), mark
    assert after.trainable


def test_a_configuration_that_is_nested_too_deeply_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[" * 200_000)
    with pytest.raises(ArtifactError, match=r"config.json is damaged"):
        pyreft.load_artifact(tmp_path, tiny_llama())


def test_a_source_run_that_an_intervention_acts_in_must_be_given() -> None:
    entries = [{"layer": layer, "component": "block_output"} for layer in range(2)]
    model = pv.IntervenableModel(pv.IntervenableConfig(entries, mode="serial"), model=tiny_gpt2())
    places = {"source_0->source_1": 2, "source_1->base": 2}
    with pytest.raises(RunError, match="acts in source_1, and sources= gives None for it"):
        model(BASE, [SOURCE, None], places)
    model(BASE, [SOURCE, OTHER], places)


def test_rows_of_a_source_that_are_too_few_are_named() -> None:
    pair = {name: tensor.repeat(3, 1) for name, tensor in BASE.items()}
    two = {name: tensor.repeat(2, 1) for name, tensor in SOURCE.items()}
    with pytest.raises(PositionError, match=r"the source of .* are for 3 rows, and the batch has 2"):
        model_of(rl.Swap())(pair, [two], PLACE)


# What they cost.


def test_a_call_describes_no_intervention_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    described = []
    native = ready.PCARotatedSpaceIntervention.native
    monkeypatch.setattr(
        ready.PCARotatedSpaceIntervention, "native", lambda own: described.append(own) or native(own)
    )
    columns = torch.linalg.qr(torch.randn(WIDTH, WIDTH)).Q.numpy()
    numbers = {"pca": SimpleNamespace(components_=columns), "pca_mean": torch.zeros(WIDTH)}
    own = pv.PCARotatedSpaceIntervention(embed_dim=WIDTH, **numbers, pca_std=torch.ones(WIDTH))
    own.set_interchange_dim(5)
    model = model_of(own)
    described.clear()
    for _ in range(2):
        model(BASE, [SOURCE], PLACE)
    assert not described


def test_the_first_call_binds_nothing_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    bound = []
    make = rl.BoundModel.__init__
    monkeypatch.setattr(
        rl.BoundModel,
        "__init__",
        lambda own, *args, **kwargs: bound.append(own) or make(own, *args, **kwargs),
    )
    model = model_of(pv.VanillaIntervention)
    model(BASE, [SOURCE], PLACE)
    assert bound == [model.reft]


def test_classes_of_ones_own_cost_one_pass_more_together(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(pv.SourcelessIntervention):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.linear = nn.Linear(int(self.embed_dim), 2)

        def forward(self, base: Any, source: Any = None, subspaces: Any = None) -> Any:
            return base

    scans = []
    scan = binding.scan
    monkeypatch.setattr(binding, "scan", lambda *args: scans.append(args) or scan(*args))
    entries = [
        {"layer": 0, "component": "block_output", "intervention_type": Own, "max_number_of_units": 2},
        {"layer": 1, "component": "mlp_activation", "intervention_type": Own},
        {"layer": 1, "component": "head_query_output", "unit": "h.pos", "intervention_type": Own},
        {"component": "transformer.h[0].output", "intervention_type": Own},
    ]
    model = pv.IntervenableModel(entries, model=tiny_gpt2())
    widths = [own.linear.in_features for own in model.interventions.values()]
    assert widths == [2 * WIDTH, 4 * WIDTH, WIDTH // 4, WIDTH]
    assert len(scans) == 2
