"""MNIST at eps = 0.1, CNN3-tiny: SABR (arXiv:2210.04871), on the same images as the grad and rgs rows.

evocert sweep problems/mnist_tiny_sabr.py --grid mixture=0.4 --seeds 0,1,2 --out runs/mnist_tiny_sabr
"""

import dataclasses

import mnist_tiny

experiment = dataclasses.replace(
    mnist_tiny.experiment,
    method="sabr",
    mixture=0.4,  # the small box's share of eps at MNIST 0.1 in the scripts of CTBench
)
