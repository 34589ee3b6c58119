"""The whole run as frozen dataclasses, and `load`, the one way from YAML files and overrides to them.

Strict: an unknown key, a wrong type or a size that cannot be built is a `ConfigError` of one line. No torch here.
"""

import re
from collections.abc import Mapping, Sequence
from math import isqrt
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, TypeAdapter
from pydantic.dataclasses import dataclass

from peerscale.composition import compose
from peerscale.composition import sweep_file as sweep_file
from peerscale.config_errors import ConfigError as ConfigError
from peerscale.config_types import STRICT, Fraction, Positive, Rate, Seed, parse
from peerscale.sweep_config import load_sweep as load_sweep
from peerscale.sweep_config import of_sweep


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class SizeConfig:
    """The backbone, the same for every method."""

    d_model: Positive
    n_layers: Positive = 4
    n_heads: Positive = 2

    def __post_init__(self) -> None:
        if self.d_model % (2 * self.n_heads):
            legal = 2 * self.n_heads * max(1, round(self.d_model / (2 * self.n_heads)))
            raise ValueError(
                f"{self.n_heads} heads do not divide d_model {self.d_model} into an even width (rotary positions turn "
                f"pairs); nearest d_model: {legal}"
            )

    @property
    def d_ff(self) -> int:
        """Hidden width of the dense feed-forward layer: 4 d_model (paper, section 3.1)."""
        return 4 * self.d_model

    @property
    def name(self) -> str:
        """`d32`; a depth other than 4 and a number of heads other than the usual one show: `d32-l6-h8`."""
        depth = "" if self.n_layers == 4 else f"-l{self.n_layers}"
        heads = "" if self.n_heads == self._usual_heads else f"-h{self.n_heads}"
        return f"d{self.d_model}{depth}{heads}"

    @property
    def _usual_heads(self) -> int:
        """As in conf/size: the fewest heads that are at most 16 wide, but 4 of d48."""
        if self.d_model == 48:
            return 4
        return next(n for n in range(1, self.d_model) if self.d_model % (2 * n) == 0 and self.d_model // n <= 16)


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class FfnConfig:
    """What every feed-forward layer has: `method` names its class, `variant` a form of it that is not the paper's."""

    method: str
    variant: str = ""

    @property
    def name(self) -> str:
        """The name of the layer's YAML file, and of its curve in a figure."""
        return f"{self.method}_{self.variant}" if self.variant else self.method


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class DenseConfig(FfnConfig):
    """d_model -> 4 d_model -> d_model."""

    method: Literal["dense"] = "dense"


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class MoeConfig(FfnConfig):
    """Coarse mixture of experts: every expert is a full dense feed-forward layer."""

    method: Literal["moe"] = "moe"
    routing: Literal["expert_choice", "token_choice"] = "expert_choice"
    n_experts: Positive = 16
    capacity_factor: Rate = 1.0
    """Expert choice: mean experts per token. Not stated in the paper; 1 keeps the active parameters of dense."""
    top_k: Positive = 1
    """Token choice: experts per token."""
    load_balance_weight: Annotated[float, Field(ge=0)] = 1e-2
    """Token choice: weight of the load-balance loss (Fedus et al. 2021)."""
    z_loss_weight: Annotated[float, Field(ge=0)] = 1e-3
    """Token choice: weight of mean(logsumexp^2) of the router scores (Zoph et al. 2022)."""

    def __post_init__(self) -> None:
        if self.top_k > self.n_experts:
            raise ValueError(f"top_k {self.top_k} is more than n_experts {self.n_experts}")


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class FineGrainedMoeConfig(FfnConfig):
    """Token-choice mixture of narrow experts and shared ones (DeepSeekMoE, Dai et al. 2024)."""

    method: Literal["fine_grained_moe"] = "fine_grained_moe"
    n_experts: Positive = 63
    """Routed experts; with one shared, 16 dense layers in all, as the coarse mixture and the paper's section 4.1.3."""
    n_shared: Positive = 1
    """Experts that every token uses."""
    top_k: Positive = 3
    """Routed experts per token. The paper takes 7; 3 and the shared one have the active parameters of dense."""
    granularity: Positive = 4
    """m: an expert has d_ff / m hidden units."""
    load_balance_weight: Annotated[float, Field(ge=0)] = 1e-2
    """alpha_1 of the expert-level balance loss (equation 12; 0.01 in section 4.1.3)."""

    def __post_init__(self) -> None:
        if self.top_k > self.n_experts:
            raise ValueError(f"top_k {self.top_k} is more than n_experts {self.n_experts}")

    def d_expert(self, d_ff: int) -> int:
        """Hidden width of one expert."""
        return d_ff // self.granularity


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class RetrievalConfig(FfnConfig):
    """What PKM and PEER share: queries and the product keys that they are compared with."""

    n_experts: Positive
    n_heads: Positive
    top_k: Positive
    d_key: Literal["half_d_model"] | Positive = "half_d_model"
    """Query and key width per head, both halves together. Not stated in the paper; the rule is d_model / 2, at least 8,
    as a fixed 128 would cost small models more than the layer that it routes to."""
    query_norm: bool = True
    """BatchNorm on the queries (paper, section 3.4)."""
    query_bias: bool = True
    """Not stated in the paper; on in the product-key memory code that it points to."""
    shared_keys: bool = True
    """One set of product keys for all heads (paper, section 2) or one for each (the code that it points to)."""

    def __post_init__(self) -> None:
        side = isqrt(self.n_experts)
        if side * side != self.n_experts:
            raise ValueError(
                f"n_experts {self.n_experts} is not a square (product keys); nearest: {side**2}, {(side + 1) ** 2}"
            )
        if self.top_k > side:
            raise ValueError(f"top_k {self.top_k} is more than the {side} sub-keys of a side; allowed: 1..{side}")
        if self.d_key != "half_d_model" and self.d_key % 2:
            raise ValueError(f"d_key {self.d_key} is odd, but a key has two equal halves")

    @property
    def n_keys(self) -> int:
        """Sub-keys per side: sqrt(n_experts) (paper, equation 4)."""
        return isqrt(self.n_experts)

    def resolved_d_key(self, d_model: int) -> int:
        """`d_key` for this model width; the rule rounds up to a multiple of 4 so that halves stay even."""
        return max(8, -(-d_model // 8) * 4) if self.d_key == "half_d_model" else self.d_key


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class PkmConfig(RetrievalConfig):
    """Product-key memory (Lample et al. 2019): retrieved values that do not depend on the input."""

    method: Literal["pkm"] = "pkm"


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class PeerConfig(RetrievalConfig):
    """Parameter-efficient expert retrieval (He 2024): retrieved experts of one neuron each."""

    method: Literal["peer"] = "peer"
    activation: Literal["gelu", "relu"] = "gelu"
    """Not stated in the paper ("e.g. ReLU or GELU")."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """Over the retrieved experts of each head (paper, equation 2 and algorithm 1)."""


Sparse = MoeConfig | FineGrainedMoeConfig | PkmConfig | PeerConfig
"""Layers of which a token uses a part."""


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class WideDenseConfig(FfnConfig):
    """A dense layer with all the parameters of a sparse one in use: the bound of Dai et al. (2024, section 4)."""

    method: Literal["wide_dense"] = "wide_dense"
    params_of: Annotated[Sparse, Field(discriminator="method")]
    """The sparse layer, with its settings."""


def _blocks(value: Any) -> Any:
    """Checked as one, since a union would report each of its members."""
    blocks = isinstance(value, list) and value and all(type(i) is int and i >= 1 for i in value)
    if value not in ("middle", "all") and not blocks:
        raise ValueError(f"middle, all or a list of blocks counted from 1, not {value!r}")
    return value


Ffn = Annotated[DenseConfig | WideDenseConfig | Sparse, Field(discriminator="method")]
"""The slot under study. A new layer is one dataclass more here, and one `case` in `build_ffn` and in `ffn_cost`."""


HELD_OUT_SETS = ("validation", "tuning", "speeches", "wikipedia")
"""Sets that are never trained on. Every corpus has the first two; only `gutenberg` has the others."""


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class DataConfig:
    """A corpus, its tokenizer and its held-out sets."""

    source: Literal["gutenberg", "text", "c4"]
    name: str | None = None
    """Stands for the corpus in the names of cells and in the table of runs; null: see `corpus_name`."""
    vocab_size: Annotated[int, Field(ge=257, le=65536)] = 2048
    train_tokens: Positive | None = None
    """Tokens to train on, written down so that planning needs no corpus; null: known once prepared."""
    max_epochs: Rate = 1.0
    """A cell that needs more passes over the corpus is dropped."""
    val_set: str = "validation"
    """The held-out set whose loss is `val_loss`; learning rates are tuned on `tuning`."""
    evaluation: dict[str, Annotated[int, Field(ge=0)]] = Field(default_factory=lambda: {"validation": 131072})
    """Tokens of each held-out set to evaluate on, the same for every cell; 0 leaves a set out. Of a smaller set all
    whole batches are used, and a set that the corpus lacks is skipped."""
    path: str | None = None
    """`text`: a .txt, .jsonl or .gz file, or a folder of them. `c4`: a folder of C4's shards in place of the hub."""
    max_documents: Positive | None = None
    """`c4`: documents to stream."""
    directory: str = "data"
    """Where prepared tokens are kept, relative to the checkout."""

    def __post_init__(self) -> None:
        if self.name is not None and not re.fullmatch(r"\w[\w.-]*", self.name, re.ASCII):
            raise ValueError(
                f"name {self.name!r} is no plain word (letters, digits, _ . -, and no . or - at its start)"
            )
        if strange := [name for name in self.evaluation if name not in HELD_OUT_SETS]:
            raise ValueError(f"evaluation names {strange[0]!r}; the held-out sets are {', '.join(HELD_OUT_SETS)}")
        if not self.evaluation.get(self.val_set):
            raise ValueError(
                f"val_set {self.val_set!r} has no tokens in evaluation, which names {list(self.evaluation)}"
            )
        if self.source == "text" and not self.path:
            raise ValueError("source text needs data.path=FILE_OR_FOLDER (.txt, .jsonl, .gz)")

    @property
    def corpus_name(self) -> str:
        """`name`; if that is null, the name of the user's file or folder without its ending, or else the `source`."""
        if self.name or self.source != "text" or not self.path:
            return self.name or self.source
        stem = re.sub(r"(\.(txt|jsonl|gz))+$", "", Path(self.path).expanduser().absolute().name)
        return re.sub(r"[^\w.-]+", "_", stem, flags=re.ASCII).strip("_.-") or self.source


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class OptimConfig:
    """AdamW and its schedule. Rates are those of d_model 32; `lr_rule` carries them to other widths."""

    name: Literal["adamw", "row_sparse_adamw"] = "adamw"
    """`row_sparse_adamw` updates only the table rows that were retrieved: no cost grows with the number of experts."""
    lr: Rate
    table_lr: Rate | None = None
    """Rate of the expert tables and PKM values; null: the layer has none."""
    lr_rule: Literal["constant", "inverse_sqrt_width"] = "inverse_sqrt_width"
    """`inverse_sqrt_width`: lr x sqrt(32 / d_model). Table rates do not scale."""
    schedule: Literal["cosine"] = "cosine"
    warmup_fraction: Fraction = 0.1
    final_lr_fraction: Fraction = 0.1
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    eps: Rate = 1e-8
    grad_clip: Rate = 1.0
    """Bound on the global gradient norm of all but the expert tables."""


RENAMED_KERNELS = {"fused": "cpp", "native": "torch"}
"""Names that older configurations and records have for a kernel."""


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class TrainerConfig:
    """How and where a cell runs; nothing here changes its result beyond floating-point order."""

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: Positive = 1
    """GPUs of one cell, or processes on a machine without; they share each batch, so must divide `batch_sequences`."""
    threads: Positive = 1
    """CPU threads of each process of a cell; parallel sweeps run fastest with one."""
    kernel: Annotated[
        Literal["auto", "cpp", "triton", "torch", "reference"],
        BeforeValidator(lambda name: RENAMED_KERNELS.get(name, name) if isinstance(name, str) else name),
    ] = "auto"
    """Which implementation of the operators (`kernels.backends`)."""
    compile: bool = False
    """torch.compile: takes 6 to 20 s at the start and saves 2 to 10 % of a step: for cells of 15 minutes or more."""
    checkpoint_every_s: Rate = 60.0
    """Seconds between two checkpoints; more where saving one takes over 2 % of them."""
    checkpoint_every_steps: Positive | None = None
    """Steps between two, besides; null: time alone decides."""
    log_every_steps: Positive = 20
    keep_checkpoint: bool = False
    """Keep the checkpoint after the last step of a finished cell, for `peerscale.model.load_model`."""
    runs_directory: str = "runs"
    """Where cells are kept, relative to the checkout."""


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class TrackingConfig:
    """Weights & Biases."""

    mode: Literal["offline", "online", "disabled"] = "offline"
    project: str = "peerscale"
    entity: str | None = None
    tags: list[str] = Field(default_factory=list)
    id_salt: str = ""
    """Changes the W&B run ids, for a project where runs of these ids were deleted."""


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class Config:
    """One cell: a model, its data and recipe, and the training compute that it may use."""

    size: SizeConfig
    ffn: Ffn
    data: DataConfig
    optim: OptimConfig
    trainer: TrainerConfig
    tracking: TrackingConfig
    budget: Rate
    """Training FLOPs, by the convention of `accounting`."""
    seed: Seed = 0
    replaced: Annotated[Literal["middle", "all"] | list[Positive], BeforeValidator(_blocks)] = "middle"
    """Blocks whose feed-forward layer is `ffn`, counted from 1; `middle` is block n_layers // 2 (paper: 6 of 12)."""
    batch_sequences: Positive = 16
    context: Annotated[int, Field(ge=2)] = 64
    """Tokens a sequence."""
    routing_group_sequences: Positive | None = None
    """Sequences among which expert choice chooses, and over which the BatchNorm of queries takes its statistics; null:
    those of the whole batch, on all devices."""
    precision: Literal["fp32", "bf16"] = "fp32"
    min_steps: Positive = 200
    """A cell with fewer optimiser steps is dropped."""

    def __post_init__(self) -> None:
        if isinstance(self.replaced, list) and max(self.replaced) > self.size.n_layers:
            raise ValueError(f"replaced {self.replaced} names a block outside 1..{self.size.n_layers}")
        layer = self.ffn.params_of if isinstance(self.ffn, WideDenseConfig) else self.ffn
        if isinstance(layer, FineGrainedMoeConfig) and self.size.d_ff % layer.granularity:
            raise ValueError(f"ffn.granularity {layer.granularity} does not divide d_ff {self.size.d_ff}")

    @property
    def replaced_blocks(self) -> tuple[int, ...]:
        """The replaced blocks, counted from 1."""
        match self.replaced:
            case "middle":
                return (max(1, self.size.n_layers // 2),)
            case "all":
                return tuple(range(1, self.size.n_layers + 1))
            case blocks:
                return tuple(sorted(set(blocks)))

    @property
    def tokens_per_step(self) -> int:
        return self.batch_sequences * self.context

    @property
    def n_routing_groups(self) -> int:
        """Consecutive parts of a batch, each with statistics of its own."""
        return self.batch_sequences // (self.routing_group_sequences or self.batch_sequences)


_CONFIG: TypeAdapter[Config] = TypeAdapter(Config)


def parse_config(tree: Mapping[str, Any]) -> Config:
    """A nested mapping, as composed by Hydra or read from `config.yaml`, as a `Config`; raises `ConfigError`."""
    return parse(_CONFIG, Config, tree)


def to_dict(config: Config) -> dict[str, Any]:
    """Plain values, as written to `config.yaml`; the inverse of `parse_config`."""
    return _CONFIG.dump_python(config, mode="json")


def load(overrides: Sequence[str] = (), *, sweep: str | Path | None = None) -> Config:
    """Compose `conf/` with Hydra-style overrides, as the command line does.

    Args:
        overrides: such as `["ffn=peer", "size=d64", "budget=1e12"]`.
        sweep: a study's name or file, whose settings lie between `conf/` and the overrides.

    Raises:
        ConfigError: an unknown key or value, or a model that cannot be built.
    """
    tree = compose([o for o in overrides if sweep is None or not of_sweep(o)], sweep=sweep)
    tree.pop("sweep", None)
    return parse_config(tree)
