"""Digits at eps = 0.1 on CNN3-tiny: the study of docs/results.md where a run takes seconds and nothing is downloaded.

    evocert run problems/digits_tiny.py
    evocert sweep problems/digits_tiny.py --grid method=grad,rgs --grid bound=ibp,crown-ibp,deeppoly --seeds 0,1,2,3,4

PGPE has a file of its own, problems/digits_tiny_pgpe.py.
"""

import evocert

experiment = evocert.Experiment(
    data="digits",
    network="cnn3_tiny",  # on 8x8 pixels D = 208
    mean=[0.305],  # of the training images, in [0, 1] pixels
    std=[0.376],
    eps=0.1,  # at 0.05, on seed 0, tight bounds were the better ones for every method, gradient descent among them
    bound="ibp",
    method="grad",
    generations=1000,
    batch_size=64,
    popsize=2,  # of rgs: one antithetic pair
    stdev_init=0.01,  # sigma
    center_learning_rate=0.01,  # Adam
    clip_norm=10.0,  # as in the field's scripts
    eps_schedule=evocert.Schedule("smooth", end=0.5, first=0.0),  # from the natural loss to the full radius
    learning_rate_schedule=evocert.Schedule("cosine", start=0.5, last=0.02),  # falls once the radius is there
    natural_every=0,  # a figure to watch, which costs a forward pass
    select="last",  # 143 validation images are too few to choose by
    validations=10,
    attack=evocert.AttackSettings(steps=20, restarts=1),
)
