"FRSKD against the authors' numbers, against a step written out by hand, who is held still, and many kinds of networks"
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import KD,At,StepLosses,assert_close,get_dls,in_float64,kl,learner,left,net,refuses,seed
from fastai.callback.mixup import CutMix,MixUp
from fastai.optimizer import SGD
from selves import batch,every,on_batch,three_steps
from torchvision.models import resnet18

from fasterdistill.examples import CNN
from fasterdistill.loss import TaskLoss
from fasterdistill.losses.fitnet import FitNet
from fasterdistill.losses.frskd import FRSKD
from fasterdistill.losses.ofd import OFD
from fasterdistill.networks.bifpn import BiFPN
from fasterdistill.networks.net import Net

both = pytest.mark.parametrize('dtype,rtol,gtol', [(torch.float64,1e-9,1e-6), (torch.float32,2e-5,1e-4)])

# -- the authors' numbers

def _vector(dtype):
    "The file, and answers and maps of student and self-teacher, all of which ask for gradients"
    v = np.load(Path(__file__).parent/'vectors'/'frskd_classification.npz')
    def t(name): return torch.tensor(v[f'in_{name}'], dtype=dtype, requires_grad=True)
    def maps(who): return {f'stage{i}': t(f'feat_{who}_{i}') for i in (0,1)}
    return v,t('logits_student'),t('logits_selfteacher'),maps('student'),maps('selfteacher'),torch.tensor(v['in_y'])

def near(got, want, tol):
    np.testing.assert_allclose(got.double(), want, rtol=0, atol=tol*np.abs(want).max())

def gradient_of_ce(z, y):
    z = z.detach().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(z, y), z)[0]

@both
def test_authors_numbers(dtype, rtol, gtol):
    v,z,zt,s,t,y = _vector(dtype)
    loss = FRSKD(alpha=float(v['par_alpha']), beta=float(v['par_beta']), T=float(v['par_T']))
    value = loss.loss(z, zt, s, t, y)
    np.testing.assert_allclose(value.item(), v['out_total']-v['out_ce_student'], rtol=rtol)
    logged = loss.take_logged()
    parts = 'out_ce_selfteacher','out_kd_T2','out_feature_code'
    np.testing.assert_allclose([o.item() for o in logged.values()], [v[k] for k in parts], rtol=rtol)

    value.backward()
    near(z.grad+gradient_of_ce(z, y), v['grad_logits_student'], gtol)           # the student's CE is `TaskLoss`'
    near(zt.grad, v['grad_logits_selfteacher'], gtol)                           # of its own CE alone
    near(zt.grad, gradient_of_ce(zt, y).double().numpy(), gtol)
    for i,m in enumerate(s.values()): near(m.grad, v[f'grad_feat_student_{i}'], gtol)
    assert all(m.grad is None for m in t.values())

@both
def test_authors_numbers_without_maps(dtype, rtol, gtol):
    v,z,zt,s,t,y = _vector(dtype)
    loss = FRSKD(alpha=float(v['par_alpha']), T=float(v['par_T']), feature=False)
    value = loss.loss(z, zt, s, t, y)
    np.testing.assert_allclose(value.item(), v['out_total_without_feature']-v['out_ce_student'], rtol=rtol)
    value.backward()
    assert all(m.grad is None for m in [*s.values(),*t.values()])

def test_paper_prints_a_length():
    "The file's other number, which the authors' code does not compute: the mean over items of the difference's length"
    v,_,_,s,t,_ = _vector(torch.float64)
    def where(m):
        a = m.detach().pow(2).mean(1).flatten(1)
        return a/a.norm(dim=1, keepdim=True)
    want = sum((where(a)-where(b)).norm(dim=1).mean() for a,b in zip(s.values(), t.values(), strict=True))
    np.testing.assert_allclose(want, v['out_feature_paper_l2'], rtol=1e-9)

@pytest.mark.parametrize('size', [50,-50])
def test_extremes(size):
    "Certain of opposite classes, and strong maps: finite in float32"
    z = torch.tensor([[size,-size,0.]], requires_grad=True)
    maps = {'a': torch.randn(1, 4, 5, 5)*50}
    value = FRSKD().loss(z, -z.detach(), maps, {'a': -maps['a'].flip(3)}, torch.tensor([1]))
    value.backward()
    assert value.isfinite()
    assert z.grad.isfinite().all()

# -- the pyramid and the loss once more, with functions alone

def _norm(m, z): return F.batch_norm(z, None, None, m.weight, m.bias, training=True, eps=m.eps)

def _lateral(m, z): return _norm(m[1], F.conv2d(z, m[0].weight)).clamp(min=0)

def _convs(m, z):
    "Two separable convolutions"
    for i in (0,4):
        z = F.conv2d(z, m[i].weight, padding=1, groups=len(m[i].weight))
        z = _norm(m[i+2], F.conv2d(z, m[i+1].weight))
        if not i: z = z.clamp(min=0)
    return z

def _mix(m, *maps):
    w = m.weight.clamp(min=0)
    return sum(a*o for a,o in zip(w/(w.sum()+1e-6), maps, strict=True))

