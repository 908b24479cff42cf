"""One thread per process: the models are tiny, and threads that outnumber the cores wait long."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy is loaded; also for processes that tests start

import torch

torch.set_num_threads(1)
