"""The parts of analyses/factual_recall that its numbers rest on."""

import sys
from pathlib import Path

import pytest
import torch

import reftlab as rl

STUDY = Path(__file__).parents[2] / "analyses" / "factual_recall"


@pytest.fixture(scope="module")
def study():
    """The study's modules, taken from its folder and forgotten again: other studies use the same names."""
    names = ("facts", "aligning")
    kept = {name: sys.modules.pop(name, None) for name in names}
    sys.path.insert(0, str(STUDY))
    try:
        import aligning
        import facts

        yield facts, aligning
    finally:
        sys.path.remove(str(STUDY))
        for name in names:
            sys.modules.pop(name, None)
            if kept[name] is not None:
                sys.modules[name] = kept[name]


@pytest.fixture(scope="module")
def asked(study):
    model, tokenizer = rl.load_model()
    return model, tokenizer, *study[0].read_facts(tokenizer)


def test_prompts_of_a_template_differ_in_the_countrys_token_alone(asked):
    _, tokenizer, countries, facts = asked
    for name, one in facts.items():
        differing = (one.ids != one.ids[0]).any(0)
        assert differing.sum() == 1
        assert differing[one.subject]
        for country, row in zip(countries, one.ids, strict=True):
            assert tokenizer.decode(row[one.subject]).strip() == country["country"], name


def test_pairs_have_different_answers_and_their_examples_ask_for_the_others(study, asked):
    facts = asked[3]["language"]
    pairs = study[0].pairs_of(list(range(len(facts.ids))), facts)
    assert len(pairs) == sum(a != b for a in facts.answers.tolist() for b in facts.answers.tolist())
    some = study[0].pairs_of(list(range(len(facts.ids))), facts, 5)
    assert len(set(some)) == 5
    assert set(some) <= set(pairs)
    for (base, other), example in zip(some, study[0].examples(facts, some), strict=True):
        assert (example.prompt, example.answer) == (facts.texts[base], facts.words[other])
        assert example.sources["other"] == facts.texts[other]


def test_swapping_the_countrys_whole_vector_after_the_first_block_swaps_the_answer(study, asked):
    model, tokenizer, _, facts = asked
    study_facts, aligning = study
    bound = {
        name: aligning.swap_at(model, tokenizer, 0, one.subject, rl.RotatedSwap(rank=2))
        for name, one in facts.items()
    }
    lines = aligning.measured(bound, facts, {"train": [0, 1, 2], "test": [3, 4, 5]}, 6)
    found = {(line["tested_on"], line["swapped"]): line["accuracy"] for line in lines}
    for group, (template, part) in aligning.GROUPS.items():
        one, numbers = facts[template], {"train": [0, 1, 2], "test": [3, 4, 5]}[part]
        pairs = study_facts.pairs_of(numbers, one, 6)
        other = torch.tensor([pair[1] for pair in pairs])
        with torch.no_grad():
            logits = model(one.ids[other]).logits[:, -1]
        among = one.answers.unique()
        own = (among[logits[:, among].argmax(1)] == one.answers[other]).float().mean()
        assert found[group, "whole vectors"] == pytest.approx(float(own))
        assert found[group, "no swap"] == 0
