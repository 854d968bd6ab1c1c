"FCFD against the authors' numbers, against a step written out by hand, and in Learners of many kinds of networks"
import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.text.models.awdlstm import AWD_LSTM,awd_lstm_lm_config
from fastai.text.models.core import get_language_model
from torch import nn

from common import KD,get_dls,learner,left,net,seed,state,assert_same
from fasterdistill.loss import TaskLoss
from fasterdistill.losses.attention import Attention
from fasterdistill.losses.fcfd import FCFD
from fasterdistill.networks.net import Net
from fasterdistill.networks.taps import Taps

timm = pytest.importorskip('timm')
vectors = Path(__file__).parent/'vectors'

# -- the authors' numbers

def _vector(dtype):
    v = np.load(vectors/'fcfd_loss.npz')
    t = lambda n: torch.tensor(v[n], dtype=dtype, requires_grad=n.startswith('in_stage') or n.startswith('in_logits'))
    fm_t = [t(f'in_stage{k}_t').detach() for k in (1,2,3)]
    bridged,mix = [t(f'in_stage{k}_s') for k in (1,2,3)],{k: t(f'in_stage{k}_mix') for k in (2,3)}
    zt,zs,z1,z2 = (t(f'in_logits_{n}') for n in ('teacher','student','mix_student_then_teacher','mix_teacher_then_student'))
    return v,fm_t,bridged,mix,zt,zs,z1,z2

@pytest.mark.parametrize('dtype,rtol,gtol', [(torch.float64,1e-9,1e-6),(torch.float32,2e-5,1e-4)])
@pytest.mark.parametrize('name,kwargs,epoch', [('epoch0_T4_w5', dict(T=4, weight=5), 0), ('epoch30_T4_w5', dict(T=4, weight=5), 30), ('epoch30_T8_w002_mix02', dict(T=8, weight=.02, mix=.2), 30)])
def test_authors_numbers(name, kwargs, epoch, dtype, rtol, gtol):
    v,fm_t,bridged,mix,zt,zs,z1,z2 = _vector(dtype)
    loss,mixed = FCFD(**kwargs),[[],[mix[2]],[mix[3]]]
    np.testing.assert_allclose(loss.stage_losses(fm_t, bridged, mixed).tolist(), v['out_l2_per_stage'], rtol=rtol)
    total = loss.loss(fm_t, bridged, mixed, zs, zt.detach(), [z1,z2], epoch)
    np.testing.assert_allclose(total.item(), v[f'out_total_{name}']-v['out_ce_student'], rtol=rtol)
    total.backward()
    y = torch.tensor(v['in_y']).long()
    zc = zs.detach().requires_grad_(); F.cross_entropy(zc, y).backward()
    want = torch.tensor(v[f'grad_logits_{name}'], dtype=dtype)          # teacher, student, both mixed paths
    got = torch.stack([torch.zeros_like(zs), zs.grad+zc.grad, z1.grad, z2.grad])
    assert (got-want).abs().max() <= gtol*want.abs().max()
    for o,n in [(bridged[0],'stage1_s'),(bridged[1],'stage2_s'),(bridged[2],'stage3_s'),(mix[2],'stage2_mix'),(mix[3],'stage3_mix')]:
        if f'grad_{n}_{name}' in v.files: assert (o.grad-torch.tensor(v[f'grad_{n}_{name}'])).abs().max() <= gtol*np.abs(v[f'grad_{n}_{name}']).max(), n

# -- one step by hand: every stage a function of its own, no Net, no hooks

def _stages(m): return [m.layer1, m.layer2, m.layer3, lambda z: m.fc(m.flat(m.pool(z)))]

def _batch_stats(m, z):
    "The stage with BatchNorm by this batch, averages left alone: a copy in train mode that shares the weights"
    if not isinstance(m, nn.Module): return m(z)
    for o in m:
        if isinstance(o, nn.BatchNorm2d): z = F.batch_norm(z, None, None, o.weight, o.bias, training=True, eps=o.eps)
        else: z = o(z.clone() if isinstance(o, nn.ReLU) else z)
    return z

