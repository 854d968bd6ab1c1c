"FCFD against the authors' numbers, against a step written out by hand, and in Learners of many kinds of networks"
import copy
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import (KD,HalfCPU,assert_close,assert_same,get_dls,in_float64,kl,learner,left,net,refuses,seed,state,
                    tuples)
from fastai.callback.training import GradientAccumulation
from fastai.text.models.awdlstm import AWD_LSTM,awd_lstm_lm_config
from fastai.text.models.core import get_language_model
from torch import nn

from fasterdistill.loss import TaskLoss
from fasterdistill.losses.attention import Attention
from fasterdistill.losses.fcfd import FCFD
from fasterdistill.networks.net import Net
from fasterdistill.networks.taps import Taps

timm = pytest.importorskip('timm')
vectors = Path(__file__).parent/'vectors'

# -- the authors' numbers

def _vector(dtype):
    "The file, and its tensors: maps by stage, and the logits of teacher, student and both mixed paths"
    v = np.load(vectors/'fcfd_loss.npz')
    def t(n): return torch.tensor(v[n], dtype=dtype, requires_grad=n.startswith(('in_stage','in_logits')))
    return v,SimpleNamespace(
        teacher=[t(f'in_stage{k}_t').detach() for k in (1,2,3)],
        bridged={k: t(f'in_stage{k}_s') for k in (1,2,3)}, mixed={k: t(f'in_stage{k}_mix') for k in (2,3)},
        zt=t('in_logits_teacher').detach(), zs=t('in_logits_student'), z1=t('in_logits_mix_student_then_teacher'),
        z2=t('in_logits_mix_teacher_then_student'))

def near(got, want, tol): assert (got-want).abs().max() <= tol*want.abs().max()

@pytest.mark.parametrize('dtype,rtol,gtol', [(torch.float64,1e-9,1e-6), (torch.float32,2e-5,1e-4)])
@pytest.mark.parametrize('name,kwargs,epoch', [
    ('epoch0_T4_w5', dict(T=4, weight=5), 0), ('epoch30_T4_w5', dict(T=4, weight=5), 30),
    ('epoch30_T8_w002_mix02', dict(T=8, weight=.02, mix=.2), 30)])
def test_authors_numbers(name, kwargs, epoch, dtype, rtol, gtol):
    v,o = _vector(dtype)
    loss,bridged,mixed = FCFD(**kwargs),list(o.bridged.values()),[[],[o.mixed[2]],[o.mixed[3]]]
    stages = loss.stage_losses(o.teacher, bridged, mixed)
    np.testing.assert_allclose(stages.tolist(), v['out_l2_per_stage'], rtol=rtol)
    total = loss.loss(o.teacher, bridged, mixed, o.zs, o.zt, [o.z1,o.z2], epoch)
    np.testing.assert_allclose(total.item(), v[f'out_total_{name}']-v['out_ce_student'], rtol=rtol)

    total.backward()
    zc = o.zs.detach().requires_grad_()
    F.cross_entropy(zc, torch.tensor(v['in_y']).long()).backward()
    want = torch.tensor(v[f'grad_logits_{name}'], dtype=dtype)          # teacher, student, both mixed paths
    near(torch.stack([torch.zeros_like(o.zs), o.zs.grad+zc.grad, o.z1.grad, o.z2.grad]), want, gtol)
    maps = {f'stage{k}_s': m for k,m in o.bridged.items()} | {f'stage{k}_mix': m for k,m in o.mixed.items()}
    for n,m in maps.items():
        if (k := f'grad_{n}_{name}') in v.files: near(m.grad, torch.tensor(v[k]), gtol)

# -- one step by hand: every stage a function of its own, no Net, no hooks

def _stages(m): return [m.layer1, m.layer2, m.layer3, lambda z: m.fc(m.flat(m.pool(z)))]

