"""CIFAR-10 at eps = 2/255, CNN3 with w=16: evolution on the smoothed certified loss, with gradients for a control variate.

evocert sweep problems/cifar10_w16_pgpe.py --grid bound=ibp,crown-ibp --seeds 0 --set data=npz --set data_path=FILE.npz
"""

import dataclasses

import cifar10_w16
import mnist_w16_pgpe

experiment = dataclasses.replace(cifar10_w16.experiment, **mnist_w16_pgpe.SETTINGS)
