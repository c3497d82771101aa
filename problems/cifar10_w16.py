"""CIFAR-10 at eps = 2/255 on CNN3 with w=16: what the rows of the study in docs/results.md share.

    evocert run problems/cifar10_w16.py

On a subset, as the rows of docs/results.md, in an .npz with x_train, y_train, x_test and y_test:

    evocert run problems/cifar10_w16.py --set data=npz --set data_path=FILE.npz

Each method of the study has a file of its own, problems/cifar10_w16_METHOD.py, for IBP; tighter bounds by
``--set bound=crown-ibp``, the larger radius by ``--set eps=8/255``.
"""

import dataclasses

import mnist_w16

experiment = dataclasses.replace(
    mnist_w16.experiment,  # its budget and schedules too
    data="cifar10",
    mean=[0.4914, 0.4822, 0.4465],  # of the training images, as the field uses them
    std=[0.2023, 0.1994, 0.2010],
    eps=2 / 255,
    center_learning_rate=0.002,  # Adam
)
