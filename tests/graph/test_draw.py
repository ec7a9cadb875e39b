from __future__ import annotations

import html
import re
import warnings
from collections import Counter
from itertools import combinations

import matplotlib
import pytest

import reftlab as rl
from reftlab import Add, Edit, InterventionGraph, LoReFT, Read, Source, Swap
from reftlab.address import parse_path
from reftlab.graph.depth import DepthAxis, depth_of
from reftlab.graph.draw import draw_graph, graph_html


def edit(name, at, positions="last", intervention=None, **rest):
    return Edit(name, at=at, positions=positions, intervention=intervention or LoReFT(rank=4), **rest)


def mixed(count):
    """Edits, interchanges and reads with long names and positions, `count` nodes and a source."""
    nodes = [Source("corrupted_subject_run")]
    for i in range(count):
        if i % 4 == 0:
            nodes.append(
                edit(
                    f"a_quite_long_edit_name_number_{i}",
                    f"blocks[{i * 7 % 30}].mlp.output",
                    "span('the Eiffel Tower in Paris, France')+last(7)",
                )
            )
        elif i % 4 == 1:
            nodes.append(
                edit(
                    f"swap_{i}",
                    f"blocks[{i * 5 % 30}].output",
                    "f7+l7",
                    Swap(),
                    source=Read(run="corrupted_subject_run"),
                )
            )
        elif i % 4 == 2:
            nodes.append(
                Read(f"blocks[{i * 3 % 30}].self_attn.q_proj.output", "last", name=f"query_read_{i}")
            )
        else:
            nodes.append(
                edit(f"joined_{i}", f"blocks[{i % 7},{10 + i % 5},{20 + i % 9}].output", "all", phase="both")
            )
    return InterventionGraph(*nodes)


def nested():
    return InterventionGraph(
        Source("first_source"),
        Source("second_source"),
        edit(
            "inner", "blocks[2].output", "last", Swap(), run="second_source", source=Read(run="first_source")
        ),
        edit("outer", "blocks[6,7,8].output", "all", Swap(), source=Read(run="second_source")),
        edit("same_run", "blocks[9].mlp.output", "last", Add(), source=Read("blocks[5].attn.output @ first")),
        edit("late", "final_norm.output", "all", phase="decode", strength=0.5),
        Read("blocks[*].output @ last", name="every"),
        Read("blocks[-1].output @ last", name="last_block"),
        Read("embed.output @ span('🦊 $x$ 北京')", name="fox"),
        Read("unembed @ last", name="logits"),
    )


def conditional():
    return InterventionGraph(
        Source("corrupt"),
        edit(
            "gated",
            "blocks[6].output",
            when=(rl.cosine("blocks[4].output @ last", "blocks[2].output @ first") > 0.8)
            & ~(rl.norm("blocks[6].output") > 3),
        ),
        edit(
            "soft", "blocks[8,9].output", when=rl.gate(Read("blocks[4].output @ last")), tasks=["tone", "x"]
        ),
        edit(
            "swap",
            "blocks[9].output",
            "last",
            Swap(),
            source=Read(run="corrupt"),
            when=rl.norm(Read("blocks[3].output @ last", run="corrupt", name="far")) < 2,
        ),
        edit("a", "blocks[11].output", share="both", tasks={"tone": [0, 1], "x": [2]}),
        edit("b", "blocks[12].mlp.output", share="both", subspace=[0, 2]),
    )


def crowded():
    return InterventionGraph(
        *[
            edit(
                f"edit_{i}",
                f"blocks[{i}].output",
                when=rl.cosine("embed.output @ last", f"blocks[{i // 2}].mlp.output @ last") > 0.25,
                tasks=["emoji", "formal"],
            )
            for i in range(20)
        ]
    )


GRAPHS = {
    "conditional": conditional(),
    "crowded": crowded(),
    "none": InterventionGraph(),
    "one": InterventionGraph(edit("emoji", "model.layers[15].output")),
    "list": InterventionGraph(edit("emoji", "blocks[4,10,16,22].output")),
    "five": mixed(5),
    "thirty": mixed(30),
    "thirty at one place": InterventionGraph(*[edit(f"edit_{i}", "blocks[15].output") for i in range(30)]),
    "sixty": mixed(60),
    "nested": nested(),
    "no blocks": InterventionGraph(edit("a", "conv1.output", "all"), edit("b", "rnn.output.hidden", "all"), edit("c", "fc.output", "all")),
    "far apart": InterventionGraph(edit("a", "blocks[0].output"), edit("b", "blocks[999999999].output"), edit("c", "blocks[-5000].output")),
    "long names": InterventionGraph(Source("s" * 90), edit("n" * 120, "blocks[3].output", "last", Swap(), source=Read(run="s" * 90))),
}  # fmt: skip


