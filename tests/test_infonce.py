"InfoNCE where labels and mixes multiply, at extremes, and in real fits"
import itertools
from functools import partial

import numpy as np
import pytest
import torch
from common import (At,HalfCPU,KD,X,Y,get_dls,in_float64,learner,left,net,refuses,seed,state,tuples)
from fastai.callback.core import Callback
from fastai.callback.mixup import CutMix,MixUp
from fastai.losses import BCEWithLogitsLossFlat,MSELossFlat
from fastai.optimizer import SGD
from fastai.torch_core import TensorImage
from torch import nn

from fasterdistill.loss import TaskLoss
from fasterdistill.losses.infonce import InfoNCE
from fasterdistill.missing import MissingLabels

def unit(z): return z/np.sqrt((z**2).sum(1, keepdims=True))

def find(a, b, tau, classes):
    "How hard each row of `a` finds it to tell its own row of `b` from the others"
    res = []
    for i,row in enumerate(a):
        wrong_or_own = [j for j in range(len(b)) if j==i or classes is None or not classes[i]&classes[j]]
        x = [row@b[j]/tau for j in wrong_or_own]
        top = max(x)
        res.append(top+np.log(sum(np.exp(o-top) for o in x))-row@b[i]/tau)
    return np.mean(res)

def by_loops(s, t, tau=.07, normalize=True, symmetric=False, classes=None):
    "The loss of rows; `classes` is a set for each item, and others with one in common are no wrong answers"
    s,t = (np.asarray(o, float) for o in (s,t))
    if normalize: s,t = unit(s),unit(t)
    there = find(s, t, tau, classes)
    return (there+find(t, s, tau, classes))/2 if symmetric else there

def call(loss, s, t, **given): return loss(fm_s=dict(a=s), fm_t=dict(a=t), **given)
def features(n=9, d=6, dtype=torch.float64):
    return torch.randn(2, n, d, dtype=dtype, generator=torch.Generator().manual_seed(0)).unbind()

# ---- which answers are wrong ----

y1,y2 = torch.tensor([0,0,1,2,2,2,3,-100,-100]),torch.tensor([1,4,1,0,2,3,4,0,-100])
def sets(*ys): return [{c for c in o if c>=0} for o in zip(*[y.tolist() for y in ys])]
labels = dict(                                         # the labels, the mix, and the classes of each item
    integers=(y1,None,sets(y1)), int8=(y1.to(torch.int8),None,sets(y1)), column=(y1[:,None],None,sets(y1)),
    mixup=(y1,(y2,torch.linspace(.1, .9, 9)),sets(y1, y2)), cutmix=(y1,(y2,.3),sets(y1, y2)),
    apart=(torch.arange(9),None,None))

@pytest.mark.parametrize('normalize,symmetric', [*itertools.product((True,False), repeat=2)])
@pytest.mark.parametrize('case', labels)
def test_same_class(case, normalize, symmetric):
    (s,t),(y,mix,classes) = features(),labels[case]
    k = dict(tau=.5, normalize=normalize, symmetric=symmetric)
    v = call(InfoNCE(mask_same_class=True, **k), s, t, target=y, mix=mix)
    assert abs(v-by_loops(s, t, classes=classes, **k))<1e-9
    assert classes is None or abs(v-by_loops(s, t, **k))>1e-2

def test_soft_and_ignored_labels():
    s,t = features()
    soft = nn.functional.one_hot(y1.clamp(min=0), 5)*.9+.02
    soft[y1<0] = float('nan')                                              # without a label
    other = y1.where(y1>=0, 255)
    ignores = nn.CrossEntropyLoss(ignore_index=255)
    loss,want = InfoNCE(mask_same_class=True),by_loops(s, t, classes=sets(y1))
    for y,criterion in ((soft,None), (soft.half(),nn.CrossEntropyLoss()), (other,ignores),
                        (other.to(torch.uint8),ignores)):
        assert abs(call(loss, s, t, target=y, criterion=criterion)-want)<1e-9
    mixed = call(loss, s, t, target=soft, mix=(soft.flip(0),.5))
    assert abs(mixed-by_loops(s, t, classes=sets(y1, y1.flip(0))))<1e-9

@pytest.mark.parametrize('symmetric', [False,True])
@pytest.mark.parametrize('normalize', [False,True])
def test_only_the_right_answer_left(normalize, symmetric):
    "All of one class: 0, and no gradient; one item of another class still learns"
    s,t = features()
    s.requires_grad_()
    loss = InfoNCE(normalize=normalize, symmetric=symmetric, mask_same_class=True, learn_tau=True)
    y = torch.zeros(9, dtype=torch.long)
    v = call(loss, s, t, target=y)
    assert v==0
    assert all((g==0).all() for g in torch.autograd.grad(v, (s,loss.log_tau)))
    y[3] = 1
    g, = torch.autograd.grad(call(loss, s, t, target=y), s)
    assert g.isfinite().all()
    assert g.abs().sum()>0

