"""More layers by their definitions, as in `per_token`: functions of the layer, x, the settings and the token ids."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import per_token


def unlike_new(layer: nn.Module) -> nn.Module:
    """The layer with norms, biases and convolutions that are not the zeros and ones of its initialisation."""
    with torch.no_grad():
        for parameter in layer.parameters():
            if (parameter == parameter.flatten()[0]).all():
                parameter.uniform_(0.5, 1.5).mul_(torch.randint(2, parameter.shape) * 2 - 1)
        if hasattr(layer, "bias_E"):
            layer.bias_E.normal_(std=0.3).sub_(layer.bias_E.mean())
    return layer


def gated_unit(x_D: Tensor, gate_FD: Tensor, down_FD: Tensor, up_DF: Tensor) -> Tensor:
    """Shazeer 2020, equation 6, with silu; its W, V and W2 are `gate`, `up` and `down`."""
    return up_DF @ (F.silu(gate_FD @ x_D) * (down_FD @ x_D))


def swiglu(layer: nn.Module, x_TD: Tensor, *_) -> Tensor:
    return torch.stack([gated_unit(x, layer.gate.weight, layer.up.weight, layer.down.weight) for x in x_TD])


def relu_squared(layer: nn.Module, x_TD: Tensor, *_) -> Tensor:
    """So et al. 2021."""
    return torch.stack([layer.down.weight @ per_token.relu(layer.up.weight @ x) ** 2 for x in x_TD])


def scores_and_chosen(layer: nn.Module, x_D: Tensor, top_k: int) -> tuple[Tensor, list[int]]:
    """A token's scores, and the experts that are best by score and bias (Wang et al. 2024)."""
    score_E = torch.sigmoid(layer.router.weight @ x_D)
    return score_E, per_token.best(score_E + layer.bias_E, top_k)


def balanced_moe(layer: nn.Module, x_TD: Tensor, config, *_) -> Tensor:
    """The mixture of DeepSeek-V3 without the residual: shared experts one by one, then the chosen ones."""
    routed, shared, y = layer.experts, layer.shared, []
    width = routed.up.shape[-1]
    for x in x_TD:
        score_E, chosen = scores_and_chosen(layer, x, config.top_k)
        units = [slice(i * width, (i + 1) * width) for i in range(config.n_shared)]
        parts = [gated_unit(x, shared.gate.weight[u], shared.up.weight[u], shared.down.weight[:, u]) for u in units]
        for e in chosen:
            weight = score_E[e] / sum(score_E[other] for other in chosen)
            parts.append(weight * gated_unit(x, routed.gate[e].T, routed.up[e].T, routed.down[e].T))
        y.append(sum(parts))
    return torch.stack(y)


def memory_plus(layer: nn.Module, x_TD: Tensor, config, *_) -> Tensor:
    """Berges et al. 2024: W2 (m * silu(W1 x)), both with bias, of the m that product-key memory retrieves."""
    memory_TD = per_token.pkm(layer, x_TD)
    if not config.gate:
        return memory_TD
    gates = [F.silu(layer.gate_in(x)) for x in x_TD]
    return torch.stack([layer.gate_out(gate * m) for gate, m in zip(gates, memory_TD, strict=True)])


def engram_memory(layer: nn.Module, t: int, config, tokens: list[int]) -> Tensor:
    """One row of every table, side by side, for the tokens up to t; in whole numbers of any size."""
    rows, first = [], 0
    sizes = primes(config.n_rows, len(config.orders) * config.n_hashes)
    for i, size in enumerate(sizes):
        row = 0
        for lag in range(config.orders[i // config.n_hashes]):
            row ^= ((tokens[t - lag] if t >= lag else -1) + 1) * int(layer.factors_LJ[lag, i])
        rows.append(layer.table[first + row % size])
        first += size
    return torch.cat(rows)


def primes(at_least: int, n: int) -> list[int]:
    """The first primes from `at_least` on; as many ones if that is 1."""
    candidates = range(at_least, 2 * at_least + 100 * n)
    return [p for p in candidates if all(p % d for d in range(2, p))][:n] if at_least > 1 else [1] * n


def engram(layer: nn.Module, x_TD: Tensor, config, tokens: list[int]) -> Tensor:
    """Engram (arXiv 2601.07372), and the signed root of its released code; the norms are torch's."""
    u, y, kernel = [], [], layer.convolution.weight[:, 0]
    for t, x in enumerate(x_TD):
        e = engram_memory(layer, t, config, tokens)
        r = layer.norm_x(x) @ layer.norm_key(layer.key.weight @ e) / len(x) ** 0.5
        u.append(torch.sigmoid(torch.sign(r) * torch.sqrt(torch.clamp(r.abs(), min=1e-6))) * (layer.value.weight @ e))
        lags = [lag for lag in range(config.kernel) if t >= lag * config.dilation]
        mixed = sum(kernel[:, -1 - lag] * layer.norm_value(u[t - lag * config.dilation]) for lag in lags)
        y.append(u[t] + F.silu(mixed))
    return torch.stack(y)