def _twice(z): return z.repeat_interleave(2, 2).repeat_interleave(2, 3)
def _half(z):
    "The largest of 3×3 at every second place, with zeros behind"
    rows = F.pad(z, (0,1,0,1)).unfold(2, 3, 2).unfold(3, 3, 2)
    return rows.flatten(4).amax(4)

def pyramid_by_hand(p, f1, f2, f3):
    l1,l2,l3 = (_lateral(m, z) for m,z in zip(p.lateral, (f1,f2,f3), strict=True))
    p2 = _convs(p.conv_up[1], _mix(p.fuse_up[1], l2, _lateral(p.up[1], _twice(l3))))
    p1 = _convs(p.conv_up[0], _mix(p.fuse_up[0], l1, _lateral(p.up[0], _twice(p2))))
    own2,own3 = _lateral(p.skip[0], f2),_lateral(p.skip[1], f3)
    t2 = _convs(p.conv_down[0], _mix(p.fuse_down[0], own2, p2.clamp(min=0), _lateral(p.down[0], _half(p1))))
    t3 = _convs(p.conv_down[1], _mix(p.fuse_down[1], own3, _lateral(p.down[1], _half(t2))))
    return [z.clamp(min=0) for z in (p1,t2,t3)]

def test_pyramid():
    "Three stages, the weights of fusion all different and one negative"
    seed()
    maps = [torch.randn(3, 2*2**i, 16>>i, 8>>i).double() for i in range(3)]
    p = BiFPN(maps).double().train()
    with torch.no_grad():
        for f in [*p.fuse_up,*p.fuse_down]: f.weight.copy_(torch.rand(len(f.weight)))
        p.fuse_down[0].weight[1] = -1.
    got,want = p(maps),pyramid_by_hand(p, *maps)
    for a,b in zip(got, want, strict=True): torch.testing.assert_close(a, b, rtol=0, atol=1e-12)

def value_by_hand(loss, maps, pred, y, lam=1., other=None):
    "FRSKD at T=4; under a mix of `y` and `other`"
    made = pyramid_by_hand(loss.pyramid, *maps)
    zt = F.linear(made[-1].mean((2,3)), loss.classifier.weight, loss.classifier.bias)
    ce = F.cross_entropy(zt, y, reduction='none')
    if other is not None: ce = lam*ce + (1-lam)*F.cross_entropy(zt, other, reduction='none')
    def where(m):
        a = (m**2).sum(1).flatten(1)
        return a/a.norm(dim=1, keepdim=True)
    gaps = sum(((where(f)-where(t.detach()))**2).mean() for f,t in zip(maps, made, strict=True))
    return ce.mean() + loss.alpha*kl(pred, zt.detach()) + loss.beta*gaps

stages = ['layer1','layer2','layer3']

def given_by(student, x, y):
    view = Net(student, x, layers=stages)(x)
    return dict(fm_s=view.fm, pred=view.pred, target=y, xb=(x,))

def built(student, x, y, **kwargs):
    loss = FRSKD(**kwargs)
    loss.build(**given_by(student, x, y))
    return loss

@in_float64
def test_value_and_gradients():
    "Of every parameter of the student and of the self-teacher"
    seed()
    student,x,y = net(s=1).train(),torch.randn(6, 1, 16, 16),torch.arange(6)
    loss = built(student, x, y).double().train()
    params = {**dict(student.named_parameters()), **dict(loss.named_parameters())}
    def grads(f):
        given = given_by(student, x, y)
        value = f(given)
        gs = torch.autograd.grad(value, [*params.values()], allow_unused=True)
        return {'': value.detach(), **{n: g for n,g in zip(params, gs, strict=True) if g is not None}}
    got = grads(lambda given: loss(**given))
    want = grads(lambda given: value_by_hand(loss, [*given['fm_s'].values()], given['pred'], y))
    assert got.keys()=={'',*params}
    assert_close(got, want)

@in_float64
@pytest.mark.parametrize('mixing', [MixUp,CutMix])
def test_mixed(mixing):
    "Both labels for both answers, each item with its share; answers and maps of the mixed pictures"
    seed()
    loss,steps,seen,m = FRSKD(alpha=1., beta=10.),StepLosses(),[],mixing(1.)
    def note(learn): seen.append([o.as_subclass(torch.Tensor).clone() for o in (learn.x,learn.y,m.yb1[0],m.lam)])
    twin = net(s=1).train()
    learn = learner(net(s=1), get_dls(n=32), cbs=[KD(None, TaskLoss()+loss),m,steps], opt_func=SGD)
    learn.add_cb(At('before_backward', note))
    learn.fit(1, 0.)

    x,y,other,lam = seen[0]
    assert not torch.equal(y, other)
    assert .01<lam.min()<.99
    given = given_by(twin, x, y)
    pred = given['pred']
    a,b = (F.cross_entropy(pred, o, reduction='none') for o in (y,other))
    want = (lam*a+(1-lam)*b).mean() + value_by_hand(loss, [*given['fm_s'].values()], pred, y, lam, other)
    torch.testing.assert_close(torch.tensor(steps.vals[0]), want.detach(), rtol=0, atol=1e-10)

