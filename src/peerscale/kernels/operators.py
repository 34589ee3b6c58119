"""What every backend offers to the models; `reference` is the definition.

Shapes: T tokens, D model width, N rows of a table, J retrieved rows a token (heads x top_k); for product keys H heads,
S the 2 halves of a key, C half a key's width, N sub-keys a side, G key sets (1, shared by the heads, or H), K top_k.
"""

from typing import Protocol

from torch import Tensor


class Operators(Protocol):
    """The retrieved-row operators, differentiable in all floating-point arguments."""

    def single_neuron_experts(
        self, x_TD: Tensor, w_down_ND: Tensor, w_up_ND: Tensor, rows_TJ: Tensor, gates_TJ: Tensor, activation: str
    ) -> Tensor:
        """y[t] = sum_j gates[t, j] sigma(<x[t], w_down[i]>) w_up[i], i = rows[t, j] (PEER, equations 6 and 7)."""

    def weighted_rows(self, table_ND: Tensor, rows_TJ: Tensor, weights_TJ: Tensor) -> Tensor:
        """y[t] = sum_j weights[t, j] table[rows[t, j]]: a product-key memory (Lample et al. 2019)."""

    def product_key_top_k(self, query_THSC: Tensor, sub_keys_GSNC: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """The best K sums of a first-side and a second-side score <query half, sub-key> of each token and head.

        Best first; equal ones in a fixed order. Scores and rows i N + j of the pairs (i, j), both (T, H, K).
        """

    def rms_norm(self, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """y = x / sqrt(mean(x^2) + eps) weight, over the last dimension (Zhang and Sennrich 2019)."""

    def rotary(self, qkv_BT3HC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
        """Queries and keys rotated by the angles of their positions, by halves (Su et al. 2021), beside the values.

        B sequences of T tokens; of each its query, key and value with H heads of width 2 C.
        """

    def cross_entropy_(self, logits_TV: Tensor, targets_T: Tensor, scale: float) -> Tensor:
        """-log softmax(logits[t])[targets[t]]; the logits become `scale` times its gradient. Not differentiable."""