def _batch_stats(m, z):
    "The stage with BatchNorm by this batch, averages left alone: a copy in train mode that shares the weights"
    if not isinstance(m, nn.Module): return m(z)
    for o in m:
        if isinstance(o, nn.BatchNorm2d): z = F.batch_norm(z, None, None, o.weight, o.bias, training=True, eps=o.eps)
        else: z = o(z.clone() if isinstance(o, nn.ReLU) else z)
    return z

def _through(stages, z):
    "What all stages but the last return, and the prediction"
    maps = []
    for s in stages[:3]:
        z = s(z)
        maps.append(z)
    return maps,stages[3](z)

def _mixed_path(stages, i, z):
    "Of a map at the end of stage `i`: the maps after it by the stages that follow, and the prediction"
    maps = {}
    for k in range(i+1, 3): maps[k] = z = _batch_stats(stages[k], z)
    return maps,stages[3](z)

def _by_hand(fcfd, student, teacher, x, paths, T, weight, mix, warm):
    S,H = _stages(student),_stages(teacher)
    fs,pred = _through(S, x)
    with torch.no_grad(): ft,zt = _through(H, x)
    bridged = [b(f) for b,f in zip(fcfd.s2t, fs)]
    others,preds = [[b] for b in bridged],[]
    for d,i in paths:
        if d=='s2t':
            maps,p = _mixed_path(H, i, bridged[i])
            for k,z in maps.items(): others[k].append(z)
        else: _,p = _mixed_path(S, i, fcfd.t2s[i](ft[i]))
        preds.append(p)
    def pooled(z): return z.clamp(min=0).mean((2,3))
    l2 = sum(((o-t)**2).mean() for t,os in zip(ft, others) for o in os)
    l2 = l2+sum(((pooled(o)-pooled(ft[2]))**2).mean() for o in others[2])
    return weight*warm*l2 + kl(pred, zt, T) + mix*sum(kl(p, zt, T) for p in preds)

def batch(n=16): return torch.randn(n, 1, 8, 8)

@pytest.fixture
def pair():
    student,teacher = net(4, s=1).train(),net(6, s=2).train()
    with torch.no_grad():
        for _ in range(5): teacher(batch())
    return student,teacher.eval().requires_grad_(False)

stage_names = ['layer1','layer2','layer3']

def _built(fcfd, student, teacher, x):
    "Both networks as the loss reads them; the loss is built"
    ns,nt = Net(student, x, stage_names),Net(teacher, x, stage_names, who='teacher')
    with torch.no_grad(): vs,vt = ns(x),nt(x, bn='eval')
    seed(3)
    fcfd.build(fm_s=vs.fm, fm_t=vt.fm, student=ns, teacher=nt, xb=(x,))
    return ns,nt

def _given(ns, nt, x, **more):
    "What FCFD reads of a batch"
    taps = Taps(ns.model, stage_names, x).attach()
    taps.clear(True)
    pred = ns.model(x)
    fm_s = dict(taps.store)
    taps.remove()
    with torch.no_grad(): zt,fm_t = nt(x, bn='eval')
    return dict(fm_s=fm_s, fm_t=fm_t, pred=pred, teacher_pred=zt, student=ns, teacher=nt, xb=(x,), **more)

def same_gradients(mine, own, tol=1e-10):
    top = max(q.grad.abs().max() for q in own.parameters() if q.grad is not None)   # one that is 0 has its rounding
    for (n,p),q in zip(mine.named_parameters(), own.parameters(), strict=True):
        assert (p.grad is None)==(q.grad is None), n
        if q.grad is not None: assert (p.grad-q.grad).abs().max() <= tol*max(q.grad.abs().max(), top), n

@in_float64
@pytest.mark.parametrize('paths', [
    [('s2t',0),('t2s',1)], [('s2t',1),('t2s',0)], [('s2t',0),('s2t',1),('t2s',0),('t2s',1)]])
