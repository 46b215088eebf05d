"""What the tests of reports report on."""

import torch
from torch import nn

SHAPE = [1, 3, 8, 8]


def network():
    """Every kind of row: strides, groups, padding modes, a transposed layer, one without a batch norm."""
    torch.manual_seed(0)
    return trained(
        nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
            nn.Conv2d(8, 8, 3, padding="same", groups=4, dilation=2),
            nn.BatchNorm2d(8, affine=False),
            nn.Conv2d(8, 4, 3, padding=1, padding_mode="circular"),
            nn.ConvTranspose2d(4, 2, 3, 2, output_padding=1),
            nn.BatchNorm2d(2),
            nn.Flatten(),
            nn.Linear(200, 5),
            nn.BatchNorm1d(5),
        )
    )


def trained(model):
    """Batch norms that do something else to each channel."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_var.uniform_(0.3, 4)
            if module.affine:
                nn.init.normal_(module.weight)
    return model.eval()
