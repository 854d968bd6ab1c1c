"Losses that learn soft labels of their own, from a class or from a view, in Learners: gradients by hand, any network"
import random
from copy import deepcopy
from functools import cache

import pytest
import timm
import torch
import torch.nn.functional as F
from common import (KD,At,X,Y,assert_close,assert_same,get_dls,in_float64,learner,left,net,raising,real,state,tuples,
                    unlabelled)
from fastai.callback.mixup import CutMix,MixUp
from fastai.vision.augment import Flip
from fastai.vision.learner import create_vision_model
from torch import nn
from torchvision.models import resnet18

from fasterdistill.checkpoint import Checkpoint
from fasterdistill.loss import TaskLoss
from fasterdistill.losses.consistency import CSKD,DDGSD,class_partners,shuffle_in_pairs
from fasterdistill.losses.dml import DML
from fasterdistill.losses.logits import SoftTarget
from fasterdistill.losses.sad import SAD
from fasterdistill.losses.uskd import USKD
from fasterdistill.teachers import EMA

n = 12

def one_batch(): return tuples(real(X[:n]), Y[:n], n=n, valid=0, bs=n)

def grads_after(loss, model, *cbs, dls=None):
    "The student's gradients of one step, by name, and the callback"
    seen,kd = {},KD(None, loss)
    note = At('before_step', lambda learn: seen.update({k: p.grad.clone() for k,p in learn.model.named_parameters()}))
    learn = learner(model, dls or one_batch(), cbs=[kd,note,*cbs])
    learn.fit(1)
    assert left(learn)==[]
    return seen,kd

def grads_of(value, model):
    return {k: g for (k,_),g in zip(model.named_parameters(), torch.autograd.grad(value, [*model.parameters()]),
                                    strict=True)}

def kl(z, target, T=4.):
    p = (target.detach()/T).softmax(1)
    return T*T*(p*(p.log()-F.log_softmax(z/T, 1))).sum(1)

# ---- gradients ----

@in_float64
def test_ddgsd_trains_both_views():
    "Each from the other, held still; both through the network, the view's own labels too"
    model = net(bn=False)
    twin,x,y = deepcopy(model),real(X[:n]),Y[:n]
    a,b = twin(x),twin(x.flip(-1))
    za,zb = twin[:-1](x),twin[:-1](x.flip(-1))
    far = (za.mean()-zb.mean()).pow(2)
    want = (F.cross_entropy(a, y)+F.cross_entropy(b, y))/2+kl(a, b).mean()+kl(b, a).mean()+.5*far
    got,kd = grads_after(.5*TaskLoss()+DDGSD(views=lambda x: x.flip(-1), features=.5), model)
    assert_close(got, grads_of(want, twin))
    assert kd.parts['ddgsd_task']==pytest.approx(F.cross_entropy(b, y).item())
    assert kd.parts['ddgsd_features']==pytest.approx(far.item())

@in_float64
def test_cskd_trains_items_and_not_their_partners():
    model = net(bn=False)
    twin,y = deepcopy(model),Y[:n]%3
    z = twin(real(X[:n]))
    partner,paired = class_partners(y, torch.Generator().manual_seed(7))
    assert paired.all() and torch.equal(y[partner], y) and (partner!=torch.arange(n)).all()
    seen,_ = grads_after(TaskLoss()+CSKD(seed=7), model, dls=tuples(real(X[:n]), y, n=n, valid=0, bs=n))
    assert_close(seen, grads_of(F.cross_entropy(z, y)+kl(z, z[partner]).mean(), twin))

