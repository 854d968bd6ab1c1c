"Networks that learn together: the numbers, the same as separate optimizers, and all that becomes of a peer in a fit"
import copy
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import (KD,At,HalfCPU,Out,X,Y,assert_close,assert_same,get_dls,in_float64,learner,left,net,raising,refuses,
                    seed,state)
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import MixUp
from fastai.callback.schedule import fit_one_cycle  # noqa: F401 (a method of Learner)
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientAccumulation,GradientClip
from fastai.losses import BCEWithLogitsLossFlat
from fastai.optimizer import Adam,SGD
from torch import nn

from fasterdistill.checkpoint import Checkpoint
from fasterdistill.loss import DistillLoss,TaskLoss
from fasterdistill.losses import DML,FitNet,SoftTarget

# ---- numbers ----

def vectors():
    with np.load(Path(__file__).parent/'vectors'/'dml.npz') as d:
        return {k.removeprefix('ordinary__'): torch.tensor(d[k]) for k in d}

@pytest.mark.parametrize('dtype', [torch.float64,torch.float32])
@pytest.mark.parametrize('n,out,grad', [(2,'out_two_networks','grad_two_networks'),
                                        (3,'out_three_networks_mean','grad_three_networks')])
def test_vectors(n, out, grad, dtype):
    v = vectors()
    zs = [v[f'in_z{i+1}'].to(dtype).requires_grad_() for i in range(n)]
    loss = DML(*[nn.Linear(1, 1) for _ in range(n-1)])
    each = loss.loss(zs, v['in_y'])
    torch.testing.assert_close(each.double(), v[out], rtol=1e-9 if dtype==torch.float64 else 2e-5, atol=0)
    tol = (1e-6 if dtype==torch.float64 else 1e-4)*v[grad].abs().max().item()
    got = torch.autograd.grad(each.sum(), zs)
    for g,want in zip(got, v[grad], strict=True):
        torch.testing.assert_close(g.double(), want.double(), rtol=0, atol=tol)

def np_dml(zs, y, mean):
    "The formula once more, by loops"
    res = []
    def log_p(z):
        z = np.asarray(z, float)
        return z-z.max(1, keepdims=True)-np.log(np.exp(z-z.max(1, keepdims=True)).sum(1, keepdims=True))
    logs = [log_p(z) for z in zs]
    for i,s in enumerate(logs):
        ce = -np.mean([row[k] for row,k in zip(s, y, strict=True)])
        kls = [np.mean([sum(np.exp(a)*(a-b) for a,b in zip(p, q, strict=True)) for p,q in zip(t, s, strict=True)])
               for j,t in enumerate(logs) if j!=i]
        res.append(ce+(np.mean(kls) if mean else np.sum(kls)))
    return res

@pytest.mark.parametrize('scale', [1.,50.])
@pytest.mark.parametrize('form', ['paper','code'])
@pytest.mark.parametrize('n', [2,4])
def test_derived(n, form, scale):
    "At logits of ±50 and more too"
    g = torch.Generator().manual_seed(n)
    zs = [(scale*torch.randn(5, 3, generator=g, dtype=torch.float64)).requires_grad_() for _ in range(n)]
    y = torch.tensor([0,2,1,1,0])
    each = DML(*[nn.Linear(1, 1) for _ in range(n-1)], form=form).loss(zs, y)
    want = np_dml([z.detach().numpy() for z in zs], y.tolist(), form=='paper')
    np.testing.assert_allclose(each.detach().numpy(), want, rtol=1e-9)
    assert all(g.isfinite().all() for g in torch.autograd.grad(each.sum(), zs))

