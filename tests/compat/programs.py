"""Programs as pyreft's and pyvene's users write them; each is run by the real libraries and by reftlab.

Each takes the two libraries and returns what it computed, by name. The calls are those of the two
READMEs and tutorials, on tiny models.
"""

from __future__ import annotations

import tempfile
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.compat.tiny import (
    BASE,
    OTHER,
    PAIR,
    PAIR_SOURCE,
    SOURCE,
    WIDTH,
    tiny_gpt2,
    tiny_llama,
    tiny_tokenizer,
)

Found = dict[str, Tensor]

REFT_KINDS = (
    "LoreftIntervention",
    "NoreftIntervention",
    "ConsreftIntervention",
    "LobireftIntervention",
    "DireftIntervention",
    "NodireftIntervention",
)
SWAP_KINDS = (
    "RotatedSpaceIntervention",
    "LowRankRotatedSpaceIntervention",
    "BoundlessRotatedSpaceIntervention",
    "SigmoidMaskIntervention",
    "SigmoidMaskRotatedSpaceIntervention",
    "AutoencoderIntervention",
)


def moved(module: torch.nn.Module) -> None:
    """Give parameters of no rotation numbers that show, and turn rotations a little."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.is_floating_point() and "temperature" not in name and "boundaries" not in name:
                wave = torch.cos(torch.arange(parameter.numel()).double() + len(name)).reshape(
                    parameter.shape
                )
                # Torch's Householder form keeps signs on the diagonal, which training leaves alone.
                wave = wave.tril(-1) if "parametrizations" in name else wave
                parameter.add_((0.2 * wave).to(parameter.dtype))


def swap_one_token(pyreft: Any, pv: Any) -> Found:
    """The first program of pyvene's README."""
    config = pv.IntervenableConfig(
        representations=[
            pv.RepresentationConfig(
                0,  # layer
                "mlp_output",  # component
                "pos",  # unit
                1,  # max number of units
            ),
        ],
        intervention_types=pv.VanillaIntervention,
    )
    intervenable = pv.IntervenableModel(config, model=tiny_gpt2())
    original, intervened = intervenable(
        BASE, [SOURCE], {"sources->base": ([[[4]]], [[[4]]])}, output_original_output=True
    )
    _, elsewhere = intervenable(BASE, [SOURCE], {"sources->base": (2, 5)})
    return {"swap.original": original.logits, "swap": intervened.logits, "swap.elsewhere": elsewhere.logits}


def zeros_and_constants(pyreft: Any, pv: Any) -> Found:
    """A vector in place of a source; zeros; interventions at every layer."""
    gpt2 = tiny_gpt2()
    constant = {"layer": 0, "component": "mlp_output", "source_representation": torch.ones(WIDTH)}
    one = pv.IntervenableModel(constant, model=gpt2)
    _, first = one(base=BASE, unit_locations={"base": 3})
    kinds = (pv.AdditionIntervention, pv.SubtractionIntervention)
    entry = {"component": "block_output", "source_representation": torch.linspace(-1, 1, WIDTH)}
    several = pv.IntervenableConfig(
        [{**entry, "layer": layer, "intervention_type": kinds[layer]} for layer in range(2)], mode="parallel"
    )
    _, second = pv.IntervenableModel(several, model=gpt2)(base=BASE, unit_locations={"base": [1, 2, 4]})
    zero = {"layer": 1, "component": "attention_output", "intervention_type": pv.ZeroIntervention}
    _, third = pv.IntervenableModel(zero, model=gpt2)(BASE, unit_locations={"base": 2})
    return {"constant": first.logits, "constants": second.logits, "zero": third.logits}


def paths_and_components(pyreft: Any, pv: Any) -> Found:
    """Components by path and by name, in two families."""
    found = {}
    gpt2, llama = tiny_gpt2(), tiny_llama()
    for name in (
        "transformer.h[1].mlp.act.output",
        "transformer.h[0].output",
        "transformer.h[1].attn.c_proj.input",
    ):
        model = pv.IntervenableModel({"component": name}, model=gpt2)
        found[f"gpt2.{name}"] = model(BASE, [SOURCE], {"sources->base": 3})[1].logits
    shared = ["block_input", "block_output", "mlp_input", "mlp_output", "mlp_activation", "attention_output"]
    shared += ["attention_input", "attention_value_output", "query_output", "key_output", "value_output"]
    for family, bare in (("gpt2", gpt2), ("llama", llama)):
        for name in shared:
            model = pv.IntervenableModel({"layer": 1, "component": name}, model=bare)
            found[f"{family}.{name}"] = model(BASE, [SOURCE], {"sources->base": 3})[1].logits
    return found


