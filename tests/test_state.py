"Reading a network, a plan, an opening and teaching leave everything as it was, wherever the network keeps it"
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common import KD,X,assert_same,get_dls,learner,left,net,seed,state
from fasterdistill.loss import TaskLoss
from fasterdistill.losses import FitNet,SoftTarget
from fasterdistill.networks import look,stages
from fasterdistill.networks.as_it_was import as_it_was
from fasterdistill.teachers import Frozen

def planned(student, teacher, loss=None):
    "A plan of a Learner in training"
    learn = learner(student, get_dls(n=32), cbs=KD(teacher, loss or TaskLoss()+SoftTarget()))
    learn.model.train()
    learn.knowledge_distillation.plan()
    return learn

# ---- TorchScript, which keeps `training` outside of Python ----

def test_a_scripted_student_trains():
    learn = planned(torch.jit.script(net()), net(8, s=1))
    assert [m.training for m in learn.model.modules()]==[True]*len(list(learn.model.modules()))
    learn.fit(1)
    assert learn.model.state_dict()['layer1.1.num_batches_tracked']==1

class Counts(nn.Module):
    "Its attributes are TorchScript's own"
    n: int
    seen: list[int]
    def __init__(self):
        super().__init__()
        self.net,self.n,self.seen,self.mean = net(),0,[0],torch.zeros(1)
    def forward(self, x):
        self.n += 1
        self.seen.append(x.size(0))
        self.mean += x.mean()
        return self.net(x)

def test_attributes_of_torchscript():
    model = torch.jit.script(Counts()).train()
    stages(model, X[:4])
    assert (model.n,model.seen,model.mean.item(),model.training)==(0,[0],0.,True)

# ---- what moves in evaluation, and what starts with the first forward ----

def quantised(w, s=0):
    from torch.ao.quantization import QuantStub,get_default_qat_qconfig,prepare_qat
    model = nn.Sequential(QuantStub(), net(w, s=s)).train()
    model.qconfig = get_default_qat_qconfig('fbgemm')
    return prepare_qat(model)

def test_observers_of_quantised_networks():
    student,teacher = quantised(4),quantised(8, 1)
    was,theirs = state(student),state(teacher)
    learn = planned(student, teacher, TaskLoss()+FitNet().at('1.layer2'))
    assert_same(state(student), was)
    assert_same(state(teacher), theirs)
    learn.fit(1)
    assert_same(state(teacher), theirs)

class Starts(nn.Module):
    "Sets its scale by the first batch, and notes what it sees in many places"
    everywhere = []
    def __init__(self, w=4):
        super().__init__()
        seed(3)
        self.net,self.scale,self.ready = net(w),nn.Parameter(torch.ones(10)),False
        self.seen,self.by = [],{'size':{}}
        self.aside,self.array,self.draws = [nn.BatchNorm2d(1)],np.zeros(2),torch.Generator().manual_seed(1)
        self.numpys,self.pythons,self.cache = np.random.RandomState(0),random.Random(0),Cache()
        self.loose = torch.zeros(3)
    def forward(self, x):
        z = self.net(self.aside[0](x))
        if not self.ready: self.scale.data.copy_(1/z.detach().std(0))
        self.ready = True
        self.seen.append(len(x))
        self.everywhere.append(len(x))
        self.by['size'][len(x)] = 1
        self.array += 1
        self.loose.add_(1)
        self.cache.rows.append(z.detach())
        self.cache.n += 1
        noise = torch.rand(10, generator=self.draws)+self.numpys.rand()+self.pythons.random()
        return z*self.scale+1e-3*noise

class Cache:
    "Held by a module, and no module"
    def __init__(self): self.rows,self.n = [],0

def kept(m):
    "All that `Starts` may change"
    aside = state(m.aside[0])
    return (*map(repr, (m.ready,m.seen,m.by,m.array,m.loose,len(m.cache.rows),m.cache.n,m.everywhere,m.scale,aside)),
            repr(m.draws.get_state().tolist()),repr(m.numpys.get_state()),m.pythons.getstate(),*flags_of(m.aside[0]))