def test_step_by_hand(pair, paths, monkeypatch):
    "The same loss, and the same gradients in student and bridges, as stages called one after the other"
    student,teacher = pair
    x,fcfd = batch(),FCFD(T=3, weight=2, mix=.5, warmup=4)
    ns,nt = _built(fcfd, student, teacher, x)
    twin = copy.deepcopy((fcfd,student,teacher))
    monkeypatch.setattr(fcfd, 'draw', lambda: paths)                    # the same paths in both
    got = fcfd(**_given(ns, nt, x, epoch=1.))
    want = _by_hand(*twin, x, paths, T=3, weight=2, mix=.5, warm=.5)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=0)
    got.backward()
    want.backward()
    for mine,own in ((fcfd,twin[0]), (student,twin[1])): same_gradients(mine, own)

# -- who gets gradients, methods.md 6.3

def _moved(m): return {n for n,p in m.named_parameters() if p.grad is not None and p.grad.abs().sum()>0}

def _grads(pair, path, monkeypatch):
    "The student's stages, the bridges and the teacher's parameters that a mixed path alone has gradients for"
    student,teacher = pair
    x,fcfd = batch(8),FCFD(paths=1, weight=0)
    ns,nt = _built(fcfd, student, teacher, x)
    monkeypatch.setattr(fcfd, 'draw', lambda: [path])
    given = _given(ns, nt, x, epoch=0.)
    given['pred'] = given['pred'].detach()                              # the student's own path carries no gradient
    fcfd(**given).backward()
    stages,bridges = {n.split('.')[0] for n in _moved(student)},{'.'.join(n.split('.')[:2]) for n in _moved(fcfd)}
    return stages,bridges,_moved(teacher)

def test_student_then_teacher_trains_the_early_student(pair, monkeypatch):
    assert _grads(pair, ('s2t',1), monkeypatch)==({'layer1','layer2'}, {'s2t.1'}, set())

def test_teacher_then_student_trains_the_late_student(pair, monkeypatch):
    assert _grads(pair, ('t2s',0), monkeypatch)==({'layer2','layer3','fc'}, {'t2s.0'}, set())

# -- BatchNorm, draws, sums

class Flat(nn.Module):
    "BatchNorm of vectors too"
    def __init__(self, w):
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(1, w, 3, 1, 1), nn.BatchNorm2d(w), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(w, 2*w, 3, 2, 1), nn.BatchNorm2d(2*w), nn.ReLU())
        self.layer3 = nn.Sequential(nn.Conv2d(2*w, 2*w, 3, 2, 1), nn.ReLU())
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(8*w, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))
    def forward(self, x): return self.head(self.layer3(self.layer2(self.layer1(x))))

@pytest.mark.parametrize('kind', ['2d','1d'])
def test_no_average_moves(kind):
    "At a learning rate of 0, five batches with and without FCFD leave every buffer of both networks bit-equal"
    def make(w):
        seed(1)
        return net(w, s=1) if kind=='2d' else Flat(w)
    def buffers(*cbs):
        student = make(4)
        learner(student, get_dls(n=160), cbs=list(cbs)).fit(1, 0.)
        return {n: b.clone() for n,b in student.named_buffers()}
    teacher = make(6)
    before = state(teacher)
    alone,beside = buffers(),buffers(KD(teacher, TaskLoss()+FCFD(paths=4)))
    assert_same(state(teacher), before, 'teacher')
    assert_same(alone, beside)
    assert all(v==5 for n,v in alone.items() if 'num_batches' in n)

def test_draws_leave_the_global_generator_alone():
    fcfd = FCFD()
    fcfd.candidates = [(d,i) for d in ('s2t','t2s') for i in range(2)]
    before = torch.get_rng_state()
    draws = [fcfd.draw() for _ in range(400)]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(len(set(d))==2 for d in draws)                             # without replacement
    counts = [sum(c in d for d in draws) for c in fcfd.candidates]
    assert all(160<=c<=240 for c in counts), counts                       # half of the time: mean 200, deviation 10