def test_forward_is_the_sum_less_the_students_own():
    peers = [net(s=1),net(3, s=2)]
    loss,x,y = DML(*peers),X[:8],Y[:8]
    pred = torch.randn(8, 10, requires_grad=True)
    preds = [pred,*(copy.deepcopy(m)(x) for m in peers)]
    want = loss.loss(preds, y).sum()-F.cross_entropy(pred, y)
    value = loss(pred=pred, xb=(x,), target=y)
    torch.testing.assert_close(value, want)
    g, = torch.autograd.grad(value, pred)
    own, = torch.autograd.grad(loss.of_others([z.detach() if z is not pred else z for z in preds], 0), pred)
    torch.testing.assert_close(g, own)                           # nobody else's loss pulls at the student

# ---- the same as separate optimizers ----

def together(peers, form='paper', cbs=(), opt_func=partial(SGD, mom=.9), **kwargs):
    dml = DML(*peers, form=form)
    dls = get_dls(n=96, bs=32, shuffle=False)
    return learner(net(), dls, cbs=[KD(None, TaskLoss()+dml),*cbs], opt_func=opt_func, metrics=[], wd=0., **kwargs),dml

def apart(networks, epochs, form='paper', make=partial(torch.optim.SGD, lr=.05, momentum=.9), clip=None):
    "A network, an optimizer; all gradients are taken before anybody steps, as in the authors' code"
    opts = [make(m.parameters()) for m in networks]
    for m in networks: m.train()
    x,y = X[:96].to(torch.get_default_dtype()),Y[:96]
    for _ in range(epochs):
        for i in range(0, 96, 32):
            zs = [m(x[i:i+32]) for m in networks]
            for opt in opts: opt.zero_grad()
            for k,z in enumerate(zs):
                kls = [F.kl_div(z.log_softmax(1), o.detach().log_softmax(1), reduction='batchmean', log_target=True)
                       for j,o in enumerate(zs) if j!=k]
                pull = sum(kls)/(len(kls) if form=='paper' else 1)
                (F.cross_entropy(z, y[i:i+32])+pull).backward()
            if clip is not None:
                for m in networks: nn.utils.clip_grad_norm_(m.parameters(), clip)
            for opt in opts: opt.step()

@in_float64
@pytest.mark.parametrize('n,form', [(1,'paper'),(2,'paper'),(2,'code')])
def test_equals_separate_optimizers(n, form):
    "Weights and BatchNorm averages of all of them"
    def peers(): return [net(4+i, s=i+1) for i in range(n)]
    learn,dml = together(peers(), form)
    learn.fit(3, .05)
    alone = [net(),*peers()]
    apart(alone, 3, form)
    for got,want in zip((learn.model,*dml.peers), alone, strict=True): assert_close(state(got), state(want), 1e-8)
    assert left(learn)==[]

@in_float64
def test_clipping_is_network_by_network():
    "A learned part of another loss has its own norm, as before"
    learn,dml = together([net(6, s=1),net(3, s=2)], cbs=[GradientClip(.05)])
    learn.fit(2, .05)
    alone = [net(),net(6, s=1),net(3, s=2)]
    apart(alone, 2, clip=.05)
    for got,want in zip((learn.model,*dml.peers), alone, strict=True): assert_close(state(got), state(want), 1e-8)

    def norm(m): return torch.stack([p.grad.norm() for p in m.parameters()]).norm().item()
    found = []
    loss = TaskLoss()+DML(net(6, s=1))+FitNet().at('layer3')
    learn = learner(net(), get_dls(), cbs=[KD(net(8, s=1), loss),GradientClip(.01)], metrics=[])
    def norms(learn):
        if not learn.training: return
        *_,dml,fit = loss.losses
        found.append([norm(m) for m in (learn.model,dml,fit)])
    learn.fit(1, cbs=At('before_step', norms, order=70))
    np.testing.assert_allclose(found, .01, rtol=1e-3)

@in_float64
def test_accumulated_gradients():
    def made(cbs, bs):
        dml = DML(net(6, bn=False, s=1))
        dls = get_dls(n=96, bs=bs, shuffle=False)
        learn = learner(net(bn=False), dls, cbs=[KD(None, TaskLoss()+dml),*cbs], metrics=[])
        learn.fit(2)
        return learn.model,dml.peers[0]
    for got,want in zip(made([GradientAccumulation(32)], 16), made([], 32), strict=True):
        assert_close(state(got), state(want), 1e-8)

