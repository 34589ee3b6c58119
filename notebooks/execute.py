"""Run a notebook in a fresh kernel and keep its outputs, to be committed.

    .venv/bin/python notebooks/execute.py [NAME.ipynb]

A digest of the code that was run is kept too, so that a test can tell outputs of other code.
"""

import hashlib
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from peerscale.errors import ArgumentParser, UserError, exit_code
from peerscale.files import ROOT, write_text


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(
        prog=".venv/bin/python notebooks/execute.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    explore = ROOT / "notebooks" / "explore.ipynb"
    parser.add_argument("notebook", type=Path, nargs="?", default=explore, help="default: notebooks/explore.ipynb")
    path = parser.parse_args(argv).notebook
    if not path.is_file():
        raise UserError(f"no notebook {path}")
    try:
        notebook = nbformat.read(path, as_version=4)
    except (ValueError, AttributeError) as error:  # nbformat's NotJSONError is a ValueError
        raise UserError(f"{path} is not a notebook ({type(error).__name__})") from None
    metadata = dict(notebook.metadata)
    options = {"resources": {"metadata": {"path": str(path.parent)}}, "timeout": 600, "record_timing": False}
    quiet = ["--IPKernelApp.log_level=40"]  # not its warning of a local port
    try:
        NotebookClient(notebook, kernel_name="python3", extra_arguments=quiet, **options).execute()
    except CellExecutionError as error:
        raise UserError(f"{path} fails and is left as it was: {error.ename}: {error.evalue}") from None
    notebook.metadata = nbformat.from_dict({**metadata, "executed": digest(notebook)})  # not this machine's Python
    write_text(path, nbformat.writes(notebook) + "\n")
    print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")
    return 0


def digest(notebook: nbformat.NotebookNode) -> str:
    """Of the code cells."""
    code = "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    return hashlib.sha256(code.encode()).hexdigest()


if __name__ == "__main__":
    sys.exit(exit_code(main))