def _by_hand(fcfd, student, teacher, x, paths, T, weight, mix, warm):
    S,H = _stages(student),_stages(teacher)
    fs,ft,z = [],[],x
    for s in S[:3]: z = s(z); fs.append(z)
    pred,z = S[3](fs[-1]),x
    with torch.no_grad():
        for h in H[:3]: z = h(z); ft.append(z)
        zt = H[3](ft[-1])
    kl = lambda z: T*T*(F.softmax(zt/T, 1)*(F.log_softmax(zt/T, 1)-F.log_softmax(z/T, 1))).sum(1).mean()
    bridged = [b(f) for b,f in zip(fcfd.s2t, fs)]
    others,preds = [[b] for b in bridged],[]
    for d,i in paths:
        if d=='s2t':
            z = bridged[i]
            for k in range(i+1, 3): z = _batch_stats(H[k], z); others[k].append(z)
            preds.append(H[3](z))
        else:
            z = fcfd.t2s[i](ft[i])
            for k in range(i+1, 3): z = _batch_stats(S[k], z)
            preds.append(S[3](z))
    l2 = sum(((o-t)**2).mean() for t,os in zip(ft, others) for o in os)
    l2 = l2+sum(((o.clamp(min=0).mean((2,3))-ft[2].clamp(min=0).mean((2,3)))**2).mean() for o in others[2])
    return weight*warm*l2 + kl(pred) + mix*sum(map(kl, preds))

@pytest.fixture
def pair():
    student,teacher = net(4, s=1).train(),net(6, s=2).train()
    with torch.no_grad():
        for _ in range(5): teacher(torch.randn(16,1,8,8))
    return student,teacher.eval().requires_grad_(False)

def _built(fcfd, student, teacher, x):
    ks = ['layer1','layer2','layer3']
    ns,nt = Net(student, x, ks),Net(teacher, x, ks, who='teacher')
    with torch.no_grad(): vs,vt = ns(x),nt(x, bn='eval')
    seed(3); fcfd.build(fm_s=vs.fm, fm_t=vt.fm, student=ns, teacher=nt, xb=(x,))
    return ns,nt,ks

@pytest.mark.parametrize('paths', [[('s2t',0),('t2s',1)],[('s2t',1),('t2s',0)],[('s2t',0),('s2t',1),('t2s',0),('t2s',1)]])
def test_step_by_hand(pair, paths, monkeypatch):
    "The same loss, and the same gradients in student and bridges, as stages called one after the other"
    student,teacher = pair
    x = torch.randn(16,1,8,8); fcfd = FCFD(T=3, weight=2, mix=.5, warmup=4)
    ns,nt,ks = _built(fcfd, student, teacher, x)
    twin = copy.deepcopy((fcfd,student,teacher))
    monkeypatch.setattr(fcfd, 'draw', lambda: paths)                    # the same paths in both
    taps = Taps(student, ks, x).attach(); taps.clear(True)
    pred = student(x); fm_s = dict(taps.store); taps.remove()
    with torch.no_grad(): zt,fm_t = nt(x, bn='eval')
    got = fcfd(fm_s=fm_s, fm_t=fm_t, pred=pred, teacher_pred=zt, student=ns, teacher=nt, epoch=1., xb=(x,))
    want = _by_hand(*twin, x, paths, T=3, weight=2, mix=.5, warm=.5)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    got.backward(); want.backward()
    for mine,his in ((fcfd,twin[0]),(student,twin[1])):
        top = max(q.grad.abs().max() for q in his.parameters() if q.grad is not None)      # a bias before a BatchNorm has a gradient of 0 and rounding
        for (n,p),q in zip(mine.named_parameters(), his.parameters(), strict=True):
            if q.grad is None: assert p.grad is None, n
            else: assert (p.grad-q.grad).abs().max() <= 1e-5*max(q.grad.abs().max(), top), n

# -- who gets gradients, methods.md 6.3

def _grads(pair, path, monkeypatch):
    student,teacher = pair
    x = torch.randn(8,1,8,8); fcfd = FCFD(paths=1, weight=0)
    ns,nt,ks = _built(fcfd, student, teacher, x)
    monkeypatch.setattr(fcfd, 'draw', lambda: [path])
    taps = Taps(student, ks, x).attach(); taps.clear(True)
    pred = student(x).detach(); fm_s = dict(taps.store); taps.remove()      # the student's own path carries no gradient here
    with torch.no_grad(): zt,fm_t = nt(x, bn='eval')
    fcfd(fm_s=fm_s, fm_t=fm_t, pred=pred, teacher_pred=zt, student=ns, teacher=nt, epoch=0., xb=(x,)).backward()
    has = lambda m: {n for n,p in m.named_parameters() if p.grad is not None and p.grad.abs().sum()>0}
    top = lambda ns: {n.split('.')[0] for n in ns}
    return top(has(student)),{'.'.join(n.split('.')[:2]) for n in has(fcfd)},has(teacher)

