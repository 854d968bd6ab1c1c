"InfoNCE where labels and mixes multiply, at extremes, and in real fits"
import itertools
from functools import partial

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.mixup import CutMix,MixUp
from fastai.data.core import DataLoaders
from fastai.losses import BCEWithLogitsLossFlat,MSELossFlat
from fastai.optimizer import SGD
from fastai.torch_core import TensorImage
from torch import nn

from common import At,KD,X,Y,get_dls,learner,left,net,seed,state,assert_same
from fasterdistill.loss import TaskLoss
from fasterdistill.losses.infonce import InfoNCE
from fasterdistill.missing import MissingLabels

torch.set_num_threads(1)

def by_loops(s, t, tau=.07, normalize=True, symmetric=False, classes=None):
    "The loss of rows `s`, `t`; `classes` is a set for each item, and others with one in common are no wrong answers"
    s,t = (np.asarray(o, float) for o in (s,t))
    if normalize: s,t = (o/np.sqrt((o**2).sum(1, keepdims=True)) for o in (s,t))
    def find(a, b):
        res = []
        for i in range(len(a)):
            x = [a[i]@b[j]/tau for j in range(len(b)) if j==i or classes is None or not classes[i]&classes[j]]
            top = max(x)
            res.append(top+np.log(sum(np.exp(o-top) for o in x))-a[i]@b[i]/tau)
        return np.mean(res)
    return (find(s, t)+find(t, s))/2 if symmetric else find(s, t)

def call(loss, s, t, **given): return loss(fm_s=dict(a=s), fm_t=dict(a=t), **given)
def features(n=9, d=6, dtype=torch.float64): return torch.randn(2, n, d, dtype=dtype, generator=torch.Generator().manual_seed(0)).unbind()
def teacher(): return net(8, s=1)
def plain_dls(y): return DataLoaders.from_dsets([*zip(X[:96], y[:96])], [*zip(X[96:128], y[96:128])], bs=32, device='cpu')

# ---- which answers are wrong ----

y1,y2 = torch.tensor([0,0,1,2,2,2,3,-100,-100]),torch.tensor([1,4,1,0,2,3,4,0,-100])
def sets(*ys): return [{c for c in o if c>=0} for o in zip(*[y.tolist() for y in ys])]
labels = dict(integers=(y1,None,sets(y1)), int8=(y1.to(torch.int8),None,sets(y1)), column=(y1[:,None],None,sets(y1)),
              mixup=(y1,(y2,torch.linspace(.1, .9, 9)),sets(y1,y2)), cutmix=(y1,(y2,.3),sets(y1,y2)), apart=(torch.arange(9),None,None))

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
    loss,want = InfoNCE(mask_same_class=True),by_loops(s, t, classes=sets(y1))
    other = y1.where(y1>=0, 255)
    for y,crit in ((soft,None), (soft.half(),nn.CrossEntropyLoss()), (other,nn.CrossEntropyLoss(ignore_index=255)), (other.to(torch.uint8),nn.CrossEntropyLoss(ignore_index=255))):
        assert abs(call(loss, s, t, target=y, criterion=crit)-want)<1e-9
    mixed = call(loss, s, t, target=soft, mix=(soft[torch.arange(8, -1, -1)], .5))
    assert abs(mixed-by_loops(s, t, classes=sets(y1, y1.flip(0))))<1e-9

@pytest.mark.parametrize('symmetric', [False,True])
@pytest.mark.parametrize('normalize', [False,True])
def test_only_the_right_answer_left(normalize, symmetric):
    "All of one class: 0, and no gradient; one item of another class still learns"
    s,t = features()
    s.requires_grad_()
    loss,y = InfoNCE(normalize=normalize, symmetric=symmetric, mask_same_class=True, learn_tau=True),torch.zeros(9, dtype=torch.long)
    v = call(loss, s, t, target=y)
    gs = torch.autograd.grad(v, (s,loss.log_tau))
    assert v==0 and all((g==0).all() for g in gs)
    y[3] = 1
    g, = torch.autograd.grad(call(loss, s, t, target=y), s)
    assert g.isfinite().all() and g.abs().sum()>0