# ---- a peer in a fit ----

def test_modes_and_optimizer():
    "It trains with the student, in evaluation mode whenever that is not in a batch; between epochs it is not there"
    learn,dml = together([net(6, s=1)])
    n,seen = len(list(learn.model.parameters())),{}
    def look(name): return lambda l: seen.setdefault(f'{name}.{l.training}', []).append(
        (dml.peers[0].training,len(l.opt.all_params())))
    learn.fit(2, cbs=[At(e, look(e), order=70) for e in ('after_pred','after_epoch')])
    assert set(seen['after_pred.True'])=={(True,2*n)}
    assert {o for k,v in seen.items() if k!='after_pred.True' for o in v}=={(False,n)}
    assert not dml.peers[0].training and left(learn)==[]
    counts = [int(m.num_batches_tracked) for m in dml.peers[0].modules() if isinstance(m, nn.BatchNorm2d)]
    assert counts==[6]*3                                         # one pass a step, none of the trial

def test_runs_under_the_students_autocast():
    kinds,peer = [],net(6, s=1)
    peer.fc.register_forward_hook(lambda m, a, o: kinds.append((m.training,o.dtype)))
    learn,_ = together([peer], cbs=[HalfCPU()])
    learn.fit(1)
    assert kinds==[(False,torch.bfloat16)]+[(True,torch.bfloat16)]*3             # the trial too
    learn,_ = together([peer])
    learn.fit(1)
    assert {k for _,k in kinds[4:]}=={torch.float32}

def test_a_student_in_half_precision():
    "Its peers stay float32"
    def cast(learn): learn.xb = tuple(x.bfloat16() for x in learn.xb)
    def wide(pred, y): return F.cross_entropy(pred.float(), y)                   # fastai averages no half precision
    learn,dml = together([net(6, s=1)], loss_func=wide)
    learn.model.bfloat16()
    was = state(dml)
    learn.fit(1, cbs=At('before_batch', cast, order=-5))
    assert {p.dtype for p in dml.parameters()}=={torch.float32}
    assert not torch.equal(dml.peers[0].fc.weight, was['peers.0.fc.weight'])

@pytest.mark.cuda
def test_mixed_precision_on_a_gpu():
    kinds,peer = [],net(6, s=1)
    peer.fc.register_forward_hook(lambda m, a, o: kinds.append(o.dtype))
    dml = DML(peer)
    dls = get_dls(n=96, bs=32)
    dls.cuda()
    learn = learner(net().cuda(), dls, cbs=[KD(None, TaskLoss()+dml),MixedPrecision()], metrics=[])
    learn.fit(2)
    assert set(kinds)=={torch.float16} and all(p.isfinite().all() for p in peer.parameters())
    assert next(peer.parameters()).is_cuda

def test_mixed_labels_reach_the_peers():
    "MixUp's loss is the peers' too: the value by hand, in the middle of a step"
    learn,dml = together([net(6, s=1)], cbs=[MixUp()])
    apart = []
    def compare(learn):
        if not learn.training: return
        (a,b),lam,z = (learn.y,learn.mix_up.yb1[0]),learn.mix_up.lam,[learn.pred.detach()]
        with torch.no_grad(): z.append(dml.peers[0](learn.x))                    # normalised by the same batch
        ce = lam*F.cross_entropy(z[1], a, reduction='none')+(1-lam)*F.cross_entropy(z[1], b, reduction='none')
        kls = [F.kl_div(s.log_softmax(1), t.log_softmax(1), reduction='batchmean', log_target=True)
               for s,t in (z,z[::-1])]
        apart.append(float(ce.mean()+sum(kls))-learn.knowledge_distillation.parts['dml'])
    learn.fit(1, cbs=At('after_loss', compare))
    assert len(apart)==3 and max(map(abs, apart))<1e-5

