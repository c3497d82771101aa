"""MNIST at eps = 0.1, CNN3 with w=16: evolution on the smoothed certified loss, with gradients for a control variate.

evocert sweep problems/mnist_w16_pgpe.py --grid bound=ibp,crown-ibp,deeppoly-sparse --seeds 0
"""

import dataclasses

import mnist_w16

SETTINGS = {
    "method": "pgpe",
    "popsize": 64,  # 32 pairs; this, the images, control variate and sigma by use are as in mnist_tiny_pgpe.py
    "batch_size": 16,
    "control_points": 4,
    "stdev_init": 0.001,  # sigma of the last layer; 0.01 and 0.003 were worse: see the search in docs/results.md
    "stdev_by_use": 0.25,
}
experiment = dataclasses.replace(mnist_w16.experiment, **SETTINGS)