one_each = 'one class an item'
@pytest.mark.parametrize('y,criterion,match', [
    (torch.tensor([[1.,1,0],[0,1,0],[0,0,1]]), None, one_each), (torch.zeros(3,3), None, one_each), (torch.rand(3), None, one_each), (torch.ones(3,1), None, one_each),
    (torch.zeros(3,4,4, dtype=torch.long), None, one_each), (torch.eye(3).long(), None, one_each), (torch.eye(3), BCEWithLogitsLossFlat(), 'yes-or-no'),
    (torch.tensor([0,1,2]), MSELossFlat(), 'regression'), (None, None, 'target=')], ids=str)
def test_refused_labels(y, criterion, match):
    with pytest.raises(ValueError, match=match): call(InfoNCE(mask_same_class=True), *features(3), target=y, criterion=criterion)

# ---- numbers ----

@pytest.mark.parametrize('symmetric', [False,True])
def test_extreme_products(symmetric):
    "As large as float32 holds: finite, and right"
    s,t = (o.float()*3e17 for o in features())
    s.requires_grad_()
    v = call(InfoNCE(normalize=False, symmetric=symmetric), s, t)
    g, = torch.autograd.grad(v, s)
    assert v>1e36 and g.isfinite().all() and g.abs().max()>1e17
    np.testing.assert_allclose(v.item(), by_loops(s.detach(), t, normalize=False, symmetric=symmetric), rtol=1e-5)

def test_zero_features():
    "A student that says nothing of an item: `log(B)` for it; finite gradients"
    s,t = features()
    a = s.clone(); a[2] = 0
    a.requires_grad_()
    v = call(InfoNCE(), a, t)
    assert torch.autograd.grad(v, a)[0].isfinite().all()
    assert abs(call(InfoNCE(), torch.zeros_like(s), t)-np.log(9))<1e-9
    assert call(InfoNCE(), s, torch.zeros_like(t)).isfinite()

def test_keeps_dtype_and_leaves_subclasses():
    s,t = features()
    assert call(InfoNCE(), s, t).dtype==torch.float64
    v = call(InfoNCE(), TensorImage(s.float()[:,:,None,None].expand(-1,-1,2,2)), TensorImage(t.float()))
    assert type(v) is torch.Tensor and v.dtype==torch.float32 and abs(v-by_loops(s, t))<1e-4