one_each = 'one class an item'
@pytest.mark.parametrize('y,criterion,match', [
    (torch.tensor([[1.,1,0],[0,1,0],[0,0,1]]), None, one_each), (torch.zeros(3, 3), None, one_each),
    (torch.tensor([.2,.5,.9]), None, one_each), (torch.ones(3, 1), None, one_each),
    (torch.zeros(3, 4, 4, dtype=torch.long), None, one_each), (torch.eye(3).long(), None, one_each),
    (torch.eye(3), BCEWithLogitsLossFlat(), 'yes-or-no'), (torch.tensor([0,1,2]), MSELossFlat(), 'regression'),
    (None, None, 'target=')], ids=str)
def test_refused_labels(y, criterion, match):
    loss = InfoNCE(mask_same_class=True)
    with pytest.raises(ValueError, match=match): call(loss, *features(3), target=y, criterion=criterion)

# ---- numbers ----

@pytest.mark.parametrize('symmetric', [False,True])
def test_extreme_products(symmetric):
    "As large as float32 holds: finite, and right"
    s,t = (o.float()*3e17 for o in features())
    s.requires_grad_()
    v = call(InfoNCE(normalize=False, symmetric=symmetric), s, t)
    g, = torch.autograd.grad(v, s)
    assert v>1e36
    assert g.isfinite().all()
    assert g.abs().max()>1e17
    want = by_loops(s.detach(), t, normalize=False, symmetric=symmetric)
    np.testing.assert_allclose(v.item(), want, rtol=1e-5)

def test_zero_features():
    "A student that says nothing of an item: `log(B)` for it; finite gradients"
    s,t = features()
    a = s.clone()
    a[2] = 0
    a.requires_grad_()
    v = call(InfoNCE(), a, t)
    assert torch.autograd.grad(v, a)[0].isfinite().all()
    assert abs(call(InfoNCE(), torch.zeros_like(s), t)-np.log(9))<1e-9
    assert call(InfoNCE(), s, torch.zeros_like(t)).isfinite()

def test_keeps_dtype_and_leaves_subclasses():
    s,t = features()
    assert call(InfoNCE(), s, t).dtype==torch.float64
    maps = s.float()[:,:,None,None].expand(-1, -1, 2, 2)
    v = call(InfoNCE(), TensorImage(maps), TensorImage(t.float()))
    assert type(v) is torch.Tensor
    assert v.dtype==torch.float32
    assert abs(v-by_loops(s, t))<1e-4

