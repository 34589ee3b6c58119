"""Copy a study's tables, fits and figures from runs/SWEEP/study to results/SWEEP, to be committed.

    python analysis/publish.py SWEEP

Sequence losses are rounded to four decimals and tracebacks left out; everything else is copied as it is. Other files
that lie in results/SWEEP stay.
"""

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace

from peerscale.errors import UserError, exit_code
from peerscale.files import replacing
from peerscale.runs.record import Record
from peerscale.runs.study import Study, collected, published, study_parser
from peerscale.runs.table import read_records


def main(argv: Sequence[str] | None = None) -> int:
    arguments = study_parser(__doc__).parse_args(argv)
    source = collected(arguments.sweep, arguments.runs)
    target = published(arguments.sweep, arguments.results)
    made_by = {source.runs: "collect", source.table: "table", source.figures: "figures"}
    for path, script in made_by.items():
        if not path.exists():
            raise UserError(f"{path} is not there; first: python analysis/{script}.py {arguments.sweep}")
    records = read_records(source.folder)
    with replacing(target.folder) as folder:
        if target.folder.is_dir():
            shutil.copytree(target.folder, folder, ignore=shutil.ignore_patterns(target.figures.name))
        copy(source, Study(sweep=source.sweep, folder=folder), records)
    for warning in doubts(records):
        print(f"warning: {warning}", file=sys.stderr)
    print(f"{len(records)} cells -> {target.folder}")
    return 0


def copy(source: Study, target: Study, records: Sequence[Record]) -> None:
    """Write the published form of a study into `target`'s folder."""
    target.folder.mkdir(exist_ok=True)
    for kept in (source.runs, source.curves, source.fits, source.table):
        if kept.is_file():
            shutil.copyfile(kept, target.folder / kept.name)
    shutil.copytree(source.figures, target.figures, copy_function=shutil.copyfile)
    with target.records.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(public(record))) + "\n" for record in records)


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
