"""Copy a study's tables, fits and figures from runs/SWEEP/study to results/SWEEP, to be committed.

    python analysis/publish.py SWEEP [--replace]

Sequence losses are rounded to four decimals and tracebacks left out; everything else is copied as it is. Other files
that lie in results/SWEEP stay. A finished cell that is published already is neither removed nor replaced by one of
another configuration without --replace.
"""

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Self

import pandas as pd

from peerscale.errors import UserError, exit_code
from peerscale.files import replacing
from peerscale.outcomes import some
from peerscale.runs.record import Record, Status, differing_keys
from peerscale.runs.study import Study, collected, published, study_parser
from peerscale.runs.table import read_records, read_runs


def main(argv: Sequence[str] | None = None) -> int:
    parser = study_parser(__doc__)
    parser.add_argument("--replace", action="store_true", help="remove or replace finished cells published before")
    arguments = parser.parse_args(argv)
    source = collected(arguments.sweep, arguments.runs)
    target = published(arguments.sweep, arguments.results)
    for path in (source.runs, source.table, source.figures):
        if not path.exists():
            raise UserError(f"{path} is not there; first: make figures SWEEP={arguments.sweep}")
    records = [public(record) for record in read_records(source.folder)]
    change = Change.between(finished(target), {r.cell: r for r in records if r.status is Status.DONE})
    if change.loses and not arguments.replace:
        raise UserError(change.refusal(source, target))
    with replacing(target.folder) as folder:
        if target.folder.is_dir():
            shutil.copytree(target.folder, folder, ignore=shutil.ignore_patterns(target.figures.name))
        copy(source, Study(sweep=source.sweep, folder=folder), records)
    for warning in doubts(records):
        print(f"warning: {warning}", file=sys.stderr)
    counts = f"{len(change.added)} added, {len(change.replaced)} replaced, {len(change.kept)} kept"
    print(f"finished cells: {counts}, {len(change.removed)} removed -> {target.folder}")
    return 0


def finished(study: Study) -> dict[str, Record | None]:
    """The finished cells of a published study by name; None for each if it was published without its records."""
    if study.records.is_file():
        return {record.cell: record for record in read_records(study.folder) if record.status is Status.DONE}
    runs = read_runs(study.runs) if study.runs.is_file() else pd.DataFrame(columns=["cell", "status"])
    return dict.fromkeys(runs.loc[runs["status"] == str(Status.DONE), "cell"])


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """What becomes of the finished cells of a published study, each by its name."""

    added: list[str]
    kept: list[str]
    replaced: dict[str, str]
    """And how the new configuration differs; empty if it is the same cell trained again."""
    removed: list[str]

    @classmethod
    def between(cls, old: Mapping[str, Record | None], new: Mapping[str, Record]) -> Self:
        both = [cell for cell in old if cell in new]
        return cls(
            added=[cell for cell in new if cell not in old],
            kept=[cell for cell in both if old[cell] == new[cell]],
            replaced={cell: _differences(old[cell], new[cell]) for cell in both if old[cell] != new[cell]},
            removed=[cell for cell in old if cell not in new],
        )

    @property
    def others(self) -> dict[str, str]:
        """The cells that are replaced by one of another configuration, and how that differs."""
        return {cell: found for cell, found in self.replaced.items() if found}

    @property
    def loses(self) -> bool:
        return bool(self.removed or self.others)

    def refusal(self, source: Study, target: Study) -> str:
        """One line: what would be lost, and what to type."""
        losses, remedies = [], []
        if self.removed:
            losses.append(f"remove {len(self.removed)} finished cells ({some(self.removed)})")
            remedies.append(f"to keep them: make figures SWEEP={source.sweep} PUBLISHED=1")
        if self.others:
            named = some([f"{cell}: {found}" for cell, found in self.others.items()])
            losses.append(f"replace {len(self.others)} by cells of another configuration ({named})")
        remedies.append(f"to do it all the same: make publish SWEEP={source.sweep} REPLACE=1")
        return f"this would {' and '.join(losses)} in {target.folder}; {'; '.join(remedies)}"


def _differences(old: Record | None, new: Record) -> str:
    if old is None:
        return "published without its record, so not known to be the same"
    same = old.fingerprint == new.fingerprint
    return "" if same else ", ".join(differing_keys(old.hashed_config, new.hashed_config)) or "fingerprint only"


def copy(source: Study, target: Study, records: Sequence[Record]) -> None:
    """Write the published form of a study into `target`'s folder."""
    target.folder.mkdir(exist_ok=True)
    for kept in (source.runs, source.curves, source.fits, source.table):
        if kept.is_file():
            shutil.copyfile(kept, target.folder / kept.name)
    shutil.copytree(source.figures, target.figures, copy_function=shutil.copyfile)
    with target.records.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(record)) + "\n" for record in records)


def public(record: Record) -> Record:
    """The record as published: a traceback names a machine's folders, and a fifth decimal of a loss is noise."""
    return replace(record, sequence_losses=[round(loss, 4) for loss in record.sequence_losses], traceback="")


def doubts(records: Sequence[Record]) -> list[str]:
    """What a reader of the published study could not reproduce."""
    commits = {str(record.environment.get("git_commit") or "") for record in records if record.environment}
    found = []
    if dirty := sorted(commit for commit in commits if "dirty" in commit):
        found.append(f"some cells ran uncommitted code ({', '.join(dirty)}): others cannot check it out")
    if "" in commits:
        found.append("some cells do not say which commit they ran")
    if len(commits) > 1:
        found.append(f"the cells ran {len(commits)} different commits")
    return found


if __name__ == "__main__":
    sys.exit(exit_code(main))
