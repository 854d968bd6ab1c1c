"SSKD: the numbers of the authors' step, the teacher's head, and what a fit does to both networks"
import random
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import KD,X,At,assert_same,get_dls,learner,left,raising,real,refuses,state,tuples
from fastai.callback.mixup import CutMix,MixUp
from fastai.torch_core import TensorImage
from torch import nn
from torch.utils.data import DataLoader

from fasterdistill.loss import TaskLoss
from fasterdistill.losses.sskd import SSKD,fit_head,likeness,ranked_kept
from fasterdistill.teachers import Frozen

dtypes = pytest.mark.parametrize('dtype', [torch.float64,torch.float32], ids=['64','32'])
tol = {torch.float64:(1e-9,1e-6), torch.float32:(2e-5,1e-4)}
cases = dict(default={}, half=dict(keep_turned=.5, keep_alike=.5))

def vectors():
    with np.load(Path(__file__).parent/'vectors'/'sskd.npz') as d: return dict(d)

def given(v, dtype):
    ins = [torch.tensor(v[f'in_{k}'], dtype=dtype) for k in ('logits_student','logits_teacher','proj_student',
                                                             'proj_teacher')]
    for i in (0,2): ins[i].requires_grad_()
    return [*ins,torch.tensor(v['in_y'])]

@dtypes
@pytest.mark.parametrize('case', cases)
def test_vectors(case, dtype):
    "The total and its gradients, less the student's own loss on the labels, and each part by itself"
    v,(value_tol,grad_tol) = vectors(),tol[dtype]
    pred,t,proj_s,proj_t,y = given(v, dtype)
    value = SSKD(**cases[case]).loss(pred, t, proj_s, proj_t, y)
    own = .1*F.cross_entropy(pred[::4], y)
    np.testing.assert_allclose(own.item(), .1*v[f'out_ce_{case}'], rtol=value_tol)
    np.testing.assert_allclose(value.item(), v[f'out_total_{case}']-.1*v[f'out_ce_{case}'], rtol=value_tol)
    grads = torch.autograd.grad(value+own, (pred,proj_s))
    for g,k in zip(grads, ('logits','feat'), strict=True):
        want = v[f'grad_{k}_{case}']
        np.testing.assert_allclose(g.double().numpy(), want, rtol=0, atol=grad_tol*np.abs(want).max())
    for weights,name in (((1,0,0),'kd'), ((0,1,0),'transform_kd'), ((0,0,1),'selfsup_kd')):
        one = SSKD(**dict(zip(('upright','turned','alike'), weights, strict=True)), **cases[case])
        part = one.loss(pred, t, proj_s, proj_t, y)
        np.testing.assert_allclose(part.item(), v[f'out_{name}_{case}'], rtol=value_tol)

@pytest.mark.parametrize('case,ratios', [('default',(1.,.75)), ('half',(.5,.5))])
def test_vectors_of_what_is_kept(case, ratios):
    "As many rows, of the same ranks; which of several that rank alike is a matter of sorting"
    v = vectors()
    t,y = torch.tensor(v['in_logits_teacher']).double(),torch.tensor(v['in_y'])
    table = likeness(torch.tensor(v['in_proj_teacher']).double())
    np.testing.assert_allclose(table.numpy(), v['out_similarity_teacher'], rtol=1e-9, atol=1e-12)
    own = torch.arange(8).repeat_interleave(3)
    np.testing.assert_allclose(F.cross_entropy(table, own).item(), v['out_teacher_pretext_ce'], rtol=1e-9)
    views = t.unflatten(0, (8,4))[:,1:].flatten(0,1)
    for answers,right,ratio,name in ((views,y.repeat_interleave(3),ratios[0],'tf'), (table,own,ratios[1],'ss')):
        rank = (answers>answers.gather(1, right[:,None])).sum(1)
        want = torch.tensor(v[f'out_index_{name}_{case}'])
        assert rank[ranked_kept(answers, right, ratio)].sort().values.tolist()==rank[want].sort().values.tolist()

def test_extremes():
    "Logits at 50 and -50, vectors of zeros: finite, gradients too"
    g = torch.Generator().manual_seed(0)
    s,t = (100.*torch.randint(0, 2, (16,10), generator=g)-50 for _ in range(2))
    for h in (torch.zeros(16,6),1e4*torch.randn(16,6,generator=g)):
        pred,proj = s.clone().requires_grad_(),h.clone().requires_grad_()
        value = SSKD().loss(pred, t, proj, h.flip(0), torch.arange(4))
        assert value.isfinite()
        assert all(o.isfinite().all() for o in torch.autograd.grad(value, (pred,proj)))

