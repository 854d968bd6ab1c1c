"SLA, and SLA with FRSKD: the authors' numbers, steps written out by hand, resuming, what comes out, kinds of networks"
import copy
import random
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import (KD,At,Out,StepLosses,assert_close,assert_same,exports,get_dls,in_float64,kl,learner,left,net,
                    refuses,seed,state)
from fastai.callback.mixup import CutMix,MixUp
from fastai.learner import load_learner
from fastai.optimizer import SGD,Adam
from selves import batch,every,on_batch,three_steps

from fasterdistill.checkpoint import Checkpoint
from fasterdistill.examples import CNN
from fasterdistill.loss import TaskLoss
from fasterdistill.losses.attention import attention_map
from fasterdistill.losses.frskd import FRSKD
from fasterdistill.losses.sla import SLA,FRSKDSLA,Views,joint_loss
from fasterdistill.networks.net import Net

both = pytest.mark.parametrize('dtype,rtol,gtol', [(torch.float64,1e-9,1e-6), (torch.float32,2e-5,1e-4)])

# -- the authors' numbers

def _vector(dtype):
    "The file, joint logits, the network's own of the pictures as they are, labels"
    v = np.load(Path(__file__).parent/'vectors'/'sla.npz')
    def t(z): return torch.tensor(z, dtype=dtype, requires_grad=True)
    return v,t(v['in_joint_logits']),t(v['in_single_logits'][::4]),torch.tensor(v['in_y'])

def near(got, want, tol):
    np.testing.assert_allclose(got.double(), want, rtol=0, atol=tol*np.abs(want).max())

@both
@pytest.mark.parametrize('name,kwargs', [('T1',{}), ('T4',dict(T=4)), ('T1_large_loss',dict(joint=4.))])
def test_authors_numbers(name, kwargs, dtype, rtol, gtol):
    v,joint,single,y = _vector(dtype)
    value = SLA(**kwargs).loss(joint, single, y)
    np.testing.assert_allclose(value.item(), v[f'out_total_sla_sd_{name}']-v['out_single_ce'], rtol=rtol)
    value.backward()
    near(joint.grad, v[f'grad_joint_{name}'], gtol)
    z = single.detach().requires_grad_()
    F.cross_entropy(z, y).backward()                                            # which is `TaskLoss`'
    want = v[f'grad_single_{name}']
    near(single.grad+z.grad, want[::4], gtol)
    assert not want.reshape(8, 4, -1)[:,1:].any()

@both
def test_parts_of_the_authors(dtype, rtol, gtol):
    v,joint,single,y = _vector(dtype)
    loss = SLA()
    assert torch.equal(loss.views(torch.tensor(v['in_images'])), torch.tensor(v['out_rotated_images']))
    near(loss.aggregate(joint).detach(), v['out_agg_logits'], rtol)
    assert loss.aggregate(joint).argmax(1).tolist()==v['out_agg_prediction'].tolist()
    assert [int(c)*4+j for c in y for j in range(4)]==v['out_joint_labels'].tolist()
    np.testing.assert_allclose(joint_loss(joint, F.one_hot(y, 10), 4).item(), v['out_joint_ce'], rtol=rtol)
    np.testing.assert_allclose(F.cross_entropy(single, y).item(), v['out_single_ce'], rtol=rtol)
    near(joint.detach()[::4,::4], v['out_single_inference_logits'], rtol)
    loss.loss(joint, single, y)
    np.testing.assert_allclose(loss.take_logged()['sla_kd'].item(), v['out_kl_agg_to_single_T1'], rtol=rtol)

@pytest.mark.parametrize('size', [50,-50])
def test_extremes(size):
    joint = torch.zeros(4, 8)
    joint[:,0] = size
    joint,z = joint.requires_grad_(),torch.tensor([[-size,size]]).float().requires_grad_()
    value = SLA().loss(joint, z, torch.tensor([0]))
    value.backward()
    assert value.isfinite()
    assert joint.grad.isfinite().all()
    assert z.grad.isfinite().all()

