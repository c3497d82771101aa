"""CIFAR-10: CNN3 certified at eps = 2/255, evolved from random weights.

    evocert run problems/cifar10_cnn3.py

The images are downloaded by torchvision if they are absent (see mnist_cnn3.py for a local copy). On a subset of your own,
an .npz with x_train, y_train, x_test and y_test:

    evocert run problems/cifar10_cnn3.py --set data=npz --set data_path=FILE.npz
"""

import evocert

experiment = evocert.Experiment(
    data="cifar10",
    network="cnn3",
    width=16,  # D = 29,930
    mean=[0.4914, 0.4822, 0.4465],  # of the training images, as the field uses them
    std=[0.2023, 0.1994, 0.2010],
    eps=2 / 255,  # the radius at which tight bounds are expected to gain on CIFAR-10 (arXiv:2403.07095)
    bound="ibp",
    method="pgpe",
    generations=40_000,  # a GPU's work: two cores take several seconds for each
    popsize=256,
    batch_size=512,
    stdev_init=0.005,  # sigma: half of MNIST's, for the radius is small and the natural task is hard
    center_learning_rate=0.002,  # Adam
    eps_schedule=evocert.Schedule("smooth", end=0.5, first=0.0),
    learning_rate_schedule=evocert.Schedule("cosine", start=0.5, last=0.02),
    natural_every=10,
)
