"""The tests are about numbers that are the same everywhere: they run on the CPU, also where there is a GPU."""

import functools
import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks

import torch

torch.backends.mps.is_available = functools.cache(lambda: False)