@in_float64
def test_uskd_holds_weights_and_order_still():
    "And trains the stage that the weak classifier reads, by its own cross-entropy"
    model,loss = net(bn=False),USKD(mu=.3)
    twin,x,y = deepcopy(model),real(X[:n]),Y[:n]
    kd = KD(None, TaskLoss()+loss)
    seen = {}
    def note(learn):
        seen.update({k: p.grad.clone() for k,p in learn.model.named_parameters()})
        seen['fc of the loss'] = loss.fc.weight.grad.clone()
    learn = learner(model, one_batch(), cbs=[kd,At('before_step', note)])
    weak = deepcopy(kd.ready(learn).losses[1].fc)
    learn.fit(1)
    z2 = twin.layer2(twin.layer1(x))
    u,z,q = weak(z2.mean((2,3))),twin(x),torch.eye(10)[y]
    p,log_p = z.softmax(1).detach(),F.log_softmax(z, 1)
    own = p[range(n),y]
    score = u.softmax(1).detach()
    score = score/(1-score[range(n),y]+1e-6)[:,None]+p.log()/(1-own.log()+1e-6)[:,None]
    Z = torch.zeros(n, 10)
    for i in range(n):
        for rank,c in enumerate(score[i].argsort(descending=True).tolist()): Z[i,c] = (c!=y[i])/(rank+1)
    Z = Z/Z.sum(1, keepdim=True)
    log_q = log_p-torch.log1p(-z.softmax(1)[range(n),y])[:,None]
    w = own**2+1-(own**2).mean()
    want = -(w*log_p[range(n),y]).mean()-.1*(Z*log_q).sum(1).mean()
    want = want-.3*((.9*q+.01)*F.log_softmax(u, 1)).sum(1).mean()+F.cross_entropy(z, y)
    fc, = torch.autograd.grad(want, [weak.weight], retain_graph=True)
    assert_close(seen, grads_of(want, twin)|{'fc of the loss': fc})

# ---- norms, mixed labels, views ----

def test_averages_move_with_both_views():
    "And with nothing else: neither `plan` nor the trial at the opening counts"
    model = net()
    kd = KD(None, TaskLoss()+DDGSD())
    learn = learner(model, get_dls(n=64, bs=32), cbs=kd)
    kd.plan()
    assert model.layer1[1].num_batches_tracked==0
    learn.fit(2)
    assert model.layer1[1].num_batches_tracked==2*2*2

@in_float64
@pytest.mark.parametrize('mix', [MixUp,CutMix])
def test_the_view_of_a_mixed_batch_has_mixed_labels(mix):
    model,seen = net(bn=False),{}
    twin = deepcopy(model)
    def note(learn):
        m = learn.mix_up if mix is MixUp else learn.cut_mix
        seen.update(x=learn.x.clone(), y=learn.y, y1=m.yb1[0], lam=m.lam)
    _,kd = grads_after(TaskLoss()+DDGSD(views=lambda x: x.flip(-1)), model, mix(), At('before_batch', note, order=8))
    b = twin(seen['x'].flip(-1))
    one,two = (F.cross_entropy(b, seen[k].long(), reduction='none') for k in ('y','y1'))
    want = (seen['lam']*one+(1-seen['lam'])*two).mean()
    assert kd.parts['ddgsd_task']==pytest.approx(want.item(), rel=1e-6)

@in_float64
def test_uskd_weighs_mixed_labels_by_their_shares():
    model,seen,loss = net(bn=False),{},USKD(beta=0, mu=0)
    twin = deepcopy(model)
    def note(learn): seen.update(x=learn.x.clone(), y=learn.y, y1=learn.mix_up.yb1[0], lam=learn.mix_up.lam)
    _,kd = grads_after(TaskLoss()+loss, model, MixUp(), At('before_batch', note, order=8))
    log_p = F.log_softmax(twin(seen['x']), 1)
    labels = [sorted({int(a): 0, int(b): 0}) for a,b in zip(seen['y'], seen['y1'], strict=True)]
    share = [{c: sum(w for k,w in ((int(a), float(l)), (int(b), 1-float(l))) if k==c) for c in o}
             for a,b,l,o in zip(seen['y'], seen['y1'], seen['lam'], labels, strict=True)]
    ranked = [sorted(s, key=lambda c, s=s: -s[c]) for s in share]
    total = 0.
    for i,order in enumerate(ranked):
        for k,c in enumerate(order):
            like = [log_p[j,o[k]].exp().item()**2 for j,o in enumerate(ranked) if len(o)>k]
            total -= (log_p[i,c].exp().item()**2+share[i][c]-sum(like)/len(like))*log_p[i,c].item()
    assert kd.parts['uskd']==pytest.approx(total/n)

def test_views_teach_each_other_without_labels():
    loss = DDGSD(views=lambda x: x.flip(-1))
    kd = KD(None, loss, weight=1.)
    learn = learner(net(), unlabelled(), loss_func=nn.CrossEntropyLoss(), cbs=kd)
    was = state(learn.model)
    learn.fit(1)
    assert kd.parts['ddgsd']==pytest.approx(kd.parts['ddgsd_apart']+5e-4*kd.parts['ddgsd_features'])
    assert not torch.equal(learn.model.layer1[0].weight, was['layer1.0.weight'])

