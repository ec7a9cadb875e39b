"""Examples from files, datasets, frames and lists: the same whatever they come from."""

import datasets
import pandas as pd
import pytest

import reftlab as rl
from tests.training.conftest import PAIRS, splits


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("x.txt", "", r"ends in \.json"),
        ("x.json", "{", "not well-formed json"),
        ("x.json", "{}", "must hold a list"),
        ("x.jsonl", '{"prompt": "a"}\nnope', "not well-formed jsonl"),
        ("x.jsonl", '{"prompt": "a"}\nnope', "line 2: Expecting value"),
        ("x.json", '[{"promt": "a"}]', "no column .* of a prompt .*'promt'; say which.*Did you mean 'promt'"),
        ("x.json", '[{"query": "a"}, {"answer": "b"}]', "example 1 has no 'query'; it has 'answer'"),
        ("x.json", '[{"prompt": "a", "answer": 4}]', "example 0: the column 'answer' holds 4, int"),
        (
            "x.json",
            '[{"question": "a", "query": "b"}]',
            "'question', 'query' all have a usual name of prompts",
        ),
        (
            "x.json",
            '[{"query": "a", "output": "b", "target": "c"}]',
            "'output', 'target' .* usual name of answers",
        ),
        ("x.csv", "prompt,answer\na", "line 2 has fewer fields than the header"),
        ("x.csv", "prompt,answer\na,b,c", "line 2 has more fields than the header"),
        ("x.parquet", "PAR", "not well-formed parquet"),
        ("x.yaml", "[", "not well-formed yaml"),
        ("x.json", "[]", "no examples"),
    ],
)
def test_a_file_of_examples_that_cannot_be_read_says_why(tmp_path, name, text, said):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(rl.DataError, match=said):
        rl.read_examples(tmp_path / name)


