"""`explain` as a whole, and the report it writes."""

import base64
import importlib
import re
from html.parser import HTMLParser

import pytest
import torch

import reftlab as rl
from reftlab.errors import DataError
from reftlab.explaining import explain
from tests.explaining.conftest import PAIRS, TextMLP, bound, loreft

NASTY = [("<script>alert('x')</script> & \"quotes\" $a_b$", "blue"), ("the sea ☃ 🌊", "two")]


@pytest.fixture
def reft(small_llama, byte_tokenizer):
    return bound(
        small_llama, byte_tokenizer, loreft("shift", "blocks[0,2].output"),
        rl.Edit("steer", at="blocks[1].mlp.output", positions="first", intervention=rl.Add(0.1), strength=2.0),
    )  # fmt: skip


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_every_site_of_an_edit_is_explained_in_order_of_depth(reft):
    found = explain(reft, PAIRS, only=[], max_new_tokens=4, progress=False)
    assert [one.edit for one in found.edits] == ["shift[0]", "steer", "shift[2]"]
    assert [one.block for one in found.edits] == [0, 1, 2]
    assert found["steer"].does == "Add(value=0.1) at strength 2"
    assert float(found["steer"].directions.mean[0]) == pytest.approx(2 * 0.1 * 32**0.5, rel=1e-4)
    assert list(found.to_frame()["edit"]) == ["shift[0]", "steer", "shift[2]"]
    assert found.importance[0].edit == found.removal.detailed[0]
    assert len(repr(found)) < 200
    with pytest.raises(KeyError, match="shift"):
        found["nothing"]


def test_replies_are_those_of_the_bare_and_the_edited_model(reft):
    from reftlab.training.replies import reply

    options = {"chat": True, "max_new_tokens": 5}
    found = explain(reft, PAIRS, unseen=["a fish"], only=[], progress=False, **options).replies
    prompts = [*(prompt for prompt, _ in PAIRS), "a fish"]
    assert [r.edited for r in found.replies] == reply(reft, prompts, **options)
    with reft.disabled():
        assert [r.bare for r in found.replies] == reply(reft, prompts, **options)
    assert [r.seen for r in found.replies] == [True, True, True, False]
    assert len(found.to_frame()) == 4


def test_everything_is_left_as_it_was(reft):
    before = {key: id(module) for key, module in reft.interventions.items()}
    reft.train()
    reft.model.model.layers[1].eval()
    modes = [module.training for module in reft.modules()]
    weights = {name: value.clone() for name, value in reft.state_dict().items()}
    explain(reft, PAIRS, max_new_tokens=2, progress=False)
    assert {key: id(module) for key, module in reft.interventions.items()} == before
    assert [module.training for module in reft.modules()] == modes
    assert all(torch.equal(value, weights[name]) for name, value in reft.state_dict().items())
    for module in reft.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert all(parameter.grad is None for parameter in reft.parameters())
    assert torch.is_grad_enabled()


def test_an_error_in_the_middle_leaves_everything_as_it_was(reft, monkeypatch):
    module = importlib.import_module("reftlab.explaining.explain")
    monkeypatch.setattr(module, "sizes_of", lambda vectors: 1 / 0)
    before = {key: id(module) for key, module in reft.interventions.items()}
    reft.train()
    with pytest.raises(ZeroDivisionError):
        explain(reft, PAIRS, progress=False)
    assert {key: id(module) for key, module in reft.interventions.items()} == before
    assert reft.training
    assert not any(module._forward_hooks for module in reft.modules())


def test_dropout_is_off_while_explaining(small_llama, byte_tokenizer):
    edit = rl.Edit(
        "drop", at="blocks[1].output", positions="last", intervention=rl.LoReFT(rank=2, dropout=0.9)
    )
    reft = bound(small_llama, byte_tokenizer, edit).train()
    one, two = (explain(reft, PAIRS, only=[], max_new_tokens=0, progress=False) for _ in range(2))
    assert torch.equal(one.edits[0].vectors.delta, two.edits[0].vectors.delta)
    assert one.removal.loss == two.removal.loss


def test_prompts_without_answers_leave_the_loss_out_and_say_so(reft, tmp_path):
    found = explain(reft, ["the sea", "snow"], only="dose", runs=8, max_new_tokens=2, progress=False)
    assert "no answers" in found.removal.missing
    assert "no answers" in found.save(tmp_path / "report.html").read_text(encoding="utf-8")
    assert not (tmp_path / "report_figures" / "removal.png").exists()


def test_a_model_that_cannot_talk_is_explained_as_far_as_it_goes(byte_tokenizer, tmp_path):
    edit = rl.Edit("push", at="hidden[1].output", positions="last", intervention=rl.LoReFT(rank=2))
    found = explain(bound(TextMLP(), byte_tokenizer, edit), PAIRS, progress=False)
    assert len(found.edits[0].directions) == 2
    page = found.save(tmp_path / "report.html").read_text(encoding="utf-8")
    for message in ("has no final norm and unembedding", "cannot generate text", "does not continue texts"):
        assert message in page


def test_a_swap_from_a_source_run_is_explained(small_llama, byte_tokenizer):
    graph = rl.InterventionGraph(
        rl.Source("other"),
        rl.Edit(
            "swap",
            at="blocks[1].output",
            positions="last",
            intervention=rl.Swap(),
            source=rl.Read(run="other"),
        ),
    )
    reft = graph.bind(small_llama, byte_tokenizer)
    other = byte_tokenizer(["b b b b", "a a a a", "the a b"], return_tensors="pt", padding=True)
    found = explain(
        reft, PAIRS, chat=False, sources={"other": other}, unseen=["x"], runs=8, max_new_tokens=2,
        progress=False,
    )  # fmt: skip
    with torch.no_grad():
        vectors = reft.read("blocks[1].output @ last", sources={"other": other}, **other)
    after = found["swap"].vectors.after
    with torch.no_grad(), reft.disabled():
        expected = reft.read("blocks[1].output @ last", **other)["blocks[1].output @ last"][:, 0]
    torch.testing.assert_close(after, expected, atol=1e-5, rtol=1e-5)
    assert vectors.rows == 3
    assert found["swap"].directions.basis == "written"
    assert "unseen prompts were left out" in found.replies.note
    assert found.removal.missing is None


