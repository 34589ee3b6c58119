"""The W&B workspace of a study, and a report with its figures, tables and how to read them.

    .venv/bin/python analysis/dashboard.py SWEEP [--save]

Writes the workspace to runs/SWEEP/study/workspace.json, which needs no server. With --save it also puts both on the W&B
server; a second call updates them there. They show what `make sync` has uploaded. Needs the package
wandb-workspaces: .venv/bin/python -m pip install --editable '.[report]'
"""

import sys
from collections.abc import Sequence

from peerscale.errors import FailedCells, UserError, exit_code
from peerscale.files import write_text
from peerscale.runs.study import collected, study_parser
from peerscale.training import views
from peerscale.training.tracking import WandbError, client_errors


def main(argv: Sequence[str] | None = None) -> int:
    parser = study_parser("dashboard", __doc__)
    parser.add_argument("--save", action="store_true", help="put workspace and report on the W&B server")
    given = parser.parse_args(argv)
    study = collected(given.sweep, given.runs)
    if not study.runs.is_file():
        raise UserError(f"{study.runs} is not there; first: make figures SWEEP={given.sweep}")
    tracking = views.tracking_of(given.runs / given.sweep)
    path = study.folder / "workspace.json"
    write_text(path, views.workspace_json(study.sweep, tracking))
    print(path)
    if not given.save:
        steps = f".venv/bin/wandb login, make sync SWEEP={study.sweep}, then add --save"
        print(f"not on the server; to put it and a report there: {steps}")
        return 0
    try:
        with client_errors():
            for name, url in views.save(study, tracking).items():
                print(f"{name}: {url}")
    except WandbError as error:
        raise FailedCells(f"W&B server: {error}; {path} is written, but workspace and report are not saved") from None
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
