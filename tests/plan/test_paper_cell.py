"""The smallest PEER cell of the paper's study goes its whole way on a CPU: text in files as docs/cluster.md saves
it, its vocabulary, bf16, row-sparse AdamW, evaluation sets. Ten steps of two sequences, in two micro-batches.

As it stands here it has 2 of its 10 blocks, 128^2 experts and a context of 64. With its blocks, 256^2 experts and its
context of 2,048 it takes 330 CPU seconds and 5.1 GiB:

    PAPER_CELL=whole .venv/bin/python -m pytest -s tests/plan/test_paper_cell.py
"""

import math
import os
import random
import re
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest

from peerscale.data.prepare import prepare
from peerscale.files import ROOT
from peerscale.plan.cells import Cell, planned_cells
from peerscale.plan.plan import plan
from peerscale.records.curves import read_metrics
from peerscale.records.record import Status, read_record
from peerscale.train.cell import train_cell

WHOLE = os.environ.get("PAPER_CELL") == "whole"
STEPS = 10


def page_stream() -> Iterator[str]:
    """Pages of 160 words: every other one of a few frequent words, the rest of a lexicon that holds each twice."""
    rng = random.Random(0)
    lexicon = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=8)) for _ in range(16_000)]
    while True:
        rare = iter(rng.sample(lexicon * 2, 2 * len(lexicon)))
        while part := list(islice(rare, 80)):
            yield " ".join(word for word in part for word in (lexicon[int(rng.paretovariate(1)) % 200], word))


class Rows(list):
    """What stands for a streamed data set."""

    def take(self, n: int) -> "Rows":
        assert n == 50_000_000
        return self


def save_texts() -> None:
    """Run the lines of docs/cluster.md in the current folder; `datasets` is a stand-in that has few pages."""
    pages = page_stream()
    n_pages = {"allenai/c4 en train": 400, "allenai/c4 en validation": 200}
    n_pages |= {"EleutherAI/lambada_openai default test": 50, "Salesforce/wikitext wikitext-103-raw-v1 test": 50}

    def load_dataset(name: str, subset: str, *, split: str, streaming: bool) -> Rows:
        assert streaming
        return Rows({"text": page} for page in islice(pages, n_pages[f"{name} {subset} {split}"]))

    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/cluster.md").read_text(encoding="utf-8"), re.DOTALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
        exec(code, {})


def smallest_cell(folder: Path) -> Cell:
    """The study's own cell, in a smaller batch, with its corpus prepared in `folder`."""
    cells = planned_cells("isoflop_paper", ["sweep.methods=[peer]", "tracking=disabled"])
    cell = min(cells, key=lambda cell: cell.plan.cost.flops_per_token)
    config = cell.config
    assert (config.size_name, config.context, config.data.vocab_size) == ("d640-l10-h10", 2048, 32_768)
    assert (config.precision, config.optim.name, config.replaced) == ("bf16", "adamw", "middle")
    if not WHOLE:
        config = replace(config, context=64, n_layers=2)
    tokens = 2 * config.context
    config = replace(
        config,
        batch_sequences=2,
        routing_group_sequences=1,  # which two micro-batches need
        ffn=replace(config.ffn, n_experts=(256 if WHOLE else 128) ** 2),
        optim=replace(config.optim, name="row_sparse_adamw", lr_rule="constant", lr=4e-3),  # the law knows longer runs
        data=replace(
            config.data,
            directory=str(folder / "data"),
            evaluation={"c4": 2 * tokens, "lambada": 2 * tokens, "wikitext": tokens},
        ),
        trainer=replace(
            config.trainer,
            accelerator="cpu",
            devices=1,
            micro_batches=2,
            keep_checkpoint=False,
            log_every_steps=1,
            runs_directory=str(folder / "runs"),
        ),
        min_steps=1,
    )
    config = replace(config, budget=STEPS * tokens * plan(config).cost.flops_per_token)
    return replace(cell, config=config, plan=plan(config, set_tokens=prepare(config.data).manifest.splits))


@pytest.mark.filterwarnings("ignore")
def test_the_smallest_cell_of_the_papers_study_trains_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the study's paths are relative to it
    save_texts()
    started = time.process_time()
    cell = smallest_cell(tmp_path)
    prepared = time.process_time()
    assert train_cell(cell) is Status.DONE
    record, losses = read_record(cell.folder), [row["loss"] for row in read_metrics(cell.folder)]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    seconds = prepared - started, time.process_time() - prepared
    print(
        f"\n{cell.plan.cost.params_total:,} parameters, preparation {seconds[0]:.0f} CPU seconds, training and "
        f"evaluation {seconds[1]:.0f}, at most {memory:.1f} GiB; losses {' '.join(f'{loss:.3f}' for loss in losses)}; "
        + ", ".join(f"{name} {values['loss']:.3f}" for name, values in (record.evaluation if record else {}).items())
    )
    assert record is not None and {*record.evaluation} == {"c4", "lambada", "wikitext"}
    assert len(losses) == STEPS and all(map(math.isfinite, losses))
    # Untrained logits have variance one, which adds one half to the loss of a guess.
    assert losses[0] == pytest.approx(math.log(32_768) + 0.5, abs=0.5) and losses[-1] < losses[0] - 0.5
    assert all(math.isfinite(values["loss"]) for values in record.evaluation.values())
