"""The WD tagger: what the graph is given, which tags are written, and files that are not what they seem."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lorasmith.engine.captioners import load_captioner
from lorasmith.engine.captioners.wd14 import Settings, Tag, choose_tags, mcut_threshold, prepare_picture, read_tags
from lorasmith.engine.errors import CaptionerError
from tests.tiny_captioners import TAG_LINES, build_wd14

TAGS = [Tag(line.split(",")[1], int(line.split(",")[2])) for line in TAG_LINES]


def chosen(settings: dict[str, Any] | None = None, **probabilities: float) -> list[str]:
    """Choose among the tags of the tiny list; `kaomoji` stands for ^_^, a tag that is not named has probability 0."""
    names = {"kaomoji": "^_^", "miku": "hatsune_miku", "ganyu": "ganyu_(genshin_impact)"}
    by_name = {names.get(name, name): value for name, value in probabilities.items()}
    values = np.array([by_name.get(tag.name, 0.0) for tag in TAGS])
    return choose_tags(TAGS, values, Settings(**(settings or {})))


# -------------------------------------------------------------------------------------------------- what it is given


def test_the_graph_gets_blue_green_red_centered_on_a_white_square() -> None:
    pixels = prepare_picture(Image.new("RGB", (100, 50), (10, 20, 30)), 100)
    assert pixels.shape == (1, 100, 100, 3)
    assert pixels.dtype == np.float32
    assert (pixels[0, 25:75] == [30, 20, 10]).all()
    assert (pixels[0, :25] == 255).all()
    assert (pixels[0, 75:] == 255).all()


@pytest.mark.parametrize("size", [(448, 448), (1, 1), (1000, 3), (3, 1000), (449, 447)])
def test_any_picture_becomes_the_square_of_the_graph(size: tuple[int, int]) -> None:
    pixels = prepare_picture(Image.new("RGB", size, (255, 255, 255)), 448)
    assert pixels.shape == (1, 448, 448, 3)
    assert (pixels == 255).all()


def test_the_probabilities_are_those_that_the_graph_gives_for_these_pixels(tmp_path: Path) -> None:
    captioner = load_captioner("wd14", str(build_wd14(tmp_path)), {"general_threshold": 0.5}, "cpu")
    weights = np.random.default_rng(7).normal(0, 6, (3, len(TAGS)))
    for color in [(255, 0, 0), (0, 0, 255), (0, 255, 0), (200, 180, 10), (0, 0, 0)]:
        means = np.array([color[2], color[1], color[0]]) / 255
        expected = 1 / (1 + np.exp(-means @ weights))
        text = captioner.caption(Image.new("RGB", (448, 448), color))
        assert text == ", ".join(choose_tags(TAGS, expected, Settings(general_threshold=0.5)))
    captioner.close()


def test_a_package_that_knows_no_gpu_says_so_and_computes_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    from lorasmith.engine.captioners import wd14

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    captioner = wd14.load(build_wd14(tmp_path), Settings(), "cuda")
    assert captioner.where == "CPU, onnxruntime (the package onnxruntime-gpu would use the GPU)"
    assert captioner.caption(Image.new("RGB", (4, 4)))
    assert wd14.load(tmp_path, Settings(), "cpu").where == "CPU, onnxruntime"


# ------------------------------------------------------------------------------------------------- which tags, and how


def test_tags_from_their_thresholds_on_are_written_best_first() -> None:
    assert chosen(solo=0.4, long_hair=0.9, blue_eyes=0.35, **{"1girl": 0.349}) == ["long hair", "solo", "blue eyes"]
    assert chosen({"general_threshold": 0.5}, solo=0.4, long_hair=0.9) == ["long hair"]


def test_characters_come_first_and_have_a_threshold_of_their_own() -> None:
    probabilities = {"solo": 0.99, "miku": 0.9, "ganyu": 0.84}
    assert chosen(**probabilities) == ["hatsune miku", "solo"]
    assert chosen({"character_first": False}, **probabilities) == ["solo", "hatsune miku"]
    both = chosen({"character_threshold": 0.8}, **probabilities)
    assert both == ["hatsune miku", "ganyu (genshin impact)", "solo"]


def test_the_rating_is_the_most_probable_one_and_only_written_on_request() -> None:
    probabilities = {"solo": 0.9, "general": 0.2, "sensitive": 0.1}
    assert chosen(**probabilities) == ["solo"]
    assert chosen({"rating": "first"}, **probabilities) == ["general", "solo"]
    assert chosen({"rating": "last", "blacklist": ["general"]}, **probabilities) == ["solo", "sensitive"]


def test_underscores_become_spaces_except_in_faces() -> None:
    assert chosen(kaomoji=0.9, long_hair=0.8) == ["^_^", "long hair"]
    assert chosen({"underscores": True}, kaomoji=0.9, long_hair=0.8) == ["^_^", "long_hair"]


@pytest.mark.parametrize("spelling", ["long hair", "long_hair", " Long Hair "])
def test_a_tag_on_the_blacklist_is_never_written_however_it_is_spelled(spelling: str) -> None:
    assert chosen({"blacklist": [spelling]}, long_hair=0.9, solo=0.8) == ["solo"]
    assert chosen({"blacklist": [spelling]}, long_hair=0.9) != ["long hair"]


def test_tags_can_be_written_as_another_text_or_left_out_by_an_empty_one() -> None:
    settings = {"replace": {"long_hair": "flowing hair", "blue eyes": "", "solo": "flowing hair"}}
    assert chosen(settings, long_hair=0.9, blue_eyes=0.8, solo=0.7) == ["flowing hair"]


def test_a_picture_without_a_sure_tag_gets_the_most_probable_one() -> None:
    assert chosen(solo=0.01, long_hair=0.02, miku=0.5) == ["long hair"]
    assert chosen(miku=0.9, solo=0.01) == ["hatsune miku"]


def test_the_largest_gap_separates_the_tags_with_mcut() -> None:
    assert mcut_threshold([0.9, 0.8, 0.2, 0.1]) == pytest.approx(0.5)
    assert mcut_threshold([0.3]) == 0.0
    assert chosen({"mcut": True}, solo=0.2, long_hair=0.19, blue_eyes=0.02) == ["solo", "long hair"]


def test_only_so_many_tags_as_asked_for_are_kept_the_surest_ones() -> None:
    settings = {"max_tags": 2, "character_threshold": 0.5}
    assert chosen(settings, solo=0.9, long_hair=0.8, blue_eyes=0.7, miku=0.85) == ["hatsune miku", "solo"]
    assert chosen(settings, solo=0.9, long_hair=0.8, miku=0.6) == ["solo", "long hair"]


@given(
    st.lists(st.floats(0, 1), min_size=len(TAGS), max_size=len(TAGS)),
    st.floats(0, 1),
    st.lists(st.sampled_from([tag.name for tag in TAGS]), max_size=4),
    st.integers(0, 3),
    st.booleans(),
)
def test_for_any_probabilities_the_tags_keep_to_the_rules(
    values: list[float], threshold: float, blacklist: list[str], most: int, mcut: bool
) -> None:
    settings = Settings(general_threshold=threshold, blacklist=blacklist, max_tags=most, mcut=mcut, underscores=True)
    words = choose_tags(TAGS, np.array(values), settings)
    by_name = dict(zip((tag.name for tag in TAGS), values, strict=True))
    kinds = [next(tag.category for tag in TAGS if tag.name == word) for word in words]
    assert not set(words) & set(blacklist)
    assert len(set(words)) == len(words)
    assert kinds == sorted(kinds, reverse=True), "characters (4) before general tags (0), no rating"
    assert not most or len(words) <= most
    if any(tag.category == 0 and tag.name not in blacklist for tag in TAGS):
        assert words
    if not mcut and len(words) > 1:
        assert all(by_name[word] >= (threshold if kind == 0 else 0.85) for word, kind in zip(words, kinds, strict=True))


# ------------------------------------------------------------------------------------------------ files that are wrong


def test_a_list_of_tags_that_does_not_fit_the_graph_is_refused(tmp_path: Path) -> None:
    build_wd14(tmp_path)
    path = tmp_path / "selected_tags.csv"
    path.write_text("\n".join(["tag_id,name,category,count", *TAG_LINES[:-1]]))
    with pytest.raises(CaptionerError, match="do not belong together") as caught:
        load_captioner("wd14", str(tmp_path), device="cpu")
    assert "knows 9 tags, the list names 8" in caught.value.why


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tag_id,name,category,count\n1,solo,0,5\n2,,0,1\n", "Line 3"),
        ("tag_id,name,category,count\n1,solo,general,5\n", "Line 2"),
        ("tag_id,name\n1,solo\n", "Line 2"),
        ("<html>Not found</html>\n<body>\n", "Line 2"),
        ("tag_id,name,category,count\n1,general,9,5\n", "names no general tag"),
        ("tag_id,name,category,count\n", "names no general tag"),
        ("\0\0\0", "selected_tags"),
    ],
)
def test_a_damaged_list_of_tags_is_told_by_file_and_line(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "selected_tags.csv"
    path.write_text(text)
    with pytest.raises(CaptionerError) as caught:
        read_tags(path)
    assert words in str(caught.value)
    assert "selected_tags.csv" in caught.value.what


def test_tags_with_commas_and_quotes_are_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "selected_tags.csv"
    path.write_text('\ufefftag_id,name,category,count\n1,"hello, ""world""",0,5\n2,ポケモン,4,3\n', encoding="utf-8")
    assert read_tags(path) == [Tag('hello, "world"', 0), Tag("ポケモン", 4)]


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        (["N", 3, 448, 448], "FLOAT"),
        (["N", 448, 224, 3], "FLOAT"),
        (["N", "H", "W", 3], "FLOAT"),
        ([4, 448, 448, 3], "FLOAT"),
        (["N", 448], "FLOAT"),
        (["N", 448, 448, 3], "UINT8"),
    ],
)
def test_a_graph_that_takes_something_else_is_refused(shape: list[Any], kind: str, tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    build_wd14(tmp_path)
    picture = helper.make_tensor_value_info("input", getattr(TensorProto, kind), shape)
    answer = helper.make_tensor_value_info("output", getattr(TensorProto, kind), shape)
    graph = helper.make_graph([helper.make_node("Identity", ["input"], ["output"])], "other", [picture], [answer])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, str(tmp_path / "model.onnx"))
    with pytest.raises(CaptionerError, match=r"model\.onnx is no WD tagger") as caught:
        load_captioner("wd14", str(tmp_path), device="cpu")
    assert "not one picture" in caught.value.why