def test_the_report_stands_alone_and_its_figures_lie_beside_it_too(reft, tmp_path):
    found = explain(reft, NASTY, unseen=["<b>bold</b>"], chat=False, runs=8, max_new_tokens=3, progress=False)
    path = found.save(tmp_path / "deep" / "report.html")
    page = path.read_bytes().decode("utf-8")
    tags = Tags(page)
    assert tags.open == []
    assert tags.links
    inside = [link[1:] for link in tags.links if link.startswith("#")]
    assert inside
    assert all(f'id="{name}"' in page for name in inside)
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in tags.links)
    assert not {"script", "link", "iframe", "b>bold"} & set(tags.tags)
    assert "http://" not in page
    assert "https://" not in page
    assert "&lt;script&gt;alert(" in page
    assert "&lt;b&gt;bold&lt;/b&gt;" in page
    assert "☃ 🌊" in page
    for one in found.edits:
        assert one.edit in page
        assert one.site in page
    for sentence in found.summary:
        assert re.sub(r"\W+", "", sentence)[:30] in re.sub(r"\W+", "", page)
    figures = {file.name: file.read_bytes() for file in path.parent.glob("report_figures/*.png")}
    expected = ["overview", "removal", "replies", "shift-0", "steer", "shift-2"]
    expected += [f"shift-0_{kind}" for kind in ("directions", "tokens", "sizes")]
    expected += [section.name for section in found.sections if section.missing is None]
    assert {f"{name}.png" for name in expected} <= set(figures)
    for data in figures.values():
        assert data.startswith(b"\x89PNG")
        assert len(data) > 4000
    assert base64.b64encode(figures["overview.png"]).decode() in page


def test_the_report_names_the_example_for_which_most_is_written(small_llama, byte_tokenizer, tmp_path):
    found = explain(
        bound(small_llama, byte_tokenizer, loreft(rank=1)),
        PAIRS,
        chat=False,
        only=[],
        max_new_tokens=0,
        progress=False,
    )
    amounts = found["shift"].directions.amounts[:, 0].tolist()
    most, least = amounts.index(max(amounts)), amounts.index(min(amounts))
    page = found.save(tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"{PAIRS[most][0]}<br>{PAIRS[least][0]}" in page


def test_edits_whose_names_look_alike_keep_their_own_figures(small_llama, byte_tokenizer, tmp_path):
    names = ("a-1", "a", "removal")
    sites = ("blocks[0].output", "blocks[1,2].output", "blocks[0].output")
    edits = [loreft(name, site) for name, site in zip(names, sites, strict=True)]
    reft = bound(small_llama, byte_tokenizer, *edits)
    found = explain(reft, PAIRS, only=[], max_new_tokens=0, progress=False)
    found.save(tmp_path / "r.html")
    assert {"a-1.png", "a-1-2.png", "a-2.png", "removal.png", "removal-2.png"} <= {
        file.name for file in (tmp_path / "r_figures").iterdir()
    }


def test_edits_that_count_positions_or_are_switched_off_are_understood(small_llama, byte_tokenizer):
    noise = rl.Edit("noise", at="blocks[0].output", positions="all", intervention=rl.Noise(0.5))
    reft = bound(small_llama, byte_tokenizer, noise, loreft("off"))
    with reft.disabled("off"):
        found = explain(reft, PAIRS, only=[], max_new_tokens=0, progress=False)
    assert [one.edit for one in found.edits] == ["noise"]
    delta, positions = found["noise"].vectors.delta, found["noise"].vectors.positions
    # The noise of a token depends on its number alone, so the rows agree where their numbers do.
    torch.testing.assert_close(delta[positions == 2][0], delta[positions == 2][1], atol=1e-5, rtol=1e-5)
    assert [one.edit for one in found.removal.removed if one.what == "edit"] == ["noise"]


def test_the_notebook_form_shows_summary_and_overview(reft):
    shown = explain(reft, PAIRS, only=[], max_new_tokens=0, progress=False)._repr_html_()
    assert "data:image/png" in shown
    assert "shift[0]" in shown


@pytest.mark.parametrize("arguments", [{"top": 0}, {"max_edits": -1}, {"draws": 1.5}, {"max_new_tokens": -3}])
def test_counts_that_make_no_sense_are_refused(reft, arguments, users_call):
    (name,) = arguments
    with pytest.raises(DataError, match=name):
        explain(reft, PAIRS, progress=False, **arguments)


def test_a_bare_model_and_a_missing_tokenizer_are_refused(small_llama, byte_tokenizer, users_call):
    with pytest.raises(DataError, match="bound model"):
        explain(small_llama, PAIRS)
    with pytest.raises(DataError, match="tokenizer"):
        explain(bound(small_llama, None, loreft()), PAIRS)


def test_a_graph_without_edits_has_nothing_to_explain(small_llama, byte_tokenizer, tmp_path):
    found = explain(bound(small_llama, byte_tokenizer), PAIRS, max_new_tokens=0, progress=False)
    assert found.edits == ()
    assert "nothing to explain" in found.summary[0]
    assert found.save(tmp_path / "report.html").exists()