def test_student_then_teacher_trains_the_early_student(pair, monkeypatch):
    assert _grads(pair, ('s2t',1), monkeypatch)==({'layer1','layer2'}, {'s2t.1'}, set())

def test_teacher_then_student_trains_the_late_student(pair, monkeypatch):
    assert _grads(pair, ('t2s',0), monkeypatch)==({'layer2','layer3','fc'}, {'t2s.0'}, set())

# -- BatchNorm, draws, sums

@pytest.mark.parametrize('kind', ['2d','1d'])
def test_no_average_moves(kind):
    "At a learning rate of 0, five batches with and without FCFD leave every buffer of both networks bit-equal"
    class Flat(nn.Module):
        def __init__(self, w):
            super().__init__()
            self.layer1 = nn.Sequential(nn.Conv2d(1, w, 3, 1, 1), nn.BatchNorm2d(w), nn.ReLU())
            self.layer2 = nn.Sequential(nn.Conv2d(w, 2*w, 3, 2, 1), nn.BatchNorm2d(2*w), nn.ReLU())
            self.layer3 = nn.Sequential(nn.Conv2d(2*w, 2*w, 3, 2, 1), nn.ReLU())
            self.head = nn.Sequential(nn.Flatten(), nn.Linear(8*w, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))
        def forward(self, x): return self.head(self.layer3(self.layer2(self.layer1(x))))
    make = (lambda w: net(w, s=1)) if kind=='2d' else (lambda w: (seed(1),Flat(w))[1])
    res = []
    for loss in (None,FCFD(paths=4)):
        student,teacher = make(4),make(6)
        before = state(teacher)
        learn = learner(student, get_dls(n=160))
        if loss is not None: learn.add_cb(KD(teacher, TaskLoss()+loss))
        learn.fit(1, 0.)
        assert_same(state(teacher), before, 'teacher')
        res.append({n: b.clone() for n,b in student.named_buffers()})
    assert_same(*res)
    assert all(v==5 for n,v in res[0].items() if 'num_batches' in n)

def test_draws_leave_the_global_generator_alone(pair):
    fcfd = FCFD(); fcfd.candidates = [(d,i) for d in ('s2t','t2s') for i in range(2)]
    st = torch.get_rng_state()
    draws = [fcfd.draw() for _ in range(400)]
    assert torch.equal(torch.get_rng_state(), st)
    assert all(len(set(d))==2 for d in draws)                             # without replacement
    counts = [sum(c in d for d in draws) for c in fcfd.candidates]
    assert all(160<=c<=240 for c in counts), counts                       # each half of the time: mean 200, deviation 10

@pytest.mark.parametrize('direction,n', [('both',4),('s2t',2),('t2s',2),('none',0)])
def test_directions(pair, direction, n):
    student,teacher = pair
    fcfd = FCFD(direction=direction)
    _built(fcfd, student, teacher, torch.randn(4,1,8,8))
    assert len(fcfd.candidates)==n and {d for d,_ in fcfd.candidates} <= {direction,'s2t','t2s'}
    assert len(fcfd.t2s)==(2 if direction in ('both','t2s') else 0)

def test_beside_another_loss_the_students_own_path_is_untouched():
    "Attention's value on the first batch, and the Learner's own loss, are what they are without FCFD"
    res = []
    for loss in (TaskLoss()+100*Attention(),TaskLoss()+FCFD()+100*Attention()):
        cb = KD(net(6, s=2), loss); learn = learner(net(4, s=1), get_dls(n=32), cbs=cb)
        learn.fit(1, 0.); res.append(cb.parts)
        assert not left(learn, cb.teacher.model)
    assert res[0]['attention']==res[1]['attention'] and res[0]['task_loss']==res[1]['task_loss']

def test_a_second_fit_uses_the_same_bridges():
    cb = KD(net(6, s=2), TaskLoss()+FCFD()); learn = learner(net(4, s=1), cbs=cb)
    learn.fit(1); ids = [id(p) for p in cb.loss.parameters()]
    learn.fit(1); assert ids and ids==[id(p) for p in cb.loss.parameters()]

