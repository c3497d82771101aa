"""MNIST at eps = 0.1 on CNN3-tiny: what the rows of the study in docs/results.md share. Two cores take seconds to minutes.

    evocert run problems/mnist_tiny.py

Each row of the study has a file of its own, problems/mnist_tiny_METHOD.py for IBP and problems/mnist_tiny_METHOD_BOUND.py for
tighter bounds, which changes what belongs to the method and the bound.
"""

import evocert

experiment = evocert.Experiment(
    data="mnist",
    network="cnn3_tiny",  # two channels in both convolutions, D = 1,108: small enough for every bound in a population
    mean=[0.1307],  # of the training images, as the field uses them
    std=[0.3081],
    eps=0.1,
    bound="ibp",
    method="grad",
    generations=1500,  # 96,000 images: with 3,000 generations of 128, IBP under grad gains one point of certified accuracy
    batch_size=64,
    center_learning_rate=0.005,  # Adam
    clip_norm=10.0,  # as in the field's scripts
    eps_schedule=evocert.Schedule("smooth", end=0.5, first=0.0),  # from the natural loss to the full radius
    learning_rate_schedule=evocert.Schedule("cosine", start=0.5, last=0.02),  # falls once the radius is there
    natural_every=0,  # a figure to watch, which costs a forward pass
    select="last",  # no choice among centres: rows differ by what they trained on alone
    validations=10,
    attack=evocert.AttackSettings(steps=20, restarts=1),
)
