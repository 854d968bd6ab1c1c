"""Distillation in several processes, with fastai's own `distrib_ctx`.

    torchrun --nproc_per_node 2 examples/several_processes.py      # on CPUs, or on two GPUs
    accelerate launch examples/several_processes.py                # on all GPUs there are
    python examples/several_processes.py                           # one process, for comparison
"""
import os
import sys

import torch
import torch.distributed as dist
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.distributed import DistributedDL
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.torch_core import num_distrib,rank_distrib,set_seed
from sklearn.datasets import load_digits
from torch import nn

from fasterdistill.all import *

gpu = torch.cuda.is_available()
bs = 64//max(num_distrib(), 1)     # of each process: all together see 64 items at a time

if not gpu:
    torch.set_num_threads(1)
    # fastai sends the order of the items from process to process by way of the GPUs. Without any, this does:
    def _broadcast(self, t, rank):
        t = torch.tensor(t)
        dist.broadcast(t, rank)
        return t.tolist()
    DistributedDL._broadcast = _broadcast

def data():
    "The 8×8 digits that scikit-learn carries: 1000 to train with, 797 to test on"
    d = load_digits()
    items = list(zip(torch.tensor(d.images/16, dtype=torch.float32)[:,None], torch.tensor(d.target)))
    train,valid = DataLoader(items[:1000], bs=bs, shuffle=True),DataLoader(items[1000:], bs=256)
    return DataLoaders(train, valid, device=torch.device('cuda' if gpu else 'cpu'))

def block(i, o, stride=1): return nn.Sequential(nn.Conv2d(i, o, 3, stride, 1), nn.BatchNorm2d(o), nn.ReLU())
def net(w):
    blocks = block(1, w),block(w, 2*w, 2),block(2*w, 4*w, 2)
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4*w, 10))

def train(model, epochs, cbs=None):
    "As in one process, but for the `with`; `(learner, accuracy)`"
    learn = Learner(data(), model, loss_func=CrossEntropyLossFlat(), metrics=accuracy, cbs=cbs)
    learn.remove_cb(ProgressCallback)
    with learn.no_logging(), learn.distrib_ctx(cpu=not gpu, sync_bn=gpu): learn.fit_one_cycle(epochs, 1e-2)
    return learn,learn.recorder.values[-1][2]

def say(text):
    if rank_distrib()==0: print(text, flush=True)

set_seed(0)
learn,acc = train(net(16), 4)
# The process of rank 0 writes, all read: without SyncBatchNorm the averages of BatchNorm are each process's own,
# and all should have one teacher
learn.save('several_processes_teacher')
teacher = learn.load('several_processes_teacher').model
say(f'teacher  {acc:.1%} of the test images, trained in {max(num_distrib(), 1)} process(es)')

set_seed(rank_distrib())           # the first weights of student and adapter differ now; all take those of rank 0
kd = KnowledgeDistillationCallback(teacher, TaskLoss() + SoftTarget(T=4) + FitNet())
student,acc = train(net(4), 8, kd)
say(f'student  {acc:.1%}')

# Student and adapter have the same weights everywhere, to the last bit
weights = torch.cat([p.detach().flatten() for p in (*student.model.parameters(),*kd.loss.parameters())])[None]
apart = (gather(weights)-weights).abs().max()
say(f'weights  {weights.shape[1]} in student and adapter, largest difference between processes {apart:g}')

if dist.is_initialized():
    dist.destroy_process_group()
    if not gpu:
        # on a busy machine Python's own way out has aborted a process now and then,
        # when threads of gloo still wanted the interpreter
        sys.stdout.flush()
        os._exit(0)