@pytest.mark.parametrize('direction,n', [('both',4), ('s2t',2), ('t2s',2), ('none',0)])
def test_directions(pair, direction, n):
    fcfd = FCFD(direction=direction)
    _built(fcfd, *pair, batch(4))
    assert len(fcfd.candidates)==n
    assert {d for d,_ in fcfd.candidates} <= {direction,'s2t','t2s'}
    assert len(fcfd.t2s)==(2 if direction in ('both','t2s') else 0)

def test_beside_another_loss_the_students_own_path_is_untouched():
    "Attention's value on the first batch, and the Learner's own loss, are what they are without FCFD"
    def parts(loss):
        cb = KD(net(6, s=2), loss)
        learn = learner(net(4, s=1), get_dls(n=32), cbs=cb)
        learn.fit(1, 0.)
        assert not left(learn, cb.teacher.model)
        return cb.parts
    alone,beside = parts(TaskLoss()+100*Attention()),parts(TaskLoss()+FCFD()+100*Attention())
    assert alone['attention']==beside['attention']
    assert alone['task_loss']==beside['task_loss']

def test_a_second_fit_uses_the_same_bridges():
    cb = KD(net(6, s=2), TaskLoss()+FCFD())
    learn = learner(net(4, s=1), cbs=cb)
    learn.fit(1)
    ids = [id(p) for p in cb.loss.parameters()]
    learn.fit(1)
    assert ids
    assert ids==[id(p) for p in cb.loss.parameters()]

class Conv(nn.Module):
    "A bridge without BatchNorm"
    def __init__(self, a, b, xb=None):
        super().__init__()
        self.conv = nn.Conv2d(a.shape[1], b.shape[1], 3, 1, 1) if a.shape[2:]==b.shape[2:] else None
    def forward(self, z): return self.conv(z)

@in_float64
def test_accumulated_gradients():
    "Two halves accumulated equal the whole batch (no BatchNorm, which would be by the half)"
    def run(bs, *cbs):
        kd = KD(net(6, bn=False, s=2), TaskLoss()+FCFD(paths=4, adapter=Conv))
        learn = learner(net(4, bn=False, s=1), get_dls(n=32, bs=bs, shuffle=False), cbs=[kd,*cbs])
        learn.fit(1, .01)
        return state(learn.model)
    assert_close(run(32), run(16, GradientAccumulation(32)))

class Spy(FCFD):
    "Notes the kinds of number that the loss is computed from"
    def loss(self, fm_t, bridged, mixed, pred, teacher_pred, mixed_preds, *rest):
        mixed_maps = [m for ms in mixed for m in ms]
        self.seen = {o.dtype for o in [*fm_t,*bridged,*mixed_maps,pred,teacher_pred,*mixed_preds]}
        return super().loss(fm_t, bridged, mixed, pred, teacher_pred, mixed_preds, *rest)

def test_under_autocast():
    spy = Spy(paths=4)
    cb = KD(net(6, s=2), TaskLoss()+spy)
    learner(net(4, s=1), cbs=[cb,HalfCPU()]).fit(2)
    assert spy.seen=={torch.float32}
    assert np.isfinite(list(cb.history[-1].values())).all()

class Around(nn.Module):
    "The classifier also reads an early map"
    def __init__(self):
        super().__init__()
        self.layer1 = nn.Conv2d(1, 4, 3, 1, 1)
        self.layer2,self.layer3 = nn.Conv2d(4, 4, 3, 2, 1),nn.Conv2d(4, 4, 3, 2, 1)
        self.fc = nn.Linear(8, 10)
    def forward(self, x):
        a = self.layer1(x)
        b = self.layer2(a.relu())
        return self.fc(torch.cat([self.layer3(b.relu()).mean((2,3)), a.mean((2,3))], 1))

def test_says_why_a_network_cannot_be_cut():
    refuses(learner(Around()), r"the student \(Around\) cannot be cut at 'layer2'.*direction='s2t'",
            KD(net(4), TaskLoss()+FCFD()))
    refuses(learner(net()), 'needs two pairs', KD(net(), TaskLoss()+FCFD().at('layer3')))
    with pytest.raises(ValueError, match="expected one of 'both'"): FCFD(direction='up')