def test_cskd_is_refused_before_anything_is_trained():
    learn = learner(net(), one_batch(), cbs=[KD(None, TaskLoss()+CSKD()),MixUp()])
    was = state(learn.model)
    with pytest.raises(ValueError, match='under MixUp or CutMix an item is of two'): learn.fit(1)
    assert_same(state(learn.model), was)

def test_views_are_made_by_fastais_transforms():
    "Which act on types that the Learner has taken off before the network"
    seen = []
    class Spied(nn.Sequential):
        def forward(self, x):
            seen.append(x.clone())
            return super().forward(x)
    model = Spied(net(bn=False))
    learner(model, one_batch(), cbs=[KD(None, TaskLoss()+DDGSD(views=Flip(p=1.)).at('0.flat'))]).fit(1)
    own,view = seen[-2:]
    torch.testing.assert_close(view, own.flip(-1), rtol=0, atol=1e-5)
    assert type(view) is torch.Tensor

def test_the_order_in_pairs_goes_on_after_a_stop():
    class Stop(Exception): ...
    def fit(*cbs, s=0):
        dls = get_dls(n=64, bs=16, drop_last=False)
        dls.train.rng = random.Random(s)
        shuffle_in_pairs(dls.train, Y[:64])
        kd = KD(None, TaskLoss()+CSKD())
        learn = learner(net(), dls, cbs=kd)
        try: learn.fit(3, cbs=cbs)
        except Stop: pass
        return learn
    whole = fit()
    fit(Checkpoint('run'), At('before_train', raising(Stop), skip=2))
    again = fit(Checkpoint('run', resume=True), s=5)
    assert_same(state(again.model), state(whole.model))
    odd = int((Y[:64].bincount()%2).sum())
    assert whole.knowledge_distillation.history[-1]['cskd_paired']>=1-odd/16/4

# ---- any network ----

timms = 'resnet10t','resnet26t','convnext_atto','mobilenetv3_small_050','regnetx_002','vit_tiny_patch16_224'

def picture_model(name, size):
    torch.manual_seed(0)
    if name=='vision_learner': return create_vision_model(resnet18, 4, pretrained=False)
    more = dict(img_size=size) if name.startswith('vit') else {}
    return timm.create_model(name, num_classes=4, pretrained=False, **more)

@cache
def noise(size): return torch.rand(8, 3, size, size, generator=torch.Generator().manual_seed(0))

@pytest.mark.parametrize('size', [64,96])
@pytest.mark.parametrize('name', [*timms,'vision_learner'])
def test_networks(name, size):
    "All three losses at once, two steps: each teaches, the student comes out as it went in"
    model = picture_model(name, size)
    kd = KD(None, TaskLoss()+USKD()+CSKD()+.5*DDGSD())
    y = torch.tensor([0,0,1,1,2,2,3,3])
    learn = learner(model, tuples(noise(size), y, n=8, valid=0, bs=4), cbs=kd)
    keys = [*model.state_dict()]
    learn.fit(1)
    assert left(learn)==[]
    assert [*model.state_dict()]==keys
    assert all(0<abs(kd.parts[k])<float('inf') for k in ('uskd','uskd_weak','cskd','ddgsd','ddgsd_apart'))
    assert kd.parts['cskd_paired']==1
    assert all(p.isfinite().all() for p in model.parameters())

@pytest.mark.parametrize('size', [64,pytest.param(96, marks=pytest.mark.slow)])
@pytest.mark.parametrize('name', [*timms,'vision_learner'])
def test_networks_beside_a_peer_and_their_own_average(name, size):
    "Stages that learn from the next one, a peer, and the average of the network: two steps"
    model,peer = picture_model(name, size),picture_model(name, size)
    for m in peer.modules():
        if hasattr(m, 'reset_parameters'): m.reset_parameters()
    kd = KD(EMA(.9), TaskLoss()+SAD(start=0)+DML(peer)+SoftTarget())
    learn = learner(model, tuples(noise(size), torch.arange(8)//2, n=8, valid=0, bs=4), cbs=kd)
    keys,began = [*model.state_dict()],state(peer)
    learn.fit(1)
    assert left(learn)==[]
    assert [*model.state_dict()]==keys
    assert all(0<kd.parts[k]<float('inf') for k in ('sad','dml','soft_target'))
    assert all(p.isfinite().all() for m in (model,peer) for p in m.parameters())
    assert any(not torch.equal(began[k], v) for k,v in peer.state_dict().items())
    assert kd.teacher.model is not model
    assert any(not torch.equal(a, b) for a,b in zip(kd.teacher.model.parameters(), model.parameters(), strict=True))
