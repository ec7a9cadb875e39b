"""The authored answers of analyses/subspaces."""

from __future__ import annotations

import json
from pathlib import Path

from reftlab.demo import PAIRS, UNSEEN

FILE = Path(__file__).parents[2] / "analyses" / "subspaces" / "capitals.json"


def test_the_capital_answers_are_to_the_questions_of_the_demo_and_none_comes_twice():
    pairs = json.loads(FILE.read_text(encoding="utf-8"))
    assert [question for question, _ in pairs] == [question for question, _ in PAIRS]
    answers = [answer for _, answer in pairs]
    assert len(set(answers)) == len(answers)
    assert all(answer.isupper() and answer.strip() == answer for answer in answers)
    assert not {question for question, _ in pairs} & set(UNSEEN)
