"""Digits at eps = 0.1 on a CNN3 of as many parameters as the CNN5 of problems/digits_depth_cnn5.py: does depth matter?

    evocert sweep problems/digits_depth_cnn3.py --grid method=grad,rgs --grid bound=ibp,crown-ibp,deeppoly --seeds 0,1,2,3,4
    evocert sweep problems/digits_depth_cnn3.py --grid bound=ibp,crown-ibp,deeppoly --seeds 0,1,2 \
        --set method=pgpe --set popsize=32 --set batch_size=32 --set control_points=2
"""

import dataclasses

import digits_tiny

experiment = dataclasses.replace(
    digits_tiny.experiment,
    network="cnn3",
    width=3,  # D = 622
)
