"Reading a network, a plan, an opening and teaching leave everything as it was, wherever the network keeps it"
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from common import KD,At,X,Real,assert_close,assert_same,get_dls,in_float64,learner,left,net,seed,state
from fasterdistill.loss import TaskLoss
from fasterdistill.losses import FCFD,FitNet,SoftTarget
from fasterdistill.networks import Net,look,stages
from fasterdistill.networks.as_it_was import as_it_was,can_watch
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
    def note(l): steps.append((l.training, bool((l.pred['dropout']==0).any())))
    steps = []
    student,teacher = (create_feature_extractor(Drops(w), ['dropout']).train() for w in (4,8))
    learn = learner(student, get_dls(n=32), cbs=KD(Frozen(teacher, output='dropout'), SoftTarget(), output='dropout'),
                    loss_func=lambda o, y: F.cross_entropy(o['dropout'], y), metrics=[])
    said = look(teacher, X[:32]).raw['dropout']
    assert not (said==0).any()                           # read in evaluation
    learn.fit(1, cbs=At('after_pred', note))
    assert drops(teacher)
    assert steps==[(True,True),(False,False),(False,False)]          # the step trains with it, behind the opening

def test_an_inner_part_held_in_evaluation_stays_so():
    teacher = merging(8)
    teacher.fc.eval()
    was,modes = state(teacher),[m.training for m in teacher.modules()]
    planned(net(), teacher).fit(1)
    assert_same(state(teacher), was)
    assert [m.training for m in teacher.modules()]==modes
    assert teacher.fc.merged

# ---- what it costs ----

@pytest.mark.skipif(not can_watch(), reason='torch 2.4 cannot watch what is written, so all is copied')
def test_ordinary_weights_are_not_copied():
    model = net(8)
    with as_it_was(model) as was:
        model(X[:8])
        copied = [o for o in was.numbers() if isinstance(o.owner, nn.Parameter) and o.was is not None]
    assert not copied
    with as_it_was(model) as was: pass
    assert was.keepers==[]

# ---- extra passes take the network as the training step had it ----

def held(model):
    "In training, its norms in evaluation, with averages far from a batch's"
    model.train()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.add_(.3)
            m.eval()
    return model

@pytest.mark.parametrize('bn', ['batch','update','eval'])
def test_norms_held_in_evaluation_stay_so(bn):
    m,x = held(net()),X[:8]
    was,want = state(m),m(x)
    again = Net(m, x, ['layer1'])
    assert torch.equal(again(x, bn=bn).pred, want)
    assert torch.equal(again.resume('layer1', m.layer1(x), bn=bn).pred, want)
    assert_same(state(m), was)

def test_norms_that_trained_go_by_the_batch():
    "One held, the others not; and all of a teacher, which is in evaluation as a whole"
    m,x = held(net()),X[:8]
    m.layer3[1].train()
    z = m.layer2(m.layer1(x))
    conv,norm = m.layer3[0](z),m.layer3[1]
    by_batch = (conv-conv.mean((0,2,3), keepdim=True))/(conv.var((0,2,3), keepdim=True, correction=0)+norm.eps).sqrt()
    want = m.fc(by_batch.relu().mean((2,3)))
    again = Net(m, x)
    torch.testing.assert_close(again.resume('layer2', z).pred, want)
    assert norm.num_batches_tracked==0
    m.eval()
    torch.testing.assert_close(again.resume('layer2', z).pred, want)

def test_fcfd_beside_bnfreeze():
    "What the terms of the loss saw of the student on its mixed paths goes by the averages"
    from fastai.callback.training import BnFreeze
    m,seen = held(net()),[]
    for o in m.modules():
        if isinstance(o, nn.BatchNorm2d): o.requires_grad_(False)
    norm = m.layer3[1]
    norm.register_forward_hook(lambda o, args, out: seen.append((args[0].detach(),out.detach().clone())))
    learn = learner(m, get_dls(n=32), cbs=[BnFreeze(),KD(net(8, s=1), TaskLoss()+FCFD(direction='t2s', paths=2))])
    mean,var = norm.running_mean.clone(),norm.running_var.clone()
    learn.fit(1)
    assert len(seen)>5
    for z,out in seen:
        scale = (norm.weight/(var+norm.eps).sqrt())[:,None,None]
        torch.testing.assert_close(out, (z-mean[:,None,None])*scale+norm.bias[:,None,None])

class Notes(nn.Module):
    "Its last stage notes how many items it saw, in a list and in a dict"
    def __init__(self, w=4, s=0):
        super().__init__()
        self.net,self.seen,self.counts = net(w, s=s),[],{'items':0}
        self.net.layer3.register_forward_pre_hook(self.note)
    def note(self, module, args):
        self.seen.append(len(args[0]))
        self.counts['items'] += len(args[0])
    def forward(self, x): return self.net(x)

def test_extra_passes_leave_lists_and_dicts_alone():
    "FCFD runs the last stage twice more a step; only the ordinary pass of the student is noted, none of the teacher's"
    student,teacher = Notes(),Notes(8, 1)
    learn = learner(student, get_dls(n=48, bs=16), cbs=KD(teacher, TaskLoss()+FCFD()))
    learn.fit(1)
    assert student.seen[:3]==[16]*3
    assert sum(student.seen[3:])==len(learn.dls.valid_ds)
    assert student.counts=={'items': sum(student.seen)}
    assert (teacher.seen,teacher.counts)==([],{'items':0})

class Segments(nn.Module):
    "Runs its stages in a checkpointed segment"
    def __init__(self, checkpointed, w=4):
        super().__init__()
        self.net,self.checkpointed = net(w),checkpointed
    def segment(self, x):
        z = self.net.layer2(self.net.layer1(x))
        return self.net.layer3(z*z.sigmoid())
    def forward(self, x):
        z = checkpoint(self.segment, x, use_reentrant=False) if self.checkpointed else self.segment(x)
        return self.net.fc(self.net.flat(self.net.pool(z)))

@in_float64
def test_fcfd_of_a_checkpointed_student():
    "As without checkpoints, but for the averages, which PyTorch's own second run of a segment moves once more"
    def trained(checkpointed):
        names = ['layer1','layer2','layer3']
        loss = TaskLoss()+FCFD().at([f'net.{n}' for n in names], names)
        learn = learner(Segments(checkpointed), get_dls(n=64), cbs=[Real(),KD(net(8, s=1), loss)])
        learn.fit(1)
        steps = learn.model.net.layer1[1].num_batches_tracked.item()
        return {n: p.detach() for n,p in learn.model.named_parameters()},steps
    (a,once),(b,twice) = trained(False),trained(True)
    assert_close(a, b)
    assert (once,twice)==(2,4)
