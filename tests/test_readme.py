"""The README's promises: its commands exist, its Python runs, and its recipe for a new layer works as written."""

import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from peerscale.files import ROOT
from peerscale.plan.cells import planned_cells
from peerscale.plan.plan import Verdict
from peerscale.records.study import read_fits

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """Fenced code blocks, without the indentation of a list."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", text, flags=re.S | re.M)
    return [re.sub(rf"^{indent}", "", body, flags=re.M) for indent, body in found]


def test_every_make_target_that_the_readme_names_is_there() -> None:
    named = set(re.findall(r"make ([a-z]+)", README)) - {"sure"}
    help_text = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    offered = set(re.findall(r"^  make ([a-z]+)", help_text, flags=re.M))
    assert named and named <= offered
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), flags=re.M)
    assert phony and offered <= set(phony.group(1).split())


def test_files_that_the_readme_links_to_are_there() -> None:
    links = re.findall(r"\]\(((?!http)[^)#]+)\)", README)
    assert len(links) > 5
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing


def test_the_python_of_the_readme_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = [block for block in blocks(README, "python") if "read_runs" in block]
    monkeypatch.chdir(ROOT)
    exec(code, {})


def test_the_study_of_the_readme_plans_as_it_stands(tmp_path: Path) -> None:
    (text,) = [block for block in blocks(README, "yaml") if block.startswith("sweep:")]
    (tmp_path / "mine.yaml").write_text(text)
    cells = planned_cells(tmp_path / "mine.yaml")
    dense, peer = (Counter(c.config.size_name for c in cells if c.config.ffn.method == m) for m in ("dense", "peer"))
    assert dense == dict.fromkeys(("d16", "d20", "d24", "d32", "d48"), 4), "two seeds of two batches"
    assert peer == {size: 2 * n for size, n in dense.items()}, "of two numbers of experts each"
    assert {cell.config.budget for cell in cells} == {9e11}
    assert [cell.name for cell in cells if cell.plan.verdict is Verdict.DROP] == []
    assert f"its {len(cells)} cells" in README


def size_of(claim: dict[str, float]) -> str:
    """The difference of a claim without its sign, and half of its interval."""
    return f"{abs(claim['value']):.3f} ± {(claim['high'] - claim['low']) / 2:.3f}"


def test_the_verdicts_of_the_readme_are_those_of_the_published_fits() -> None:
    main, small = (read_fits(ROOT / "results" / study / "fits.json") for study in ("isoflop_cpu", "reproduce"))
    of = {(claim["rival"], claim["budget"]): claim for claim in main["claims"] + small["claims"]}
    assert of["dense", 3e13]["family"] == 6
    decided = {rival: claim["p_holm"] < 0.05 for (rival, budget), claim in of.items() if budget == 3e13}
    assert decided == {"dense": True, "pkm": False, "moe_token_choice": False}
    leads = ("dense", 3e13)
    for place in (leads, ("dense", 1e14), ("pkm", 1e14), ("moe", 2.2e12)):
        assert of[place]["leads"], place
    assert of["moe_token_choice", 1e14]["value"] > 0 and of["moe_token_choice", 1e14]["p_holm"] < 0.05
    assert all(of[rival, 2.2e12]["p_holm"] > 0.05 for rival in ("moe_token_choice", "pkm"))
    text = " ".join(README.split())
    for line in (
        f"PEER leads by {size_of(of[leads])} at 3·10¹³ FLOPs and by {size_of(of['dense', 1e14])} at 10¹⁴.",
        f"ahead of PEER by {size_of(of['moe_token_choice', 1e14])} at 10¹⁴. They cannot be told apart at 3·10¹³ or "
        "2.2·10¹².",
        f"PEER leads by {size_of(of['moe', 2.2e12])} at 2.2·10¹².",
        f"PEER leads by {size_of(of['pkm', 1e14])} at 10¹⁴, which is not significant with own curvatures",
    ):
        assert line in text, line
    (growth,) = (one for one in main["growth"] if one["method"] == "peer")
    assert growth["low"] < 0 < growth["high"]
    interval = f"{growth['slope']:.2f} [{growth['low']:.2f}, +{growth['high']:.2f}]".replace("-", "−")
    assert f"cannot be told: ln multiplier {interval} per factor of ten." in text


def test_the_difference_with_own_curvatures_is_that_of_the_published_fits() -> None:
    places = (("isoflop_cpu", 3e13), ("reproduce", 2.2e12), ("every_block", 1e13))
    first, second, third = (own_curvature(study, budget) for study, budget in places)
    assert (
        f"−{-first['value']:.3f} (standard error {first['se']:.3f}) at 3·10¹³, −{-second['value']:.3f} "
        f"({second['se']:.3f}) at 2.2·10¹² and −{-third['value']:.3f} ({third['se']:.3f}) in `every_block`"
    ) in " ".join(README.split())


def own_curvature(study: str, budget: float) -> dict[str, float]:
    fits = read_fits(ROOT / "results" / study / "fits.json")
    (entry,) = (e for e in fits["budgets"] if e["budget"] == budget)
    (one,) = (d["own"] for d in entry["differences"] if (d["method"], d["reference"]) == ("peer", "dense"))
    return one


def test_the_differences_of_every_block_are_those_of_the_published_fits() -> None:
    claims = read_fits(ROOT / "results" / "every_block" / "fits.json")["claims"]
    dense, token_choice, pkm = (
        f"{abs(one['value']):.3f} ± {(one['high'] - one['low']) / 2:.3f}"
        for rival in ("dense", "moe_token_choice", "pkm") for one in claims if one["rival"] == rival
    )  # fmt: skip
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert (
        f"PEER leads dense by {dense}, and cannot be told apart from token choice (−{token_choice}, p = 0.052) and PKM "
        f"(+{pkm})"
    ) in " ".join(page.split())
    assert [one["p_holm"] < 0.05 and one["value"] < 0 for one in claims] == [True, False, False]


def test_the_barely_significant_differences_are_those_of_the_published_fits() -> None:
    fits = read_fits(ROOT / "results" / "reproduce" / "fits.json")
    barely = {claim["rival"]: f"{claim['p_holm']:.3f}" for claim in fits["claims"] if claim["p_holm"] > 0.05}
    assert barely == {"moe_token_choice": "0.083", "pkm": "0.083"}
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert "(p = 0.083)" in README and "(p = 0.083)" in page
    own = {d["method"]: -d["own"]["value"] for d in fits["budgets"][1]["differences"] if d["reference"] == "peer"}
    less = {name: f"{value:+.3f}".replace("-", "−") for name, value in own.items()}
    said = (
        f"PEER's loss less dense's is {less['dense']}, less that of expert choice {less['moe']}, of token choice "
        f"{less['moe_token_choice']} and of PKM {less['pkm']}, with standard errors of 0.011"
    )
    assert said in " ".join(page.split())