def test_nothing_is_kept():
    "All answers wrong and none of them kept: that part is 0"
    z = torch.zeros(8,3)
    z[:,1] = 1
    assert SSKD(upright=0, alike=0, keep_turned=0).loss(torch.randn(8,3), z, z, z, torch.tensor([0,2]))==0
    assert SSKD(upright=0, alike=0, keep_turned=0).loss(torch.randn(8,3), z, z, z, torch.tensor([1,1]))>0
    assert SSKD(upright=0, alike=0, keep_turned=0).loss(torch.randn(8,3), z, z, z)>0              # nobody knows

# ---- the first step ----

def test_head_leaves_all_as_it_was(teacher):
    "After a fit and after an interrupt: the teacher, held in parts in training, its loader, and all generators"
    teacher.train()
    teacher.layer2.eval()
    dls = get_dls()
    was,modes,own = state(teacher),[m.training for m in teacher.modules()],dls.train.rng
    def rngs(): return torch.get_rng_state().tolist(),np.random.get_state()[1].tolist(),random.getstate(),own.getstate()
    before = rngs()
    def check():
        assert_same(state(teacher), was)
        assert [m.training for m in teacher.modules()]==modes
        assert dls.train.rng is own
        assert rngs()==before
        assert not any(m._forward_hooks for m in teacher.modules())
        assert all(p.requires_grad and p.grad is None for p in teacher.parameters())
    a,b,c = (fit_head(teacher, dls, 2, seed=s, progress=False) for s in (0,0,1))
    check()
    assert_same(state(a), state(b))
    assert not torch.equal(a[0].weight, c[0].weight)
    h = teacher.fc.register_forward_pre_hook(raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt): fit_head(teacher, dls, 2, progress=False)
    h.remove()
    check()

def test_head_of_whatever_teaches(teacher):
    "A network, a `Frozen`; data from a Learner, `DataLoaders`, one loader of fastai or of torch"
    dls = get_dls()
    want = state(fit_head(teacher, dls, 1, progress=False))
    learn = learner(dls=dls)
    for who,data in ((Frozen(teacher),learn), (teacher,learn), (teacher,dls.train)):
        assert_same(state(fit_head(who, data, 1, progress=False)), want)
    torchs = DataLoader(list(zip(X[:64], range(64))), batch_size=16)
    assert fit_head(teacher, torchs, 1, progress=False)[0].in_features==32
    for who in ([teacher],learner(teacher)):
        with pytest.raises(ValueError, match=r'such as Frozen\(learner\); here is a'): fit_head(who, dls)
    with pytest.raises(ValueError, match='makes its inputs of those of a Learner'): fit_head(Frozen(teacher), dls)
    with pytest.raises(ValueError, match='have to be square'):
        fit_head(teacher, DataLoader([(torch.rand(1,8,12),0)]*4, batch_size=2), 1, progress=False)

class Scaled(nn.Module):
    "A network of pictures and of a number for each"
    def __init__(self, m):
        super().__init__()
        self.m = m
    def forward(self, x, scale): return self.m(x*scale[:,None,None,None])

def test_head_of_two_inputs(teacher):
    "What comes beside a picture goes with all its positions"
    scale = torch.linspace(.5, 2, 64)
    one = DataLoader([(x*k,0) for x,k in zip(X, scale)], batch_size=16)
    two = DataLoader([(x,k,0) for x,k in zip(X, scale)], batch_size=16)
    a,b = fit_head(teacher, one, 1, progress=False),fit_head(Scaled(teacher), two, 1, progress=False)
    for k,o in a.state_dict().items(): torch.testing.assert_close(b.state_dict()[k], o, rtol=1e-4, atol=1e-6)

def test_teachers_own_inputs(teacher):
    "A head is made on what the network sees when it teaches: the same as on pictures that were normalised before"
    was,net_inp = state(teacher),Frozen(teacher, inputs=lambda x: 2*x-1)
    def scaled(x:TensorImage): return 2*x-1
    twice = get_dls(shuffle=False, after_batch=[scaled])
    a = fit_head(net_inp, learner(dls=get_dls(shuffle=False)), 1, progress=False)
    assert_same(state(a), state(fit_head(teacher, twice, 1, progress=False)))
    assert_same(state(teacher), was)
    assert net_inp.was is None

