"""How a batch is divided among devices and micro-batches, and whether a part of it fits the memory of a GPU."""

from dataclasses import replace

from peerscale.config.schema import Config
from peerscale.layers.registry import layer_class
from peerscale.plan.cost import TRAINING, Cost, cost

DENSE = [{"method": name} for name in ("dense", "relu_squared", "swiglu")]
CHECKPOINT_BYTES = 12
"""Per parameter: weight and two moments, in fp32."""
GRADIENT_BYTES = 4
UPDATE_BYTES = 40
"""Per parameter of the table that row-sparse AdamW updates: copies of the rows read, which are all of them on a GPU."""
LOGITS_BYTES = 2**30
"""For the slices of logits and their gradients that a GPU holds at once (`ops.cross_entropy`)."""


def device_memory(config: Config, micro_batches: int | None = None) -> dict[str, int]:
    """Bytes that training takes on one device, by purpose; an estimate that ignores the allocator's overhead.

    `micro_batches` is the number of parts in which the batch is computed; None: `trainer.micro_batches`.

    `state` is weight, moments and gradient; with precision bf16 also the copies that autocast keeps of matrices, and
    the operators of tables. `activations` is what one micro-batch keeps for its backward pass: per token and block 9
    d_model numbers, and the `saved_numbers` of its layers. The `reference` kernel keeps more for PKM and PEER.
    Activation checkpointing keeps the inputs of attention and dense layers, and temporarily all of one block.
    Row-sparse AdamW has no gradient of a whole table, but needs memory for an `update`, when activations are freed.
    """
    around, bytes_each = config.surroundings, 2 if config.precision == "bf16" else 4
    d_model, n_layers, n_params = config.d_model, config.n_layers, cost(config).params_total
    layer, dense = config.ffn.saved_numbers(around), config.dense_layer.saved_numbers(around)
    n_replaced = len(config.replaced_blocks)
    numbers = n_layers * 9 * d_model + n_replaced * layer + config.n_dense * dense
    if config.trainer.activation_checkpointing:
        kept = n_replaced * (layer + d_model)
        if isinstance(config.ffn, tuple(map(layer_class, DENSE))):  # recomputed like the others
            kept, dense = 0, max(layer, dense)
        numbers = n_layers * 2 * d_model + kept + 9 * d_model + dense
    parts, of_token = micro_batches or around.micro_batches, bytes_each * numbers
    if config.precision == "bf16":
        of_token += 2 * n_replaced * config.ffn.saved_in_fp32(around)
        if not config.trainer.compiles_on("cuda" if config.trainer.accelerator == "gpu" else "cpu"):
            of_token += n_layers * 8 * d_model  # input and normalised input of both norms are fp32; compiled, one is
    tables = config.ffn.table_sizes(around) if config.optim.name == "row_sparse_adamw" else []
    shared = min(sum(tables), sum(config.ffn.cost(around).shared.values()))
    in_tables = n_replaced * sum(tables) - (n_replaced - 1) * shared
    state = checkpoint_bytes(config) + GRADIENT_BYTES * (n_params - in_tables)
    activations = config.tokens_per_step // config.trainer.devices // parts * of_token
    return {
        "state": state + 2 * n_params * (config.precision == "bf16"),
        "activations": activations,
        "logits": LOGITS_BYTES,
        "update": max(0, UPDATE_BYTES * max(tables, default=0) - activations - LOGITS_BYTES),
    }


def checkpoint_bytes(config: Config) -> int:
    """The size of one checkpoint."""
    return CHECKPOINT_BYTES * cost(config).params_total


def recomputed_share(config: Config, cost: Cost) -> float:
    """FLOPs that activation checkpointing adds, as a share of the training FLOPs: the recomputed forward passes."""
    if not config.trainer.activation_checkpointing:
        return 0.0
    kept = cost.flops["logits"] + (0 if isinstance(config.ffn, tuple(map(layer_class, DENSE))) else cost.layer_flops)
    return (cost.flops_per_token - kept) / TRAINING / cost.flops_per_token


def in_memory(config: Config) -> Config:
    """The configuration with what `trainer` leaves to the plan: micro-batches, and whether to checkpoint activations.

    The micro-batches are the fewest that divide the batch in a way that the layer allows and fit the memory of the
    device; 1 if no number does. Activations are checkpointed where it would not fit otherwise.
    """
    parts, given = None, config.trainer.activation_checkpointing
    for checkpointing in (False, True) if given is None else (given,):
        config = replace(config, trainer=replace(config.trainer, activation_checkpointing=checkpointing))
        if parts := _fewest_parts(config):
            break
    parts = parts or config.trainer.micro_batches or 1
    return replace(config, trainer=replace(config.trainer, micro_batches=parts))


def indivisible(config: Config, micro_batches: int) -> str:
    """Why a batch cannot be divided among the devices and into `micro_batches`; empty if it can."""
    batch, devices, parts = config.batch_sequences, config.trainer.devices, micro_batches
    if batch % devices:
        return f"{batch} sequences cannot be shared by trainer.devices {devices}"
    group, here = config.routing_group_sequences or batch, batch // devices
    if here % parts:
        return f"the {here} sequences of a device cannot be divided into trainer.micro_batches {parts}"
    if batch % group:
        return f"routing_group_sequences {group} does not divide batch_sequences {batch}"
    if group < batch and here % group:
        return f"routing_group_sequences {group} does not divide the {here} sequences of a device"
    if parts > 1 and config.ffn.takes_statistics and (here // parts) % group:
        return (
            f"{config.ffn.name} takes statistics over {group} sequences, which trainer.micro_batches {parts} splits; "
            f"routing_group_sequences may be {here // parts} or a divisor of that"
        )
    return ""


def too_large(config: Config) -> str:
    """Why a cell does not fit its GPUs; empty if it fits or uses no GPUs."""
    if _fits(config, config.surroundings.micro_batches):
        return ""
    of_state, room = device_memory(config)["state"] / 1e9, config.trainer.device_memory_gb
    needed = f"{_memory_gb(config):.3g} GB, {of_state:.3g} of them weights and moments"
    return f"{needed}, are more than trainer.device_memory_gb {room:g}"


def _fewest_parts(config: Config) -> int | None:
    """The number of micro-batches that was asked for, or else the smallest that fits; None if none does."""
    here, asked = config.batch_sequences // config.trainer.devices, config.trainer.micro_batches
    numbers = (n for n in ([asked] if asked else range(1, here + 1)) if not indivisible(config, n))
    return next((n for n in numbers if _fits(config, n)), None)


def _fits(config: Config, micro_batches: int) -> bool:
    room = config.trainer.device_memory_gb
    return config.trainer.accelerator != "gpu" or room is None or _memory_gb(config, micro_batches) <= room


def _memory_gb(config: Config, micro_batches: int | None = None) -> float:
    return sum(device_memory(config, micro_batches).values()) / 1e9