# -- who is held still

def reached(model, loss, x, y):
    "Names of the parameters of the student, and of the loss, that the loss has a gradient for"
    names = list(loss.names)
    view = Net(model, x, layers=names)(x)
    value = loss(fm_s=view.fm, pred=view.pred, target=y, xb=(x,))
    ps = dict(model.named_parameters())|{f'loss.{n}': p for n,p in loss.named_parameters()}
    gs = torch.autograd.grad(value, [*ps.values()], allow_unused=True)
    return {n for n,g in zip(ps, gs, strict=True) if g is not None and g.abs().max()>0}

def made_for_resnet(**kwargs):
    seed()
    model,x,y = resnet18(num_classes=10).train(),torch.randn(4, 3, 64, 64),torch.arange(4)
    view = Net(model, x, layers=[f'layer{i}' for i in (1,2,3,4)])(x)
    loss = FRSKD(**kwargs)
    loss.build(fm_s=view.fm, pred=view.pred, target=y, xb=(x,))
    return model,loss.train(),x,y

def test_its_own_loss_trains_the_stages():
    "60 of the 62 tensors of a ResNet-18, as measured with the authors' code: all but those of the classifier"
    model,loss,x,y = made_for_resnet(alpha=0., beta=0.)
    got = reached(model, loss, x, y)
    own = {n for n,_ in model.named_parameters()}
    assert len(own)==62
    assert own-got=={'fc.weight','fc.bias'}
    assert {f'loss.{n}' for n,_ in loss.named_parameters()}<=got

@pytest.mark.parametrize('alpha,beta,student', [(0.,0.,'nothing'), (1.,0.,'all'), (0.,1.,'stages')])
def test_backbone_alone(alpha, beta, student):
    "Without the path through the maps: answers teach the whole student, maps its stages"
    model,loss,x,y = made_for_resnet(alpha=alpha, beta=beta, backbone=False)
    got = reached(model, loss, x, y)
    own = {n for n,_ in model.named_parameters()}
    want = dict(nothing=set(), all=own, stages=own-{'fc.weight','fc.bias'})[student]
    assert got & own==want
    assert got-own=={f'loss.{n}' for n,_ in loss.named_parameters()}

@in_float64
@pytest.mark.parametrize('backbone', [True,False])
def test_self_teacher_learns_from_labels_alone(backbone):
    "Its gradients do not depend on `alpha` and `beta`"
    seed()
    student,x,y = net(s=1).train(),torch.randn(6, 1, 16, 16),torch.arange(6)
    loss = built(student, x, y, backbone=backbone).double().train()
    def grads():
        value = loss(**given_by(student, x, y))
        ps = dict(loss.named_parameters())
        return dict(zip(ps, torch.autograd.grad(value, [*ps.values()]), strict=True))
    one = grads()
    loss.alpha,loss.beta = 7.,0.
    assert_close(grads(), one, 1e-12)

# -- in Learners of many kinds of networks

@pytest.mark.parametrize('name,size', every)
def test_networks(name, size):
    loss = FRSKD(alpha=1., beta=10.)
    values,model = three_steps(name, size, loss)
    assert values[-1]<values[0]
    said = loss.self_teacher(model, batch(size, size)[0])
    assert said.pred.shape==(8,5)
    assert len(said.fm)>=2
    assert all(m.ndim==4 and m.shape[2]==m.shape[3] for m in said.fm.values())

@pytest.mark.parametrize('feature', [FitNet(),OFD(margins=[0.]*3),False], ids=['fitnet','overhaul','none'])
def test_other_features(feature):
    "In a Learner, where what they learn is built too"
    loss = FRSKD(alpha=1., beta=.01, feature=feature)
    values,_ = three_steps('cnn', 32, loss)
    assert values[-1]<values[0]
    parts = {n.split('.')[0] for n,_ in loss.named_parameters()}
    assert parts=={'pyramid','classifier'}|({'feature'} if feature else set())

def test_oblong():
    "13 rows behind 26, 7 behind 13: sizes that do not halve"
    seed()
    learn = on_batch(CNN(4, 5, ni=3), *batch(26, 50), KD(None, TaskLoss()+FRSKD(channels=16)))
    learn.fit(1)
    assert left(learn)==[]

def test_nothing_to_look_at():
    "A ResNet in torchvision's form on 32×32 ends in maps of 1×1"
    learn = on_batch(resnet18(num_classes=5), *batch(32, 32))
    refuses(learn, 'a map of 1×1 has one place to look at', KD(None, TaskLoss()+FRSKD()))
    learn.fit(1, cbs=[KD(None, TaskLoss()+FRSKD().at('stages[:-1]'))])
    learn.fit(1, cbs=[KD(None, TaskLoss()+FRSKD(feature=False))])

def test_one_stage():
    learn = on_batch(CNN(4, 5, depth=1, ni=3), *batch(32, 32))
    refuses(learn, 'needs two or more', KD(None, TaskLoss()+FRSKD()))
