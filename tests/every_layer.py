"""A network with every kind of layer, and its training, for tests of norm decay."""

import torch
from torch import nn

SHAPE = [2, 3, 8, 8]


class Network(nn.Module):
    """Every kind of layer: merged taps, groups, transposed, depthwise, dilated, an input smaller than its kernel."""

    def __init__(self):
        super().__init__()
        self.reflect = nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect")
        self.grouped = nn.Conv2d(6, 6, 3, stride=2, padding=1, groups=3)
        self.transposed = nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1)
        self.depthwise = nn.Conv2d(4, 4, 5, stride=(1, 2), padding=2, groups=4)
        self.dilated = nn.Conv1d(4, 3, 5, dilation=3, stride=4)
        self.solid = nn.Conv3d(1, 2, (2, 3, 3), padding=(0, 1, 1))
        self.small = nn.Conv1d(10, 5, 5, padding=2)
        self.linear = nn.Linear(5, 4)

    def forward(self, x):
        x = self.grouped(self.reflect(x).relu()).relu()
        x = self.depthwise(self.transposed(x).relu()).flatten(2)
        x = self.dilated(x.relu())  # [2, 3, 5]
        x = self.solid(x.unflatten(2, (1, 5)).unsqueeze(1)).relu()  # [2, 2, 2, 1, 5]
        x = self.small(x.flatten(1, 3).mT.repeat(1, 2, 1)[..., :2]).relu()
        return self.linear(x.mean(-1))


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return Network().to(dtype)


def train(model, step, steps, lr=0.05):
    generator = torch.Generator().manual_seed(1)
    dtype = next(model.parameters()).dtype
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    for _ in range(steps):
        x = torch.randn(SHAPE, generator=generator, dtype=torch.float64).to(dtype)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        step()
        optimizer.step()
    return [p.detach() for p in model.parameters()]