def test_weighed():
    "A weight is the peers' rate with SGD: what they learn by is multiplied"
    def moved(w):
        learn,dml = together([net(6, s=1)], opt_func=partial(SGD, mom=0.))
        learn.knowledge_distillation.loss.weights[1] = [w]
        was,moves = state(dml.peers[0]),{}
        def look(l):
            if l.training and not moves: moves.update({k: v-was[k] for k,v in dml.peers[0].named_parameters()})
        learn.fit(1, cbs=At('after_step', look, order=70))
        return moves
    one,half = moved(1.),moved(.5)
    for k in one: torch.testing.assert_close(half[k], one[k]/2, rtol=1e-3, atol=1e-7)

# ---- what is refused ----

def test_what_no_loss_may_learn():
    "The student, a part of it, a network around it, the teacher; before anything is trained or moved"
    student,teacher = net(),net(8, s=1)
    part = nn.Sequential(student.layer1, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    for peer,why in ((student,'what DML(Sequential) learns is the student itself'),
                     (Out(student, lambda o: o),'what DML(Out) learns is the student itself'),
                     (part,'shares 4 learned parameters with the student'),
                     (teacher,'what DML(Sequential) learns is the teacher')):
        for loss in (TaskLoss()+SoftTarget()+DML(peer),SoftTarget()+.5*DML(net(s=3), peer)):
            with pytest.raises(ValueError) as e: learner(student, get_dls(), cbs=KD(teacher, loss), metrics=[]).fit(1)
            assert why.split(' learns')[-1] in str(e.value)
    refuses(learner(student, cbs=KD(teacher, TaskLoss()+DML(student))), 'is the student itself', teachers=[teacher])

def test_what_is_built_is_looked_at_too():
    class Borrows(DistillLoss):
        "Builds a part around the student's own classifier"
        def build(self, student): self.head = student['fc']
        def forward(self, pred, student): return pred.mean()
    refuses(learner(net(), cbs=KD(None, TaskLoss()+Borrows())), 'shares 2 learned parameters with the student')

def test_peers_that_cannot_be():
    twin = net()
    for bad,error,why in ((lambda: DML(net),TypeError,'a peer is a network'),
                          (lambda: DML(SoftTarget()),TypeError,'a peer is a network'),
                          (lambda: DML(learner()),TypeError,'give its model'),
                          (lambda: DML(twin, twin),ValueError,'two peers are one network'),
                          (lambda: DML(twin, Out(twin, lambda o: o)),ValueError,'or share parameters'),
                          (lambda: DML(net(), nn.Flatten()),ValueError,'requires a gradient'),
                          (lambda: DML(net(), form='sum'),ValueError,"one of 'paper' or 'code'")):
        with pytest.raises(error, match=why): bad()
    refuses(learner(cbs=KD(None, TaskLoss()+DML(net(classes=7)))), r'the peer Sequential returns \(32, 7\)')
    refuses(learner(cbs=KD(None, TaskLoss()+DML(Out(net(), lambda o: (o,o))))), 'the peer Out returns a tuple')
    pred = torch.randn(4, 10)
    with pytest.raises(ValueError, match='one class of several'):
        DML(net())(pred=pred, xb=(X[:4],), target=torch.ones(4, 10), criterion=BCEWithLogitsLossFlat())

def test_another_student_needs_another_loss():
    loss = TaskLoss()+DML(net(6, s=1))
    learner(net(), cbs=KD(None, loss)).fit(1)
    refuses(learner(net(s=2), cbs=KD(None, loss)), 'trained with another student')

# ---- repr, copies, files, whatever happens ----

def test_repr_is_a_word():
    cb = KD(None, TaskLoss()+.5*DML(net(), Out(net(s=1), abs), form='code'))
    assert repr(cb.loss)=="TaskLoss() + 0.5*DML(Sequential, Out, form='code')"
    assert repr(cb)==f'KnowledgeDistillationCallback(None, {cb.loss!r})'

def test_a_copied_learner_has_peers_of_its_own():
    learn,dml = together([net(6, s=1)], opt_func=Adam)
    learn.fit(1)
    twin = copy.deepcopy(learn)
    other = twin.knowledge_distillation.loss.losses[1]
    was = state(dml)
    twin.fit(1)
    assert_same(state(dml), was)
    learn.fit(1)
    assert_same(state(other), state(dml))
    assert_same(state(twin.model), state(learn.model))
    assert other._args[0][0] is other.peers[0]                   # and the expression names the same

def test_plan_and_lr_find(tmp_path):
    learn,dml = together([net(6, s=1)], path=tmp_path)
    was = state(dml)
    plan = learn.knowledge_distillation.plan()
    assert plan.learned==sum(p.numel() for p in dml.parameters())
    learn.lr_find(num_it=6, show_plot=False)
    assert_same(state(dml), was)
    learn.fit(1)

@pytest.mark.parametrize('event', ['after_pred','after_loss','before_step'])
def test_interrupted(event):
    learn,dml = together([net(6, s=1)])
    with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=At(event, raising(KeyboardInterrupt()), skip=1))
    assert left(learn)==[] and not any(m.training for m in dml.modules())
    assert all(p.grad is None and p.requires_grad for p in dml.parameters())
    learn.fit(1)

