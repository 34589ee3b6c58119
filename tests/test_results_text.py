"""The README's table of results holds the numbers of the committed studies, to the last digit."""

import json
from typing import Any

import pandas as pd
import pytest

from peerscale.files import ROOT

STUDIES = ("isoflop_cpu", "every_block", "reproduce")
RIVALS = {
    "dense": "PEER − dense",
    "moe_token_choice": "PEER − MoE (token choice)",
    "moe": "PEER − MoE (expert choice)",
    "pkm": "PEER − PKM",
}
NONE = "—"


def table() -> dict[tuple[str, float], dict[str, str]]:
    """The rows by study and budget."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = next(part for part in text.split("\n\n") if part.startswith("| FLOPs | PEER − dense |"))
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines())
    named = [dict(zip(head, row, strict=True)) for row in rows]
    found = {(row["study"].partition("]")[0].strip("["), float(row["FLOPs"])): row for row in named}
    assert len(found) == len(rows)
    return found


TABLE = table()


def difference(fits: dict[str, Any], budget: float, rival: str) -> str:
    """PEER's loss less that of a rival as the table has it: bold if it is a significant claim, with each size."""
    texts = []
    (entry,) = (one for one in fits["budgets"] if one["budget"] == budget)
    for one in entry["differences"]:
        pair = (one["method"], one["reference"])
        if one.get("value") is None or pair not in (("peer", rival), (rival, "peer")):
            continue
        value = one["value"] * (1 if pair[0] == "peer" else -1)
        text = f"{value:+.3f} ± {(one['high'] - one['low']) / 2:.3f}".replace("-", "−")
        claimed = [
            claim["p_holm"] for claim in fits["claims"]
            if (claim["budget"], claim["size"], claim["method"], claim["rival"]) == (budget, one["size"], "peer", rival)
        ]  # fmt: skip
        bold = "**" * any(p < 0.05 for p in claimed)
        texts.append(f"{bold}{text}{bold}" + f" at d_model {one['size'][1:]}" * bool(one["size"]))
    return ", ".join(dict.fromkeys(texts)) or NONE


@pytest.mark.parametrize("study", STUDIES)
def test_every_cell_is_that_of_the_fits(study: str) -> None:
    fits = json.loads((ROOT / "results" / study / "fits.json").read_text(encoding="utf-8"))
    runs = pd.read_csv(ROOT / "results" / study / "runs.csv")
    usual = runs[(runs["status"] == "done") & runs["settings"].isna() & (runs["rate_factor"] == 1)].fillna(
        {"variant": ""}
    )
    seeds = usual.groupby(["budget", "method", "variant", "size"])["seed"].nunique().groupby("budget")
    assert {budget for name, budget in TABLE if name == study} == {entry["budget"] for entry in fits["budgets"]}
    for budget in seeds.groups:
        row, least, most = TABLE[study, budget], seeds.min()[budget], seeds.max()[budget]
        of_peer = [m for m in fits["multipliers"] if (m["method"], m["budget"]) == ("peer", budget)]
        multipliers = [f"{m['multiplier']:.2f} [{m['low']:.2f}, {m['high']:.2f}]" for m in of_peer]
        expected = {column: difference(fits, budget, rival) for rival, column in RIVALS.items()} | {
            "FLOPs": f"{budget:g}".replace("e+", "e"),
            "multiplier [95 %]": ", ".join(multipliers) or NONE,
            "seeds": f"{least}" if least == most else f"{least} to {most}",
            "study": f"[{study}](results/{study}/table.md)",
        }
        assert {column: row[column] for column in expected} == expected