def heads(pyreft: Any, pv: Any) -> Found:
    """One head at one token, and one head everywhere."""
    found = {}
    gpt2 = tiny_gpt2()
    for name in ("head_attention_value_output", "head_query_output", "head_key_output", "head_value_output"):
        config = pv.IntervenableConfig([{"layer": 1, "component": name, "unit": "h.pos"}])
        model = pv.IntervenableModel(config, model=gpt2)
        places = pv.GET_LOC((3, 4))
        found[name] = model(BASE, [SOURCE], {"sources->base": (places, places)})[1].logits
    config = pv.IntervenableConfig([{"layer": 0, "component": "head_attention_value_output", "unit": "h"}])
    model = pv.IntervenableModel(config, model=gpt2)
    found["head.everywhere"] = model(BASE, [SOURCE], {"sources->base": ([[[2]]], [[[2]]])})[1].logits
    return found


def subspaces(pyreft: Any, pv: Any) -> Found:
    """Parts of a vector, by a partition."""
    entry = {"layer": 0, "component": "block_output", "subspace_partition": [[0, 8], [8, 16]]}
    model = pv.IntervenableModel(pv.IntervenableConfig([entry]), model=tiny_gpt2())
    _, one = model(BASE, [SOURCE], {"sources->base": 3}, subspaces=[[[1]]])
    _, rest = model(BASE, [SOURCE], {"sources->base": (2, 4)}, subspaces=0)
    first = pv.IntervenableModel({"layer": 1, "component": "mlp_output"}, model=tiny_gpt2())
    next(iter(first.interventions.values())).set_interchange_dim(6)
    _, few = first(BASE, [SOURCE], {"sources->base": 4})
    return {"subspace": one.logits, "subspace.short": rest.logits, "subspace.first": few.logits}


def two_sources(pyreft: Any, pv: Any) -> Found:
    """Two sources into one base, side by side; one of them left out; one after the other."""
    entries = [{"layer": 0, "component": "mlp_output"}, {"layer": 1, "component": "attention_output"}]
    model = pv.IntervenableModel(pv.IntervenableConfig(entries, mode="parallel"), model=tiny_gpt2())
    places = {"sources->base": ([[[1]], [[4]]], [[[2]], [[5]]])}
    _, both = model(BASE, [SOURCE, OTHER], places)
    _, second = model(BASE, [None, OTHER], places)
    _, same = model(BASE, [SOURCE], {"sources->base": 3})
    nested = pv.IntervenableModel(pv.IntervenableConfig(entries, mode="serial"), model=tiny_gpt2())
    order = {"source_0->source_1": ([[[1]]], [[[2]]]), "source_1->base": ([[[3]]], [[[5]]])}
    _, serial = nested(BASE, [SOURCE, OTHER], order)
    return {"both": both.logits, "second": second.logits, "same": same.logits, "serial": serial.logits}


def grouped(pyreft: Any, pv: Any) -> Found:
    """Two interventions that take one source together."""
    entries = [
        {"layer": 0, "component": "mlp_output", "group_key": 0},
        {"layer": 1, "component": "attention_output", "group_key": 0},
        {"layer": 1, "component": "mlp_output", "group_key": 1},
    ]
    model = pv.IntervenableModel(pv.IntervenableConfig(entries), model=tiny_gpt2())
    _, output = model(BASE, [SOURCE, OTHER], {"sources->base": 4})
    return {"groups": output.logits}


def batches(pyreft: Any, pv: Any) -> Found:
    """Rows of different lengths, padded on the right, each with units of its own."""
    model = pv.IntervenableModel({"layer": 0, "component": "block_output"}, model=tiny_llama())
    places = {"sources->base": ([[[1, 2], [0, 2]]], [[[3, 5], [1, 2]]])}
    _, output = model(PAIR, [PAIR_SOURCE], places)
    return {"batch.long": output.logits[:1], "batch.short": output.logits[1:, :3]}


def collect(pyreft: Any, pv: Any) -> Found:
    """Vectors read, alone and beside an edit."""
    path = {"component": "transformer.h[1].output", "intervention_type": pv.CollectIntervention}
    (_, alone), _ = pv.IntervenableModel(path, model=tiny_gpt2())(BASE, unit_locations={"base": [1, 3, 4]})
    entries = [
        {"layer": 0, "component": "mlp_output", "intervention_type": pv.ZeroIntervention},
        {"layer": 1, "component": "block_output", "intervention_type": pv.CollectIntervention},
    ]
    beside = pv.IntervenableModel(pv.IntervenableConfig(entries), model=tiny_gpt2())
    (_, seen), output = beside(BASE, unit_locations={"base": 3})
    return {"collect": alone[0], "collect.beside": seen[0], "collect.output": output.logits}