def test_accumulated_gradients():
    "Two halves accumulated equal the whole batch (no BatchNorm in networks; that of the bridges is by the half batch, so it is put in eval)"
    class Plain(nn.Module):
        def __init__(self, b): super().__init__(); self.conv = nn.Conv2d(b[0], b[1], 3, b[2], 1) if b[2]==1 else None
        def forward(self, z): return self.conv(z)
    adapter = lambda a,b,xb=None: Plain((a.shape[1],b.shape[1],1))
    res = []
    for bs,cbs in ((32,[]),(16,[GradientAccumulation(32)])):
        learn = learner(net(4, bn=False, s=1), get_dls(n=32, bs=bs, shuffle=False), cbs=[KD(net(6, bn=False, s=2), TaskLoss()+FCFD(paths=4, adapter=adapter)),*cbs])
        learn.fit(1, .01); res.append(state(learn.model))
    for k in res[0]: torch.testing.assert_close(res[0][k], res[1][k], rtol=0, atol=1e-6)

class BF16(Callback):
    "What fastai's MixedPrecision does, on a CPU"
    order = 10
    def before_batch(self): self.amp = torch.autocast('cpu', dtype=torch.bfloat16); self.amp.__enter__()
    def after_pred(self): self.learn.pred = self.pred.float()
    def after_loss(self): self.amp.__exit__(None, None, None)

def test_under_autocast():
    seen = []
    class Spy(FCFD):
        def loss(self, fm_t, bridged, mixed, pred, teacher_pred, mixed_preds, *rest):
            seen.extend(o.dtype for o in [*fm_t,*bridged,*[m for ms in mixed for m in ms],pred,teacher_pred,*mixed_preds])
            return super().loss(fm_t, bridged, mixed, pred, teacher_pred, mixed_preds, *rest)
    cb = KD(net(6, s=2), TaskLoss()+Spy(paths=4)); learn = learner(net(4, s=1), cbs=[cb,BF16()])
    learn.fit(2)
    assert set(seen)=={torch.float32}
    assert np.isfinite(list(cb.history[-1].values())).all()

def test_says_why_a_network_cannot_be_cut():
    class Around(nn.Module):
        def __init__(self): super().__init__(); self.layer1,self.layer2,self.layer3,self.fc = nn.Conv2d(1,4,3,1,1),nn.Conv2d(4,4,3,2,1),nn.Conv2d(4,4,3,2,1),nn.Linear(8,10)
        def forward(self, x):
            a = self.layer1(x); b = self.layer2(a.relu())
            return self.fc(torch.cat([self.layer3(b.relu()).mean((2,3)), a.mean((2,3))], 1))
    learn = learner(Around(), cbs=KD(net(4), TaskLoss()+FCFD()))
    with pytest.raises(ValueError, match=r"the student \(Around\) cannot be cut at 'layer2'.*direction='s2t'"): learn.fit(1)
    with pytest.raises(ValueError, match='needs two pairs'): learner(net(), cbs=KD(net(), TaskLoss()+FCFD().at('layer3'))).fit(1)
    with pytest.raises(ValueError, match="expected one of 'both'"): FCFD(direction='up')

s1,s2,t1,t2 = [(who,layer) for who in ('student','teacher') for layer in ('layer1','layer2')]
@pytest.mark.parametrize('bad,named', [
    ({},None), ({t1,t2},"teacher at 'layer1'"), ({t2},"teacher at 'layer2'"), ({s1,s2,t2},"teacher at 'layer2'"),
    ({s1,s2},"student at 'layer1'")])
def test_cuts_are_tried_deepest_first(pair, bad, named, monkeypatch):
    "And the one that is named is the first in the order of the switches"
    asked = {'student':[],'teacher':[]}
    def why_not(net, layer):
        who = 'teacher' if net.who=='teacher' else 'student'
        asked[who].append(layer)
        return f'{who} at {layer!r}' if (who,layer) in bad else None
    monkeypatch.setattr(Net, 'why_not', why_not)
    if named is None: _built(FCFD(), *pair, torch.randn(4,1,8,8))
    else:
        with pytest.raises(ValueError, match=f"^{named}; name other stages.*direction='{'t2s' if 'teacher' in named else 's2t'}'"):
            _built(FCFD(), *pair, torch.randn(4,1,8,8))
    assert asked=={'student':['layer2','layer1'],'teacher':['layer2','layer1']}

