"""The demo runs from end to end on the embedded model; the quickstart notebook holds its training to account."""

import io

import pytest
from rich.console import Console

import reftlab as rl
from reftlab.demo import PAIRS, UNSEEN, only_emojis, run


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("🌊🐠🐚", True),
        ("👩‍🚀❤️", True),
        ("👍🏽", True),
        ("", False),
        ("🌊 🐠", False),
        ("🌊a", False),
        ("7", False),
        ("🌊\ufffd", False),
        ("^", False),
        ("■", False),
        ("♪", False),
        ("1️⃣", True),
        ("\ufe0f", False),
    ],
)
def test_emojis_are_told_from_everything_else(text, wanted):
    assert only_emojis(text) is wanted


def test_the_demo_trains_saves_reloads_and_explains(tmp_path, monkeypatch, users_call):
    # Less of everything: the quickstart notebook trains on all pairs, and the report's sections have tests.
    pairs, unseen = PAIRS[:4], UNSEEN[:2]
    for name, fewer in (("PAIRS", pairs), ("UNSEEN", unseen), ("_RUNS", 8)):
        monkeypatch.setattr(f"reftlab.demo.{name}", fewer)
    printed = io.StringIO()
    console = Console(file=printed, width=100)
    demo = run(tmp_path, at="blocks[10,20].output", epochs=3, learning_rate=8e-3, console=console)
    assert demo.after.loss < demo.before.loss
    assert demo.reloaded_alike
    assert len(demo.unseen) == len(unseen)
    model, tokenizer = rl.load_model()
    reft = rl.load(demo.artifact, model, tokenizer)
    assert rl.evaluate(reft, pairs, max_new_tokens=24) == demo.after
    with reft.disabled():
        assert rl.evaluate(reft, pairs, max_new_tokens=24) == demo.before
    page = demo.report.read_text(encoding="utf-8")
    assert "emoji[20]" in page
    assert (demo.report.parent / "report_figures" / "overview.png").stat().st_size > 5_000
    text = printed.getvalue()
    assert text.count(pairs[0][0]) == 1
    assert f"{demo.after.exact} of {len(pairs)}" in text
    assert "same replies" in text
