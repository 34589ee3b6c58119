"""A layer to start from: the bilinear layer of Shazeer 2020 (arXiv 2002.05202), y = (x V * x W) U."""

from torch import Tensor, nn

from peerscale.layers import FfnConfig, LayerCost, Surroundings, layer_config


@layer_config  # the fields are the keys of conf/ffn/bilinear.yaml
class BilinearConfig(FfnConfig):
    method: str = "bilinear"
    d_hidden_over_d_model: float = 8 / 3

    def d_hidden(self, d_model: int) -> int:
        return round(self.d_hidden_over_d_model * d_model)

    def cost(self, around: Surroundings) -> LayerCost:  # 2 forward FLOPs for each multiply-add
        weights = 3 * around.d_model * self.d_hidden(around.d_model)
        return LayerCost(params={"ffn": weights}, forward_flops={"ffn": 2 * weights})

    def build(self, around: Surroundings) -> nn.Module:
        return Bilinear(around.d_model, self.d_hidden(around.d_model))


class Bilinear(nn.Module):
    def __init__(self, d_model: int, d_hidden: int) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(d_model, d_hidden, bias=False), nn.Linear(d_model, d_hidden, bias=False)
        self.down = nn.Linear(d_hidden, d_model, bias=False)

    def init_weights(self, output_scale: float) -> None:
        for linear in (self.one, self.other, self.down):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        self.down.weight.data *= output_scale

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        return self.down(self.one(x) * self.other(x))