def timms(name, **kwargs): return partial(timm.create_model, name, num_classes=10, **kwargs)

def three_steps(teacher, student, x, y):
    "A fit of all these items, four at a time; the callback"
    cb = KD(teacher, TaskLoss()+FCFD())
    learn = learner(student, tuples([*x,*x], [*y,*y], n=len(x), valid=len(x), bs=4), loss_func=nn.CrossEntropyLoss(),
                    cbs=cb)
    learn.fit(1, 1e-3)
    assert np.isfinite(cb.history[-1]['fcfd'])
    assert not left(learn, teacher)

def test_tokens_of_oblong_pictures():
    "ViT to ViT on 64×32 pictures: 4×2 patches, which no square grid fits"
    make = timms('vit_tiny_patch16_224', img_size=(64,32), depth=4, num_heads=3)
    three_steps(make(embed_dim=48), make(embed_dim=24), torch.randn(8, 3, 64, 32), torch.arange(8))

# -- the zoo

tokens = dict(img_size=64, depth=4, embed_dim=48, num_heads=3)
zoo = dict(
    resnet=timms('resnet10t'), resnet18=timms('resnet18'), mobilenet=timms('mobilenetv3_small_050'),
    convnext=timms('convnext_atto'), regnet=timms('regnetx_002'), efficientnet=timms('efficientnet_b0'),
    vit=timms('vit_tiny_patch16_224', **tokens), reg=timms('vit_tiny_patch16_224', **tokens, reg_tokens=2),
    deit=timms('deit_tiny_distilled_patch16_224', **tokens),
    swin=timms('swin_tiny_patch4_window7_224', img_size=64, window_size=2, embed_dim=24, depths=(1,1,1,1),
               num_heads=(1,2,4,4)),
    mixer=partial(timm.models.mlp_mixer.MlpMixer, num_classes=10, img_size=64, patch_size=16, num_blocks=4,
                  embed_dim=48))
pairs = '''resnet18→resnet resnet→mobilenet convnext→resnet resnet→convnext regnet→mobilenet efficientnet→resnet
    vit→resnet swin→resnet mixer→mobilenet resnet→vit resnet→swin vit→vit deit→vit vit→reg swin→swin
    vit→mixer'''.split()

@pytest.mark.parametrize('teacher,student', [p.split('→') for p in pairs], ids=pairs)
def test_zoo(teacher, student):
    "Three steps of every kind of pair; the student's state_dict keys as before, nothing left behind"
    seed()
    t,s = zoo[teacher](),zoo[student]()
    keys = list(s.state_dict())
    three_steps(t, s, torch.randn(12, 3, 64, 64), torch.arange(12)%10)
    assert list(s.state_dict())==keys

def test_a_network_with_memory_keeps_it():
    "Another pass, whole or from the middle, must not be what a recurrent network remembers of the text"
    seed()
    config = awd_lstm_lm_config|dict(emb_sz=6, n_hid=7, n_layers=2)
    m = get_language_model(AWD_LSTM, 20, config=config).train()
    def hidden(): return [[t.clone() for t in h] for h in m[0].hidden]
    x = torch.randint(20, (3,8))
    m(x)
    was = hidden()
    n = Net(m, x, out=lambda o: o[0])
    for _ in range(2):
        pred = n.resume('0.rnns.1[0]', torch.randn(3, 8, 6)).pred
        n(x)
        assert pred.shape==(3,8,20)
        for p,q in zip(hidden(), was, strict=True): assert all(torch.equal(a, b) for a,b in zip(p, q, strict=True))
    m(x)
    assert not torch.equal(m[0].hidden[1][0], was[1][0])                  # its own passes do change it
    assert 'state kept from batch to batch' in n.why_not('0.rnns.0[0]')