def test_other_sizes():
    "Built on one size of input, and used on another; a layout that only the input tells"
    loss,x = InfoNCE(),lambda n: (torch.zeros(9,3,n,n),)
    z = lambda *shape: torch.randn(shape, generator=torch.Generator().manual_seed(1))
    loss.build(fm_s=dict(a=z(9,8,8,5)), fm_t=dict(a=z(9,17,7)), xb=x(32))          # channels last; a class token
    for n in (8,12):
        s,t = z(9,n,n,5),z(9,n*n//4+1,7)
        got = loss(fm_s=dict(a=s), fm_t=dict(a=t), xb=x(4*n))
        assert abs(got-by_loops(loss.project[0](s.mean((1,2))).detach(), t[:,1:].mean(1)))<1e-4

def test_wrong_inputs():
    s,t = features()
    with pytest.raises(ValueError, match='at least 2'): call(InfoNCE(), s[:1], t[:1])
    with pytest.raises(ValueError, match=r'\(9, 6\) and \(9, 5\).*linear layer'): call(InfoNCE(), s, t[:,:5])
    with pytest.raises(ValueError, match=r'\(9, 6, 1, 1, 1\)'): call(InfoNCE(), s[...,None,None,None], t)
    with pytest.raises(ValueError, match='a tuple'): InfoNCE().build(fm_s=dict(a=(s,s)), fm_t=dict(a=t))
    for tau in (0, -1, float('nan'), float('inf'), '1', None):
        with pytest.raises(ValueError, match='positive number'): InfoNCE(tau)

# ---- the temperature ----

def test_floor():
    for tau,floor in ((.07,.01),(.005,.005)):
        loss = InfoNCE(tau, learn_tau=True)
        assert abs(loss.temperature-tau)<1e-7
        with torch.no_grad(): loss.log_tau.fill_(-20.)
        assert abs(loss.temperature-floor)<1e-7 and loss.temperature.requires_grad
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

def test_tau_learns_in_a_fit():
    "From `tau` on, as a column: the mean over the epoch's batches"
    taus,nce = [],InfoNCE(tau=.2, learn_tau=True)
    kd = KD(teacher(), TaskLoss()+nce)
    learn = learner(cbs=[kd, At('after_pred', lambda l: taus.append(float(nce.temperature.detach())) if l.training else None)])
    learn.fit(2)
    assert abs(taus[0]-.2)<1e-6 and len(taus)==len(set(taus))==6 and nce.temperature.item()!=taus[5] and left(learn)==[]
    assert 'infonce_tau' in learn.recorder.metric_names
    for h,ts in zip(kd.history, (taus[:3],taus[3:]), strict=True): assert abs(h['infonce_tau']-np.mean(ts))<1e-6

def test_no_weight_decay():
    "All of one class, so that the loss has no gradient: decay alone moves the linear layer, and the temperature and the bias stay"
    nce,was = InfoNCE(mask_same_class=True, learn_tau=True),{}
    learn = learner(dls=get_dls(label=lambda y: 0), cbs=[KD(teacher(), TaskLoss()+nce), At('after_pred', lambda l: was.update(state(nce)), skip=0)], opt_func=SGD, wd=.5)
    learn.fit(1)
    now = state(nce)
    assert now.keys()==was.keys()=={'log_tau','project.0.weight','project.0.bias'}
    torch.testing.assert_close(now['project.0.weight'], was['project.0.weight']*(1-learn.lr*.5)**3)
    for k in ('log_tau','project.0.bias'): assert torch.equal(now[k], was[k])

# ---- fits ----

class Autocast(Callback):
    "The events of `to_bf16`, for this machine"
    order,run_valid = 10,False
    def before_batch(self): self.auto = torch.autocast('cpu', dtype=torch.bfloat16); self.auto.__enter__()
    def after_pred(self): self.was = self.pred.dtype; self.learn.pred = self.pred.float()
    def after_loss(self): self.auto.__exit__(None, None, None)

variants = dict(raw=dict(normalize=False), symmetric=dict(symmetric=True), masked=dict(mask_same_class=True), all=dict(symmetric=True, mask_same_class=True, learn_tau=True))
class Note(Callback):
    "Learned weights and temperature before each training batch"
    run_valid = False
    def __init__(self, nce): self.nce,self.seen = nce,[]
    def after_pred(self):
        tau = self.nce.temperature
        self.seen.append((*[p.detach().clone() for p in self.nce.project[0].parameters()], tau.item() if torch.is_tensor(tau) else tau))

def watched(**kwargs):
    "A loss, a list of what it is given and returns in training, and the callback that notes what it had learned"
    nce,calls = InfoNCE(**kwargs),[]
    nce.register_forward_hook(lambda m, a, given, out: calls.append((given,out.detach())) if torch.is_grad_enabled() else None, with_kwargs=True)
    return nce,calls,Note(nce)

def expected(nce, given, seen):
    "The loss by loops, on what it was given, with what it had learned"
    (s,),(t,),(w,b,tau) = given['fm_s'].values(),given['fm_t'].values(),seen
    ys = [given['target'],*(given['mix'] or ())[:1]] if nce.mask_same_class else []
    s,t = s.detach().double().mean((2,3))@w.T.double()+b,t.double().mean((2,3))
    return by_loops(s, t, tau, nce.normalize, nce.symmetric, sets(*ys) if ys else None)

@pytest.mark.parametrize('cbs', [[],[Autocast],[MixUp],[CutMix]], ids=['plain','autocast','mixup','cutmix'])
@pytest.mark.parametrize('kwargs', variants.values(), ids=variants)
def test_in_a_fit(kwargs, cbs):
    "Every batch as the loops say, on what the loss was given, in float32; parts that move; nothing left"
    nce,calls,note = watched(**kwargs)
    learn = learner(cbs=[KD(teacher(), TaskLoss()+nce), note, *[cb() for cb in cbs]])
    learn.fit(1)
    assert left(learn)==[] and len(calls)==3 and all(p.dtype==torch.float32 for p in nce.parameters())
    for (given,v),seen in zip(calls, note.seen, strict=True):
        (s,),(t,) = given['fm_s'].values(),given['fm_t'].values()
        assert s.dtype==t.dtype==v.dtype==torch.float32 and s.requires_grad and not t.requires_grad
        assert ('target' in given)==nce.mask_same_class and (given.get('mix') is not None)==(nce.mask_same_class and cbs in ([MixUp],[CutMix]))
        want = expected(nce, given, seen)
        assert abs(v-want)<1e-4*want
    assert not torch.equal(note.seen[0][0], nce.project[0].weight)

def test_batch_of_one():
    "The last batch goes without"
    nce,calls,_ = watched()
    kd = KD(teacher(), TaskLoss()+nce)
    learner(dls=get_dls(65, drop_last=False), cbs=kd).fit(1)
    assert [len(given['fm_s']['layer3']) for given,_ in calls]==[32,32] and 'info_nce' not in kd.parts and np.isfinite(kd.history[0]['info_nce'])

def test_missing_labels():
    "Items without one are like no other, and compared as all"
    nce,calls,note = watched(mask_same_class=True)
    learner(dls=plain_dls(Y.where(Y%2==1, -100)), cbs=[KD(teacher(), TaskLoss()+nce), MissingLabels(), note]).fit(1)
    for (given,v),seen in zip(calls, note.seen, strict=True):
        assert (given['target']==-100).sum()>8 and len(given['target'])==32
        assert abs(v-expected(nce, given, seen))<1e-4*v

@pytest.mark.parametrize('loss_func,label,out', [(BCEWithLogitsLossFlat(), lambda y: torch.eye(10)[y], 10), (MSELossFlat(), float, 1)], ids=['multi-label','regression'])
def test_refused_before_anything_is_trained(loss_func, label, out):
    model,y = net(classes=out),torch.stack([torch.as_tensor(label(int(o))) for o in Y[:128]])
    was = state(model)
    def fit(loss): learner(model, plain_dls(y), loss_func=loss_func, metrics=[], cbs=KD(net(8, out), loss)).fit(1)
    with pytest.raises(ValueError, match='one class an item'): fit(TaskLoss()+InfoNCE(mask_same_class=True))
    assert_same(state(model), was)
    fit(TaskLoss()+InfoNCE())                                              # without labels it does not matter what they are
    assert not torch.equal(state(model)['fc.weight'], was['fc.weight'])

def test_learns():
    "A student of the loss alone finds the own item among others it was not trained on, which an untrained one does not"
    x = torch.stack([o for o,_ in get_dls(64, 96).valid_ds]).as_subclass(torch.Tensor)
    seed()
    t = teacher()
    learner(t, get_dls(640), opt_func=partial(SGD, mom=.9)).fit(3)
    nce,model = InfoNCE(),net()
    learn = learner(model, get_dls(640), cbs=KD(t, 0*TaskLoss()+nce))
    def found():
        f = lambda m: m.eval()[:3](x).mean((2,3))
        with torch.no_grad(): s,t_ = nce.project[0](f(model)),f(t)
        return float((nn.functional.normalize(s)@nn.functional.normalize(t_).T).argmax(1).eq(torch.arange(len(x))).float().mean())
    nce.build(fm_s=dict(layer3=torch.zeros(2,16,2,2)), fm_t=dict(layer3=torch.zeros(2,32,2,2)))
    before = found()
    learn.fit(8)
    assert before<.1 and found()>max(.25, 3*before)