class Stop(Exception): ...

def run(path, s, cbs=(), at=None):
    seed(s)
    learn,dml = together([net(6, s=1),net(3, s=2)], opt_func=Adam, path=path)
    seed(s)
    def stop(l):
        if l.training and (l.epoch,l.iter)==at: raise Stop
    if at is None: learn.fit_one_cycle(3, .02, cbs=list(cbs))
    else:
        with pytest.raises(Stop): learn.fit_one_cycle(3, .02, cbs=[*cbs,At('before_batch', stop)])
    return state(learn.model)|{f'dml.{k}': v for k,v in state(dml).items()}

def test_resumed_equals_the_uninterrupted(tmp_path):
    "Peers, their averages and moments"
    whole = run(tmp_path, 0)
    run(tmp_path, 0, [Checkpoint('run')], at=(2,1))
    assert_same(run(tmp_path, 7, [Checkpoint('run', resume=True)]), whole)
    f = tmp_path/'models'/'run.pth'
    run(tmp_path, 0, [Checkpoint('run')], at=(2,1))
    kept = torch.load(f, weights_only=True)
    kept['kds'][0]['learned']['losses.1.peers.1.layer1.1.running_mean'] += 1e-3
    torch.save(kept, f)
    other = run(tmp_path, 7, [Checkpoint('run', resume=True)])
    assert any(not torch.equal(other[k], whole[k]) for k in whole)               # the comparison can fail

def test_peers_with_the_students_weights():
    "Nothing to tell each other: a warning, for a copy of the student and for two alike peers"
    why = 'two of the networks have the same weights'
    for student,peers in ((net(),[net()]),(net(s=3),[net(),net(4, s=0)])):
        learn = learner(student, cbs=KD(None, TaskLoss()+DML(*peers)))
        with pytest.warns(UserWarning, match=why): learn.fit(1)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learner(net(), cbs=KD(None, TaskLoss()+DML(net(s=1)))).fit(1)

def test_peers_of_the_best_epoch(tmp_path):
    "They come back with its student"
    learn,dml = together([net(6, s=1)], path=tmp_path)
    epochs = []
    learn.fit(3, cbs=[At('after_epoch', lambda l: epochs.append((state(l.model),state(dml)))),
                      SaveModelCallback(monitor='valid_loss', comp=np.greater)])
    i = [row[1] for row in learn.recorder.values].index(max(row[1] for row in learn.recorder.values))
    assert i<2
    assert_same(state(learn.model), epochs[i][0])
    assert_same(state(dml), epochs[i][1])