# -- a step by hand

def embedding(m, x):
    z = m.layer3(m.layer2(m.layer1(x)))
    return z.mean((2,3))

def turned(x, k):
    "By `k` quarters, without torch's function: transposed, then upside down"
    for _ in range(k): x = x.transpose(2, 3).flip(2)
    return x

def joint_ce(u, y, m):
    "Row by row"
    return sum(F.cross_entropy(u[[b*m+j]], y[[b]]*m+j) for b in range(len(y)) for j in range(m))/len(u)

def together(u, classes, m):
    "Number by number"
    rows = [[sum(u[b*m+j,c*m+j] for j in range(m))/m for c in range(classes)] for b in range(len(u)//m)]
    return torch.stack([torch.stack(r) for r in rows])

def rows_of(first, rest):
    "View by view of each item"
    n = len(first)
    return torch.stack([first[b] if j==0 else rest[(j-1)*n+b] for b in range(n) for j in range(1+len(rest)//n)])

def sla_by_hand(m, head, x, y, T=1.):
    "The whole loss of SLA+SD: the pictures in one pass, the other views in another"
    e,others = embedding(m, x),torch.cat([turned(x, k) for k in (1,2,3)])
    z = m.fc(e)
    u = head(rows_of(e, embedding(m, others)))
    s = together(u, 10, 4)
    return F.cross_entropy(z, y) + joint_ce(u, y, 4) + kl(z, s.detach(), T)

class Grads:
    "Gradients before the first step, and what it was taken on"
    def __init__(self, loss): self.loss,self.seen = loss,None
    def __call__(self, learn):
        if self.seen is not None: return
        ps = {**dict(learn.model.named_parameters()), **{f'loss.{n}': p for n,p in self.loss.named_parameters()}}
        grads = {n: p.grad.clone() for n,p in ps.items() if p.grad is not None}
        x,y = (o.as_subclass(torch.Tensor).clone() for o in (learn.x,learn.y))
        self.seen = x,y,copy.deepcopy(self.loss),grads,{n: b.clone() for n,b in learn.model.named_buffers()}

def one_epoch(loss, model, **kwargs):
    grads,steps = Grads(loss),StepLosses()
    cbs = KD(None, TaskLoss()+loss),steps,At('before_step', grads)
    learn = learner(model, get_dls(n=32, bs=8), opt_func=SGD, cbs=[*cbs])
    learn.fit(1, **kwargs)
    assert left(learn)==[]
    return learn,steps.vals[0],grads.seen

@in_float64
@pytest.mark.parametrize('T', [1.,4.])
def test_step(T):
    "Value, the gradient of every parameter, and BatchNorm's averages, which move with both passes"
    twin = net(s=1).train()
    learn,value,(x,y,loss,grads,buffers) = one_epoch(SLA(T=T), net(s=1))
    want = sla_by_hand(twin, loss.head.linear, x, y, T)
    params = {**dict(twin.named_parameters()), **{f'loss.{n}': p for n,p in loss.named_parameters()}}
    gs = dict(zip(params, torch.autograd.grad(want, [*params.values()]), strict=True))
    assert abs(value-want.item())<1e-10
    assert_close(grads, gs)
    assert_close(buffers, dict(twin.named_buffers()))
    counts = [b.item() for n,b in learn.model.named_buffers() if 'num_batches' in n]
    assert counts==[2*len(learn.dls.train)]*3

@in_float64
def test_joint_labels_alone():
    "With all the weight: the network's own classifier learns nothing"
    twin,loss = net(s=1).train(),SLA(sd=False)
    grads = Grads(loss)
    learn = learner(net(s=1), get_dls(n=32, bs=8), opt_func=SGD, wd=0.,
                    cbs=[KD(None, loss, weight=1),At('before_step', grads)])
    was = learn.model.fc.weight.detach().clone()
    learn.fit(1)
    assert torch.equal(learn.model.fc.weight, was)
    x,y,loss,got,_ = grads.seen
    u = loss.head.linear(rows_of(embedding(twin, x), embedding(twin, torch.cat([turned(x, k) for k in (1,2,3)]))))
    params = {n: p for n,p in twin.named_parameters() if not n.startswith('fc')}
    gs = torch.autograd.grad(joint_ce(u, y, 4), [*params.values()])
    assert_close({n: got[n] for n in params}, dict(zip(params, gs, strict=True)))

@in_float64
def test_with_frskd():
    "All of FRSKDSLA: the pictures count twice where the authors run them twice"
    twin,m = net(s=1).train(),4
    _,value,(x,y,loss,grads,_) = one_epoch(FRSKDSLA(alpha=3., beta=20., T=2., joint=.5, sd=.7), net(s=1))
    loss.train()
    others,n = torch.cat([turned(x, k) for k in (1,2,3)]),len(x)
    def stages(x):
        f1 = twin.layer1(x)
        f2 = twin.layer2(f1)
        return [f1,f2,twin.layer3(f2)]
    fs,gs = stages(x),stages(others)
    ts,us = loss.pyramid(fs),loss.pyramid(gs)
    e,d,zt = fs[2].mean((2,3)),gs[2].mean((2,3)),loss.classifier(ts[2].mean((2,3)))
    z = twin.fc(e)
    u,v = loss.head.linear(rows_of(e, d)),loss.self_head(rows_of(ts[2], us[2]).mean((2,3)))
    s,t = together(u, 10, m),together(v, 10, m)
    want = F.cross_entropy(z, y) + F.cross_entropy(zt, y) + .5*(joint_ce(u, y, m)+joint_ce(v, y, m))
    want = want + .7*(kl(z, s.detach(), 2.)+kl(zt, t.detach(), 2.))
    want = want + 3*(kl(z, zt.detach(), 2.)+kl(s, t.detach(), 2.))/2
    def apart(a, b): return (attention_map(a)-attention_map(b.detach())).pow(2).sum()
    for f,g,own,more in zip(fs, gs, ts, us, strict=True):
        want = want + 20*(2*apart(f, own)+apart(g, more))/(5*n*f[0,0].numel())
    params = {**dict(twin.named_parameters()), **{f'loss.{n}': p for n,p in loss.named_parameters()}}
    grad = dict(zip(params, torch.autograd.grad(want, [*params.values()]), strict=True))
    assert abs(value-want.item())<1e-9
    assert_close(grads, grad, 1e-9)

@in_float64
def test_plain_sum():
    "Beside each other they run, and the self-teacher sees no view but the picture"
    sizes,loss = [],FRSKD()
    learn = learner(net(s=1), get_dls(n=32, bs=8), cbs=[KD(None, TaskLoss()+loss+SLA())])
    learn.fit(1)
    loss.pyramid.register_forward_pre_hook(lambda m, args: sizes.append([len(z) for z in args[0]]))
    learn.fit(1)
    assert {'task_loss','frskd','sla'}<=learn.knowledge_distillation.parts.keys()
    assert all(n==[8,8,8] for n in sizes)
    assert len(sizes)>=4

# -- going on from a file

def resumable(path, loss, s, opt):
    seed(3)
    learn = learner(net(s=1), get_dls(), opt_func=opt, path=path, cbs=[KD(None, TaskLoss()+loss())])
    for dl in learn.dls.loaders: dl.rng = random.Random(s)
    seed(s)
    return learn

class Stop(Exception): ...

def trained(learn, *cbs, at=None):
    def stop(l):
        if l.training and (l.epoch,l.iter)==at: raise Stop
    if at is None: learn.fit_one_cycle(3, .05, cbs=[*cbs])
    else:
        with pytest.raises(Stop): learn.fit_one_cycle(3, .05, cbs=[*cbs,At('before_batch', stop)])
    return learn

def all_of(learn):
    loss = learn.knowledge_distillation.loss
    return state(learn.model)|{f'loss.{k}': v for k,v in state(loss).items()}

@pytest.mark.parametrize('opt', [partial(SGD, mom=.9),Adam], ids=['sgd','adam'])
@pytest.mark.parametrize('loss', [SLA,FRSKD,FRSKDSLA])
def test_resumed(tmp_path, loss, opt):
    "To the last bit, BatchNorm's averages and the moments of what is learned too; `plan()` before changes nothing"
    whole = trained(resumable(tmp_path, loss, 0, opt))
    trained(resumable(tmp_path, loss, 0, opt), Checkpoint('run'), at=(1,2))
    again = resumable(tmp_path, loss, 7, opt)
    again.knowledge_distillation.plan(again)
    trained(again, Checkpoint('run', resume=True))
    assert_same(all_of(again), all_of(whole))
    assert [list(r) for r in again.recorder.values]==[list(r) for r in whole.recorder.values]

# -- what comes out

def answers_by_hand(model, loss, x, layer):
    "What all views say, and what the picture alone: the embedding of each, the head, number by number"
    made = loss.kinds(x)
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        es = [Net(model, x, [layer])(v, bn='eval').fm[layer] for v in made]
        us = [loss.head(e) for e in es]
    m,c = len(made),us[0].shape[1]//len(made)
    said = torch.stack([sum(us[j][:,k*m+j] for j in range(m))/m for k in range(c)], 1)
    return said,torch.stack([us[0][:,k*m] for k in range(c)], 1)

def test_in_a_learner(tmp_path):
    "Accuracy, `predict` and an exported Learner are those of the aggregated network"
    loss = SLA(colours=1)
    learn = learner(net(s=1), get_dls(), cbs=[KD(None, TaskLoss()+loss)])
    learn.fit(2)
    plain = learn.model
    learn.model = loss.aggregated(plain)
    x,y = (torch.cat([o.as_subclass(torch.Tensor) for o in column]) for column in zip(*learn.dls.valid, strict=True))
    want,first = answers_by_hand(plain, loss, x, 'embedding')
    torch.testing.assert_close(loss.single(plain)(x).detach(), first, rtol=1e-4, atol=1e-5)
    preds,_ = learn.get_preds(with_loss=False)
    torch.testing.assert_close(preds, want.softmax(1), rtol=1e-4, atol=1e-5)
    assert abs(learn.validate()[1]-(want.argmax(1)==y).float().mean().item())<1e-6
    assert int(learn.predict(learn.dls.valid_ds[3][0])[1])==want[3].argmax().item()

    learn.export(tmp_path/'all_views.pkl')
    again = load_learner(tmp_path/'all_views.pkl').model
    assert torch.equal(again.eval()(x), learn.model.eval()(x))
    assert not torch.equal(want, first)

def test_training_goes_on_apart():
    "What came out before does not follow the network, and the network is not changed by it"
    loss = SLA()
    learn = learner(net(s=1), get_dls(), cbs=[KD(None, TaskLoss()+loss)])
    learn.fit(1)
    was = state(learn.model)
    out = loss.aggregated(learn.model)
    said,modes = out(torch.ones(2, 1, 8, 8)),[m.training for m in learn.model.modules()]
    assert_same(state(learn.model), was)
    mine = {p.data_ptr() for p in [*learn.model.parameters(),*loss.parameters()]}
    assert not mine & {p.data_ptr() for p in out.parameters()}
    learn.fit(1)
    assert torch.equal(out(torch.ones(2, 1, 8, 8)), said)
    assert [m.training for m in learn.model.modules()]==modes

@pytest.mark.skipif(not exports, reason='torch 2.4 does not export it')
def test_exported_at_another_batch_size():
    loss = SLA(rotations=2)
    learn = learner(net(s=1), get_dls(), cbs=[KD(None, TaskLoss()+loss)])
    learn.fit(1)
    out,x = loss.aggregated(learn.model),torch.randn(7, 1, 8, 8)
    program = torch.export.export(out, (x[:3],), dynamic_shapes=({0: torch.export.Dim('b', min=2)},)).module()
    torch.testing.assert_close(program(x), out(x), rtol=1e-5, atol=1e-6)

@pytest.mark.parametrize('kind', ['scaled','dict'])
def test_what_the_network_makes_of_its_answer(kind):
    "It is not in what comes out, which holds nothing behind the embedding"
    model,output = Out(net(s=1), (lambda z: z*2) if kind=='scaled' else (lambda z: dict(logits=z))),None
    if kind=='dict': output = 'logits'
    def ce(out, y): return F.cross_entropy(out['logits'] if isinstance(out, dict) else out, y)
    loss,x = SLA(),torch.randn(5, 1, 8, 8)
    learn = learner(model, get_dls(), loss_func=ce, metrics=[], cbs=[KD(None, TaskLoss()+loss, output=output)])
    learn.fit(1)
    want,first = answers_by_hand(model.m, loss, x, 'embedding')
    out = loss.aggregated(model)
    with torch.no_grad():
        torch.testing.assert_close(out(x), want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(loss.single(model)(x), first, rtol=1e-4, atol=1e-5)
    assert not any(p.shape==(10,16) for p in out.parameters())

def test_nothing_learned_yet():
    with pytest.raises(RuntimeError, match='needs a fit first'): SLA().single(net())

# -- what is refused

@pytest.mark.parametrize('loss', [SLA,FRSKDSLA])
@pytest.mark.parametrize('mixing', [MixUp,CutMix])
def test_mixed_pictures(mixing, loss):
    learn = learner(net(s=1), get_dls())
    refuses(learn, 'MixUp and CutMix make one of two pictures: leave them out', KD(None, TaskLoss()+loss()), mixing())

@pytest.mark.parametrize('loss', [SLA,FRSKDSLA])
def test_oblong(loss):
    learn = on_batch(CNN(4, 5, ni=3), *batch(16, 24))
    refuses(learn, r'these are 16×24: crop them, or use SLA\(rotations=2\)', KD(None, TaskLoss()+loss()))
    learn.fit(1, cbs=[KD(None, TaskLoss()+loss(rotations=2))])
    learn.fit(1, cbs=[KD(None, TaskLoss()+loss(rotations=1, colours=6))])
    assert left(learn)==[]

def test_no_colours():
    learn = learner(net(s=1), get_dls())
    refuses(learn, 'orders three channels anew; here are 1', KD(None, TaskLoss()+SLA(colours=3)))

# -- views

@pytest.mark.parametrize('rotations,colours', [(4,1),(1,3),(1,6),(2,3),(4,6)])
def test_views_differ(rotations, colours):
    "As many as said, all different, each with the same values, the first the picture"
    x = torch.randn(2, 3, 5, 5)
    made = Views(rotations, colours)(x)
    assert len(made)==rotations*colours==len(Views(rotations, colours))
    assert torch.equal(made[0], x)
    assert all(not torch.equal(a, b) for i,a in enumerate(made) for b in made[:i])
    for v in made: assert torch.equal(v.flatten(1).sort(1)[0], x.flatten(1).sort(1)[0])

# -- many kinds of networks

@pytest.mark.parametrize('name,size', every)
def test_networks(name, size):
    loss = SLA()
    model = three_steps(name, size, loss, 'sla_joint')
    x = batch(size, size)[0]
    want,first = answers_by_hand(model, loss, x, 'embedding')
    out = loss.aggregated(model)
    with torch.no_grad():
        torch.testing.assert_close(out(x), want, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(loss.single(model)(x), first, rtol=1e-3, atol=1e-4)

@pytest.mark.parametrize('name,size', every)
def test_networks_with_frskd(name, size):
    loss = FRSKDSLA(alpha=.1, beta=1., sd=.1)                # little beside the labels, by which it is measured
    model = three_steps(name, size, loss, 'frskd_self')
    x = batch(size, size)[0]
    assert loss.aggregated(model)(x).shape==loss.self_teacher(model, x).pred.shape==(8,5)