def test_head_learns(teacher):
    "By a loop of its own: the same steps"
    dls = get_dls(shuffle=False)
    head = fit_head(teacher, dls, 4, progress=False)
    torch.manual_seed(0)
    m = deepcopy(teacher).eval()
    mine = nn.Sequential(nn.Linear(32,32), nn.ReLU(), nn.Linear(32,32))
    opt = torch.optim.SGD(mine.parameters(), lr=.05, momentum=.9, weight_decay=5e-4)
    for epoch in range(4):
        opt.param_groups[0]['lr'] = (.05,.05,.005,.0005)[epoch]
        for i in range(3):
            x = real(X[32*i:32*i+32])
            views = torch.cat([torch.stack([torch.rot90(o, k, (1,2)) for k in range(4)]) for o in x])
            with torch.no_grad(): z = m.flat(m.pool(m.layer3(m.layer2(m.layer1(views)))))
            h = mine(z)
            rows = [[F.cosine_similarity(h[4*i+k], h[4*j], 0) for j in range(32)] for i in range(32) for k in (1,2,3)]
            loss = F.cross_entropy(torch.stack([torch.stack(r) for r in rows]), torch.arange(32).repeat_interleave(3))
            opt.zero_grad()
            loss.backward()
            opt.step()
    for k,o in mine.state_dict().items(): torch.testing.assert_close(head.state_dict()[k], o, rtol=1e-4, atol=1e-5)

# ---- in a Learner ----

def head_of(width=32):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(width,9), nn.Dropout(.5))

def kd(teacher, **kwargs): return KD(teacher, .1*TaskLoss()+SSKD(head_of(), **kwargs))

def test_a_step_by_hand(teacher):
    "The first step's value, from both networks as they are, the head in evaluation; its weights stay what they are"
    cb,given = kd(teacher),head_of()
    learn = learner(dls=get_dls(shuffle=False), cbs=cb)
    m,t,values = deepcopy(learn.model).train(),deepcopy(teacher).eval(),[]
    learn.fit(1, cbs=[At('after_batch', lambda l: values.append(cb.parts['sskd']) if l.training else None)])
    loss = cb.loss.losses[1]
    assert_same(state(loss.head), state(given))
    assert not loss.head.training
    assert left(learn, teacher)==[]

    x,y = zip(*list(learn.dls.train_ds)[:32])
    x,y = torch.stack([o.as_subclass(torch.Tensor) for o in x]),torch.tensor([int(o) for o in y])
    def views_of(f, x): return f(x),f(torch.stack([torch.rot90(x, k, (2,3)) for k in (1,2,3)], 1).flatten(0,1))
    def four(a, b): return torch.cat([torch.cat([a[i:i+1],b[3*i:3*i+3]]) for i in range(32)])
    def feature(m, x): return m.flat(m.pool(m.layer3(m.layer2(m.layer1(x)))))
    first = {}
    refit = learner(dls=get_dls(shuffle=False), cbs=(again := kd(teacher)))
    def note(l):
        if not first: first.update(state(again.loss.losses[1].project))
    refit.fit(1, cbs=[At('after_pred', note)])
    project = nn.Sequential(nn.Linear(16,16), nn.ReLU(), nn.Linear(16,16))
    project.load_state_dict(first)
    with torch.no_grad():
        z_s,z_t = (four(*views_of(lambda v, m=m: feature(m, v), x)) for m in (m,t))
        want = SSKD().loss(m.fc(z_s), t.fc(z_t), project(z_s), given.eval()(z_t), y)
    torch.testing.assert_close(torch.tensor(values[0]), want, rtol=1e-4, atol=1e-4)

@pytest.mark.parametrize('bn', ['batch','update'])
def test_averages(teacher, bn):
    "Those of the student's BatchNorms move with the turned pictures only where that is asked for"
    learn,was = learner(cbs=kd(teacher, bn=bn)),state(teacher)
    learn.fit(1)
    assert int(learn.model.layer1[1].num_batches_tracked)==3*(2 if bn=='update' else 1)
    assert_same(state(teacher), was)

@pytest.mark.parametrize('mix', [MixUp,CutMix])
def test_mixes_are_refused(teacher, mix):
    refuses(learner(), 'under MixUp and CutMix it is of two', kd(teacher), mix(), teachers=(teacher,))

def test_pictures_that_are_not_square(teacher):
    dls = tuples(F.interpolate(X[:160], (8,12)), torch.arange(160)%10)
    refuses(learner(dls=dls), r'have to be square, \(B,C,H,H\); the input is \(32, 1, 8, 12\)', kd(teacher),
            teachers=(teacher,))

def test_head_of_another_teacher(teacher):
    cb = KD(teacher, TaskLoss()+SSKD(head_of(24)))
    refuses(learner(), "the head takes no vectors of 32 numbers", cb, teachers=(teacher,))
    refuses(learner(), 'which is its first step', KD(teacher, TaskLoss()+SSKD()), teachers=(teacher,))

def test_the_users_head_stays(teacher):
    "It is copied: what the user holds goes on to be trainable"
    mine = head_of()
    loss = SSKD(mine)
    assert all(p.requires_grad for p in mine.parameters())
    assert not {id(p) for p in mine.parameters()} & {id(p) for p in loss.parameters()}
    assert repr(loss)=='SSKD(Sequential)'
    assert_same(state(loss.at('layer3').head), state(mine))
