"""MNIST at eps = 0.1, CNN3-tiny: problems/mnist_tiny_pgpe.py with CROWN-IBP."""

import dataclasses

import mnist_tiny_pgpe

experiment = dataclasses.replace(mnist_tiny_pgpe.experiment, bound="crown-ibp")
