"""MNIST: CNN3 certified at eps = 0.1, evolved from random weights.

    evocert run problems/mnist_cnn3.py

The images are downloaded by torchvision if they are absent. With a local copy (the folder that holds MNIST/):

    evocert run problems/mnist_cnn3.py --set data_dir=FOLDER --set download=false

or the environment variable EVOCERT_DATA=FOLDER.
"""

import evocert

experiment = evocert.Experiment(
    data="mnist",
    network="cnn3",
    width=16,  # D = 24,330, the CNN3 of the certified-training literature
    mean=[0.1307],  # of the training images, as the field uses them
    std=[0.3081],
    eps=0.1,  # the easier of MNIST's two usual radii, where tight bounds are expected to gain (arXiv:2403.07095)
    bound="ibp",
    method="pgpe",
    generations=20_000,  # a GPU's work: two cores take a few seconds for each. Try --set generations=20 --set popsize=16
    popsize=256,  # the signal of a step is about sqrt(popsize / 2 / D) of its length
    batch_size=512,
    stdev_init=0.01,  # sigma: larger noise wakes neurons that are provably dead, and widens every interval
    center_learning_rate=0.002,  # Adam
    eps_schedule=evocert.Schedule("smooth", end=0.4, first=0.0),  # slowly at first: the natural loss comes first
    learning_rate_schedule=evocert.Schedule("cosine", start=0.4, last=0.02),
    natural_every=10,  # the natural loss is a figure to watch, and costs a forward pass
)
