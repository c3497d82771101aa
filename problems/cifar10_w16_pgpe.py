"""CIFAR-10 at eps = 2/255, CNN3 with w=16: evolution on the smoothed certified loss, with gradients for a control variate.

evocert sweep problems/cifar10_w16_pgpe.py --grid bound=ibp,crown-ibp --seeds 0 --set data=npz --set data_path=FILE.npz
"""

import dataclasses

import cifar10_w16
import mnist_w16_pgpe

experiment = dataclasses.replace(
    mnist_w16_pgpe.experiment,  # its population and sigma too
    **{name: getattr(cifar10_w16.experiment, name) for name in ("data", "mean", "std", "eps", "center_learning_rate")},
)
