"""What networks do that is seldom thought of: hooks of the user, quantised activations, packed sequences, tuples,
lazy layers, weights that a reparametrisation makes, a fit inside of another"""
import warnings

import pytest
import torch
import torch.nn.functional as F
from common import KD,At,StepLosses,X,assert_same,get_dls,learner,left,net,refuses,seed,state
from torch import nn
from torch.nn.utils import parametrizations,prune

from fasterdistill.loss import TaskLoss,as_loss
from fasterdistill.losses import FCFD,Attention,FitNet,SoftTarget

# ---- forward hooks of the user ----

def doubles(m, args, out): return 2*out
def halves(m, args, out): return F.avg_pool2d(out, 2)
def in_pairs(m, args, out): return out,out.mean()

def hooked(hook, w=4, s=0):
    "Its second stage returns what a hook makes of its output"
    m = net(w, s=s)
    m.layer2.register_forward_hook(hook)
    if hook is in_pairs: m.layer3.register_forward_pre_hook(lambda m, args: args[0][:1])
    return m

@pytest.mark.parametrize('hook', [doubles,halves,in_pairs])
def test_hooks_that_change_what_a_layer_returns(hook):
    "The trial reads what a step does, which is what the next layer gets: here the same, without BatchNorm"
    name = 'layer2[0]' if hook is in_pairs else 'layer2'
    def size(fm_s): return fm_s[name].square().mean()
    m,plain,steps = hooked(hook),net(),StepLosses()
    for o in (m,plain):
        for i in (1,2,3): o.get_submodule(f'layer{i}')[1] = nn.Identity()
    z = hook(None, None, plain.layer2(plain.layer1(X[:32])))
    want = (z[0] if hook is in_pairs else z).square().mean().item()
    kd = KD(None, as_loss(size), weight=1., activations_student=name)
    learn = learner(m, get_dls(n=32, shuffle=False), metrics=[], cbs=[kd,steps])
    assert kd.plan(learn).rows[0].value==pytest.approx(want, rel=1e-5)
    learn.fit(1)
    assert steps.vals==pytest.approx([want], rel=1e-5)

@pytest.mark.parametrize('hook', [doubles,halves])
def test_no_cut_where_a_hook_would_run_twice(hook):
    "What is put in has been through it already"
    learn = learner(hooked(hook), get_dls(n=32), metrics=[])
    refuses(learn, "cannot be cut at 'layer2'", KD(hooked(hook, 8, 1), TaskLoss()+FCFD()))
    learn.fit(1, cbs=KD(hooked(hook, 8, 1), TaskLoss()+FitNet().at('layer2')+Attention().at('layer2')))

# ---- what layers return ----

class Attends(nn.Module):
    "Its attention returns a tuple, of which the second is None without weights"
    def __init__(self, w=16, s=0, weights=True):
        super().__init__()
        seed(s)
        self.emb,self.att,self.fc = nn.Linear(8, w),nn.MultiheadAttention(w, 2, batch_first=True),nn.Linear(w, 10)
        self.weights = weights
    def forward(self, x):
        z = self.emb(x[:,0])
        return self.fc((z+self.att(z, z, z, need_weights=self.weights)[0]).mean(1))

class Packed(nn.Module):
    "A recurrent layer on packed sequences"
    def __init__(self, w=8, s=0):
        super().__init__()
        seed(s)
        self.lstm,self.fc = nn.LSTM(8, w, batch_first=True),nn.Linear(w, 10)
    def forward(self, x):
        lengths = x[:,0].sum(2).gt(.5).sum(1).clamp(min=1).cpu()
        z = nn.utils.rnn.pack_padded_sequence(x[:,0], lengths, batch_first=True, enforce_sorted=False)
        return self.fc(self.lstm(z)[1][0][-1])

@pytest.mark.parametrize('make,layer,match', [
    (Attends, 'att', r"'att' of the student, which returns 2 items, not a tensor: name one of them, as in 'att\[0\]'"),
    (lambda w,s: Attends(w, s, False), 'att[1]', r"'att\[1\]' of the student \(Attends\): that is None on this batch"),
    (Packed, 'lstm[0]', r"which returns a PackedSequence, not a tensor$"),
    (Packed, 'lstm[1]', r"which returns 2 items, not a tensor$")], ids=['tuple','None','packed','within'])
@pytest.mark.parametrize('loss', [FitNet,Attention])
def test_what_is_no_tensor_is_named(make, layer, match, loss):
    refuses(learner(make(16, 0), get_dls(n=32), metrics=[]), match, KD(make(32, 1), TaskLoss()+loss().at(layer)))

@pytest.mark.parametrize('loss', [SoftTarget(),FitNet().at('fc:in'),FitNet().at('embedding'),FitNet().at('lstm[1][0]')],
                         ids=['predictions','input','embedding','deeper'])
