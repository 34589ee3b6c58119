"""Write the standing table, results/standing/{table.md,table.csv,standing.png}, from the records of all entrants there.

.venv/bin/python analysis/standing.py [--results results/standing_code]
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from peerscale.errors import ArgumentParser, UserError, exit_code
from peerscale.figures import style
from peerscale.figures.standing import standing_figure, standing_table
from peerscale.files import write_text
from peerscale.records.entry import STANDING, read_entries
from peerscale.stats.standing import standing_rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(prog=".venv/bin/python analysis/standing.py", description=__doc__)
    parser.add_argument("--results", type=Path, default=STANDING, metavar="DIR", help="folders of entrants")
    folder = parser.parse_args(argv).results
    entries = read_entries(folder)
    if not entries:
        raise UserError(f"no entrants in {folder}; first: make place LAYER=NAME")
    try:
        rows = standing_rows(entries)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    reference = next(entry.name for entry in entries if entry.about["entrant"]["reference"])
    text = standing_table(rows, reference)
    write_text(folder / "table.csv", rows.to_csv(index=False))
    write_text(folder / "table.md", text)
    style.save(standing_figure(rows), folder / "standing")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
