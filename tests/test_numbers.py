"""Every number in README.md and docs/results.md is that of what is committed, to the last digit.

`of_readme` and `of_results` have the numbers of every paragraph, list item and row of a table, in order: those of
results computed from `fits.json` and `runs.csv`, others (budgets, settings, the paper's) as they are.
"""

import itertools
import json
import math
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import pandas as pd
import pytest
import yaml

from peerscale.files import ROOT
from peerscale.plan.entrant import SIZES, Placing, read_entrant
from peerscale.records.entry import ENTRY, STANDING

NUMBER = re.compile(r"[−+]?\d(?:[\d,.]*\d)?(?:e\d+)?[⁰¹²³⁴⁵⁶⁷⁸⁹]*(?:·10[⁰¹²³⁴⁵⁶⁷⁸⁹]+)?")
NOT_TEXT = re.compile(r"```.*?```|`[^`\n]*`|\]\([^)]*\)|^#.*?$", flags=re.S | re.M)
"""Code, targets of links, and headings."""

MAIN, SMALL, EVERY = "isoflop_cpu", "reproduce", "every_block"
PEER, MORE, TWO_HEADS = "peer", "peer n_experts=16384", "peer n_heads=2-top_k=32"
TOKEN, EXPERT = "moe_token_choice", "moe"
RIVALS = ("dense", TOKEN, EXPERT, "pkm")
BUDGETS = ("1e12", "3e12", "1e13", "3e13", "1e14")


@cache
def fits(study: str) -> Any:
    return json.loads((ROOT / "results" / study / "fits.json").read_text(encoding="utf-8"))


@cache
def runs(study: str) -> pd.DataFrame:
    return pd.read_csv(ROOT / "results" / study / "runs.csv")


def written(value: float, digits: int = 3, sign: bool = True) -> str:
    """A number as the texts have it: with a sign, or its size alone."""
    return f"{value:+.{digits}f}".replace("-", "−") if sign else f"{abs(value):.{digits}f}"


def difference(study: str, budget: float, method: str, rival: str, size: str = "") -> tuple[int, dict[str, Any]]:
    """The difference of two methods, and 1 if it is the method's loss less its rival's, or -1."""
    (entry,) = (one for one in fits(study)["budgets"] if one["budget"] == budget)
    found = {(one["method"], one["reference"], one["size"]): one for one in entry["differences"]}
    there = (method, rival, size) in found
    return (1, found[method, rival, size]) if there else (-1, found[rival, method, size])


def pair(*place: Any, sign: bool = True, on: str = "") -> list[str]:
    """A difference and half of its interval, on the validation set or on another one."""
    direction, found = difference(*place)
    found = found["sets"][on] if on else found
    half = (found["high"] - found["low"]) / 2
    return [written(direction * found["value"], sign=sign), written(half, sign=False)]


def own(*place: Any, sign: bool = True) -> list[str]:
    """A difference with own curvatures, and its standard error."""
    direction, found = difference(*place)
    return [written(direction * found["own"]["value"], sign=sign), written(found["own"]["se"], sign=False)]


def multiplier(study: str, method: str, budget: float) -> list[str]:
    """A multiplier with its interval; nothing if it has none."""
    found = [one for one in fits(study)["multipliers"] if (one["method"], one["budget"]) == (method, budget)]
    return [f"{one[key]:.2f}" for one in found for key in ("multiplier", "low", "high")]


def growth(method: str) -> list[str]:
    (one,) = (each for each in fits(MAIN)["growth"] if each["method"] == method)
    return [f"{one[key]:.2f}".replace("-", "−") for key in ("slope", "low", "high")]


def p_of_one_curvature(study: str, budget: float) -> str:
    (entry,) = (one for one in fits(study)["budgets"] if one["budget"] == budget)
    return f"{entry['equality']['p']:.2f}"


def usage(n_experts: int, digits: int) -> list[str]:
    """Lowest and highest share of PEER's experts that are used at 1e14, in percent."""
    rows = runs(MAIN)
    shares = rows.loc[(rows["method"] == PEER) & (rows["n_experts"] == n_experts) & (rows["budget"] == 1e14)]
    return [f"{100 * end:.{digits}f}" for end in (shares["expert_usage"].min(), shares["expert_usage"].max())]