def test_packed_sequences(loss):
    learn = learner(Packed(), get_dls(n=64), metrics=[])
    kd = KD(Packed(16, 1), TaskLoss()+loss)
    if '[1][0]' in repr(loss): return refuses(learn, 'is no name of a layer', kd)
    learn.fit(1, cbs=kd)
    assert left(learn)==[]

# ---- numbers that are quantised ----

class EightBits(nn.Module):
    "A network of eight-bit numbers inside"
    def __init__(self, m):
        super().__init__()
        from torch.ao.quantization import DeQuantStub,QuantStub,convert,get_default_qconfig,prepare
        self.i,self.m,self.o = QuantStub(),m,DeQuantStub()
        self.eval().qconfig = get_default_qconfig('fbgemm')
        prepare(self, inplace=True)(X[:64])
        convert(self, inplace=True)
    def forward(self, x): return self.o(self.m(self.i(x)))

def test_a_teacher_of_eight_bits():
    "Its layers are heard in float32; it is not cut inside of them"
    teacher = EightBits(net(8, bn=False, s=1))
    def size(fm_t): return fm_t['m.layer2'].square().mean()
    def learn(): return learner(net(), get_dls(n=32, shuffle=False), metrics=[])
    with torch.no_grad(): z = teacher.m.layer2(teacher.m.layer1(teacher.i(X[:32])))
    plan = KD(teacher, TaskLoss()+as_loss(size), activations_teacher='m.layer2').plan(learn())
    assert z.is_quantized
    assert plan.rows[1].value==pytest.approx(z.dequantize().square().mean().item(), rel=1e-5)
    learn().fit(1, cbs=KD(teacher, TaskLoss()+SoftTarget()+FitNet().at('layer2', 'm.layer2')))
    at = [f'layer{i}' for i in (1,2,3)]
    refuses(learn(), 'does not run on blanks', KD(teacher, TaskLoss()+FCFD().at(at, [f'm.{n}' for n in at])))

# ---- layers that are not made yet, weights that are made anew each time ----

def lazy(): return nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(10))

def test_lazy_layers():
    student = lazy()
    with pytest.raises(ValueError, match=r"'0.weight' of the student \(Sequential\) is lazy .* run it on a batch"):
        learner(student, get_dls(n=32), metrics=[]).fit(1, cbs=KD(net(8), SoftTarget()))
    refuses(learner(dls=get_dls(n=32), metrics=[]), 'of the teacher .* is lazy .* it has learned nothing yet',
            KD(lazy(), SoftTarget()))
    student(X[:2])
    learner(student, get_dls(n=32), metrics=[]).fit(1, cbs=KD(net(8), SoftTarget()))

def cut_down(m): return prune.l1_unstructured(m, 'weight', .5)
makers = dict(weight_norm=parametrizations.weight_norm, spectral_norm=parametrizations.spectral_norm, by_hooks=cut_down,
              spectral_norm_by_hooks=nn.utils.spectral_norm)

@pytest.mark.parametrize('loss', [SoftTarget,FCFD])
@pytest.mark.parametrize('name', makers)
def test_weights_that_are_made_in_the_forward(name, loss):
    "Vectors that move with each pass in training stay where they are but for the steps"
    def made(w, s=0):
        m = net(w, s=s)
        for i in (1,2,3): m.get_submodule(f'layer{i}')[0] = makers[name](m.get_submodule(f'layer{i}')[0])
        return m
    student,teacher = made(4),made(8, 1)
    twin = made(4)
    was,theirs = state(student),state(teacher)
    learn = learner(student, get_dls(n=32, shuffle=False), metrics=[], cbs=KD(teacher, TaskLoss()+loss()))
    learn.model.train()
    learn.knowledge_distillation.plan()
    assert_same(state(student), was)
    learn.fit(1, lr=0.)
    assert_same(state(teacher), theirs)
    learner(twin, get_dls(n=32, shuffle=False), metrics=[]).fit(1, lr=0.)
    assert_same(state(student), state(twin))             # one step, whatever was tried

# ---- a fit inside of another ----

def test_a_fit_inside_of_a_fit_with_the_same_teacher():
    "It takes off its own hooks, and none of the outer one's"
    teacher = net(8, s=1)
    was = state(teacher)
    def inner(l):
        if l.training: learner(net(s=5), get_dls(n=32), metrics=[]).fit(1, cbs=KD(teacher, TaskLoss()+FitNet()))
    def history(*cbs):
        learn = learner(net(), get_dls(n=96, shuffle=False), metrics=[], cbs=[KD(teacher, TaskLoss()+FitNet()),*cbs])
        with warnings.catch_warnings():
            warnings.simplefilter('error')               # a layer that is not read is left out with a warning
            learn.fit(1)
        assert left(learn, teacher)==[]
        return learn.knowledge_distillation.history
    alone = history()
    assert history(At('after_batch', inner))==alone
    assert_same(state(teacher), was)
