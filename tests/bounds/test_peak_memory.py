"""What a bound really takes of memory stays within the budget that its tile was chosen for: in fresh processes."""

import os
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak can be reset on Linux alone"),
]

# The peak is reset, as a process begins with its parent's; what torch and Numba load at their first use is not the bound's.
MEASURE = """
import ctypes, gc, sys, torch
from torch.utils.checkpoint import checkpoint
import evocert
from evocert.bounds import BOUNDS, Tile, box_around, choose_tile, compiled, read_network

name, members, images, budget, gradient = sys.argv[1], *map(int, sys.argv[2:])
torch.set_num_threads(2)
torch.manual_seed(0)
module = evocert.cnn3((1, 28, 28), 10, mean=[0.13], std=[0.31], width=16)
network = read_network(module, (1, 28, 28))
parameters = torch.nn.utils.parameters_to_vector(module.parameters()).detach()
parameters = (parameters + 0.001 * torch.randn(members, len(parameters))).requires_grad_(bool(gradient))
box, labels = box_around(torch.rand(images, 1, 28, 28), 0.1), torch.randint(0, 10, (images,))
small = evocert.cnn3((1, 8, 8), 10, mean=[0.13], std=[0.31], width=1)
begun = torch.nn.utils.parameters_to_vector(small.parameters()).detach().unsqueeze(0).requires_grad_()
BOUNDS[name](read_network(small, (1, 8, 8)), begun, box_around(torch.rand(1, 1, 8, 8), 0.1), labels[:1]).sum().backward()
compiled.load(torch.float32)
tile = choose_tile(BOUNDS[name].cost(network, torch.device("cpu")), images, budget * 2**20, torch.device("cpu"))
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")

def level(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) / 1024

before = level("VmRSS")
with torch.set_grad_enabled(bool(gradient)):
    margins = BOUNDS[name](network, parameters, box, labels, tile=Tile(1, images) if gradient else tile)
    if gradient:
        margins.sum().backward()
print(level("VmHWM") - before)
"""


def peak(name: str, members: int, images: int, budget: int, *, gradient: bool = False) -> float:
    """MiB above the level before the call."""
    arguments = [name, str(members), str(images), str(budget), str(int(gradient))]
    # For a gradient, what lives: large blocks go back to the system as soon as they are freed, whatever else lies between.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"} if gradient else None
    command = [sys.executable, "-c", MEASURE, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(done.stdout)


@pytest.mark.parametrize(
    ("name", "members", "images", "budget"),
    [
        ("ibp", 32, 64, 48),
        ("ibp", 32, 64, 256),
        ("crown-ibp", 8, 64, 64),
        ("crown-ibp", 8, 64, 256),
        ("deeppoly", 4, 64, 64),
        ("deeppoly", 4, 64, 256),
        ("deeppoly-sparse", 4, 64, 64),
        ("deeppoly-sparse", 4, 64, 256),
        ("alpha-crown", 2, 32, 192),
    ],
)
def test_a_tile_stays_within_its_budget(name, members, images, budget):
    assert peak(name, members, images, budget) < budget


def test_the_gradient_keeps_the_graph_of_one_chunk_at_a_time():
    # Measured: 25 MiB, and 101 with the graphs of all chunks at once.
    assert peak("deeppoly", 1, 16, 1024, gradient=True) < 50
