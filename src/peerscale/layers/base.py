"""What every layer defines: its settings, its cost, its limits, and how it is built."""

from dataclasses import dataclass as plain_dataclass
from dataclasses import field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, dataclass_transform

from pydantic.dataclasses import dataclass

from peerscale.types import STRICT, FileNameOrEmpty

if TYPE_CHECKING:
    from torch import nn

    from peerscale.ops.operators import Operators

T = TypeVar("T")

Place = Literal["feed_forward", "beside", "before_attention"]
"""Where a layer sits in its blocks, x being the residual stream.

`feed_forward`: in place of the dense layer, x + layer(norm(x)). `beside`: dense stays, x + dense(norm(x)) +
layer(norm(x)). `before_attention`: dense stays, and x + layer(x) comes before attention; in the first block that is the
input of the model.
"""


@plain_dataclass(frozen=True, kw_only=True, slots=True)
class Surroundings:
    """What a layer may know about the model around it."""

    d_model: int
    """Width of the layer's input and output."""
    d_ff: int
    """Hidden width of the dense layer of this model."""
    group_sequences: int
    """Sequences over which a layer may take statistics or choose: `routing_group_sequences`, or else the batch."""
    n_groups: int = 1
    """Number of these groups in a batch, on all devices."""
    micro_batches: int = 1
    """Number of parts in which a batch passes through the layer; each consists of whole groups."""
    operators: "Operators | None" = None
    """The backend of the operators (`ops.backends`); known once a model is built."""
    first: "nn.Module | None" = None
    """The layer of the first of its blocks, while those of the others are built, which may share its parameters."""


@plain_dataclass(frozen=True, kw_only=True, slots=True)
class LayerCost:
    """The cost of one feed-forward layer."""

    params: dict[str, int]
    """Parameters by group."""
    forward_flops: dict[str, int]
    """Forward FLOPs per token by component: 2 per multiply-add of a matrix product; nothing else is counted."""
    inactive: int = 0
    """Parameters that a token does not use (on average, with expert choice)."""
    shared: dict[str, int] = field(default_factory=dict)
    """Those of `params` that are the same in all blocks with the layer, by group."""


@plain_dataclass(frozen=True, kw_only=True, slots=True)
class OwnTraining:
    """How some parameters of a layer are trained, where that differs from the others."""

    lr_factor: float = 1.0
    """On the learning rate that they would have: that of the model, or `optim.table_lr`."""
    final_lr_factor: float = 1.0
    """On top of the schedule, a factor that goes linearly from 1 at the first step to this at the last."""
    weight_decay: float | None = None
    """None: `optim.weight_decay` for matrices, none for vectors and tables."""


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=())
def layer_config(kind: type[T]) -> type[T]:
    """Make the settings of a layer a frozen, strictly checked dataclass; its fields are the keys of the YAML file."""
    decorate: Any = dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
    return decorate(kind)


@layer_config
class FfnConfig:
    """The settings of a feed-forward layer, and what follows from them; every layer is a subclass.

    `method` names the layer; `variant` names a form of it that differs from the paper's. A subclass defines `cost` and
    `build`.
    """

    method: str
    variant: FileNameOrEmpty = ""

    SHARES_OF_PEAK: ClassVar[tuple[float, float]] = (0.3, 0.3)
    """Share of a GPU's peak that training reaches, on one GPU and on each of several, which exchange the gradients of
    whole tables: estimates by bytes and FLOPs for an H100 and d_model 768. None was measured."""

    @property
    def name(self) -> str:
        """The name of the layer's YAML file, and of its curve in a figure."""
        return f"{self.method}_{self.variant}" if self.variant else self.method

    def cost(self, around: Surroundings) -> LayerCost:
        """Parameters and forward FLOPs of one layer; the parameters are checked against those of the built layer."""
        raise NotImplementedError

    def build(self, around: Surroundings) -> "nn.Module":
        """One layer, x (B, T, D) -> y (B, T, D), or (x, tokens (B, T)) -> y if it has `takes_tokens = True`.

        If it has parameters, it has a method `init_weights(output_scale)`, which is called once, after all layers are
        built, and leaves the weights that training starts from: it draws them, or keeps those that the constructor
        drew. `output_scale`, (2 n_layers)^-1/2, is meant for its last matrix product.

        The layer, and each module inside it, may also have

        - `expert_tables()`: a list of the parameters trained with `optim.table_lr`, outside the gradient's clip;
        - `own_training()`: an `OwnTraining` for each parameter that differs in rate, weight decay or schedule;
        - `auxiliary_loss`: added to the loss (None: nothing to add);
        - `after_step()`: called after each optimiser step, to change what has no gradient, such as buffers.
        """
        raise NotImplementedError

    @property
    def place(self) -> Place:
        """Where the layer sits in its blocks."""
        return "feed_forward"

    def unusable(self, around: Surroundings) -> str:
        """Why a cell with this layer in this model is dropped; empty if it can be trained."""
        return ""

    def saved_numbers(self, around: Surroundings) -> int:
        """Numbers per token that one layer and its norm keep for the backward pass; for the plan's memory estimate.

        The default is that of a dense layer: its input, the normalised input, and two vectors of the hidden width.
        """
        return 2 * around.d_model + 2 * around.d_ff

    def saved_in_fp32(self, around: Surroundings) -> int:
        """How many of `saved_numbers` stay fp32 in bf16 training, apart from the norm's; for the same estimate."""
        return 0

    def table_sizes(self, around: Surroundings) -> list[int]:
        """Parameters of each table whose rows are read by `peerscale.ops`; for the same estimate."""
        return []

    @property
    def takes_statistics(self) -> bool:
        """Whether the output or loss depends on which sequences are in a group (`Surroundings.group_sequences`)."""
        return False

    def columns(self, d_model: int) -> dict[str, Any]:
        """The layer's values for the table of runs, by column; the columns are `LAYER_COLUMNS` of `records.table`."""
        return {}