def largest_gain(budget: float) -> list[str]:
    """The largest estimated gain of a better learning rate at a budget, and its standard error."""
    each = [one for one in fits(MAIN)["rates"]["brackets"]["each"] if one["budget"] == budget]
    one = max(each, key=lambda found: found["gain"])
    return [f"{one['gain']:.4f}", f"{one['se']:.4f}"]


def error_of_rates(method: str, budget: float) -> str:
    (entry,) = (one for one in fits(MAIN)["budgets"] if one["budget"] == budget)
    (found,) = (one["rate_se"] for one in entry["methods"] if one["name"] == method)
    return f"{found:.4f}"


def row_of_budget(study: str, budget: float) -> list[str]:
    """The numbers of a row of the table by budget."""
    usual = runs(study)[
        (runs(study)["status"] == "done") & runs(study)["settings"].isna() & (runs(study)["rate_factor"] == 1)
    ].fillna({"variant": ""})
    seeds = usual[usual["budget"] == budget].groupby(["method", "variant", "size"])["seed"].nunique()
    (entry,) = (one for one in fits(study)["budgets"] if one["budget"] == budget)
    sizes = {
        rival: [d["size"] for d in entry["differences"] if d["method"] == rival and d["reference"] == PEER]
        for rival in RIVALS
    }
    found = [f"{budget:g}".replace("e+", "e")]
    for rival in RIVALS:
        for size in sizes[rival]:
            found += [*pair(study, budget, PEER, rival, size), *([size[1:]] if size else [])]
    return [*found, *multiplier(study, PEER, budget), *map(str, dict.fromkeys((seeds.min(), seeds.max())))]


def claimed(study: str, budget: float, rival: str) -> bool:
    """Whether the difference of PEER to a rival is significant after Holm's correction."""
    return any(
        claim["p_holm"] < 0.05
        for claim in fits(study)["claims"] if (claim["budget"], claim["rival"]) == (budget, rival)
    )  # fmt: skip


def at_both(method: str, rival: str, strip: str = "") -> list[str]:
    """The differences at two sizes of 1e14, each with its size, without the sign that is told in words."""
    return [n.strip(strip) for d in ("112", "128") for n in (*pair(MAIN, 1e14, method, rival, f"d{d}"), d)]


def more_flops() -> list[str]:
    """How many percent more FLOPs per token expert choice has than PEER where they are compared at equal d_model."""
    done = runs(MAIN)[
        (runs(MAIN)["status"] == "done") & runs(MAIN)["settings"].isna() & (runs(MAIN)["rate_factor"] == 1)
    ].fillna({"variant": ""})
    flops = done.pivot_table(index=["budget", "size"], columns=["method", "variant"], values="flops_per_token")
    more = 100 * (flops[EXPERT, ""] / flops[PEER, ""] - 1).dropna()
    return [f"{more.min():.0f}", f"{more.max():.0f}"]


def gains_of_tables() -> list[str]:
    """How much lower the losses of PEER and PKM are at a third and a tenth of their table rates, at 1e14."""
    lower = ((f"{PEER} table_lr=0.006", PEER), ("pkm table_lr=0.02", "pkm"))
    return [n for one, usual in lower for n in pair("table_rates", 1e14, one, usual, "d112", sign=False)]


def step_times() -> list[str]:
    """How many percent longer a step of PEER takes than dense's at equal FLOPs."""
    table = pd.read_csv(ROOT / "results" / "bench" / "training_step.csv").set_index("method")
    times = table.loc[PEER, "time_over_dense"]
    return [f"{100 * end - 100:.0f}" for end in (times.min(), times.max())]


def extent() -> list[str]:
    """Parameters (thousands, millions) and tokens (millions) of the smallest and largest runs."""
    both = pd.concat([runs(MAIN), runs(SMALL)])
    both = both[both["status"] == "done"]
    params, tokens = both["params_total"], both["tokens"]
    return [
        f"{params.min() / 1e3:.0f}",
        f"{params.max() / 1e6:.1f}",
        f"{tokens.min() / 1e6:.1f}",
        f"{tokens.max() / 1e6:.0f}",
    ]