def flags_of(m): return m.training,repr(state(m))

def test_what_starts_with_the_first_forward():
    student,teacher = Starts(),Starts(8)
    was,theirs = kept(student),kept(teacher)
    learn = planned(student, teacher, TaskLoss()+FitNet().at('net.layer2'))
    assert kept(student)==was
    assert kept(teacher)==theirs
    learn.fit(1)
    Starts.everywhere.clear()
    assert kept(teacher)==theirs
    assert len(student.seen)==1+2                        # a batch of training, two of validation

def test_a_failure_leaves_nothing():
    student,teacher = Starts(),Starts(8)
    was,theirs = kept(student),kept(teacher)
    learn = learner(student, get_dls(n=32), cbs=KD(teacher, FitNet().at('net.layer2', 'net.nothing')))
    with pytest.raises(ValueError, match='net.nothing'): learn.fit(1)
    assert (kept(student),kept(teacher))==(was,theirs)

def test_lazy_layers_are_lazy_again():
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(3))
    look(model, X[:2])
    assert [type(m).__name__ for m in model]==['LazyConv2d','LazyBatchNorm2d','Flatten','LazyLinear']
    assert model(X[:2]).shape==(2,3)
    look(model, X[:2])
    assert model[3].in_features==4*6*6

# ---- networks whose train() and eval() do work ----

class Merging(nn.Linear):
    "Merges a second matrix into its weight when it goes to evaluation"
    def __init__(self, i, o):
        super().__init__(i, o)
        self.more,self.merged = nn.Parameter(torch.randn(o, i)),False
    def train(self, mode=True):
        if self.merged==mode: self.weight.data += self.more.data*(-1 if mode else 1)
        self.merged = not mode
        return super().train(mode)
    def forward(self, x): return super().forward(x) if self.merged else super().forward(x)+x@self.more.T

def merging(w, s=0):
    model = net(w, s=s)
    model.fc = Merging(4*w, 10)
    return model

def test_a_teacher_that_merges_weights():
    teacher = merging(8)
    was = state(teacher)
    learn = planned(merging(4), teacher)
    assert_same(state(teacher), was)
    learn.fit(1)
    assert_same(state(teacher), was)                     # to the last bit, which its own `train` does not bring back
    assert (teacher.fc.merged,teacher.training)==(False,True)
    assert left(learn, teacher)==[]

class Drops(nn.Module):
    "Its dropout is a function, which a traced graph has for good"
    def __init__(self, w):
        super().__init__()
        self.net = net(w)
    def forward(self, x): return F.dropout(self.net(x), .5, self.training)

def test_functional_dropout_of_a_feature_extractor():
    from torchvision.models.feature_extraction import create_feature_extractor
    def drops(m): return bool((m(X[:32])['dropout']==0).any())
    student,teacher = (create_feature_extractor(Drops(w), ['dropout']).train() for w in (4,8))
    learn = learner(student, get_dls(n=32), cbs=KD(Frozen(teacher, output='dropout'), SoftTarget(), output='dropout'),
                    loss_func=lambda o, y: F.cross_entropy(o['dropout'], y), metrics=[])
    said = look(teacher, X[:32]).raw['dropout']
    assert not (said==0).any()                           # read in evaluation
    learn.fit(1)
    assert drops(teacher)
    student.train()
    assert drops(student)

def test_an_inner_part_held_in_evaluation_stays_so():
    teacher = merging(8)
    teacher.fc.eval()
    was,modes = state(teacher),[m.training for m in teacher.modules()]
    planned(net(), teacher).fit(1)
    assert_same(state(teacher), was)
    assert [m.training for m in teacher.modules()]==modes
    assert teacher.fc.merged

# ---- what it costs ----

def test_ordinary_weights_are_not_copied():
    model = net(8)
    with as_it_was(model) as was: model(X[:8])
    assert [o for o in was.numbers() if isinstance(o.owner, nn.Parameter)]==[]
    with as_it_was(model) as was: pass
    assert was.keepers==[]
