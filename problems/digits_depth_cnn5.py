"""Digits at eps = 0.1 on a CNN5 that is wide enough to learn and small enough for every bound in a population.

    evocert sweep problems/digits_depth_cnn5.py --grid method=grad,rgs --grid bound=ibp,crown-ibp,deeppoly --seeds 0,1,2,3,4
    evocert sweep problems/digits_depth_cnn5.py --grid bound=ibp,crown-ibp,deeppoly --seeds 0,1,2 \
        --set method=pgpe --set popsize=32 --set batch_size=32 --set control_points=2
"""

import dataclasses

import digits_tiny

import evocert

experiment = dataclasses.replace(
    digits_tiny.experiment,
    network=lambda shape, classes: evocert.networks.cnn5(
        shape, classes, mean=digits_tiny.experiment.mean, std=digits_tiny.experiment.std, width=2, hidden=16
    ),  # D = 660
)