def given_representations(pyreft: Any, pv: Any) -> Found:
    """Tensors in place of a source run."""
    model = pv.IntervenableModel({"layer": 0, "component": "block_output"}, model=tiny_gpt2())
    key = next(iter(model.interventions))
    given = torch.linspace(-2, 2, 2 * WIDTH).reshape(1, 2, WIDTH)
    _, by_key = model(
        BASE, source_representations={key: given}, unit_locations={"sources->base": (None, [[[1, 4]]])}
    )
    _, one = model(BASE, source_representations=torch.ones(WIDTH), unit_locations={"base": 2})
    return {"given.key": by_key.logits, "given.one": one.logits}


def fixed_weights(pyreft: Any, pv: Any) -> Found:
    """A JumpReLU autoencoder, principal components, and a block that is skipped."""
    sae = pv.JumpReLUAutoencoderIntervention(embed_dim=WIDTH, low_rank_dimension=24)
    wave = torch.sin(torch.arange(WIDTH * 24).float()).reshape(WIDTH, 24)
    weights = {"W_enc": wave, "W_dec": 0.1 * wave.T.contiguous(), "threshold": torch.full((24,), 0.2)}
    weights |= {"b_enc": torch.linspace(-0.5, 0.5, 24), "b_dec": torch.linspace(0, 0.3, WIDTH)}
    sae.load_state_dict(weights, strict=False)
    sae.set_interchange_dim(9)
    place = {"sources->base": 4}
    path = {"component": "transformer.h[0].output", "intervention": sae}
    _, swapped = pv.IntervenableModel(path, model=tiny_gpt2())(BASE, [SOURCE], place)
    columns = torch.linalg.qr(wave[:, :WIDTH]).Q.numpy()
    pca = pv.PCARotatedSpaceIntervention(
        embed_dim=WIDTH,
        pca=SimpleNamespace(components_=columns),
        pca_mean=torch.linspace(-1, 1, WIDTH).numpy(),
        pca_std=torch.linspace(0.5, 2, WIDTH).numpy(),
    )
    pca.set_interchange_dim(5)
    entry = {"layer": 0, "component": "block_output", "intervention": pca}
    _, turned = pv.IntervenableModel(entry, model=tiny_gpt2())(BASE, [SOURCE], place)
    skip = {"layer": 1, "component": "block_output", "intervention_type": pv.SkipIntervention}
    _, skipped = pv.IntervenableModel(skip, model=tiny_gpt2())(BASE, [SOURCE], place)
    return {"sae": swapped.logits, "pca": turned.logits, "skip": skipped.logits}


def own_interventions(pyreft: Any, pv: Any) -> Found:
    """A function, and a class of the user's own."""

    class Multiplier(pv.ConstantSourceIntervention):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs, keep_last_dim=True)

        def forward(self, base: Any, source: Any = None, subspaces: Any = None) -> Any:
            return base * 1.5

    model = pv.IntervenableModel(
        {"layer": 0, "component": "block_output", "intervention_type": Multiplier}, model=tiny_gpt2()
    )
    _, by_class = model(BASE, unit_locations={"base": 3})
    mix = {"layer": 1, "component": "mlp_output", "intervention": lambda b, s: 0.5 * b + 0.5 * s}
    _, by_function = pv.IntervenableModel(mix, model=tiny_gpt2())(BASE, [SOURCE], {"sources->base": 4})

    class Parts(
        pv.SourcelessIntervention, pv.TrainableIntervention, pv.DistributedRepresentationIntervention
    ):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs, keep_last_dim=True)
            self.linear = torch.nn.Linear(self.embed_dim, 4)
            with torch.no_grad():
                self.linear.weight.fill_(0.1)
                self.linear.bias.zero_()

        def forward(self, base: Any, source: Any = None, subspaces: Any = None) -> Any:
            amounts = self.linear(base)
            new = base.clone()
            for row, chosen in enumerate(subspaces):
                new[row, :, chosen] = amounts[row][:, chosen]
            return pv.InterventionOutput(output=new, latent=amounts)

    class Turned(pv.ConstantSourceIntervention, pv.DistributedRepresentationIntervention):
        def forward(self, base: Any, source: Any = None, subspaces: Any = None) -> Any:
            return base.flip(-1)

    own = {"layer": 0, "component": "block_output", "intervention_type": Parts}
    parts = pv.IntervenableModel(own, model=tiny_llama())
    places = {"sources->base": (None, [[[3, 5], [1, 2]]])}
    _, apart = parts(PAIR, unit_locations=places, subspaces=[[[0, 2], [1, 3]]])
    two = {"component": "model.layers[1].output", "max_number_of_units": 2, "intervention": Turned()}
    _, joined = pv.IntervenableModel(two, model=tiny_llama())(PAIR, unit_locations=places)
    return {
        "own.class": by_class.logits,
        "own.function": by_function.logits,
        "own.parts": apart.logits[:, :3],
        "own.latent": parts.full_intervention_outputs[0].latent,
        "own.joined": joined.logits[:, :3],
    }