@pytest.fixture(params=GRAPHS, name="graph")
def each_graph(request):
    return GRAPHS[request.param]


def gids(figure):
    """How many artists carry each gid."""
    return Counter(a.get_gid() for a in figure.findobj() if a.get_gid())


def texts(figure):
    return [text for text in figure.axes[0].texts if text.get_text()]


def test_every_node_is_drawn_once_for_each_site_it_names():
    found = gids(draw_graph(nested()))
    assert {gid: n for gid, n in found.items() if gid.partition(":")[0] in ("edit", "read", "supply")} == {
        "edit:inner": 1, "edit:outer": 3, "edit:same_run": 1, "edit:late": 1, "read:every": 1, "read:last_block": 1,
        "read:fox": 1, "read:logits": 1, "supply:inner": 1, "supply:outer": 3, "supply:same_run": 1,
    }  # fmt: skip
    assert (found["flow:inner"], found["flow:outer"], found["flow:same_run"]) == (1, 3, 1)


def test_drawn_nodes_and_lanes_are_those_of_the_graph(graph):
    found = gids(draw_graph(graph))
    expected = {f"edit:{e.name}" for e in graph.edits} | {f"read:{r.label}" for r in graph.reads}
    expected |= {f"{kind}:{e.name}" for e in graph.edits if e.source for kind in ("supply", "flow")}
    expected |= {f"when:{e.name}" for e in graph.edits if e.when is not None}
    looked_at = {read for e in graph.edits if e.when is not None for read in e.when.reads}
    expected |= {f"condition:{number}" for number in range(len(looked_at))}
    expected |= {f"lane:{run}" for run in graph.run_order}
    assert set(found) == expected
    assert all(found[f"lane:{run}"] == 1 for run in graph.run_order)


def test_no_two_texts_overlap_and_none_is_cropped(graph):
    figure = draw_graph(graph)
    renderer = figure.canvas.get_renderer()
    boxes = {text: text.get_window_extent(renderer) for text in texts(figure)}
    for (a, box_a), (b, box_b) in combinations(boxes.items(), 2):
        # Letters' boxes have a pixel of air around them.
        apart = (
            box_a.x1 <= box_b.x0 + 1
            or box_b.x1 <= box_a.x0 + 1
            or box_a.y1 <= box_b.y0 + 2
            or box_b.y1 <= box_a.y0 + 2
        )
        assert apart, (a.get_text(), b.get_text())
    width, height = figure.canvas.get_width_height()
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height for box in boxes.values())


def test_no_text_covers_a_mark_of_another_node(graph):
    figure = draw_graph(graph)
    renderer = figure.canvas.get_renderer()
    marks = [a for a in figure.axes[0].lines if a.get_gid()]
    boxes = [text.get_window_extent(renderer) for text in texts(figure)]
    for mark in marks:
        x, y = figure.axes[0].transData.transform((mark.get_xdata()[0], mark.get_ydata()[0]))
        assert not any(box.x0 < x < box.x1 and box.y0 < y < box.y1 for box in boxes), mark.get_gid()


def test_every_name_is_written_in_full(graph):
    written = [text.get_text() for text in texts(draw_graph(graph))]
    for edit_ in graph.edits:
        assert edit_.name in written
    for read in graph.reads:
        assert read.name is None or read.name in written
    for run in graph.sources:
        assert f"run {run} (source)" in written
    assert "base run" in written


def test_the_axis_says_what_it_is_and_the_legend_explains_what_occurs():
    written = [text.get_text() for text in texts(draw_graph(nested()))]
    assert "model depth (block)" in written
    for entry in (
        "edit, on prompt tokens",
        "edit, on generated tokens",
        "read",
        "read that supplies an edit",
        "values flow",
    ):
        assert entry in written
    assert not any("prompt and generated" in text for text in written)