def test_other_sizes():
    "Built on one size of input, and used on another; a layout that only the input tells"
    def x(n): return (torch.zeros(9, 3, n, n),)
    def z(*shape): return torch.randn(shape, generator=torch.Generator().manual_seed(1))
    loss = InfoNCE()
    loss.build(fm_s=dict(a=z(9, 8, 8, 5)), fm_t=dict(a=z(9, 17, 7)), xb=x(32))     # channels last; a class token
    for n in (8,12):
        s,t = z(9, n, n, 5),z(9, n*n//4+1, 7)
        got = call(loss, s, t, xb=x(4*n))
        assert abs(got-by_loops(loss.project[0](s.mean((1,2))).detach(), t[:,1:].mean(1)))<1e-4

def test_wrong_inputs():
    s,t = features()
    with pytest.raises(ValueError, match='at least 2'): call(InfoNCE(), s[:1], t[:1])
    with pytest.raises(ValueError, match=r'\(9, 6\) and \(9, 5\).*linear layer'): call(InfoNCE(), s, t[:,:5])
    with pytest.raises(ValueError, match=r'\(9, 6, 1, 1, 1, 1\)'): call(InfoNCE(), s[...,None,None,None,None], t)
    with pytest.raises(ValueError, match='a tuple'): InfoNCE().build(fm_s=dict(a=(s,s)), fm_t=dict(a=t))
    for tau in (0, -1, float('nan'), float('inf'), '1', None):
        with pytest.raises(ValueError, match='positive number'): InfoNCE(tau)

# ---- the temperature ----

def test_floor():
    for tau,floor in ((.07,.01), (.005,.005)):
        loss = InfoNCE(tau, learn_tau=True)
        assert abs(loss.temperature-tau)<1e-7
        with torch.no_grad(): loss.log_tau.fill_(-20.)
        assert abs(loss.temperature-floor)<1e-7
        assert loss.temperature.requires_grad
        call(loss, *features(dtype=torch.float32)).backward()
        assert loss.log_tau.grad.isfinite()

@pytest.mark.parametrize('tau', [.07,.005])
def test_reading_the_temperature_changes_nothing(tau):
    "Nor does computing the loss; below the floor it is the floor that is read, used and shown"
    loss,floor = InfoNCE(tau, learn_tau=True),min(.01, tau)
    for log_tau in (-20.,np.log(floor)-1e-3,np.log(floor)+1e-3,-1.):
        with torch.no_grad(): loss.log_tau.fill_(log_tau)
        was,version = loss.log_tau.item(),loss.log_tau._version
        shown = max(np.exp(was), floor)
        for _ in range(2): assert abs(loss.temperature-shown)<1e-6*shown
        v = call(loss, *features())
        assert (loss.log_tau.item(),loss.log_tau._version)==(was,version)
        assert abs(v-by_loops(*features(), shown))<1e-5*v and abs(loss.take_logged()['infonce_tau']-shown)<1e-6*shown

def misled(t): return torch.cat([t[:len(t)//2], t[len(t)//2:].flip(0)])       # half of the items are taken for another

def test_gradient_at_the_floor():
    "Down it ends there; up it is that of the floor itself"
    (_,t),loss = features(),InfoNCE(learn_tau=True)
    def slope(s, log_tau):
        with torch.no_grad(): loss.log_tau.fill_(log_tau)
        return torch.autograd.grad(call(loss, s, t), loss.log_tau)[0].item()
    assert slope(t, np.log(.011))>0 and slope(t, np.log(.009))==slope(t, -20.)==0
    up = slope(misled(t), np.log(.01)+1e-6)
    assert up<0 and slope(misled(t), -20.)==pytest.approx(up, rel=1e-4)

@pytest.mark.parametrize('opt', [partial(torch.optim.SGD, lr=.05, momentum=.9),partial(torch.optim.Adam, lr=.1)],
                         ids=['sgd','adam'])
def test_to_the_floor_and_back(opt):
    "While being surer is better, and when it is not any more; a step past the floor is soon made up for"
    t = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
    loss,taus = InfoNCE(learn_tau=True),[]
    opt = opt([loss.log_tau])
    for s in [t]*150+[misled(t)]*50:
        opt.zero_grad()
        call(loss, s, t).backward()
        nn.utils.clip_grad_norm_(loss.parameters(), 1.)
        opt.step()
        taus.append(loss.temperature.item())
    assert min(taus)==pytest.approx(.01) and taus[149]==pytest.approx(.01) and taus[-1]>.1

def test_tau_learns_in_a_fit(teacher):
    "From `tau` on, as a column: the mean over the epoch's batches"
    taus,nce = [],InfoNCE(tau=.2, learn_tau=True)
    def note(l):
        if l.training: taus.append(float(nce.temperature.detach()))
    kd = KD(teacher, TaskLoss()+nce)
    learn = learner(cbs=[kd,At('after_pred', note)])
    learn.fit(2)
    assert abs(taus[0]-.2)<1e-6
    assert len(taus)==len(set(taus))==6
    assert nce.temperature.item()!=taus[5]
    assert left(learn)==[]
    assert 'infonce_tau' in learn.recorder.metric_names
    for h,ts in zip(kd.history, (taus[:3],taus[3:]), strict=True): assert abs(h['infonce_tau']-np.mean(ts))<1e-6

@in_float64
def test_no_weight_decay(teacher):
    "All of one class, so that no gradient moves anything: only the linear layer decays, not temperature and bias"
    nce,was = InfoNCE(mask_same_class=True, learn_tau=True),{}
    start = At('after_pred', lambda l: was.update(state(nce)), skip=0)
    learn = learner(dls=get_dls(label=lambda y: 0), cbs=[KD(teacher, TaskLoss()+nce),start], opt_func=SGD, wd=.5)
    learn.fit(1)
    now = state(nce)
    assert now.keys()==was.keys()=={'log_tau','project.0.weight','project.0.bias'}
    decayed = was['project.0.weight']*(1-learn.lr*.5)**3
    torch.testing.assert_close(now['project.0.weight'], decayed, rtol=0, atol=1e-10)
    for k in ('log_tau','project.0.bias'): assert torch.equal(now[k], was[k])

# ---- fits ----

variants = dict(
    raw=dict(normalize=False), symmetric=dict(symmetric=True), masked=dict(mask_same_class=True),
    all=dict(symmetric=True, mask_same_class=True, learn_tau=True))

class Note(Callback):
    "Learned weights and temperature before each training batch"
    run_valid = False
    def __init__(self, nce): self.nce,self.seen = nce,[]
    def after_pred(self):
        weight,bias = [p.detach().clone() for p in self.nce.project[0].parameters()]
        self.seen.append((weight,bias,float(self.nce.temperature)))

def watched(**kwargs):
    "A loss, a list of what it is given and returns in training, and the callback that notes what it had learned"
    nce,calls = InfoNCE(**kwargs),[]
    def note(m, args, given, out):
        if torch.is_grad_enabled(): calls.append((given,out.detach()))
    nce.register_forward_hook(note, with_kwargs=True)
    return nce,calls,Note(nce)

def expected(nce, given, seen):
    "The loss by loops, on what it was given, with what it had learned"
    (s,),(t,),(w,b,tau) = given['fm_s'].values(),given['fm_t'].values(),seen
    s,t = s.detach().double().mean((2,3))@w.T.double()+b,t.double().mean((2,3))
    classes = None
    if nce.mask_same_class: classes = sets(given['target'], *(given['mix'] or ())[:1])
    return by_loops(s, t, tau, nce.normalize, nce.symmetric, classes)

@pytest.mark.parametrize('cbs', [[],[HalfCPU],[MixUp],[CutMix]], ids=['plain','autocast','mixup','cutmix'])
@pytest.mark.parametrize('kwargs', variants.values(), ids=variants)
def test_in_a_fit(teacher, kwargs, cbs):
    "Every batch as the loops say, on what the loss was given, in float32; parts that move; nothing left"
    nce,calls,note = watched(**kwargs)
    learn = learner(cbs=[KD(teacher, TaskLoss()+nce),note,*[cb() for cb in cbs]])
    learn.fit(1)
    assert left(learn)==[]
    assert len(calls)==3
    assert all(p.dtype==torch.float32 for p in nce.parameters())
    for (given,v),seen in zip(calls, note.seen, strict=True):
        (s,),(t,) = given['fm_s'].values(),given['fm_t'].values()
        assert s.dtype==t.dtype==v.dtype==torch.float32
        assert s.requires_grad
        assert not t.requires_grad
        assert ('target' in given)==nce.mask_same_class
        assert (given.get('mix') is not None)==(nce.mask_same_class and cbs in ([MixUp],[CutMix]))
        want = expected(nce, given, seen)
        assert abs(v-want)<1e-4*want
    assert not torch.equal(note.seen[0][0], nce.project[0].weight)

def test_batch_of_one(teacher):
    "The last batch goes without"
    nce,calls,_ = watched()
    kd = KD(teacher, TaskLoss()+nce)
    learner(dls=get_dls(65, drop_last=False), cbs=kd).fit(1)
    assert [len(given['fm_s']['layer3']) for given,_ in calls]==[32,32]
    assert 'info_nce' not in kd.parts
    assert np.isfinite(kd.history[0]['info_nce'])

def test_missing_labels(teacher):
    "Items without one are like no other, and compared as all"
    nce,calls,note = watched(mask_same_class=True)
    dls = tuples(X, Y.where(Y%2==1, -100), valid=32)
    learner(dls=dls, cbs=[KD(teacher, TaskLoss()+nce),MissingLabels(),note]).fit(1)
    for (given,v),seen in zip(calls, note.seen, strict=True):
        assert (given['target']==-100).sum()>8
        assert len(given['target'])==32
        assert abs(v-expected(nce, given, seen))<1e-4*v

@pytest.mark.parametrize('loss_func,y', [(BCEWithLogitsLossFlat(),torch.eye(10)[Y]), (MSELossFlat(),Y.float())],
                         ids=['multi-label','regression'])
def test_refused_before_anything_is_trained(loss_func, y):
    out = 10 if y.ndim==2 else 1
    def make(): return learner(net(classes=out), tuples(X, y, valid=32), loss_func=loss_func, metrics=[])
    t = net(8, out)
    refuses(make(), 'one class an item', KD(t, TaskLoss()+InfoNCE(mask_same_class=True)))
    learn = make()
    was = state(learn.model)
    learn.fit(1, cbs=KD(t, TaskLoss()+InfoNCE()))                          # it matters not what is not read
    assert not torch.equal(state(learn.model)['fc.weight'], was['fc.weight'])

def unit_rows(z): return nn.functional.normalize(z)

def test_learns(teacher):
    "A student of the loss alone finds the own item among others it was not trained on; an untrained one does not"
    x = torch.stack([o for o,_ in get_dls(64, 96).valid_ds]).as_subclass(torch.Tensor)
    seed()
    learner(teacher, get_dls(640)).fit(3)
    nce,model = InfoNCE(),net()
    nce.build(fm_s=dict(layer3=torch.zeros(2, 16, 2, 2)), fm_t=dict(layer3=torch.zeros(2, 32, 2, 2)))
    def feature(m): return m.eval()[:3](x).mean((2,3))
    def found():
        with torch.no_grad(): s,t = nce.project[0](feature(model)),feature(teacher)
        nearest = (unit_rows(s)@unit_rows(t).T).argmax(1)
        return float(nearest.eq(torch.arange(len(x))).float().mean())
    before = found()
    learner(model, get_dls(640), cbs=KD(teacher, 0*TaskLoss()+nce)).fit(8)
    assert before<.1
    assert found()>max(.25, 3*before)
