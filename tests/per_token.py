"""The layers as the papers write them: a Python loop over tokens, no product-key shortcut, no batched product.

Everything is built from the layer's own parameters, so that autograd through the loop gives their gradients too.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn


def unlike_new(layer: nn.Module) -> nn.Module:
    """The layer with keys, biases and norms that are not those of its initialisation, which hide mistakes."""
    with torch.no_grad():
        layer.sub_keys.normal_()
        if layer.query.bias is not None:
            layer.query.bias.normal_()
        if layer.query_norm is not None:
            layer.query_norm.weight.uniform_(0.5, 1.5)
            layer.query_norm.bias.normal_()
    return layer


def gelu(x: Tensor) -> Tensor:
    """x Phi(x) (Hendrycks and Gimpel 2016)."""
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def relu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.zeros_like(x))


def softmax(scores: Tensor) -> Tensor:
    """Over the last axis."""
    exponentials = torch.exp(scores - scores.detach().max())
    return exponentials / exponentials.sum(-1, keepdim=True)


def best(scores: Tensor, k: int) -> list[int]:
    """Where the k largest are, the largest first."""
    values = scores.tolist()
    return sorted(range(len(values)), key=values.__getitem__, reverse=True)[:k]


def batch_norm(query: Tensor, norm: nn.BatchNorm1d) -> Tensor:
    """Over the tokens of the batch in training; with the running statistics in evaluation."""
    if norm.training:
        mean = query.mean(0)
        variance = (query - mean).square().mean(0)
    else:
        mean, variance = norm.running_mean, norm.running_var
    return (query - mean) / torch.sqrt(variance + norm.eps) * norm.weight + norm.bias


def queries(layer: nn.Module, x_TD: Tensor) -> Tensor:
    """(T, H x d_key), laid out (head, half, d_key / 2)."""
    query = x_TD @ layer.query.weight.T
    if layer.query.bias is not None:
        query = query + layer.query.bias
    return query if layer.query_norm is None else batch_norm(query, layer.query_norm)


def retrieved(layer: nn.Module, x_TD: Tensor) -> Iterator[tuple[int, Tensor, list[int]]]:
    """For every token and head: the token, the top k scores and the experts, of all N keys (equations 1 to 4)."""
    n_sets, _, n_keys, half = layer.sub_keys.shape
    n_heads = layer.query.out_features // (2 * half)
    query_TC = queries(layer, x_TD)
    for t in range(len(x_TD)):
        for h in range(n_heads):
            q = query_TC[t, h * 2 * half : (h + 1) * 2 * half]
            first, second = layer.sub_keys[h if n_sets > 1 else 0]
            keys = torch.stack([torch.cat([first[i], second[j]]) for i in range(n_keys) for j in range(n_keys)])
            scores = keys @ q
            experts = best(scores, layer.top_k)
            yield t, scores[experts], experts


def peer(layer: nn.Module, x_TD: Tensor) -> Tensor:
    """PEER, equations 1 to 7: heads summed, no scaling."""
    activation = {"gelu": gelu, "relu": relu}[layer.activation]
    gate = {"softmax": softmax, "sigmoid": lambda s: 1 / (1 + torch.exp(-s))}[layer.score]
    y = [torch.zeros_like(x) for x in x_TD]
    for t, scores, experts in retrieved(layer, x_TD):
        for g, i in zip(gate(scores), experts, strict=True):
            y[t] = y[t] + g * activation(layer.w_down[i] @ x_TD[t]) * layer.w_up[i]
    return torch.stack(y)


def pkm(layer: nn.Module, x_TD: Tensor) -> Tensor:
    """Product-key memory (Lample et al. 2019): values in place of experts."""
    y = [torch.zeros_like(x) for x in x_TD]
    for t, scores, rows in retrieved(layer, x_TD):
        for g, i in zip(softmax(scores), rows, strict=True):
            y[t] = y[t] + g * layer.values[i]
    return torch.stack(y)


def dense(layer: nn.Module, x_TD: Tensor) -> Tensor:
    """W2 gelu(W1 x)."""
    return torch.stack([layer.down.weight @ gelu(layer.up.weight @ x) for x in x_TD])


def coarse_expert(layer: nn.Module, e: int, x_D: Tensor) -> Tensor:
    return gelu(x_D @ layer.experts.up[e]) @ layer.experts.down[e]


def expert_choice(layer: nn.Module, x_BTD: Tensor) -> Tensor:
    """Zhou et al. 2022 within each group of the tokens at one position: every expert takes its best tokens."""
    B, T, _ = x_BTD.shape
    n_experts = len(layer.router.weight)
    capacity = round(B * layer.config.capacity_factor / n_experts)
    y = [[torch.zeros_like(x_BTD[b, t]) for t in range(T)] for b in range(B)]
    for t in range(T):
        probability_BE = torch.stack([softmax(layer.router.weight @ x_BTD[b, t]) for b in range(B)])
        for e in range(n_experts):
            for b in best(probability_BE[:, e], capacity):
                y[b][t] = y[b][t] + probability_BE[b, e] * coarse_expert(layer, e, x_BTD[b, t])
    return torch.stack([torch.stack(row) for row in y])


def token_choice(layer: nn.Module, x_TD: Tensor) -> Tensor:
    """Every token takes its best experts, weighted by their probability; none is dropped."""
    y = []
    for x in x_TD:
        probability = softmax(layer.router.weight @ x)
        y.append(sum(probability[e] * coarse_expert(layer, e, x) for e in best(probability, layer.top_k)))
    return torch.stack(y)


def fine_grained(layer: nn.Module, x_TD: Tensor, n_shared: int) -> Tensor:
    """Dai et al. 2024, equations 9 to 11 without the residual: shared experts one by one, then the best routed ones."""
    width = layer.experts.up.shape[-1]
    y = []
    for x, routed in zip(x_TD, token_choice(layer, x_TD), strict=True):
        for i in range(n_shared):
            units = slice(i * width, (i + 1) * width)
            routed = routed + layer.shared.down.weight[:, units] @ gelu(layer.shared.up.weight[units] @ x)
        y.append(routed)
    return torch.stack(y)


def assert_equal_with_gradients(layer: nn.Module, loop: Callable[[nn.Module, Tensor], Tensor], x: Tensor) -> None:
    """`layer(x)` is `loop(layer, x)`, and so is the gradient for x and for every parameter, in float64."""
    layer, x = layer.double(), x.double().requires_grad_()
    inputs = {"x": x, **dict(layer.named_parameters())}
    wanted, got = loop(layer, x), layer(x)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
    upstream = torch.randn(wanted.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wanted_gradients = torch.autograd.grad(wanted, list(inputs.values()), upstream)
    got_gradients = torch.autograd.grad(got, list(inputs.values()), upstream)
    for name, a, b in zip(inputs, got_gradients, wanted_gradients, strict=True):
        assert b.abs().max() > 1e-6, f"the loop has no gradient for {name}: the comparison would show nothing"
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"gradient of {name}: {m}")