def test_conditions_are_drawn_as_the_reads_they_look_at_with_dashed_arrows_and_written_out():
    figure = draw_graph(conditional())
    found = gids(figure)
    # Two edits look at the last token of block 4, which is drawn once.
    assert {gid: n for gid, n in found.items() if gid.startswith("condition:")} == {
        "condition:0": 1, "condition:1": 1, "condition:2": 1, "condition:3": 1,
    }  # fmt: skip
    assert {gid: n for gid, n in found.items() if gid.startswith("when:")} == {
        "when:gated": 3, "when:soft": 2, "when:swap": 1,
    }  # fmt: skip
    dashed = {a.get_gid() for a in figure.axes[0].patches if a.get_linestyle() not in ("solid", "-")}
    assert dashed == {"when:gated", "when:soft", "when:swap"}
    written = [text.get_text() for text in texts(figure)]
    assert "if → gated and soft" in written
    assert "far if → swap" in written
    assert "if gate('blocks[4].output @ last')" in written
    assert any(text.startswith("if (cosine('blocks[4].") for text in written)
    assert written.count("shared as both") == 2
    assert written.count("tasks tone, x") == 2
    assert "@ the edit's tokens" in written
    assert {"read that a condition looks at", "decides whether the edit acts"} <= set(written)
    assert not {"decides whether the edit acts"} & {text.get_text() for text in texts(draw_graph(nested()))}


def test_html_says_when_an_edit_acts_for_which_tasks_and_with_whom_it_shares():
    page = html.unescape(graph_html(conditional()))
    for edit_ in conditional().edits:
        if edit_.when is not None:
            assert repr(edit_.when) in page
    assert "tone in [0, 1], x in [2]" in page
    assert "tone, x" in page
    assert ">both<" in page
    assert "LoReFT(rank=4) in directions [0, 2]" in page


def test_depth_runs_from_left_to_right_and_sources_stand_above_what_needs_them():
    figure = draw_graph(nested())
    place = {a.get_gid(): (a.get_xdata()[0], -a.get_ydata()[0]) for a in figure.axes[0].lines if a.get_gid()}
    order = [
        "read:fox",
        "edit:inner",
        "edit:outer",
        "edit:same_run",
        "read:last_block",
        "edit:late",
        "read:logits",
    ]
    assert sorted(order, key=lambda gid: place[gid][0]) == order
    assert (
        place["supply:inner"][1] > place["edit:inner"][1] == place["supply:outer"][1] > place["edit:outer"][1]
    )


def test_edits_at_one_place_stand_in_the_order_in_which_they_act():
    figure = draw_graph(GRAPHS["thirty at one place"])
    heights = {a.get_gid(): a.get_ydata()[0] for a in figure.axes[0].lines if a.get_gid()}
    assert sorted(heights, key=heights.get) == [f"edit:edit_{i}" for i in range(30)]


def test_the_number_of_blocks_turns_a_band_into_places():
    graph = InterventionGraph(
        Read("blocks[*].output", "last", name="every"), Read("blocks[-1].output", "last", name="end")
    )
    assert gids(draw_graph(graph))["read:every"] == 1
    assert "[*]" in [text.get_text() for text in texts(draw_graph(graph))]
    known = draw_graph(graph, layers=6)
    assert gids(known)["read:every"] == 6
    last = {a.get_gid(): a.get_xdata()[0] for a in known.axes[0].lines if a.get_gid()}
    assert last["read:every"] == last["read:end"]


@pytest.mark.parametrize(
    ("path", "columns", "band"),
    [
        ("blocks[3].output", (3,), ""),
        ("model.layers.3.self_attn.q_proj.output", (3,), ""),
        ("h[2,5,8].output", (2, 5, 8), ""),
        ("h[4:12:2].output", (4, 6, 8, 10), ""),
        ("h[:3].output", (0, 1, 2), ""),
        ("h[-2:].output", (-2, -1), ""),
        ("h[-4:-2].output", (-4, -3), ""),
        ("h[*].output", (0, -1), "[*]"),
        ("layers.*.output", (0, -1), "[*]"),
        ("h[4:].output", (4, -1), "[4:]"),
        ("h[2:-2].output", (2, -3), "[2:-2]"),
        ("h[::-1].output", (0, -1), "[::-1]"),
        ("embed.output", ("embed",), ""),
        ("output.logits", ("output.logits",), ""),
    ],
)  # fmt: skip
def test_a_path_stands_at_its_first_number(path, columns, band):
    depth = depth_of(parse_path(path))
    assert (depth.columns, depth.band) == (columns, band)


def test_places_outside_the_blocks_stand_before_or_behind_them():
    paths = ["lm_head.output", "model.norm.output", "h[1].output", "model.embed_tokens.output", "pre.output"]
    axis = DepthAxis.of(
        [parse_path(path) for path in ["vision.output", *paths[:3], "after.output", *paths[3:4]]]
    )
    assert axis.left == ("vision", "model.embed_tokens")
    assert axis.right == ("after", "model.norm", "lm_head")
    assert axis.blocks == (0, 1)