def test_tokens_of_oblong_pictures():
    "ViT to ViT on 64×32 pictures: 4×2 patches, which no square grid fits"
    t,s = (timm.create_model('vit_tiny_patch16_224', num_classes=10, img_size=(64,32), depth=4, embed_dim=d, num_heads=3) for d in (48,24))
    x,y = torch.randn(8,3,64,32),torch.arange(8)
    dls = DataLoaders.from_dsets(list(zip(x,y)), list(zip(x,y)), bs=4, device='cpu', num_workers=0)
    cb = KD(t, TaskLoss()+FCFD()); learner(s, dls, loss_func=nn.CrossEntropyLoss(), cbs=cb).fit(1, 1e-3)
    assert np.isfinite(cb.history[-1]['fcfd'])

# -- the zoo

def _m(name, **k): return timm.create_model(name, num_classes=10, **k)
_small = dict(
    resnet=lambda: _m('resnet10t'), resnet18=lambda: _m('resnet18'), mobilenet=lambda: _m('mobilenetv3_small_050'), convnext=lambda: _m('convnext_atto'), regnet=lambda: _m('regnetx_002'),
    efficientnet=lambda: _m('efficientnet_b0'), vit=lambda: _m('vit_tiny_patch16_224', img_size=64, depth=4, embed_dim=48, num_heads=3), reg=lambda: _m('vit_tiny_patch16_224', img_size=64, depth=4, embed_dim=48, num_heads=3, reg_tokens=2),
    deit=lambda: _m('deit_tiny_distilled_patch16_224', img_size=64, depth=4, embed_dim=48, num_heads=3), swin=lambda: _m('swin_tiny_patch4_window7_224', img_size=64, window_size=2, embed_dim=24, depths=(1,1,1,1), num_heads=(1,2,4,4)),
    mixer=lambda: timm.models.mlp_mixer.MlpMixer(num_classes=10, img_size=64, patch_size=16, num_blocks=4, embed_dim=48))
pairs = [('resnet18','resnet'),('resnet','mobilenet'),('convnext','resnet'),('resnet','convnext'),('regnet','mobilenet'),('efficientnet','resnet'),('vit','resnet'),('swin','resnet'),('mixer','mobilenet'),
         ('resnet','vit'),('resnet','swin'),('vit','vit'),('deit','vit'),('vit','reg'),('swin','swin'),('vit','mixer')]

@pytest.mark.parametrize('teacher,student', pairs, ids=['→'.join(p) for p in pairs])
def test_zoo(teacher, student):
    "Three steps of every kind of pair; the student's state_dict keys as before, nothing left behind"
    seed(); t,s = _small[teacher](),_small[student]()
    keys = list(s.state_dict())
    x,y = torch.randn(12,3,64,64),torch.arange(12)%10
    dls = DataLoaders.from_dsets(list(zip(x,y)), list(zip(x,y)), bs=4, device='cpu', num_workers=0)
    cb = KD(t, TaskLoss()+FCFD()); learn = learner(s, dls, loss_func=nn.CrossEntropyLoss(), cbs=cb)
    learn.fit(1, 1e-3)
    assert np.isfinite(cb.history[-1]['fcfd']) and list(s.state_dict())==keys
    assert not left(learn, t)

def test_a_network_with_memory_keeps_it():
    "Another pass, whole or from the middle, must not be what a recurrent network remembers of the text"
    seed(); m = get_language_model(AWD_LSTM, 20, config=dict(awd_lstm_lm_config, emb_sz=6, n_hid=7, n_layers=2)).train()
    x = torch.randint(20, (3,8)); m(x)
    was = [[t.clone() for t in h] for h in m[0].hidden]
    n = Net(m, x, out=lambda o: o[0])
    for _ in range(2):
        pred = n.resume('0.rnns.1[0]', torch.randn(3,8,6)).pred; n(x)
        assert pred.shape==(3,8,20) and all(torch.equal(a, b) for p,q in zip(m[0].hidden, was, strict=True) for a,b in zip(p, q, strict=True))
    m(x); assert not torch.equal(m[0].hidden[1][0], was[1][0])                    # its own passes do change it
    assert 'state kept from batch to batch' in n.why_not('0.rnns.0[0]')
