"""Colours that stay, labels that read well, files that repeat."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from peerscale.figures import style
from peerscale.stats.curve import Curve
from toy_study import curve_of


def colours(names: Iterable[str]) -> dict[str, str]:
    return {str(curve): colour for curve, colour in style.colours(map(curve_of, names)).items()}


def ordered(names: Iterable[str]) -> list[str]:
    return [*map(str, style.ordered(map(curve_of, names)))]


def test_known_methods_keep_their_colours_whatever_else_is_drawn() -> None:
    alone = {name: colours([name])[name] for name in style.COLOURS}
    assert alone == style.COLOURS
    together = colours(["mine", *style.COLOURS])
    assert {name: together[name] for name in alone} == alone


def test_unknown_methods_get_colours_of_their_own() -> None:
    names = ["mine", "yours", "peer n_experts=16384", "peer n_experts=65536", "gated"]
    chosen = colours([*names, "dense"])
    assert len(set(chosen.values())) == len(chosen)
    assert colours(reversed(names)) == colours(names)
    assert colours(["mine"])["mine"] in style.SPARE_COLOURS


def test_colours_differ_in_lightness_or_hue_for_the_colour_blind() -> None:
    """Dichromats see two dimensions: no two methods may be close in both lightness and blue-yellow."""
    points = []
    for colour in style.COLOURS.values():
        red, green, blue = to_rgb(colour)
        points.append((0.299 * red + 0.587 * green + 0.114 * blue, blue - (red + green) / 2))
    for i, a in enumerate(points):
        for b in points[:i]:
            assert abs(a[0] - b[0]) + abs(a[1] - b[1]) > 0.15


def test_methods_look_alike_everywhere_and_differ_without_colour() -> None:
    together = style.looks(map(curve_of, ["mine", "peer n_experts=16384", *style.COLOURS]))
    shapes = [(look["marker"], look["linestyle"]) for look in together.values()]
    assert len({marker for marker, _ in shapes}) == len({line for _, line in shapes}) == len(shapes)
    for method in style.COLOURS:
        alone = style.looks([Curve(method)])[Curve(method)]
        assert {**alone, "color": ""} == {**together[Curve(method)], "color": ""}
    (alone,) = style.looks([curve_of("peer n_experts=16384")]).values()
    assert alone["marker"] == together[curve_of("peer n_experts=16384")]["marker"]


def test_order_and_labels() -> None:
    names = ordered(["peer", "gated", "pkm", "dense", "pkm", "a_layer"])
    assert names == ["dense", "pkm", "peer", "a_layer", "gated"]
    assert ordered(["dense batch=16", "dense batch=8", "dense"]) == ["dense", "dense batch=8", "dense batch=16"]
    variants = ["a_layer b=1", "peer b=16", "peer b=8", "pkm b=16", "dense b=8"]
    assert ordered(variants) == ["dense b=8", "pkm b=16", "peer b=8", "peer b=16", "a_layer b=1"]
    assert [style.label(curve_of(n)) for n in ("moe", "moe_token_choice", "peer top_k=8", "a_layer")] == [
        "MoE (expert choice)",
        "MoE (token choice)",
        "PEER, top 8",
        "a layer",
    ]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"batch_sequences": 16}, "batch 16"),
        ({"ffn.n_experts": 65536, "optim.name": "row_sparse_adamw"}, "65,536 experts, row-sparse AdamW"),
        ({"ffn.n_heads": 2, "ffn.top_k": 4}, "2 heads, top 4"),
        ({"ffn.n_heads": 1}, "1 head"),
        ({"ffn.n_experts": 1024, "ffn.query_norm": False}, "1,024 experts, no BatchNorm"),
        ({"optim.lr": 1e-5, "optim.table_lr": 6e-3}, "rate 1e-05, table rate 0.006"),
        ({"context": 128, "some_key": "a-b"}, "context 128, some key a-b"),
        ({"optim.lr": 0.01, "optim.beta2": 0.99}, "rate 0.01, beta2 0.99"),
        ({}, ""),
    ],
)
def test_settings_are_words(settings: dict[str, Any], words: str) -> None:
    assert style.in_words(Curve.of("peer", settings)) == words


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ("d64", "d_model 64"), ("d12-h2", "d_model 12 (2 heads)"), ("d32-l6", "d_model 32 (6 layers)"),
        ("d32-l6-h8", "d_model 32 (6 layers, 8 heads)"), ("mine", "mine"), ("", ""),
    ],
)  # fmt: skip
def test_sizes_are_words(size: str, words: str) -> None:
    assert style.size_label(size) == words


def test_variants_are_shades_of_their_method_from_light_to_dark() -> None:
    names = [f"{method} batch_sequences={n}" for method in ("dense", "peer", "mine") for n in (8, 16, 32)]
    chosen = colours(names)
    assert len(set(chosen.values())) == len(names)
    for method in ("dense", "peer", "mine"):
        rgb = [np.array(to_rgb(chosen[f"{method} batch_sequences={n}"])) for n in (8, 16, 32)]
        base = np.array(to_rgb(colours([method])[method]))
        lightness = [colour.sum() for colour in rgb]
        assert lightness == sorted(lightness, reverse=True) and np.diff(lightness).max() < -0.15
        for colour in rgb:  # on the line from white through the method's colour to black
            end = 1.0 if colour.sum() > base.sum() else 0.0
            shares = (colour - base)[base != end] / (end - base)[base != end]
            np.testing.assert_allclose(shares, shares.mean(), atol=0.01)
    assert colours(["peer batch_sequences=8"])["peer batch_sequences=8"] == style.COLOURS["peer"]


def test_a_legend_is_read_row_by_row() -> None:
    names = [f"{method} batch_sequences={n}" for method in ("dense", "peer") for n in (8, 16, 32)]
    figure, _ = style.panels(1)
    style.curve_legend(figure, style.looks(map(curve_of, names)))
    figure.draw_without_rendering()
    boxes = [(text.get_window_extent(), text.get_text()) for text in figure.legends[0].get_texts()]
    read = sorted(boxes, key=lambda item: (round(-item[0].y0), item[0].x0))
    assert [text for _, text in read] == [style.label(curve_of(name)) for name in names]


@pytest.mark.parametrize(
    ("budget", "title"),
    [(1e11, "$10^{11}$ FLOPs"), (3e11, r"$3 \times 10^{11}$ FLOPs"), (2.5e18, r"$2.5 \times 10^{18}$ FLOPs")],
)
def test_budget_title(budget: float, title: str) -> None:
    assert style.budget_title(budget) == title


@pytest.mark.parametrize(
    ("value", "text"), [(105, "105"), (1500, "1.5k"), (3e5, "300k"), (1e6, "1M"), (2e9, "2G"), (6e15, "6P")]
)
def test_short_number(value: float, text: str) -> None:
    assert style.short_number(value) == text


def test_files_repeat_byte_for_byte_and_name_no_date_or_version(tmp_path: Path) -> None:
    with style.applied():
        figure, axes = style.panels(2)
        axes[0].plot([1, 2], [3, 4])
        style.caption(figure, "note")
    for name in ("first", "second"):
        style.save(figure, tmp_path / name)
    for kind in ("png", "pdf"):
        first, second = ((tmp_path / f"{name}.{kind}").read_bytes() for name in ("first", "second"))
        assert first == second
        assert b"CreationDate" not in first and b"Matplotlib" not in first
    assert {path.name for path in tmp_path.iterdir()} == {"first.png", "first.pdf", "second.png", "second.pdf"}


def test_the_order_of_names_does_not_depend_on_the_process() -> None:
    names = [f"peer load_balance_weight={value}" for value in ("0.003", "0.03", "0.0003")]
    assert ordered(names) == ordered(reversed(names)) == sorted(names)
