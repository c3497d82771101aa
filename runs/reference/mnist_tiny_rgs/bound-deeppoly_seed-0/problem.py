"""MNIST at eps = 0.1, CNN3-tiny: randomised gradient smoothing.

evocert sweep problems/mnist_tiny_rgs.py --grid bound=ibp,crown-ibp,deeppoly --seeds 0,1,2 --out runs/mnist_tiny_rgs
"""

import dataclasses

import mnist_tiny

experiment = dataclasses.replace(
    mnist_tiny.experiment,
    method="rgs",
    popsize=2,  # one antithetic pair: its mean gradient is within a few percent of that of many, see docs/method.md
    stdev_init=0.003,  # sigma: see the search in docs/results.md
)