def speed_ratios() -> list[str]:
    """The time of a step of PEER-pytorch over ours, smallest and largest: as it comes, and with its best settings."""
    table = pd.read_json(ROOT / "results" / "bench" / "peer_step.json")
    best = table[["ratio_fused_adamw", "ratio_tuned"]].min(axis=1)  # with fused AdamW, and with an allocator as well
    return [f"{end:.1f}" for ratio in (table["ratio"], best) for end in (ratio.min(), ratio.max())]


ENTRANTS = ("engram", "peer_9216", "pkm")
CONTROL = "engram_one_row"


def standing() -> Iterator[list[str]]:
    """At 1e13: differences of these entrants with half of the interval; multipliers and times; that of the control."""
    table = pd.read_csv(ROOT / "results" / "standing" / "table.csv").set_index("entrant")
    at = table[table["budget"] == 1e13]
    halves = (at["high"] - at["low"]) / 2
    differences = {name: [written(one[name], sign=False) for one in (at["difference"], halves)] for name in at.index}
    assert all(at["difference"][name] < 0 for name in ENTRANTS), "README says below"
    (cell,) = Placing("peer_9216", read_entrant("peer_9216")).cells([{}], 1e13, [64], [0])
    experts = f"{cell.config.ffn.n_experts:,}"
    yield [*differences["engram"], experts, *differences["peer_9216"], *differences["pkm"]]
    yield [f"{value:.2f}" for column in ("multiplier", "time") for value in at.loc[[*ENTRANTS], column]]
    assert at["difference"][CONTROL] > 0, "README says behind"
    yield differences[CONTROL]


CONTROLS = {
    "no layer": ("no_layer",), "dense, initial output scale 0.25": ("dense initial_output_scale=0.25",),
    "wide dense": ("wide_dense",), "PEER": (PEER,), "PEER, no BatchNorm": ("peer query_norm=false",),
    "PEER, 1 head": ("peer n_heads=1",), "PKM": ("pkm",), "PKM, PEER's top k": ("pkm_equal_top_k",),
    "MoE (token choice)": (TOKEN,),
    "MoE (token choice), 32 experts": ("moe_token_choice n_experts=32",),
    "MoE (token choice), 64 experts": ("moe_token_choice n_experts=64", "16,384"),
    "fine-grained MoE": ("fine_grained_moe",),
    "MoE (expert choice)": (EXPERT,), "MoE (expert choice), batch 64": ("moe batch_sequences=64",),
    "MoE (expert choice), 16 experts, capacity factor 1.0": ("moe n_experts=16-capacity_factor=1.0",),
}  # fmt: skip

DENSE, PKM = (MAIN, 1e14, PEER, "dense"), (MAIN, 1e14, PEER, "pkm")
PLACES = (
    (SMALL, 7e11), (MAIN, 1e12), (SMALL, 2.2e12), (MAIN, 3e12), (MAIN, 1e13), (EVERY, 1e13), (MAIN, 3e13), (MAIN, 1e14),
)  # fmt: skip
COMPARED = (PEER, MORE, TOKEN, "pkm")
NORMALISED, NOT_NORMALISED = (f"peer n_experts=65536-query_norm={each}" for each in ("true", "false"))


def of_readme() -> list[list[str]]:
    return [
        ["2024"],
        ["3.11"],
        ["95"],
        [*pair(MAIN, 3e13, PEER, "dense", sign=False), "3·10¹³", *pair(*DENSE, sign=False), "10¹⁴"],
        ["10¹⁴", *pair(MAIN, 1e14, PEER, TOKEN, sign=False), *pair(*PKM, sign=False)],
        ["16,384", "4,096", *pair(MAIN, 1e14, MORE, PEER, sign=False), "10¹⁴"],
        ["10¹⁴"],
        [*pair("controls", 1e13, "no_layer", "dense", "d64", sign=False), "10¹³"],
        ["10¹⁴", "16,384", "10¹³", "6·10⁴"],
        ["10¹³"],
        *standing(),
        ["60"],
        speed_ratios(),
        ["4.0"],
    ]


