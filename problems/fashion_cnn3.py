"""Fashion-MNIST: CNN3 certified at eps = 0.1, evolved from random weights. For a local copy see mnist_cnn3.py.

evocert run problems/fashion_cnn3.py
"""

import evocert

experiment = evocert.Experiment(
    data="fashion_mnist",
    network="cnn3",
    width=16,  # D = 24,330, as for MNIST
    mean=[0.2860],  # of the training images
    std=[0.3530],
    eps=0.1,  # as for MNIST, so that the two can be compared
    bound="ibp",
    method="pgpe",
    generations=20_000,  # a GPU's work: two cores take a few seconds for each
    popsize=256,
    batch_size=512,
    stdev_init=0.01,  # as for MNIST
    center_learning_rate=0.002,  # Adam
    eps_schedule=evocert.Schedule("smooth", end=0.6, first=0.0),  # slower than MNIST: the classes lie closer together
    learning_rate_schedule=evocert.Schedule("cosine", start=0.6, last=0.02),
    natural_every=10,
)
