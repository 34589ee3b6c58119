"""The settings of what is trained here: the corpus in data/, or in a rehearsal a small made-up text."""

from pathlib import Path

from broken_runs import write_text
from gpu.machine import Machine

from peerscale.config.schema import load
from peerscale.data.prepare import prepare


def settings(machine: Machine, folder: Path) -> list[str]:
    """Overrides of the cells that are trained: their text, where they are kept, and on what they run."""
    words = [f"trainer.runs_directory={folder / 'runs'}"]
    if not machine.rehearse:
        return [*words, f"trainer.kernel={machine.kernel}", "trainer.accelerator=gpu"]
    words += ["trainer.kernel=torch", "trainer.accelerator=cpu"]  # Triton's interpreter would take minutes
    text = folder / "rehearsal.txt"
    if not text.is_file():
        write_text(text)
    return [*words, "data=text", f"data.path={text}", f"data.directory={folder / 'data'}", "data.vocab_size=300"]


def prepared(machine: Machine, folder: Path) -> list[str]:
    """The same, once the corpus is there; raises `UserError` if it is not, and cannot be made without a network."""
    words = settings(machine, folder)
    prepare(load([*words, "budget=1e12"]).data)
    return words