def of_results() -> list[list[str]]:
    best, worst = (pair("active", 1e13, one, "dense", "d64") for one in (TWO_HEADS, "peer n_heads=4-top_k=16"))
    not_tried = error_of_rates("pkm", 1e14)
    more = [pair(MAIN, 1e14, MORE, rival, sign=False) for rival in (PEER, TOKEN)]
    like = (pair(MAIN, 1e14, method, MORE, "d112") for method in ("moe_token_choice n_experts=32", EXPERT))
    return [
        ["95"],
        # By budget
        ["95"],
        *(row_of_budget(*place) for place in PLACES),
        # By rival
        ["2.2·10¹²", "3·10¹³", "10¹⁴", *own(MAIN, 3e13, PEER, "dense"), "3·10¹³", *own(*DENSE), "10¹⁴"],
        ["4,096", "10¹⁴", "2", "32", "10¹³", *at_both(TWO_HEADS, TOKEN, "+")],
        ["16,384", "10¹⁴", *more[0], "4,096", *more[1], "10¹³"],
        ["2.2·10¹²", "10¹⁴", *at_both(PEER, EXPERT, "+"), *more_flops()],
        [*own(*PKM, sign=False), "10¹⁴", "1", *at_both("pkm n_heads=1", PEER)],
        [*pair("controls", 1e13, "no_layer", "dense", "d64", sign=False), "10¹³"],
        # Multipliers
        ["16,384"],
        *([budget, *(n for method in COMPARED for n in multiplier(MAIN, method, float(budget)))] for budget in BUDGETS),
        [*growth(PEER), *growth(TOKEN)],
        # The paper's claims
        ["−0.145", "6·10¹⁸", "−0.107", "2·10¹⁹", "10¹⁴", "3·10¹³", "2.2·10¹²", "10¹³"],
        ["−0.061", "−0.054"],
        ["−0.037", "−0.040", "2.2·10¹²", "10¹⁴"],
        ["23.47", "16,384", "20.64", "16,384", "4,096", *pair(MAIN, 1e14, MORE, PEER), "10¹⁴", "3·10¹³", "10¹³"],
        ["3", "1", "2", "4", "64", *("2", "32", *best), *("4", "16", *worst)],
        ["−0.004", "0.000", *pair("experts", 1e13, NORMALISED, NOT_NORMALISED, "d64"), "65,536", "10¹³"],
        ["100", usage(4096, 1)[0], "4,096", "10¹⁴", *usage(16384, 0), "16,384"],
        ["10¹⁴", "16,384", "2", "3.2", "3.7", "112", "32", "16,384", *(number for each in like for number in each)],
        # What explains a difference to dense?
        ["10¹³", "64"],
        *(
            [*NUMBER.findall(name), *pair("controls", 1e13, method, "dense", "d64"), *notes]
            for name, (method, *notes) in CONTROLS.items()
        ),
        # The standing table
        departure_from_one_law(),
        # What limits these numbers
        ["10¹⁴", "2", "32"],
        ["3·10¹³", "10¹⁴", *largest_gain(1e14), "10¹⁴", not_tried, "10¹³", error_of_rates(PEER, 1e13), "16,384"],
        ["10¹⁴", "112", *gains_of_tables()],
        ["10¹³", "10¹⁴", "2", "32", *at_both(TWO_HEADS, PEER, "−")],
        ["10¹³", p_of_one_curvature(MAIN, 1e13), p_of_one_curvature(EVERY, 1e13)],
        ["10¹⁴", *pair(*DENSE, on="speeches"), *pair(*DENSE, on="wikipedia")],
        step_times(),
        ["10¹²", "3·10¹²"],
        [*extent(), "6·10⁴", "3·10⁷"],
    ]