def test_a_graph_for_exactly_one_picture_is_taken(tmp_path: Path) -> None:
    import onnx

    model = onnx.load(str(build_wd14(tmp_path) / "model.onnx"))
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(model, str(tmp_path / "model.onnx"))
    captioner = load_captioner("wd14", str(tmp_path), device="cpu")
    assert captioner.caption(Image.new("RGB", (10, 10)))


def test_an_answer_that_is_no_number_is_an_error_and_not_a_caption(tmp_path: Path) -> None:
    import onnx
    from onnx import numpy_helper

    model = onnx.load(str(build_wd14(tmp_path) / "model.onnx"))
    weights = next(value for value in model.graph.initializer if value.name == "weights")
    broken = np.full_like(numpy_helper.to_array(weights), np.nan)
    weights.CopyFrom(numpy_helper.from_array(broken, "weights"))
    onnx.save(model, str(tmp_path / "model.onnx"))
    captioner = load_captioner("wd14", str(tmp_path), device="cpu")
    with pytest.raises(CaptionerError, match="no numbers"):
        captioner.caption(Image.new("RGB", (10, 10), (9, 9, 9)))


def test_a_damaged_graph_writes_nothing_to_the_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    build_wd14(tmp_path)
    data = (tmp_path / "model.onnx").read_bytes()
    for torn in (b"x", data[:-7], data[: len(data) // 3], bytes(1000)):
        (tmp_path / "model.onnx").write_bytes(torn)
        with pytest.raises(CaptionerError, match=r"model\.onnx"):
            load_captioner("wd14", str(tmp_path), device="cpu")
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