def generations(pyreft: Any, pv: Any) -> Found:
    """A vector added to every generated token, and an edit of the prompt alone."""
    entries = [
        {"layer": layer, "component": "mlp_output", "intervention_type": pv.AdditionIntervention}
        for layer in range(2)
    ]
    model = pv.IntervenableModel(entries, model=tiny_gpt2())
    how = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": 39}
    _, steered = model.generate(BASE, source_representations=torch.linspace(-3, 3, WIDTH), **how)
    swap = pv.IntervenableModel({"layer": 0, "component": "block_output"}, model=tiny_gpt2())
    place = {"sources->base": 4}
    plain, prompted = swap.generate(
        BASE, [SOURCE], place, intervene_on_prompt=True, output_original_output=True, **how
    )
    return {"generate.steered": steered, "generate.plain": plain, "generate.prompted": prompted}


INPUTS = ["a b c d e f", "g h i j", "k l m n o p q"]
OUTPUTS = [" r s ", " t u v ", " w "]


def data_modules(pyreft: Any, pv: Any) -> Found:
    """The rows that the data modules make, as one batch each."""
    found = {}
    tokenizer, model = tiny_tokenizer(), tiny_llama()
    last = pyreft.make_last_position_supervised_data_module(
        tokenizer, model, INPUTS, OUTPUTS, num_interventions=2
    )
    both = pyreft.make_multiple_position_supervised_data_module(
        tokenizer, model, INPUTS, OUTPUTS, positions="f2+l2", num_interventions=4, nonstop=True
    )
    shared = pyreft.make_multiple_position_supervised_data_module(
        tokenizer, model, INPUTS, OUTPUTS, positions="f1+l2", num_interventions=3, share_weights=True
    )
    for name, module in (("last", last), ("both", both), ("shared", shared)):
        rows = module["train_dataset"]
        batch = module["data_collator"]([rows[n] for n in range(len(rows))])
        for field in ("input_ids", "labels", "attention_mask", "intervention_locations"):
            found[f"data.{name}.{field}"] = batch[field]
    for positions, length in (("f2+l3", 9), ("f5", 6), ("l4", 6), ("f5+l5", 4)):
        places = pyreft.get_intervention_locations(
            last_position=length, positions=positions, num_interventions=2, pad_mode="last"
        )
        found[f"locations.{positions}.{length}"] = torch.tensor(places)
    return found


def training(pyreft: Any, pv: Any) -> Found:
    """pyreft's README from the configuration to the reply, with an intervention that has no rotation."""
    tokenizer, model = tiny_tokenizer(), tiny_llama()
    own = pyreft.NodireftIntervention(
        embed_dim=model.config.hidden_size, low_rank_dimension=2, add_bias=False, dtype=torch.float32
    )
    with torch.no_grad():
        for layer in (own.learned_source, own.proj_layer):
            wave = torch.sin(torch.arange(layer.weight.numel()).double())
            layer.weight.copy_(0.1 * wave.reshape(layer.weight.shape))
        own.learned_source.bias.zero_()
    config = pyreft.ReftConfig(
        representations={"component": "model.layers[0].output", "low_rank_dimension": 2, "intervention": own}
    )
    reft_model = pyreft.get_reft_model(model, config)
    reft_model.set_device("cpu")
    reft_model.print_trainable_parameters()
    data = pyreft.make_last_position_supervised_data_module(
        tokenizer=tokenizer, model=model, inputs=INPUTS, outputs=OUTPUTS
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            num_train_epochs=12.0, output_dir=folder, learning_rate=5e-2, per_device_train_batch_size=3,
            logging_steps=1, optim="adamw_torch", report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = pyreft.ReftTrainerForCausalLM(model=reft_model, tokenizer=tokenizer, args=arguments, **data)
        trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    prompt = tokenizer("a b c d e f", return_tensors="pt")
    prompt = {name: prompt[name] for name in ("input_ids", "attention_mask")}
    place = prompt["input_ids"].shape[-1] - 1
    _, reply = reft_model.generate(
        prompt, unit_locations={"sources->base": (None, [[[place]]])}, intervene_on_prompt=True,
        max_new_tokens=5, do_sample=False, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return {
        "training.losses": torch.tensor(losses),
        "training.weight": own.learned_source.weight,
        "training.projection": own.proj_layer.weight,
        "training.reply": reply,
    }


PROGRAMS = (
    swap_one_token,
    zeros_and_constants,
    paths_and_components,
    heads,
    subspaces,
    two_sources,
    grouped,
    batches,
    collect,
    given_representations,
    fixed_weights,
    own_interventions,
    generations,
    data_modules,
    training,
)
