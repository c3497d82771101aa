"""MNIST at eps = 0.1, CNN3 with w=16: MTL-IBP (arXiv:2305.13991), on the same images as the other rows.

evocert run problems/mnist_w16_mtl_ibp.py
evocert run problems/mnist_w16_mtl_ibp.py --set eps=0.3
"""

import dataclasses

import mnist_w16

experiment = dataclasses.replace(
    mnist_w16.experiment,
    method="mtl-ibp",
    mixture=0.5,  # of the certified loss: that of CTBench's scripts at MNIST 0.3; at 0.1 it is 0.02, for a far larger network
)