def test_characters_without_a_glyph_are_named_and_nothing_is_read_as_mathematics():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = draw_graph(nested())
        figure.canvas.draw()
    written = " ".join(text.get_text() for text in texts(figure))
    assert ":fox face: $x$ ‹U+5317›" in written


def test_draw_writes_the_file_and_leaves_pyplot_alone(tmp_path):
    import matplotlib.pyplot as plt

    figure = GRAPHS["five"].draw(tmp_path / "graph.png")
    assert (tmp_path / "graph.png").read_bytes().startswith(b"\x89PNG")
    GRAPHS["five"].draw(tmp_path / "graph.svg")
    assert "swap_1" in (tmp_path / "graph.svg").read_text() or "<path" in (tmp_path / "graph.svg").read_text()
    assert plt.get_fignums() == []
    assert figure.get_size_inches()[0] >= 7


def test_a_readers_own_matplotlib_settings_do_not_break_the_picture():
    with matplotlib.rc_context({"font.size": 30, "font.family": "monospace", "axes.facecolor": "black"}):
        figure = draw_graph(GRAPHS["five"])
    assert {text.get_fontfamily()[0] for text in texts(figure)} == {"DejaVu Sans"}


def test_html_has_every_node_with_its_formula_and_the_picture(graph):
    page = graph_html(graph)
    for node in (*graph.edits, *(read for read in graph.reads if read.name)):
        assert node.name in page
    for run in graph.run_order[:-1]:
        assert f"source {run}" in page
    assert re.search(r"src='data:image/png;base64,iVBOR[A-Za-z0-9+/=]{500,}'", page)
    if graph.edits:
        assert graph.edits[0].intervention.formula in page


def test_html_escapes_what_users_write():
    graph = InterventionGraph(
        Source("corrupt"),
        edit(
            "x",
            "blocks[1].output",
            "span('<script>alert(1)</script>')",
            Swap(),
            source=Read(positions="span('<b>')", run="corrupt"),
        ),
        Read("blocks[2].output", "after('</td>&')"),
    )
    page = graph._repr_html_()
    assert "<script" not in page
    assert "<b>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert page.count("</td>") == page.count("<td ")


def test_blocks_in_which_nothing_happens_are_left_out_and_named():
    graph = InterventionGraph(
        edit("a", "blocks[10].output"), edit("b", "blocks[13].output"), edit("c", "blocks[-6].output")
    )
    written = [text.get_text() for text in texts(draw_graph(graph))]
    assert {"0 … 9", "−5 … −1"} <= set(written)
    assert {"10", "11", "12", "13", "−6"} <= set(written)
    assert not {"0", "9", "−5", "−1"} & set(written)
    known = [text.get_text() for text in texts(draw_graph(graph, layers=30))]
    assert {"0 … 9", "14 … 23", "24", "25 … 29"} <= set(known)


def test_blocks_that_a_band_covers_are_not_left_out():
    graph = InterventionGraph(edit("all", "blocks[*].output"), edit("one", "blocks[9].output"))
    assert not any(" … " in text.get_text() for text in texts(draw_graph(graph)))


def test_a_condition_is_written_with_both_its_reads():
    when = rl.cosine("blocks[10].output @ [1]", "blocks[10].output @ last") > 0.8
    graph = InterventionGraph(edit("e", "blocks[15].output", when=when))
    written = [text.get_text().strip() for text in texts(draw_graph(graph))]
    assert "if cosine('blocks[10].output @ [1]'," in written
    assert "'blocks[10].output @ last') > 0.8" in written


def test_edits_at_one_site_have_arrows_of_their_own_and_labels_beside_them():
    def swap(name, heads):
        return edit(
            name, "blocks[3].attn.heads", "last", Swap(), heads=heads, run="path", source=Read(run="corrupt")
        )

    figure = draw_graph(
        InterventionGraph(Source("corrupt"), Source("path"), swap("one", [3]), swap("two", [4, 5]))
    )
    x = {a.get_gid(): a.get_xdata()[0] for a in figure.axes[0].lines if a.get_gid()}
    assert x["supply:one"] == x["edit:one"] < x["supply:two"] == x["edit:two"]
    written = " ".join(text.get_text() for text in texts(figure))
    assert "(head 3)" in written
    assert "(heads 4, 5)" in written
    starts = [text.get_position()[0] for text in texts(figure) if text.get_text() in ("one", "two", "→ one")]
    assert min(starts) > x["edit:two"]
