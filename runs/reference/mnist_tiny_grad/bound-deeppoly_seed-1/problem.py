"""MNIST at eps = 0.1, CNN3-tiny: gradient descent on the certified loss itself.

evocert sweep problems/mnist_tiny_grad.py --grid bound=ibp,crown-ibp,deeppoly --seeds 0,1,2 --out runs/mnist_tiny_grad
"""

from mnist_tiny import experiment

__all__ = ["experiment"]
