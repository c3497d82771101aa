"""Digits at eps = 0.1, CNN3-tiny: evolution, from the same random weights as problems/digits_tiny.py.

evocert sweep problems/digits_tiny_pgpe.py --grid bound=ibp,crown-ibp,deeppoly --seeds 0,1,2,3,4 --out runs/digits_tiny_pgpe
"""

import dataclasses

import digits_tiny

experiment = dataclasses.replace(
    digits_tiny.experiment,
    method="pgpe",
    popsize=32,  # 16 pairs for 208 parameters
    batch_size=32,
    control_points=2,  # gradients that take most of the noise out of the differences
)
