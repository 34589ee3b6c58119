"""The configuration of a run as frozen dataclasses, and `load`, which makes it from YAML files and overrides.

Parsing is strict: an unknown key, a wrong type or a size that cannot be built raises a `ConfigError` of one line. This
module does not import torch.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter
from pydantic.dataclasses import dataclass

from peerscale.config.compose import composed
from peerscale.config.errors import parse
from peerscale.layers.base import FfnConfig, Surroundings
from peerscale.layers.registry import Layer, parse_layer
from peerscale.types import STRICT, FileName, Fraction, Integer, Number, Positive, Rate, Seed, Size, Whole

NOT_HASHED = (
    "trainer", "tracking", "min_steps",
    "data.directory", "data.name", "data.path", "data.evaluation_files", "data.train_tokens", "data.max_epochs",
)  # fmt: skip
"""Keys that decide how and where a cell runs and what is kept, but not its result."""

CORPUS_SETS = ("train", "validation", "tuning", "speeches", "wikipedia")
"""Sets that a corpus may have of its own; only `gutenberg` has the last two. Other names are free for the user's."""


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class DataConfig:
    """A corpus, its tokenizer and its held-out sets. Places of text are files, or folders of them (`data.text`)."""

    source: Literal["gutenberg", "code", "text"]
    name: FileName | None = None
    """Name of the corpus in cell names and in the table of runs; null: see `corpus_name`."""
    vocab_size: Annotated[Integer, Field(ge=257, le=65536)] = 2048
    train_tokens: Positive | None = None
    """Training tokens of the corpus, given so that planning does not need it; null: known once it is prepared."""
    max_epochs: Rate = 1.0
    """A cell that needs more passes over the corpus is dropped."""
    val_set: str = "validation"
    """The held-out set whose loss is `val_loss`; learning rates are tuned on `tuning`."""
    evaluation: dict[str, Whole] = Field(default_factory=lambda: {"validation": 131072})
    """Tokens of each held-out set to evaluate on, the same for every cell; 0 leaves a set out. If a set is smaller, all
    its whole batches are used; a set that the corpus does not have is skipped."""
    evaluation_files: dict[FileName, str] = Field(default_factory=dict)
    """Further held-out sets: name -> place of its text. They are prepared with the corpus, with its tokenizer."""
    path: str | None = None
    """`text`: the place of the text, of which spans are set aside as `validation` and `tuning`."""
    directory: Annotated[str, Field(min_length=1)] = "data"
    """Where prepared tokens are kept, relative to the checkout."""

    def __post_init__(self) -> None:
        if taken := [name for name in self.evaluation_files if name in CORPUS_SETS]:
            raise ValueError(f"evaluation_files names {taken[0]!r}, which is a set of the corpus itself")
        if not self.evaluation.get(self.val_set):
            raise ValueError(f"val_set {self.val_set!r} has no tokens in evaluation")
        if self.source == "text" and not self.path:
            raise ValueError("source text needs data.path=FILE_OR_FOLDER (.txt, .jsonl, .parquet)")

    @property
    def corpus_name(self) -> str:
        """`name`; if that is null, the name of the user's file or folder without its ending, or else the `source`."""
        if self.name or self.source != "text" or not self.path:
            return self.name or self.source
        stem = re.sub(r"(\.(txt|jsonl|parquet|gz))+$", "", Path(self.path).expanduser().absolute().name)
        return re.sub(r"[^\w.-]+", "_", stem, flags=re.ASCII).strip("_.-") or self.source


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class RateLawConfig:
    """How the best learning rate depends on width, tokens and batch, as fitted by `analysis/fit.py rates`.

    lr x (d_model / reference)^-width_exponent x (tokens / reference)^-tokens_exponent
    x (batch_sequences / reference)^batch_exponent
    """

    reference_d_model: Rate
    reference_tokens: Rate
    reference_batch_sequences: Rate
    """The reference point, at which the best rate is `optim.lr`."""
    width_exponent: Number
    tokens_exponent: Number
    batch_exponent: Number
    fitted_d_model: tuple[Rate, Rate]
    """Smallest and largest value in the runs that the law was fitted to; the plan lists cells outside this range."""
    fitted_tokens: tuple[Rate, Rate]
    fitted_batch_sequences: tuple[Rate, Rate]
    fewest_steps: Positive | None = None
    """The same for steps: few tokens and a large batch can each be in range and give a run too short for the law."""
    largest_lr: Rate | None = None
    """Upper bound on the rate of every cell, before `lr_factor`: the largest rate that the runs tried; null: none."""


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class TableLawConfig:
    """How the best learning rate of expert tables falls with the length of the run, as fitted in results/table_rates.

    table_lr x (tokens / reference)^-tokens_exponent for runs that are longer than the reference. Beyond the runs that
    it was fitted to it stays as it is for the longest of them.
    """

    reference_tokens: Rate
    """Up to which the best rate is `optim.table_lr`."""
    tokens_exponent: Number
    fitted_tokens: tuple[Rate, Rate]
    """Smallest and largest value in the runs that the law was fitted to."""


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class OptimConfig:
    """AdamW, with a linear warm-up and a cosine decay."""

    name: Literal["adamw", "row_sparse_adamw"] = "adamw"
    """`row_sparse_adamw` updates only the table rows that were retrieved, so its cost does not grow with the number of
    experts."""
    lr: Rate
    """Peak rate, which `lr_rule` scales: that at d_model 32, or at the reference point of `lr_law`."""
    table_lr: Rate | None = None
    """Peak rate of expert tables and PKM values, which `table_lr_law` scales; null: that of all other parameters."""
    table_lr_law: TableLawConfig | None = None
    """null: `table_lr` is the same for all runs."""
    lr_rule: Literal["constant", "inverse_sqrt_width", "law"] = "inverse_sqrt_width"
    """`inverse_sqrt_width`: lr x sqrt(32 / d_model); `law`: as `lr_law` says."""
    lr_law: RateLawConfig | None = None
    lr_factor: Rate = 1.0
    """Multiplies the main peak rate, never that of the tables; the axis of a study that brackets its rates."""
    warmup_fraction: Annotated[Number, Field(ge=0, lt=1)] = 0.1
    final_lr_fraction: Fraction = 0.1
    weight_decay: Annotated[Number, Field(ge=0)] = 0.1
    beta1: Annotated[Number, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[Number, Field(ge=0, lt=1)] = 0.95
    eps: Rate = 1e-8
    table_eps: Rate | None = None
    """For expert tables with a `table_lr`; null: `Config.table_eps` decides."""
    grad_clip: Rate = 1.0
    """Bound on the global gradient norm of all parameters except the expert tables."""

    def __post_init__(self) -> None:
        if self.lr_rule == "law" and self.lr_law is None:
            raise ValueError("lr_rule law needs optim.lr_law, the law that analysis/fit.py rates fits")


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class TrainerConfig:
    """How and where a cell runs; nothing here changes its result, except through the order of floating-point sums."""

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: Positive = 1
    """GPUs of one cell, or processes on a machine without GPUs. They share each batch, so their number must divide
    `batch_sequences`. `row_sparse_adamw` trains on one."""
    micro_batches: Positive | None = None
    """Parts of a device's batch that are computed one after the other to save memory; their gradients are summed. Null:
    the plan chooses the smallest number that fits `device_memory_gb`."""
    activation_checkpointing: bool | None = None
    """Keep only the inputs of attention and dense layers and recompute the rest in the backward pass: less memory for a
    third more time. The layer under study is not recomputed; the FLOPs of the budget do not change. Null: where a cell
    does not fit `device_memory_gb` otherwise."""
    device_memory_gb: Rate | None = None
    """Memory of one GPU; a cell that trains on GPUs must fit into it (`device_memory`). Null: no limit."""
    device_flops_per_s: Rate = 9.89e14
    """Peak of one GPU (default: an H100 in bf16). Times that no record gives are estimated from it and
    `device_utilisation`."""
    device_utilisation: Annotated[Number, Field(gt=0, le=1)] | None = None
    """Share of the peak that training is assumed to reach; null: that of the layer (`FfnConfig.SHARES_OF_PEAK`)."""
    threads: Size = 1
    """CPU threads of each process of a cell; parallel sweeps run fastest with one."""
    kernel: Literal["auto", "cpp", "triton", "torch", "reference"] = "auto"
    """Which implementation of the operators (`ops.backends`)."""
    compile: bool | None = None
    """torch.compile for attention, norms and dense layers: takes up to a minute at the start, so that a CPU needs long
    cells. Null: on GPUs only."""
    tf32: bool = False
    """On GPUs, products of fp32 numbers round them to 10 bits, which is several times as fast: scores of product keys,
    queries and routers, and with precision fp32 everything. Hashed where it is so."""
    checkpoint_every_s: Rate = 60.0
    """Seconds between two checkpoints."""
    checkpoint_every_steps: Positive | None = None
    """Save a checkpoint every so many steps instead; null: time decides."""
    log_every_steps: Positive = 20
    validations: Whole = 10
    """How often a run on one device logs `val_loss`, on a small part of `data.val_set`; it changes no other number."""
    keep_checkpoint: bool = False
    """Keep the checkpoint after the last step of a finished cell, for `peerscale.api.load_model`."""
    runs_directory: Annotated[str, Field(min_length=1)] = "runs"
    """Where cells are kept, relative to the checkout."""

    def __post_init__(self) -> None:
        for key in ("device_memory_gb", "tf32"):
            if getattr(self, key) and self.accelerator == "auto":
                raise ValueError(f"{key} needs accelerator=gpu, since the plan cannot know what auto will find")

    def compiles_on(self, device: str) -> bool:
        """Whether the backbone is compiled on this type of device, as torch calls it."""
        return device == "cuda" if self.compile is None else self.compile


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class TrackingConfig:
    """Weights & Biases."""

    mode: Literal["offline", "online", "disabled"] = "offline"
    project: str = "peerscale"
    entity: str | None = None
    tags: list[str] = Field(default_factory=list)
    id_salt: str = ""
    """Changes the W&B run ids, for a project in which runs with the usual ids were deleted."""


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class Config:
    """One cell: a model, its data and recipe, and the training compute that it may use."""

    d_model: Annotated[Positive, Field(multiple_of=2)]
    """Width, even since attention heads need pairs."""
    head_dim: Annotated[Positive, Field(multiple_of=2)] | None = None
    """Width of an attention head, even since rotary embedding needs pairs; null: see `usual_head_dim`."""
    n_layers: Size = 4
    """Number of blocks."""
    ffn: Layer
    """The layer under study."""
    data: DataConfig
    optim: OptimConfig
    trainer: TrainerConfig
    tracking: TrackingConfig
    budget: Rate
    """Training FLOPs, by the convention of `plan.cost`."""
    seed: Seed = 0
    replaced: Literal["middle", "all"] | Annotated[list[Positive], Field(min_length=1)] = "middle"
    """Blocks whose feed-forward layer is `ffn`, counted from 1; `middle` is block n_layers // 2 (paper: 6 of 12)."""
    dense: Literal["dense", "relu_squared", "swiglu"] = "dense"
    """The feed-forward layer of the other blocks, by its `method`."""
    batch_sequences: Size = 16
    context: Annotated[Size, Field(ge=2)] = 64
    """Tokens per sequence."""
    routing_group_sequences: Positive | None = None
    """Sequences in a routing group: expert choice selects tokens within a group, and the BatchNorm of queries takes its
    statistics over a group. Null: the whole batch, on all devices."""
    precision: Literal["fp32", "bf16"] = "fp32"
    min_steps: Positive = 200
    """A cell with fewer optimiser steps is dropped."""

    def __post_init__(self) -> None:
        if self.head_dim and self.d_model % self.head_dim:
            raise ValueError(f"head_dim {self.head_dim} does not divide d_model {self.d_model}")
        if isinstance(self.replaced, list) and max(self.replaced) > self.n_layers:
            raise ValueError(f"replaced {self.replaced} names a block outside 1..{self.n_layers}")

    @property
    def n_heads(self) -> int:
        """Number of attention heads."""
        return self.d_model // (self.head_dim or usual_head_dim(self.d_model))

    @property
    def d_ff(self) -> int:
        """Hidden width of the dense feed-forward layer: 4 d_model (paper, section 3.1)."""
        return 4 * self.d_model

    @property
    def size_name(self) -> str:
        """`d32`; a depth other than 4 and an unusual number of heads are appended: `d32-l6-h8`."""
        depth = "" if self.n_layers == 4 else f"-l{self.n_layers}"
        heads = "" if self.head_dim in (None, usual_head_dim(self.d_model)) else f"-h{self.n_heads}"
        return f"d{self.d_model}{depth}{heads}"

    @property
    def replaced_blocks(self) -> tuple[int, ...]:
        """The replaced blocks, counted from 1."""
        match self.replaced:
            case "middle":
                return (max(1, self.n_layers // 2),)
            case "all":
                return tuple(range(1, self.n_layers + 1))
            case blocks:
                return tuple(sorted(set(blocks)))

    @property
    def dense_layer(self) -> FfnConfig:
        """The feed-forward layer of the blocks that are not replaced."""
        return parse_layer({"method": self.dense})

    @property
    def n_dense(self) -> int:
        """Number of blocks that have the `dense_layer`: all but those in which `ffn` is in its place."""
        return self.n_layers - len(self.replaced_blocks) * (self.ffn.place == "feed_forward")

    @property
    def table_eps(self) -> float:
        """AdamW's eps for expert tables: with a million experts the gradients of a row are so small that 1e-8 would
        shorten its steps. Runs on CPUs keep that of all other parameters, as the committed ones had."""
        optim = self.optim
        if optim.table_lr is None:
            return optim.eps
        return optim.table_eps or (1e-15 if self.trainer.accelerator == "gpu" else optim.eps)

    @property
    def surroundings(self) -> Surroundings:
        """What the layer under study may know about the rest of the model."""
        return Surroundings(
            d_model=self.d_model,
            d_ff=self.d_ff,
            group_sequences=self.routing_group_sequences or self.batch_sequences,
            n_groups=self.n_routing_groups,
            micro_batches=self.trainer.micro_batches or 1,
        )

    @property
    def tokens_per_step(self) -> int:
        return self.batch_sequences * self.context

    @property
    def n_routing_groups(self) -> int:
        """Number of consecutive parts of a batch, each with its own statistics."""
        return self.batch_sequences // (self.routing_group_sequences or self.batch_sequences)


def usual_head_dim(d_model: int) -> int:
    """The largest even divisor of `d_model` up to 16; 12 for d_model 48, with which the first studies ran."""
    return 12 if d_model == 48 else max(width for width in range(2, 17, 2) if d_model % width == 0)


_CONFIG: TypeAdapter[Config] = TypeAdapter(Config)


def parse_config(tree: Mapping[str, Any], where: str = "") -> Config:
    """Make a `Config` from a nested mapping, composed by Hydra or read from `config.yaml`.

    Raises:
        ConfigError: for the first mistake; `where` stands before the key.
    """
    return parse(_CONFIG, tree, where)


def to_dict(config: Config) -> dict[str, Any]:
    """Plain values, as written to `config.yaml`; the inverse of `parse_config`."""
    return _CONFIG.dump_python(config, mode="json")


def load(overrides: Sequence[str] = ()) -> Config:
    """Compose `conf/` with Hydra-style overrides such as `["ffn=peer", "d_model=64"]`, as the command line does.

    Raises:
        ConfigError: an unknown key or value, or a model that cannot be built.
    """
    return parse_config(composed(overrides).tree)
