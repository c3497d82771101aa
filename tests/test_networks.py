"""The built-in networks: sizes as in the literature, and one-line refusals."""

import pytest
import torch

from evocert.bounds import read_network
from evocert.errors import InputError
from evocert.networks import NETWORKS, cnn3, cnn3_tiny, cnn5, flat_parameters, fully_connected, with_parameters

GREY = {"mean": [0.1], "std": [0.3]}
COLOUR = {"mean": [0.5] * 3, "std": [0.2] * 3}


@pytest.mark.parametrize(
    ("module", "shape", "parameters"),
    [  # counts: the table of module sizes in evocert/networks.py's sources
        (cnn3((1, 28, 28), 10, width=16, **GREY), (1, 28, 28), 24_330),
        (cnn3((1, 28, 28), 10, width=8, **GREY), (1, 28, 28), 10_122),
        (cnn3((1, 28, 28), 10, width=4, **GREY), (1, 28, 28), 4_554),
        (cnn3_tiny((1, 28, 28), 10, **GREY), (1, 28, 28), 1_108),
        (cnn3((3, 32, 32), 10, width=16, **COLOUR), (3, 32, 32), 29_930),
        (cnn3((3, 32, 32), 10, width=8, **COLOUR), (3, 32, 32), 12_922),
        (cnn5((1, 28, 28), 10, **GREY), (1, 28, 28), 820_954),
        (cnn5((3, 32, 32), 10, **COLOUR), (3, 32, 32), 1_067_002),
        (fully_connected((1, 8, 8), 10, width=16, depth=3, **GREY), (1, 8, 8), 64 * 16 + 16 + 16 * 16 + 16 + 170),
        (fully_connected((1, 8, 8), 10, depth=1, **GREY), (1, 8, 8), 650),
    ],
)
def test_sizes(module, shape, parameters):
    network = read_network(module, shape)
    assert network.num_parameters == len(flat_parameters(module)) == parameters
    assert network.layers[0].kind == "Normalize"


@pytest.mark.parametrize("name", ["cnn3", "cnn5"])
def test_images_that_are_too_small_are_refused(name):
    with pytest.raises(InputError, match=r"images of shape \[1, 1, 1\] are too small"):
        NETWORKS[name]((1, 1, 1), 10, **GREY)


def test_parameters_go_in_and_out_in_order():
    module = cnn3((1, 8, 8), 4, width=2, **GREY)
    vector = torch.arange(len(flat_parameters(module)), dtype=torch.float64)
    with_parameters(module, vector)
    assert torch.equal(flat_parameters(module).double(), vector)
    assert module[1].weight.flatten()[1] == 1
    assert module[1].weight.dtype == torch.float32


def test_shapes_of_the_layers():
    maps = [layer.output_shape for layer in read_network(cnn3((1, 28, 28), 10, **GREY), (1, 28, 28)).layers]
    assert maps == [(1, 28, 28), (16, 14, 14), (16, 14, 14), (32, 7, 7), (32, 7, 7), (1568,), (10,)]
    maps = [layer.output_shape for layer in read_network(cnn5((3, 32, 32), 7, **COLOUR), (3, 32, 32)).layers]
    assert maps[1::2][:3] == [(16, 32, 32), (16, 16, 16), (32, 8, 8)]
    assert maps[-4:] == [(2048,), (512,), (512,), (7,)]