def test_all_kinds_of_files_give_the_same_examples(tmp_path):
    texts = {
        "a.json": '[{"q": "who", "a": "red"}, {"q": "what"}]',
        "a.jsonl": '{"q": "who", "a": "red"}\n\n{"q": "what"}\n',
        "a.yaml": "- {q: who, a: red}\n- {q: what}\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        read = rl.read_examples(tmp_path / name, prompt="q", answer="a")
        assert read == [rl.Example("who", "red"), rl.Example("what")]
    assert rl.read_examples(tmp_path / "a.json", prompt="q", answer="a", limit=1) == read[:1]
    with pytest.raises(rl.DataError, match="cannot be read"):
        rl.read_examples(tmp_path / "nowhere.json")


def test_parquet_a_dataset_a_frame_and_a_list_give_the_same_examples(tmp_path):
    rows = [{"question": "who", "answer": "red"}, {"question": "what", "answer": None}]
    expected = [rl.Example("who", "red"), rl.Example("what")]
    pd.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    saved = datasets.Dataset.from_list(rows)
    saved.save_to_disk(str(tmp_path / "saved"))
    for source in (tmp_path / "a.parquet", saved, tmp_path / "saved", str(tmp_path / "saved"), rows):
        assert rl.read_examples(source) == expected
    assert rl.read_examples(pd.DataFrame(rows[:1])) == expected[:1]


@pytest.mark.parametrize(
    ("row", "example"),
    [
        ({"question": "q", "answer": "a", "id": 7}, ("q", "a")),
        ({"instruction": "i", "input": "", "output": "o", "answer": "x"}, ("i", "o")),
        ({"instruction": "i", "input": "c", "output": "o"}, ("i\n\nc", "o")),
        ({"instruction": "i", "response": "r"}, ("i", "r")),
        ({"prompt": "p", "completion": "c"}, ("p", "c")),
        ({"prompt": "p", "answer": "a", "response": "r", "question": "q"}, ("p", "a")),
        ({"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}, ("u", "a")),
        ({"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]}, ("u", "a")),
        ({"messages": [{"role": "user", "content": "u"}]}, ("u", None)),
        (
            {
                "prompt": [{"role": "user", "content": "u"}],
                "completion": [{"role": "assistant", "content": "a"}],
            },
            ("u", "a"),
        ),
        ({"text": "t", "query": "q"}, ("q", None)),
    ],
)
def test_columns_with_usual_names_are_found(row, example):
    assert rl.read_examples([row]) == [rl.Example(*example)]


def test_a_column_of_tasks_counts_in_our_own_layout_or_where_it_is_named():
    own = {"prompt": "p", "answer": "a", "task": "emoji"}
    assert rl.read_examples([own]) == [rl.Example("p", "a", "emoji")]
    foreign = {"question": "p", "answer": "a", "task": "trivia", "edit": "emoji"}
    assert rl.read_examples([foreign]) == [rl.Example("p", "a")]
    assert rl.read_examples([foreign], task="edit") == [rl.Example("p", "a", "emoji")]


def test_columns_that_are_named_win_over_usual_names():
    row = {"instruction": "i", "input": "c", "output": "o", "answer": "a"}
    assert rl.read_examples([row], answer="answer", prompt="instruction") == [rl.Example("i", "a")]
    assert rl.read_examples([row], prompt="output", answer="input") == [rl.Example("o", "c")]
    with pytest.raises(
        rl.DataError, match=r"answer='outptu': there is no such column; .*Did you mean 'output'"
    ):
        rl.read_examples([row], answer="outptu")
    with pytest.raises(rl.DataError, match="prompt='q' names a column, and the examples are no table"):
        rl.read_examples([("a", "b")], prompt="q")


@pytest.mark.parametrize(
    ("roles", "said"),
    [
        (["user", "assistant", "user", "assistant"], "turns user, assistant, user, assistant; expected one"),
        (["assistant"], "turns assistant"),
        (["system"], "expected one of the user"),
    ],
)
def test_a_conversation_of_another_form_is_refused_with_its_turns(roles, said):
    messages = [{"role": role, "content": "x"} for role in roles]
    with pytest.raises(rl.DataError, match=f"example 0: .*{said}"):
        rl.read_examples([{"messages": messages}])


def test_json_lines_may_hold_separators_and_be_called_json(tmp_path):
    text = '{"prompt": "a\u2028b", "answer": "c\u0085d"}\n{"prompt": "e"}\n'
    expected = [rl.Example("a\u2028b", "c\u0085d"), rl.Example("e")]
    for name in ("a.jsonl", "a.json"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert rl.read_examples(tmp_path / name) == expected


def test_the_mark_that_spreadsheets_write_is_no_part_of_a_columns_name(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,answer\nwho,red\n", encoding="utf-8-sig")
    assert rl.read_examples(tmp_path / "a.csv") == [rl.Example("who", "red")]


def test_of_several_splits_the_one_named_train_or_chosen_is_read(tmp_path):
    both = splits(train=PAIRS[:2], test=PAIRS[2:])
    both.save_to_disk(str(tmp_path / "both"))
    for source in (both, tmp_path / "both"):
        assert rl.read_examples(source) == [rl.Example(*pair) for pair in PAIRS[:2]]
        assert rl.read_examples(source, split="test", limit=1) == [rl.Example(*PAIRS[2])]
        with pytest.raises(rl.DataError, match=r"split='tset': .*there is train, test\. Did you mean 'test'"):
            rl.read_examples(source, split="tset")
    with pytest.raises(rl.DataError, match="the splits dev, test; say which one"):
        rl.read_examples(splits(dev=PAIRS, test=PAIRS))
    assert len(rl.read_examples(splits(dev=PAIRS))) == len(PAIRS)
    with pytest.raises(rl.DataError, match="this dataset is one split already"):
        rl.read_examples(both["train"], split="train")
    with pytest.raises(rl.DataError, match=r"split='train': only a Hugging Face dataset has one"):
        rl.read_examples(PAIRS, split="train")


def test_a_folder_of_files_is_a_dataset_with_splits_and_slices(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "task").mkdir()
    for name, pairs in (("train", PAIRS[:3]), ("test", PAIRS[3:])):
        pd.DataFrame(pairs, columns=["question", "answer"]).to_json(
            tmp_path / "task" / f"{name}.jsonl", orient="records", lines=True
        )
    folder = str(tmp_path / "task")
    assert rl.read_examples(folder) == [rl.Example(*pair) for pair in PAIRS[:3]]
    assert rl.read_examples(folder, split="train[1:]") == [rl.Example(*pair) for pair in PAIRS[1:3]]


def test_a_dataset_that_is_nowhere_says_that_it_is_no_file_either(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        rl.DataError, match=r"'nobody/nothing' cannot be loaded: Couldn't reach.* no such file"
    ):
        rl.read_examples("nobody/nothing")


def test_sources_and_positions_of_rows_are_kept_from_every_kind_of_source(tmp_path):
    rows = [
        {"prompt": "who", "answer": "red", "sources": {"other": "what"}, "positions": {"swap": [0]}},
        {"prompt": "what", "answer": "blue", "sources": {"other": "who"}, "positions": {"swap": [0]}},
    ]
    wanted = [rl.Example(**row) for row in rows]
    for name, write in (
        ("rows.jsonl", lambda file: pd.DataFrame(rows).to_json(file, orient="records", lines=True)),
        ("rows.parquet", lambda file: pd.DataFrame(rows).to_parquet(file)),
    ):
        write(tmp_path / name)
        read = rl.read_examples(tmp_path / name)
        assert [example.sources for example in read] == [example.sources for example in wanted]
        assert [list(example.positions["swap"]) for example in read] == [[0], [0]]
    assert rl.read_examples(rows) == wanted
    assert rl.read_examples(datasets.Dataset.from_list(rows)) == wanted
    # In tables made elsewhere the words mean other things.
    cited = [{"prompt": "who", "answer": "red", "sources": "a book"}]
    assert rl.read_examples(cited) == [rl.Example("who", "red")]


def test_a_dataset_saved_as_one_split_has_no_other(tmp_path):
    datasets.Dataset.from_list([{"prompt": "who", "answer": "red"}] * 3).save_to_disk(str(tmp_path / "one"))
    assert len(rl.read_examples(tmp_path / "one")) == 3
    for split in ("nonsense", "train[:1]"):
        with pytest.raises(rl.DataError, match="one split already"):
            rl.read_examples(tmp_path / "one", split=split)
    with pytest.raises(rl.DataError, match=r"subset='nonsense'.*without subsets"):
        rl.read_examples(tmp_path / "one", subset="nonsense")


def test_prompts_may_be_messages_without_answers():
    [example] = rl.read_examples([{"prompt": [{"role": "user", "content": "who"}]}])
    assert example == rl.Example("who")