def departure_from_one_law() -> list[str]:
    """How far rates of the standing table are from the common law's, in percent, and what that moves at most.

    The common exponents are those of conf/optim; a distance x in the logarithm of the rate costs curvature x^2.
    """
    curvature, apart, moved = fits("rates")["rates"]["law"]["curvature"], [], {}
    common = yaml.safe_load(text_of("conf/optim/adamw.yaml"))["lr_law"]
    for name in sorted(path.parent.name for path in STANDING.glob(f"*/{ENTRY}")):
        cells = Placing(name, read_entrant(name)).cells([{}], 1e13, SIZES[1e13], [0])
        (tuned,) = (cell for cell in cells if cell.config.d_model == 64)
        own = tuned.config.optim.lr_law
        logs = [
            (common["width_exponent"] - own.width_exponent) * math.log(cell.config.d_model / 64)
            + (common["tokens_exponent"] - own.tokens_exponent) * math.log(cell.plan.tokens / tuned.plan.tokens)
            for cell in cells
        ]
        apart += [abs(math.expm1(x)) for x in logs]
        moved[name] = curvature * math.fsum(x**2 for x in logs) / len(logs)
    assert max(moved, key=lambda name: moved[name]).startswith("peer")
    return [f"{100 * max(apart):.0f}", "10¹³", f"{max(moved.values()):.4f}"]


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def pieces(text: str) -> Iterator[tuple[str, list[str]]]:
    """Every paragraph, list item and row of a table that has a number: its text, and its numbers."""
    for piece in re.split(r"\n\s*\n|\n(?=[-|] ?)", NOT_TEXT.sub("](", text)):
        if numbers := NUMBER.findall(piece):
            yield piece.strip(), numbers


def wrong(text: str, expected: list[list[str]]) -> list[str]:
    """What differs between the numbers of a text and those that are expected."""
    found = [*pieces(text)]
    return [
        f"{piece[0][:60]!r}: {piece[1]}, expected {wanted}"
        for piece, wanted in itertools.zip_longest(found, expected, fillvalue=("the end", []))
        if piece[1] != wanted
    ]


PAGES = {"README.md": of_readme, "docs/results.md": of_results}


@pytest.mark.parametrize("name", PAGES)
def test_every_number_is_that_of_the_committed_sweeps(name: str) -> None:
    assert wrong(text_of(name), PAGES[name]()) == []


@pytest.mark.parametrize("name", PAGES)
def test_a_change_of_any_digit_is_found(name: str) -> None:
    text, expected = text_of(name), PAGES[name]()
    skipped = [range(*match.span()) for match in NOT_TEXT.finditer(text)]
    places = [match.start() for match in re.finditer(r"\d", text) if not any(match.start() in each for each in skipped)]
    assert len(places) > 50
    for at in places:
        changed = f"{text[:at]}{(int(text[at]) + 1) % 10}{text[at + 1 :]}"
        assert wrong(changed, expected), text[at - 20 : at + 20]


@pytest.mark.parametrize(("study", "budget"), PLACES)
@pytest.mark.parametrize("rival", RIVALS)
def test_what_is_bold_is_claimed(study: str, budget: float, rival: str) -> None:
    label = f"| {budget:g} |".replace("e+", "e")
    (row,) = [
        line for line in text_of("docs/results.md").splitlines() if line.startswith(label) and f"[{study}]" in line
    ]
    assert row.split("|")[2 + [*RIVALS].index(rival)].strip().startswith("**") == claimed(study, budget, rival)


def test_what_the_readme_tells_apart_in_the_standing_table() -> None:
    beaten = "Engram beats all others; this PEER, PKM and DeepSeek's fine-grained MoE beat SwiGLU, GELU and ReLU²"
    words = " ".join(text_of("README.md").split())
    assert f"By Holm's test of all pairs {beaten}, and do not differ significantly" in words
    assert "Not significant: PEER ahead of PKM (the paper), SwiGLU ahead of GELU (the literature)" in words
    table = pd.read_csv(ROOT / "results" / "standing" / "table.csv")
    ranks = table[table["budget"] == 1e13].set_index("entrant")["rank"].str.split(", ").map(frozenset)
    apart = {pair for pair in itertools.combinations(ranks.index, 2) if not ranks[pair[0]] & ranks[pair[1]]}
    behind_engram = {("engram", one) for one in ranks.index if one != "engram"}
    alike, others = ("peer_9216", "pkm", "balanced_moe"), ("swiglu", "dense", "relu_squared")
    assert apart >= behind_engram | {*itertools.product(alike, others)}
    assert not apart & {*itertools.combinations(alike, 2), ("pkm", "peer"), ("swiglu", "dense")}
