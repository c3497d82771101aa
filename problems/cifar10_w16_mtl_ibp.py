"""CIFAR-10 at eps = 2/255, CNN3 with w=16: MTL-IBP (arXiv:2305.13991), on the same images as the other rows.

evocert run problems/cifar10_w16_mtl_ibp.py --set data=npz --set data_path=FILE.npz
"""

import dataclasses

import cifar10_w16

experiment = dataclasses.replace(
    cifar10_w16.experiment,
    method="mtl-ibp",
    mixture=0.01,  # of the certified loss, as at 2/255 in the scripts of CTBench; at 8/255 it is 0.6
)
