"""MNIST at eps = 0.1, CNN3 with w=16: SABR (arXiv:2210.04871), on the same images as the other rows.

evocert run problems/mnist_w16_sabr.py
evocert run problems/mnist_w16_sabr.py --set eps=0.3 --set mixture=0.9
"""

import dataclasses

import mnist_w16

experiment = dataclasses.replace(
    mnist_w16.experiment,
    method="sabr",
    mixture=0.4,  # the small box's share of eps at MNIST 0.1 in the scripts of CTBench; at 0.3 it is 0.9
)
