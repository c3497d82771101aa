"""CIFAR-10 at eps = 2/255, CNN3 with w=16: randomised gradient smoothing.

evocert sweep problems/cifar10_w16_rgs.py --grid bound=ibp,crown-ibp --seeds 0 --set data=npz --set data_path=FILE.npz
"""

import dataclasses

import cifar10_w16

experiment = dataclasses.replace(
    cifar10_w16.experiment,
    method="rgs",
    popsize=2,  # one antithetic pair
    stdev_init=0.003,  # sigma, as on MNIST
)
