"""MNIST at eps = 0.1 on CNN3 with w=16, the literature's width: what the rows of the study in docs/results.md share.

    evocert run problems/mnist_w16.py

Each method of the study has a file of its own, problems/mnist_w16_METHOD.py, for IBP; tighter bounds by ``--set bound=crown-ibp``.
"""

import dataclasses

import mnist_tiny

experiment = dataclasses.replace(
    mnist_tiny.experiment,  # its budget and schedules too
    network="cnn3",
    width=16,  # D = 24,330, 22 times that of CNN3-tiny
)
