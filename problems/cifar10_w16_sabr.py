"""CIFAR-10 at eps = 2/255, CNN3 with w=16: SABR (arXiv:2210.04871), on the same images as the other rows.

evocert run problems/cifar10_w16_sabr.py --set data=npz --set data_path=FILE.npz
"""

import dataclasses

import cifar10_w16

experiment = dataclasses.replace(
    cifar10_w16.experiment,
    method="sabr",
    mixture=0.1,  # the small box's share of eps at 2/255 in the scripts of CTBench; at 8/255 it is 0.9
)
