"""MNIST at eps = 0.1, CNN3-tiny: problems/mnist_tiny_grad.py with DeepPoly."""

import dataclasses

import mnist_tiny_grad

experiment = dataclasses.replace(mnist_tiny_grad.experiment, bound="deeppoly")
