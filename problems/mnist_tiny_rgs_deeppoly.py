"""MNIST at eps = 0.1, CNN3-tiny: problems/mnist_tiny_rgs.py with DeepPoly."""

import dataclasses

import mnist_tiny_rgs

experiment = dataclasses.replace(mnist_tiny_rgs.experiment, bound="deeppoly")
