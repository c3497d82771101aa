"""MNIST at eps = 0.1, CNN3-tiny: MTL-IBP (arXiv:2305.13991), on the same images as the grad and rgs rows.

evocert sweep problems/mnist_tiny_mtl_ibp.py --grid mixture=0.02,0.5 --seeds 0,1,2 --out runs/mnist_tiny_mtl_ibp
"""

import dataclasses

import mnist_tiny

experiment = dataclasses.replace(
    mnist_tiny.experiment,
    method="mtl-ibp",
    mixture=0.5,  # of the certified loss; 0.02, for the CNN7 of CTBench's scripts at MNIST 0.1, is in the sweep beside it
)
