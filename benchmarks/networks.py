"""Prints the table of networks in docs/training.md: parameters, multiplications of a prediction, grid.

Counted on torch's meta device, whose tensors have shapes but no values: python benchmarks/networks.py
"""

from __future__ import annotations

import argparse

import torch
from torch.utils.flop_counter import FlopCounterMode

from pneumo_experiments.learning.network import NETWORKS, PneumothoraxNet
from pneumo_experiments.settings.networks import EXTRA, libraries_of

WITH_DECODER = ("unet:resnet34", "unet++:resnet34", "fpn:resnet34", "deeplabv3+:resnet50")


def row(name: str, side: int) -> str:
    """A network's line: name, parameters, GMAC of one image, pixels per value in a row, extra."""
    grids = list[torch.Size]()
    with torch.device("meta"):
        network = PneumothoraxNet(name).eval()
        network.mask_head.register_forward_hook(lambda _, inputs, output: grids.append(output.shape))
        with FlopCounterMode(display=False) as counter:
            network(torch.empty(1, 1, side, side))
    # Convolutions and matrix products alone, two operations for each multiplication.
    gmac = counter.get_total_flops() / 2e9
    millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    extra = EXTRA if libraries_of(name) else ""
    return f"| `{name}` | {millions:.1f} M | {gmac:.1f} | {side // grids[0][-1]} | {extra} |"


def main() -> None:
    """Prints the header and a line for each network."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--image_size", type=int, default=384)
    side = parser.parse_args().image_size
    print(f"| `network` | parameters | GMAC at {side} px | pixels per value, in a row | extra |")
    print("|---|---|---|---|---|")
    for name in (*NETWORKS, *WITH_DECODER):
        print(row(name, side))


if __name__ == "__main__":
    main()
