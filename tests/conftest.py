"""One thread a process: the models are tiny, and threads that outnumber the cores wait long."""

import os

import torch

os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
torch.set_num_threads(1)
