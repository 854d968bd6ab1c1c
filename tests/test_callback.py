"""A fit with the callback: what it computes, what it leaves alone, how it ends, what it refuses.
Other opinions: loops written by hand in plain PyTorch, and the same fit without the callback, to the last bit."""
import copy
import gc
import os
import pickle
import random
import subprocess
import sys
import warnings
import weakref
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import (KD,At,HalfCPU,StepLosses,Watch,X,Y,asked,assert_close,assert_same,flags,get_dls,in_float64,kl,
                    learner,left,lr,net,raising,real,refuses,seed,state,tuples)
from fastai.callback.core import (CancelBackwardException,CancelBatchException,CancelEpochException,
                                  CancelFitException,CancelStepException,CancelTrainException,
                                  CancelValidException,Callback)
from fastai.callback.mixup import MixUp
from fastai.callback.progress import CSVLogger
from fastai.callback.schedule import SchedCos,SchedLin
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientAccumulation,GradientClip
from fastai.interpret import ClassificationInterpretation
from fastai.losses import BCEWithLogitsLossFlat,CrossEntropyLossFlat,MSELossFlat
from fastai.optimizer import Adam,OptimWrapper,SGD
from fastcore.foundation import L
from torch import nn

from fasterdistill.loss import DistillLoss,FeatureLoss,TaskLoss,after,ramp,steps
from fasterdistill.losses.attention import Attention
from fasterdistill.losses.fitnet import FitNet
from fasterdistill.losses.infonce import InfoNCE
from fasterdistill.losses.logits import BinarySoftTarget,Logits,SoftTarget
from fasterdistill.teachers.teacher import Frozen


def fitted(cb=None, n=2, **kwargs):
    "A Learner that has trained for `n` epochs"
    kwargs.setdefault('dls', get_dls(shuffle=False))
    learn = learner(**kwargs)
    seed(3)
    learn.fit(n, cbs=cb)
    return learn

# ---- what it computes ----

class Read(SimpleNamespace):
    "What a loss reads of a batch: the `task` loss, logits `s` and `t`, maps `fs` and `ft`, `pos` and `epoch`"
    def kl(self, T=4.): return kl(self.s, self.t, T)
    def mse(self): return (self.s-self.t).pow(2).mean()

def maps(m, x):
    "What a `net` answers, and its maps"
    fm = []
    for k in ('layer1','layer2','layer3'):
        x = m.get_submodule(k)(x)
        fm.append(x)
    return m.fc(m.flat(m.pool(x))),fm

def by_hand(teacher, loss, n=2, extra=()):
    "The same steps without fastai, by the loss of a `Read`; the network and the value of each step"
    model,teacher = net(),copy.deepcopy(teacher).eval()
    opt = torch.optim.SGD([*model.parameters(),*extra], lr=lr, momentum=.9)
    vals = []
    for i in range(3*n):
        batch = slice(i%3*32, i%3*32+32)
        x,y = real(X[batch]),Y[batch]
        model.train()
        s,fs = maps(model, x)
        with torch.no_grad(): t,ft = maps(teacher, x)
        val = loss(Read(task=F.cross_entropy(s, y), s=s, t=t, fs=fs, ft=ft, pos=i/(3*n), epoch=i//3))
        val.backward()
        opt.step()
        opt.zero_grad()
        vals.append(val.item())
    return model,vals

def energy(z): return F.normalize(z.pow(2).sum(1).flatten(1))
def at_code(s, t): return (energy(s)-energy(t)).pow(2).mean()
def l1(pred, teacher_pred, **kwargs): return F.l1_loss(pred, teacher_pred)

def cosine(b):
    share = SchedCos(1, .2)(b.pos)
    return (1-share)*b.task+share*b.kl()

def two_layers(b):
    smaller = F.adaptive_avg_pool2d(b.fs[0], 4)
    return .7*b.task+.3*(at_code(b.fs[2], b.ft[2])+at_code(smaller, b.ft[1]))

same_steps = dict(                                     # the callback of a teacher, and the loss of a `Read`
    lerp=(lambda t: KD(t, SoftTarget), lambda b: .5*b.task+.5*b.kl()),
    positional=(lambda t: KD(t, SoftTarget(T=2), None, None, .9), lambda b: .1*b.task+.9*b.kl(2.)),
    cosine=(lambda t: KD(t, SoftTarget(), weight=SchedCos(1, .2)), cosine),
    schedule=(lambda t: KD(t, SoftTarget(), weight=.8, schedule=SchedLin(0, 1)),
              lambda b: (1-.8*b.pos)*b.task+.8*b.pos*b.kl()),
    sum=(lambda t: KD(t, 2*SoftTarget()+Logits()), lambda b: .5*b.task+.5*(2*b.kl()+b.mse())),
    whole=(lambda t: KD(t, .1*TaskLoss()+.9*SoftTarget(T=4)+100*Attention()),
           lambda b: .1*b.task+.9*b.kl()+100*sum(map(at_code, b.fs, b.ft))),
    layers=(lambda t: KD(t, Attention(), ['layer3','layer1'], ['layer3','layer2'], .3), two_layers),
    ramp=(lambda t: KD(t, TaskLoss()+ramp(2)*Logits()), lambda b: b.task+(b.epoch+1)/2*b.mse()),
    phases=(lambda t: KD(t, steps({0:0, 1:1})*TaskLoss()+steps({0:1, 1:0})*Logits()),
            lambda b: b.task if b.epoch else b.mse()),
    after=(lambda t: KD(t, TaskLoss()+3*after(1)*Logits()), lambda b: b.task+3*b.epoch*b.mse()),
    pos=(lambda t: KD(t, TaskLoss()+SchedLin(1, 0)*Logits()), lambda b: b.task+(1-b.pos)*b.mse()),
    function=(lambda t: KD(t, l1), lambda b: .5*b.task+.5*(b.s-b.t).abs().mean()))

@in_float64
@pytest.mark.parametrize('kd,hand', same_steps.values(), ids=same_steps)
def test_steps_equal_a_loop(teacher, kd, hand):
    losses = StepLosses()
    learn = fitted([kd(teacher),losses])
    model,vals = by_hand(teacher, hand)
    np.testing.assert_allclose(losses.vals, vals, rtol=1e-10, atol=1e-10)
    assert_close(state(learn.model), state(model))
    assert left(learn, teacher)==[]

def pointwise(s, t): return nn.Conv2d(s.shape[1], t.shape[1], 1)

@in_float64
def test_learned_parts_equal_a_loop(teacher):
    "The adapter learns with the student, as if it were written into the same optimizer"
    loss = FitNet(adapter=pointwise).at('layer2')
    with torch.no_grad(): s,t = [m.layer2(m.layer1(real(X[:4]))) for m in (net().eval(),teacher)]
    loss.build(fm_s=dict(layer2=s), fm_t=dict(layer2=t))
    conv = copy.deepcopy(loss.adapters[0])
    learn = fitted(KD(teacher, TaskLoss()+2*loss))
    hint = lambda b: b.task+2*(conv(b.fs[1])-b.ft[1]).pow(2).mean()
    model,_ = by_hand(teacher, hint, extra=conv.parameters())
    assert_close(state(learn.model), state(model))
    assert_close(state(loss.adapters[0]), state(conv))
    assert not torch.equal(conv.weight, nn.Conv2d(8, 16, 1).weight)
    assert left(learn, teacher)==[]

class OneHot(Callback):
    "Labels as the loss functions of other tasks read them"
    def before_batch(self):
        if not isinstance(self.loss_func, CrossEntropyLossFlat|nn.CrossEntropyLoss):
            self.learn.yb = (F.one_hot(self.y, 10).float(),)

@pytest.mark.parametrize('loss_func,expected', [
    (None,SoftTarget), (nn.CrossEntropyLoss(label_smoothing=.1),SoftTarget),
    (BCEWithLogitsLossFlat(),BinarySoftTarget), (nn.BCEWithLogitsLoss(),BinarySoftTarget),
    (MSELossFlat(),Logits), (nn.L1Loss(),Logits)])
def test_loss_left_out(teacher, loss_func, expected):
    cb = KD(teacher)
    learn = learner(loss_func=loss_func, metrics=[])
    learn.fit(1, cbs=[OneHot(),cb])
    assert type(cb.loss) is expected
    assert left(learn, teacher)==[]

def test_loss_left_out_unknown(teacher):
    learn = learner(loss_func=lambda p,y: (p**2).mean())
    with pytest.raises(ValueError, match='name one'): learn.fit(1, cbs=KD(teacher))

# ---- what it leaves alone ----

def predictions(learn):
    "All that a Learner says of its validation set"
    seed(4)
    interp = ClassificationInterpretation.from_learner(learn)
    item = learn.dls.valid_ds[0][0]
    return [*interp.top_losses(), torch.tensor(interp.confusion_matrix()), torch.tensor(learn.validate()),
            *learn.get_preds(with_loss=True, with_input=True), learn.predict(item)[2], learn.tta(n=1)[0]]

def test_valid_loss_and_predictions_as_without(teacher):
    learn = fitted(n=1)
    alone = predictions(learn)
    learn.add_cb(KD(teacher, .5*SoftTarget()+100*FitNet(), weight=.9))
    beside = predictions(learn)
    assert len(alone)==len(beside)
    assert all(torch.equal(p, q) for p,q in zip(alone, beside))
    learn.fit(1)
    beside = predictions(learn)
    learn.remove_cb(KD)
    assert all(torch.equal(p, q) for p,q in zip(beside, predictions(learn)))
    assert not torch.equal(alone[0], beside[0])
    assert left(learn, teacher)==[]

def test_recorded_losses_are_the_task_loss(teacher):
    "In a fit, too: the same table as without, when the distillation adds nothing"
    alone,watched = fitted(),fitted(KD(teacher, TaskLoss()+Watch()))
    assert [o[:3] for o in alone.recorder.values]==[o[:3] for o in watched.recorder.values]
    losses = StepLosses()
    learn = fitted([KD(teacher, SoftTarget(), weight=1.),losses])
    task = np.array([o.item() for o in learn.recorder.losses])
    assert np.abs(task-np.array(losses.vals)).min()>.01

@pytest.mark.parametrize('loss', [
    lambda: TaskLoss()+Watch(),
    lambda: TaskLoss()+Watch()+0*SoftTarget()+0.*FitNet(),
    lambda: TaskLoss()+Aside()], ids=['teacher and hooks','weight 0','a learned part'])
def test_bit_equal_to_training_without(teacher, loss):
    alone = fitted(opt_func=Adam, dls=get_dls())
    beside = fitted(KD(teacher, loss()), opt_func=Adam, dls=get_dls())
    assert_same(state(alone.model), state(beside.model))
    assert alone.recorder.losses==beside.recorder.losses

class Aside(DistillLoss):
    "Learns, with large gradients, from the student's activations without telling the student"
    layers = 'layer2'
    def build(self, fm_s): self.lin,self.idle = nn.Linear(8, 3),nn.Parameter(torch.ones(3))
    def forward(self, fm_s):
        pooled = fm_s['layer2'].detach().mean((2,3))
        return 1e3*(self.lin(pooled)-1).pow(2).mean() + 0*self.idle.sum()

def test_clipping_of_the_student_is_as_without(teacher):
    alone = fitted(GradientClip(.01))
    beside = fitted([GradientClip(.01),KD(None, TaskLoss()+Aside())])
    assert_same(state(alone.model), state(beside.model))

    loss,norms = Aside(),[]
    def note(l): norms.append(torch.stack([p.grad.norm() for p in loss.parameters()]).norm().item())
    fitted([GradientClip(.01),KD(None, TaskLoss()+loss),At('before_step', note)])
    np.testing.assert_allclose(norms, .01, rtol=1e-3)

@in_float64
def test_weight_decay_spares_biases_and_norms(teacher):
    loss = Aside()
    fitted(KD(None, TaskLoss()+loss), wd=.1)
    decayed = torch.ones(3)*(1-lr*.1)**6                            # a weight that no gradient moves
    torch.testing.assert_close(loss.idle.detach(), decayed, rtol=0, atol=1e-10)

    fit,seen = FitNet(),{}
    def look(l): seen.update({n: l.opt.state[p].get('do_wd', True) for n,p in fit.named_parameters()})
    fitted([KD(teacher, TaskLoss()+fit),At('after_step', look)], wd=.1)
    assert len(seen)==3
    assert sorted(seen.values())==[False,False,True]
    assert [p.ndim for n,p in fit.named_parameters() if seen[n]]==[4]

@in_float64
def test_gradient_accumulation_equals_the_larger_batch():
    t = net(8, bn=False, s=1)
    def run(bs, *cbs):
        loss = FitNet(adapter=pointwise)
        learn = learner(net(bn=False), get_dls(128, bs=bs, shuffle=False))
        seed(3)
        learn.fit(2, cbs=[*cbs,KD(t, TaskLoss()+SoftTarget()+loss)])
        return state(learn.model),state(loss)
    whole,halves = run(64),run(32, GradientAccumulation(64))
    for a,b in zip(whole, halves): assert_close(a, b)

def test_autocast(teacher):
    seen,half = [],[]
    teacher.fc.register_forward_hook(lambda m,a,o: half.append((o.dtype,torch.is_autocast_enabled('cpu'))))
    def look(pred, teacher_pred, fm_s, fm_t, **k):
        read = [pred,teacher_pred,*fm_s.values(),*fm_t.values(),pred@pred.T]
        seen.append({o.dtype for o in read})
    n = []
    learn = fitted([HalfCPU(),KD(teacher, TaskLoss()+SoftTarget()+FitNet()+Watch(look)),
                    At('before_batch', lambda l: n.append(len(half)))])
    assert half[n[0]:]==[(torch.bfloat16,True)]*6           # the teacher, in the six batches
    assert seen[1:]==[{torch.float32}]*6
    assert not torch.is_autocast_enabled('cpu')
    assert np.isfinite(learn.recorder.values[-1]).all()

class Doubles(Callback):
    order = -9
    def before_batch(self): self.learn.xb = (self.xb[0].double(),)

@pytest.mark.parametrize('loss', [lambda: SoftTarget(), lambda: TaskLoss()+FitNet()], ids=['share','learned'])
def test_networks_of_float64(teacher, loss):
    "Beside a loss of fastai's, which makes float32 of all, and learned parts, which torch makes so"
    learn = learner(net().double())
    learn.fit(1, cbs=[Doubles(),KD(teacher.double(), loss())])
    assert learn.model.fc.weight.dtype==torch.float64
    assert not torch.equal(learn.model.fc.weight, net().double().fc.weight)
    assert left(learn, teacher)==[]

# ---- what is shown ----

def shown(learn):
    "The columns of the table but the first and the last"
    return list(learn.recorder.metric_names)[1:-1]

def test_columns_and_csv(teacher, tmp_path):
    loss,log = TaskLoss()+SoftTarget()+.5*FitNet()+2*FitNet().at('layer1'),[]
    cb = KD(teacher, loss)
    learn = learner(path=tmp_path, cbs=cb)
    learn.logger = log.append
    learn.fit(2, cbs=CSVLogger())

    ours = ['soft_target','fit_net','fit_net_2','agreement']
    names = ['epoch','train_loss','valid_loss','accuracy',*ours,'time']
    values = [list(r) for r in learn.recorder.values]
    assert list(learn.recorder.metric_names)==names
    head,*rows = [r.split(',') for r in (tmp_path/'history.csv').read_text().split()]
    assert head==names
    assert [[float(o) for o in r[1:-1]] for r in rows]==values
    assert [[float(o) for o in r[1:-1]] for r in log]==values
    for r,h in zip(values, cb.history, strict=True): assert r[3:]==[h[n] for n in ours]
    assert list(cb.parts)==['task_loss',*ours]
    assert set(cb.history[0])==set(cb.parts)
    assert left(learn, teacher)==[]
    assert [m.name for m in learn.metrics]==['accuracy']

    learn.fit(1)
    assert list(learn.recorder.metric_names)==names
    assert len(cb.history)==1

def test_column_values(teacher):
    "A column is the mean over the epoch's training batches"
    vals,agree = [],[]
    def note(pred, teacher_pred, **k):
        vals.append(kl(pred, teacher_pred).item())
        agree.append((pred.argmax(1)==teacher_pred.argmax(1)).float().mean().item())
    cb = KD(teacher, SoftTarget()+Watch(note))
    fitted(cb)
    vals,agree = vals[1:],agree[1:]                                # the first is the trial of the losses
    for e,h in enumerate(cb.history):
        epoch = slice(3*e, 3*e+3)
        assert h['soft_target']==pytest.approx(np.mean(vals[epoch]), rel=1e-5)
        assert h['agreement']==pytest.approx(np.mean(agree[epoch]), rel=1e-5)
    assert len(cb.history)==2
    assert cb.parts['soft_target']==pytest.approx(vals[-1], rel=1e-5)

class Logs(DistillLoss):
    "Logs `value` as `key`, which is 'half' by rights"
    logs = ('half',)
    def __init__(self, value=.5, key='half'): self.value,self.key = value,key
    def forward(self, pred):
        self.log(self.key, pred.new_tensor(self.value))
        return pred.mean()*0

def test_logged_columns(teacher):
    cb = KD(teacher, SoftTarget()+Logs())
    learn = fitted(cb)
    assert shown(learn)[3:]==['soft_target','logs','agreement','half']
    assert cb.history[0]['half']==.5

    cb = KD(teacher, TaskLoss()+Logs(.5)+Logs(.25))                # a name that is taken
    learn = fitted(cb)
    names = ['half','logs_2_half']
    assert shown(learn)[3:]==['logs','logs_2',*names]
    assert [cb.history[0][k] for k in names]==[.5,.25]
    assert [cb.parts[k] for k in names]==[.5,.25]

    with pytest.raises(ValueError, match="logs 'other'"): fitted(KD(teacher, TaskLoss()+Logs(key='other')))

class Grows(DistillLoss):
    "Logs the mean of each of its layers, of which it knows in `build`"
    layers,also,logs = 'stages',('embedding',),('first',)
    def build(self, fm_s): self.logs = (*type(self).logs,*(f'mean_{k}' for k in self.declared(fm_s)))
    def forward(self, fm_s):
        self.log('first', next(iter(fm_s.values())).mean())
        for k,z in self.declared(fm_s).items(): self.log(f'mean_{k}', z.mean())
        return fm_s['embedding'].mean()*0

def test_names_logged_that_layers_decide():
    "Noted like others; in the table they stand from the next fit on: its header is written before the first batch"
    cb = KD(None, TaskLoss()+Grows().at(['layer1','layer2']))
    learn = fitted(cb)
    assert shown(learn)[3:]==['grows','first']
    names = ['mean_layer1','mean_layer2']
    for h in cb.history:
        assert h['mean_layer1']==h['first']>0
        assert h['mean_layer2']>0
    assert [n for n in cb.parts if n in names]==names
    learn.fit(1, cbs=cb)
    assert shown(learn)[3:]==['grows','first',*names]
    assert [learn.recorder.values[-1][list(learn.recorder.metric_names).index(n)-1] for n in names]==[
        cb.history[-1][n] for n in names]
    assert left(learn)==[]

def test_layers_read_besides(teacher):
    "They come last, `at` does not replace them, and what they are paired with in the other network is nothing"
    seen = []
    class Besides(FitNet):
        also = dict(student=('embedding',), teacher=('fc','embedding'))
        def forward(self, fm_s, fm_t, **given):
            seen.append((fm_s,fm_t))
            return super().forward(fm_s, fm_t, **given)
    cb = KD(teacher, TaskLoss()+Besides().at('layer2'))
    learn = learner(dls=get_dls(shuffle=False), cbs=cb)
    rows = cb.plan().rows[1].layers
    assert rows==['layer2 (8, 4, 4) → layer2 (16, 4, 4)', 'also embedding (fc:in) (16)',
                  'also fc (10)', 'also embedding (fc:in) (32)']
    seed(3)
    learn.fit(1)
    fm_s,fm_t = seen[-1]
    assert [list(fm_s),list(fm_t)]==[['layer2','embedding'],['layer2','fc','embedding']]
    assert torch.equal(teacher.fc(fm_t['embedding']), fm_t['fc'])
    assert len(cb.loss.losses[1].adapters)==1
    plain = KD(teacher, TaskLoss()+FitNet().at('layer2'))
    fitted(plain, 1)
    assert plain.history[0]['fit_net']==cb.history[0]['besides']
    assert left(learn, teacher)==[]

def test_no_columns(teacher):
    cb = KD(teacher, SoftTarget(), columns=False)
    learn = fitted(cb)
    assert list(learn.recorder.metric_names)==['epoch','train_loss','valid_loss','accuracy','time']
    assert cb.history[0]['soft_target']>0

@pytest.mark.parametrize('loss,has', [
    (lambda: SoftTarget(),True), (lambda: TaskLoss()+FitNet(),False), (lambda: TaskLoss()+Attention(),False)])
def test_agreement_only_where_the_prediction_is_read(teacher, loss, has):
    learn = fitted(KD(teacher, loss()))
    assert ('agreement' in learn.recorder.metric_names)==has

def test_mixup(teacher, tmp_path):
    "The teacher sees the mixed batch; agreement stays blank"
    seen,given = [],[]
    class Reads(DistillLoss):
        def forward(self, pred, teacher_pred, xb, target, mix):
            seen.append((xb[0],target,*(mix or ())))
            return (pred-teacher_pred).pow(2).mean()
    def note(l):
        if l.training: given.append((l.xb[0],*l.yb,l.mix_up.yb1[0],l.mix_up.lam))
    learn,cb = learner(path=tmp_path),KD(teacher, TaskLoss()+Reads())
    learn.fit(1, cbs=[MixUp(.4),cb,CSVLogger(),At('after_loss', note)])

    assert cb.history[0]['agreement'] is None
    assert 'agreement' not in cb.parts
    assert (tmp_path/'history.csv').read_text().split()[1].split(',')[-2]=='None'
    assert list(learn.recorder.metric_names)[-2]=='agreement'
    for got,want in zip(seen[1:], given, strict=True):
        assert type(got[0]) is torch.Tensor
        assert got[1].dtype==torch.int64
        assert all(torch.equal(a, b) for a,b in zip(got, want, strict=True))
    learn.fit(1, cbs=cb)
    assert cb.history[0]['agreement'] is not None
    assert left(learn, teacher)==[]

@pytest.mark.parametrize('exc', [RuntimeError,KeyboardInterrupt])
def test_names_gone_after_an_exception(teacher, exc):
    learn = learner()
    stop = At('after_batch', raising(exc('boom')), skip=1)
    with pytest.raises(exc): learn.fit(2, cbs=[KD(teacher, SoftTarget()),stop])
    assert [m.name for m in learn.metrics]==['accuracy']
    assert left(learn, teacher)==[]
    learn.fit(1)
    assert 'soft_target' not in learn.recorder.metric_names

# ---- plan ----

def rngs(learn):
    return [torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate(),
            learn.dls.train.rng.getstate(), learn.dls.valid.rng.getstate()]

def snapshot(learn, t, cb):
    "All that `plan` could change"
    return SimpleNamespace(
        states=[state(learn.model),state(t),state(cb.loss)], rngs=rngs(learn), attrs=dict(vars(learn)),
        modes=[m.training for m in (*t.modules(),*learn.model.modules())])

def planned(learn, t, cb):
    "`plan` was asked, and nothing is another than before"
    was = snapshot(learn, t, cb)
    text = repr(cb.plan(learn))
    learn.model.train()
    learn.model.train(was.modes[-1])
    assert 'layer3 (16, 2, 2) → layer3 (32, 2, 2)' in text
    assert 'student  Sequential' in text
    now = snapshot(learn, t, cb)
    for a,b in zip(was.states, now.states): assert_same(a, b)
    assert was.rngs==now.rngs
    assert was.modes==now.modes
    assert was.attrs.keys()==now.attrs.keys()
    assert all(was.attrs[k] is now.attrs[k] for k in was.attrs)
    assert left(learn, t)==[]

@pytest.mark.parametrize('fits', [0,1])
def test_plan_changes_nothing(teacher, fits):
    def run(plan):
        t,learn = copy.deepcopy(teacher),learner(net(), get_dls())
        for m in (learn.model,t): m.layer3.append(nn.Dropout(.2))
        cb = KD(t, .1*TaskLoss()+.9*SoftTarget()+Attention()+FitNet())
        learn.add_cb(cb)
        if fits: learn.fit(fits)
        if plan: planned(learn, t, cb)
        learn.fit(2)
        return [state(learn.model),state(t),state(cb.loss)],learn.recorder.values
    (states,values),(states_p,values_p) = run(False),run(True)
    for a,b in zip(states, states_p): assert_same(a, b)
    assert values==values_p

def test_plan_counts(teacher):
    learn = learner()
    plan = KD(teacher, TaskLoss()+FitNet()).plan(learn)
    assert plan.learned==16*32+2*32
    assert plan.sizes==[sum(p.numel() for p in m.parameters()) for m in (learn.model,teacher)]
    with pytest.raises(ValueError, match='needs a Learner'): KD(teacher, SoftTarget()).plan()

# ---- several fits ----

def same_optimizer(a, b):
    "Two state dicts of an optimizer hold the same"
    assert len(a['state'])==len(b['state'])
    for p,q in zip(a['state'], b['state']):
        assert all(torch.equal(torch.as_tensor(p[k]), torch.as_tensor(q[k])) for k in p)

def test_lr_find_leaves_all_as_it_was(teacher):
    def run(find):
        cb = KD(teacher, TaskLoss()+FitNet())
        learn = learner(dls=get_dls(shuffle=False), opt_func=Adam, cbs=cb)
        learn.fit(1)
        if find:
            was,opt = [state(learn.model),state(cb.loss)],copy.deepcopy(learn.opt.state_dict())
            learn.lr_find(num_it=8, show_plot=False)
            for a,b in zip(was, [state(learn.model),state(cb.loss)]): assert_same(a, b)
            same_optimizer(opt, learn.opt.state_dict())
            assert left(learn, teacher)==[]
        learn.fit(1, lr)
        return state(learn.model),state(cb.loss)
    for a,b in zip(run(False), run(True)): assert_same(a, b)

def test_lr_find_first(teacher):
    "Before any fit: what lr_find built and moved is put back to where it started"
    cb,starts = KD(teacher, TaskLoss()+FitNet()),[]
    learn = learner(cbs=[cb,At('after_pred', lambda l: starts.append(state(cb.loss)))])
    was = state(learn.model)
    learn.lr_find(num_it=8, show_plot=False)
    assert_same(was, state(learn.model))
    assert_same(starts[0], state(cb.loss))
    assert left(learn, teacher)==[]

optimizers = {
    'SGD': partial(SGD, mom=.9), 'Adam': Adam, 'torch AdamW': partial(OptimWrapper, opt=torch.optim.AdamW),
    'torch SGD': partial(OptimWrapper, opt=partial(torch.optim.SGD, momentum=.9))}

@pytest.mark.parametrize('opt_func', optimizers.values(), ids=optimizers)
def test_two_fits_are_one(teacher, opt_func):
    "A second fit goes on with the learned parts and with what the optimizer knows of them"
    def run(*ns):
        learn,cb = learner(dls=get_dls(shuffle=False), opt_func=opt_func),KD(teacher, TaskLoss()+FitNet())
        parts = []
        seed(3)
        for n in ns:
            learn.fit(n, lr, cbs=cb)
            parts.append(list(cb.loss.parameters()))
            assert left(learn, teacher)==[]
        assert all(a is b for p in parts for a,b in zip(p, parts[0], strict=True))
        assert len(parts[0])==3
        return state(learn.model),state(cb.loss)
    whole,halves,first = run(2),run(1, 1),run(1)
    for a,b in zip(whole, halves): assert_same(a, b)
    learned,earlier = whole[1],first[1]
    for k in learned:
        if k.endswith(('weight','bias')): assert (learned[k]-earlier[k]).abs().max()>1e-4        # they do learn

def test_fine_tune_and_groups(teacher):
    learn = learner(splitter=lambda m: [list(m[:2].parameters()),list(m[2:].parameters())])
    loss = TaskLoss()+FitNet()
    learn.add_cb(KD(teacher, loss))
    learn.fine_tune(2, 1e-2, freeze_epochs=1)
    first = list(loss.parameters())
    assert left(learn, teacher)==[]
    assert len(learn.opt.param_lists)==2
    assert all(p.requires_grad for p in learn.model.parameters())

    learn.freeze()
    was = state(learn.model)
    learn.fit_one_cycle(1, slice(1e-4,1e-2))
    assert torch.equal(was['layer1.0.weight'], learn.model.layer1[0].weight)
    assert not torch.equal(was['fc.weight'], learn.model.fc.weight)
    assert all(a is b for a,b in zip(first, loss.parameters(), strict=True))
    assert left(learn, teacher)==[]

    learn.unfreeze()
    learn.fit_flat_cos(1, 1e-3)
    assert left(learn, teacher)==[]

def test_save_model_with_optimizer(teacher, tmp_path):
    learn = learner(path=tmp_path, opt_func=Adam)
    with warnings.catch_warnings():
        warnings.filterwarnings('error', 'Could not load|Saved file')
        learn.fit(2, cbs=[KD(teacher, TaskLoss()+FitNet()),SaveModelCallback(with_opt=True)])
    assert left(learn, teacher)==[]
    learn.fit(1, cbs=KD(teacher, TaskLoss()+FitNet()))
    assert left(learn, teacher)==[]

# ---- the ways out of a fit ----

positions = '''before_fit before_epoch before_train before_batch after_pred after_loss before_backward
    after_backward before_step after_step after_batch after_train before_validate after_validate after_epoch
    after_fit'''.split()
cancels = (CancelBatchException,CancelTrainException,CancelValidException,CancelEpochException,CancelFitException,
           CancelStepException,CancelBackwardException)

def distilled(t, **kwargs): return KD(t, TaskLoss()+SoftTarget()+FitNet()+Watch(), **kwargs)

@pytest.mark.parametrize('exc', [RuntimeError,KeyboardInterrupt,*cancels], ids=lambda o: o.__name__)
def test_an_exception_at_every_event(teacher, exc):
    teacher.layer1.eval()                                        # what was so stays so
    teacher.fc.weight.requires_grad_(False)
    had,was = flags(teacher),state(teacher)
    dls,cb,ends,student = get_dls(64, 32),distilled(teacher),{},net()
    learner(student, dls).fit(1, cbs=cb)
    for order in (1,70):
        for e in positions:
            learn = learner(student, dls, cbs=cb)
            stop = At(e, raising(exc('boom')), order, skip=1 if e.endswith(('batch','step','loss','pred')) else 0)
            try: learn.fit(2, cbs=stop)
            except BaseException as ex: ends[e] = type(ex)       # a misplaced Cancel is an error of fastai's
            assert set(left(learn, teacher)) <= {'teacher flags','teacher mode'}, (e,order)
            assert flags(teacher)==had, (e,order)
            assert not any(p.grad is not None for p in cb.loss.parameters())
            assert not cb.loss.training
    assert_same(was, state(teacher))
    if exc in (RuntimeError,KeyboardInterrupt): assert ends==dict.fromkeys(positions, exc)
    learn = learner(student, dls, cbs=cb)                        # and all goes on
    learn.fit(1)
    assert np.isfinite(learn.recorder.values[-1]).all()

class CrossEntropyThat(nn.CrossEntropyLoss):
    "Calls `f` first"
    def __init__(self, f):
        super().__init__()
        self.f = f
    def forward(self, *args):
        self.f()
        return super().forward(*args)

def planted(where, learn, teacher, boom):
    "The loss of a fit in which what `where` names calls `boom`, and the handle of the user's hook, if it is one"
    loss = TaskLoss()+SoftTarget()+FitNet()
    if where=='loss': return loss+Watch(boom),None
    if where=='build': return loss+FitNet(adapter=lambda s,t: boom()),None
    if where=='task loss': learn.loss_func = CrossEntropyThat(boom)
    if where=='data':
        own = type(learn.dls.train).create_item
        def create_item(i):
            boom()
            return own(learn.dls.train, i)
        learn.dls.train.create_item = create_item
    hooked = {'student': learn.model.layer2, 'teacher': teacher.layer2, "a hook of the user's": learn.model.fc}
    return loss,hooked[where].register_forward_hook(boom) if where in hooked else None

@pytest.mark.parametrize('exc', [RuntimeError,KeyboardInterrupt])
@pytest.mark.parametrize('where', ['student','teacher','loss','task loss','data','build','a hook of the user\'s'])
def test_an_exception_from_the_work_itself(teacher, where, exc):
    calls = []
    def boom(*args, **kwargs):
        calls.append(1)
        if len(calls)==(1 if where=='build' else 5): raise exc('boom')
    learn = learner()
    loss,handle = planted(where, learn, teacher, boom)
    with pytest.raises(exc, match='boom'): learn.fit(3, cbs=KD(teacher, loss))
    if handle:
        assert any(handle.id in m._forward_hooks for o in (learn.model,teacher) for m in o.modules())
        handle.remove()
    assert left(learn, teacher)==[]

class Lines:
    """Raise KeyboardInterrupt at the `at`-th line that a fit executes in fastai, here, or in torch's modules and
    optimizers (count them all if None); with `only`, at those of our functions with these names"""
    parts = '/fastai/','/fasterdistill/','/torch/nn/modules/','/torch/optim/'
    def __init__(self, at=None, only=None):
        self.at,self.only,self.n,self.done,self.where,self.met = at,only,0,False,None,set()
    def counts(self, code):
        if not self.only: return any(p in code.co_filename for p in self.parts)
        ours = 'fasterdistill' in code.co_filename and code.co_name in self.only
        if ours: self.met.add(code.co_name)
        return ours
    def call(self, frame, event, arg): return self.line if self.counts(frame.f_code) else None
    def line(self, frame, event, arg):
        if event=='line' and not self.done:
            self.n += 1
            if self.n==self.at:
                file = frame.f_code.co_filename.split('/')[-1]
                self.done,self.where = True,f'{file}:{frame.f_lineno} {frame.f_code.co_name}'
                raise KeyboardInterrupt
        return self.line
    def __enter__(self):
        self.was = sys.gettrace()
        sys.settrace(self.call)
        return self
    def __exit__(self, *args): sys.settrace(self.was)

def swept(learn, teacher):
    "What an interrupted fit left, which is put in order, so that a fault does not count twice"
    res = left(learn, teacher) + ['no gradients']*(not torch.is_grad_enabled())
    torch.set_grad_enabled(True)
    for m in (*learn.model.modules(),*teacher.modules()):
        m._forward_hooks.clear()
        m._forward_pre_hooks.clear()
        m.train().requires_grad_(True)
    vars(learn.dls.train).pop('get_idxs', None)
    return res

def interrupted(n=None, offset=0, only=None):
    "Which of the fits interrupted at `n` lines, evenly spread (or at all in our functions `only`), left what"
    teacher,dls,dirty,hit = net(8, s=1),get_dls(64, 32),[],0
    def one(at):
        learn,lines,cb = learner(dls=dls),Lines(at, only),distilled(teacher)
        try:
            with lines: learn.fit(1, cbs=cb)
        except KeyboardInterrupt: pass
        gc.collect()
        return learn,lines
    lines = one(None)[1]
    assert not only or lines.met==only, f'functions that have other names now: {only-lines.met}'
    total = lines.n
    n = n or total
    gc.collect()
    gc.freeze()
    for i in range(n):
        learn,lines = one(1+(i*total+offset)//n)
        hit += lines.done
        if what := swept(learn, teacher): dirty.append((lines.where,what))
    gc.unfreeze()
    assert hit>.98*n, f'{hit} of {n} interrupts were delivered'
    return dirty

def test_ctrl_c_at_any_line():
    dirty = interrupted(150)
    assert len(dirty)<=1, dirty

delicate = {'open','attach','remove','join','leave','close','end','tidy','setup','unhook','fitting','around_fit',
            'reading','rng_kept','first_batch','step'}

@pytest.mark.parametrize('n', [120,pytest.param(None, marks=pytest.mark.slow)])
def test_ctrl_c_while_opening_and_closing(n):
    "Where it is most delicate: none may leave anything"
    assert interrupted(n, only=delicate)==[]

@pytest.mark.slow
def test_ctrl_c_at_any_of_many_lines():
    dirty = interrupted(1500, offset=700)
    assert len(dirty)<=3, dirty

def test_resnet18_teacher():
    from torchvision.models import resnet18
    t = resnet18(num_classes=10)
    t.conv1 = nn.Conv2d(1, 64, 3, bias=False)
    t.layer2.requires_grad_(False)
    t.bn1.eval()
    had,was = flags(t),state(t)
    assert len(had[0])==62
    assert 0<sum(had[0])<62
    learn = learner(dls=get_dls(32, 16, bs=16))
    learn.fit(1, cbs=KD(t, TaskLoss()+SoftTarget()+Attention().at(['layer1','layer2'])+FitNet().at('layer3')))
    assert [p.grad for p in t.parameters()]==[None]*62
    assert flags(t)==had
    assert_same(was, state(t))
    assert set(left(learn, t))=={'teacher flags','teacher mode'}

# ---- what a step costs ----

class Counted(nn.Module):
    def __init__(self, m):
        super().__init__()
        self.m,self.n = m,0
    def forward(self, x):
        self.n += 1
        return self.m(x)

class ReadsStudent(DistillLoss):
    layers = 'last'
    def forward(self, fm_s, pred): return sum(o.pow(2).mean() for o in fm_s.values())+0*pred.sum()

class ReadsOptional(DistillLoss):
    def forward(self, pred, teacher_pred=None):
        assert teacher_pred is None
        return pred.pow(2).mean()

def fitnet_at_3(): return FitNet().at('layer3','m.layer3')

@pytest.mark.parametrize('loss,per_epoch', [
    (lambda: TaskLoss(), (0,0)),
    (lambda: TaskLoss()+ReadsStudent(), (0,0)),
    (lambda: TaskLoss()+ReadsOptional(), (0,0)),
    (lambda: SoftTarget(), (1,1)),
    (lambda: TaskLoss()+SoftTarget()+Logits()+fitnet_at_3()+Attention().at('layer2','m.layer2'), (1,1)),
    (lambda: TaskLoss()+fitnet_at_3(), (1,1)),
    (lambda: TaskLoss()+steps({0:0, 1:1})*SoftTarget(), (0,1))])
def test_teacher_runs_once_a_batch_where_a_term_needs_it(teacher, loss, per_epoch):
    "`per_epoch`: passes a batch, in each of the two epochs"
    t,training,valid = Counted(teacher),[],[]
    def note(l): (training if l.training else valid).append(t.n)
    learn = learner()
    learn.fit(2, cbs=[KD(t, loss()),At('after_pred', note),At('after_batch', note)])
    passes = [after-before for before,after in zip(training[::2], training[1::2])]
    assert passes==[per_epoch[0]]*3+[per_epoch[1]]*3
    assert valid[::2]==valid[1::2]
    assert len(set(valid))<=2
    if not any(per_epoch): assert t.n==0

def n_hooks(*models): return sum(len(m._forward_hooks) for o in models for m in o.modules())

@pytest.mark.parametrize('loss,n', [
    (lambda: SoftTarget(),0), (lambda: TaskLoss()+FitNet(),2),
    (lambda: TaskLoss()+FitNet()+Attention().at(['layer2','layer3']),4)])
def test_hooks_only_where_a_term_reads(teacher, loss, n):
    seen,learn = [],learner()
    def note(l):
        if l.training: seen.append(n_hooks(l.model, teacher))
    learn.fit(1, cbs=[KD(teacher, loss()),At('after_batch', note)])
    assert seen==[n]*3

def test_nothing_of_a_batch_is_kept(teacher):
    refs,alive,xs = [],[],[]
    def keep(pred, teacher_pred, fm_s, fm_t, **k):
        refs.append([weakref.ref(o) for o in [teacher_pred,*fm_s.values(),*fm_t.values()]])
    def count(): return sum(r() is not None for rs in refs for r in rs)
    def look(l):
        gc.collect()
        alive.append(count())
    learn = learner(cbs=KD(teacher, TaskLoss()+SoftTarget()+Watch(keep)+FitNet()))
    gc.collect()
    gc.freeze()                                                # makes collecting fast
    note = At('after_pred', lambda l: xs.append(weakref.ref(l.xb[0])))
    learn.fit(2, cbs=[At('after_batch', look),At('before_validate', look),note])
    gc.collect()
    assert len(refs)==7
    assert not any(alive), alive
    assert not any(r() is not None for r in xs)

    refs.clear()
    try: learn.fit(1, cbs=At('before_backward', raising(KeyboardInterrupt)))
    except KeyboardInterrupt: pass
    del learn.loss_grad                                        # fastai's own, with the graph behind it
    learn._end_cleanup()
    gc.collect()
    gc.unfreeze()
    assert refs
    assert count()==0

@pytest.mark.cuda
def test_no_host_synchronisation(teacher):
    "A step never waits for the GPU"
    class Strict(Callback):
        order = 4
        def after_loss(self):
            torch.cuda.set_sync_debug_mode('error' if self.training and self.learn.iter else 'default')
    class Lax(Callback):
        order = 8
        def after_loss(self): torch.cuda.set_sync_debug_mode('default')
    dls = get_dls()
    dls.to('cuda')
    learn = learner(net().cuda(), dls)
    learn.fit(2, cbs=[Strict(),Lax(),KD(teacher, TaskLoss()+SoftTarget()+Attention()+FitNet())])
    assert {p.device.type for p in teacher.parameters()}=={'cuda'}
    assert left(learn, teacher)==[]

# ---- what comes out ----

class Named(nn.Module):
    "Its layers are called as attributes of a Learner are"
    def __init__(self, m):
        super().__init__()
        self.model,self.opt = m[:3],m[3:]
    def forward(self, x): return self.opt(self.model(x))

def test_names_are_those_of_the_network(teacher):
    "Not of the Learner, and 'model.…' may be written or not; the order is the one asked for"
    seen = []
    class Keys(DistillLoss):
        def forward(self, fm_s, fm_t):
            seen.append((list(fm_s),list(fm_t),[o.shape[1] for o in fm_s.values()]))
            return sum(o.mean() for o in fm_s.values())*0
    learn = learner(Named(net()))
    student,theirs = ['opt','model','model.layer1','layer1'],['fc','model.layer3','layer1','layer1']
    learn.fit(1, cbs=KD(teacher, TaskLoss()+Keys().at(student, theirs)))
    assert seen==[(student,['fc','model.layer3','layer1','layer1@2'],[10,16,4,4])]*4
    assert left(learn, teacher)==[]

@pytest.mark.parametrize('event', ['after_batch','after_train','after_epoch'])
def test_predictions_inside_a_fit(teacher, event):
    "What fastai makes of them is its own; nothing more goes wrong"
    learn = learner(cbs=KD(teacher, TaskLoss()+SoftTarget()+FitNet()))
    learn.fit(2, cbs=At(event, lambda l: l.get_preds(inner=True), skip=0))
    assert left(learn, teacher)==[]
    learn.remove_cbs([cb for cb in learn.cbs if isinstance(cb, At)])
    learn.fit(1)
    assert left(learn, teacher)==[]

def test_two_callbacks_are_refused(teacher):
    learn = learner(cbs=KD(teacher, SoftTarget))
    refuses(learn, '2 KnowledgeDistillationCallbacks', KD(teacher, Logits()), teachers=[teacher])
    assert left(learn, teacher)==[]
    assert len([cb for cb in learn.cbs if isinstance(cb, KD)])==1

alone = '''
import sys
class Blocked:
    def find_spec(self, name, *a):
        if name.split('.')[0]=='fasterdistill': raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
import pickle,warnings,torch
warnings.simplefilter('ignore')
from pathlib import Path
from fastai.learner import load_learner
d,res = Path(sys.argv[1]),{}
x = torch.load(d/'x.pth')
for f in sorted(d.glob('*.pkl')):
    if f.stem.startswith('learn'): m = load_learner(f).model
    elif f.stem.startswith('pickle'): m = pickle.loads(f.read_bytes()).model
    else: m = torch.load(f, weights_only=False)
    m.eval()
    with torch.no_grad(): res[f.stem] = m(x),list(m.state_dict()),sum(len(o._forward_hooks) for o in m.modules())
    assert not m.training
assert 'fasterdistill' not in sys.modules
torch.save(res, d/'res.pth')
'''

def read_alone(folder):
    "What another process reads from the files of a folder, in which the package cannot be imported"
    env = {k: v for k,v in os.environ.items() if k!='PYTHONPATH'}
    subprocess.run([sys.executable, '-c', alone, str(folder)], check=True, cwd=folder, env=env)
    return torch.load(folder/'res.pth')

def test_exports_load_where_the_package_is_not(teacher, tmp_path):
    "After a fit and between its epochs; the Learner trains on, and so does a copy of it"
    preds,x = {},X[:8]
    def write(learn, name):
        preds.update({f'{k}_{name}': asked(learn.model, x) for k in ('learn','pickle','model')})
        (tmp_path/f'pickle_{name}.pkl').write_bytes(pickle.dumps(learn))
        torch.save(learn.model, tmp_path/f'model_{name}.pkl')
        learn.export(f'learn_{name}.pkl')
    def run(name, *cbs):
        learn = learner(net(16), path=tmp_path, cbs=cbs)
        learn.fit(1)
        write(learn, f'{name}_after')
        learn.fit(2, cbs=At('after_epoch', lambda l: write(l, f'{name}_mid'), skip=0))
        write(learn, f'{name}_end')
        return learn
    learn = run('kd', KD(teacher, TaskLoss()+SoftTarget()+Attention()+FitNet()))
    run('bare')
    torch.save(x, tmp_path/'x.pth')

    assert left(learn, teacher)==[]
    def size(name): return os.path.getsize(tmp_path/f'learn_{name}.pkl')
    for n in ('after','mid','end'): assert abs(size(f'kd_{n}')/size(f'bare_{n}')-1)<.01, n
    res = read_alone(tmp_path)
    assert res.keys()==preds.keys()
    for n,(pred,keys,hooks) in res.items():
        assert torch.equal(pred, preds[n]), n
        assert keys==list(learn.model.state_dict()), n
        assert not hooks or 'mid' in n

@pytest.mark.parametrize('loss', [lambda: SoftTarget(), lambda: TaskLoss()+SoftTarget()+FitNet()],
                         ids=['plain','learned'])
def test_export_in_mid_fit_changes_nothing(teacher, loss, tmp_path):
    def run(f):
        learn = learner(path=tmp_path, opt_func=Adam, dls=get_dls(shuffle=False))
        seed(3)
        learn.fit(3, cbs=[KD(teacher, loss()),At('after_epoch', f, order=1, skip=0)])
        assert left(learn, teacher)==[]
        assert len(learn.dls.train_ds)==96
        return state(learn.model)
    want = run(lambda l: None)
    assert_same(want, run(pickle.dumps))
    assert_same(want, run(lambda l: l.export()))

@pytest.mark.parametrize('when', ['before','between','mid'])
def test_a_copy_trains_on(teacher, when):
    "`deepcopy(learn)` distils with the same teacher, from the same point, and neither disturbs the other"
    kd,copies = KD(teacher, TaskLoss()+SoftTarget()+FitNet()),[]
    ref = learner(dls=get_dls(shuffle=False), opt_func=Adam, cbs=kd)
    def take(l): copies.append(copy.deepcopy(l))
    if when!='before': ref.fit(1, cbs=[At('after_epoch', take)] if when=='mid' else None)
    if when!='mid': take(ref)
    twin, = copies
    assert ref.metrics
    assert left(ref, teacher)==[]

    was = state(ref.model)
    for l in (twin,ref):
        seed(5)
        l.fit(1)
    assert left(twin, teacher)==[]
    assert left(ref, teacher)==[]
    mine,own = (next(cb for cb in l.cbs if isinstance(cb, KD)) for l in (twin,ref))
    assert mine.teacher is own.teacher
    assert mine.loss is not own.loss
    assert list(twin.recorder.metric_names)==list(ref.recorder.metric_names)
    assert_same(state(twin.model), state(ref.model))
    assert_same(state(mine.loss), state(own.loss))
    assert not torch.equal(was['fc.weight'], ref.model.fc.weight)
    assert twin.model is not ref.model

def test_same_keys_as_without(teacher):
    beside = fitted(KD(teacher, TaskLoss()+FitNet()))
    assert list(fitted().model.state_dict())==list(beside.model.state_dict())

# ---- errors, before anything is trained ----

class Unused(nn.Sequential):
    "Leaves out its third layer"
    def forward(self, x): return self[1](self[0](x))

class NoStages(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 10)
    def forward(self, x): return self.fc(x.flatten(1))

class Dicts(nn.Module):
    def __init__(self, m):
        super().__init__()
        self.m = m
    def forward(self, x): return dict(out=self.m(x))

class Vector(DistillLoss):
    def forward(self, pred): return pred.mean(1)

class Number(DistillLoss):
    def forward(self, pred): return 0.

class NoLayers(FeatureLoss):
    layers = None
    def pair(self, s, t): return (s-t).pow(2).mean()

class Labels(DistillLoss):
    def forward(self, pred, target): return F.cross_entropy(pred, target)

def reads_maps(fm_s, fm_t, **kwargs): return 0

def other_names(t):
    "A Learner whose classes are called 'd0', 'd1', …"
    return learner(t, get_dls(vocab=[f'd{i}' for i in range(10)], label=lambda y: f'd{y}'))

mistakes = dict(                                       # the callback of a student and a teacher, and what it says
    unknown_student=(
        lambda s,t: KD(t, TaskLoss()+FitNet().at('layr3','layer3')),
        r"the student \(Sequential\) has no layer 'layr3'; nearest: 'layer3'"),
    unknown_teacher=(
        lambda s,t: KD(t, TaskLoss()+FitNet().at('layer3','layer9')),
        r"the teacher \(Sequential\) has no layer 'layer9'; nearest: .*'layer3'"),
    unknown_activations=(
        lambda s,t: KD(t, Attention(), 'layer3', 'body.9'),
        r"the teacher \(Sequential\) has no layer 'body.9'"),
    unequal=(
        lambda s,t: KD(t, Attention(), ['layer1','layer2'], ['layer1']),
        r"2 of the student \('layer1', 'layer2'\) and 1 of the teacher \('layer1'\).*give as many"),
    unequal_at=(
        lambda s,t: KD(t, TaskLoss()+Attention().at('layer1', ['layer1','layer2'])),
        'give as many of each'),
    unequal_stages=(
        lambda s,t: KD(t, TaskLoss()+Attention().at('stages', ['layer1','layer2'])),
        'give as many of each'),
    several=(
        lambda s,t: KD(t, Attention()+FitNet(), ['layer1'], ['layer1']),
        r'here are 2: Attention\(\), FitNet\(\)\. Say the layers of each with \.at'),
    none_reads=(
        lambda s,t: KD(t, SoftTarget(), ['layer1'], ['layer1']),
        'reads no activations'),
    no_layers=(
        lambda s,t: KD(t, TaskLoss()+NoLayers()),
        r'NoLayers\(\) reads activations and has no layers of its own: name them with \.at'),
    function_no_layers=(
        lambda s,t: KD(t, reads_maps),
        'has no layers of its own'),
    weight_beside=(
        lambda s,t: KD(t, TaskLoss()+SoftTarget(), weight=.9),
        r'holds TaskLoss\(\), so it is the whole loss; weight=0.9'),
    schedule_beside=(
        lambda s,t: KD(t, TaskLoss()+SoftTarget(), schedule=SchedLin(0, 1)),
        r'holds TaskLoss\(\)'),
    weight_above=(
        lambda s,t: KD(t, SoftTarget(), weight=5),
        r'weight=5: expected a number from 0 to 1.*TaskLoss\(\) \+ 5\*'),
    weight_below=(
        lambda s,t: KD(t, SoftTarget(), weight=-.1),
        'weight=-0.1: expected a number from 0 to 1'),
    weight_nan=(
        lambda s,t: KD(t, SoftTarget(), weight=float('nan')),
        'expected a number from 0 to 1'),
    weight_kind=(
        lambda s,t: KD(t, SoftTarget(), weight='half'),
        "'half' cannot weigh a loss"),
    schedule_kind=(
        lambda s,t: KD(t, SoftTarget(), schedule=lambda a,b: 1),
        'cannot weigh a loss'),
    classes=(
        lambda s,t: KD(net(8, classes=7), SoftTarget()),
        r'the student returns \(32, 10\) and the teacher \(32, 7\): the same classes'),
    vocab=(
        lambda s,t: KD(other_names(t), SoftTarget()),
        "the teacher does not know 10 of the student's 10 classes: 0, 1, 2, 3, 4 and 5 more; it knows 'd0'"),
    never_runs=(
        lambda s,t: KD(Unused(t, nn.Identity(), nn.Linear(3, 3)), TaskLoss()+Attention().at('layer3','2')),
        r"the layer '2' of the teacher \(Unused\) does not run on this batch"),
    never_runs_again=(
        lambda s,t: KD(t, TaskLoss()+Attention().at('layer3#2','layer3')),
        "'layer3#2' of the student .* does not run 2 times"),
    itself=(
        lambda s,t: KD(s, SoftTarget()),
        'the teacher is the student itself'),
    itself_in_list=(
        lambda s,t: KD([t,s], SoftTarget()),
        'the teacher is the student itself'),
    shared=(
        lambda s,t: KD(nn.Sequential(s, nn.Identity()), SoftTarget()),
        r'teacher and student share 14 parameters.*deepcopy'),
    a_class=(
        lambda s,t: KD(NoStages, SoftTarget()),
        'the teacher is the class NoStages: expected a trained network'),
    no_teacher_at_all=(
        lambda s,t: KD(3, SoftTarget()),
        '3 cannot teach'),
    no_stages=(
        lambda s,t: KD(NoStages(), TaskLoss()+Attention()),
        r"no stages were found in the teacher \(NoStages\): .*It runs 'fc' \(10\); show_layers\(model, x, depth"),
    stage_number=(
        lambda s,t: KD(t, TaskLoss()+FitNet().at('stages[7]')),
        r"reads 'stages\[7\]'"),
    not_scalar=(
        lambda s,t: KD(t, TaskLoss()+Vector()),
        r'Vector\(\) returns \(32,\): expected a scalar'),
    not_tensor=(
        lambda s,t: KD(t, TaskLoss()+Number()),
        r'Number\(\) returns float: expected a scalar'),
    none_reads_teacher=(
        lambda s,t: KD(None, SoftTarget()),
        r"SoftTarget\(\) reads 'teacher_pred', but the teacher is None"),
    none_reads_maps=(
        lambda s,t: KD(None, TaskLoss()+FitNet()),
        r"FitNet\(\) reads 'fm_t', but the teacher is None"),
    ensemble_maps=(
        lambda s,t: KD([t,net(8)], TaskLoss()+FitNet()),
        'reads the layers of one network.*give a single teacher'),
    no_loss=(
        lambda s,t: KD(t, 3),
        '3 is no loss'),
    wrong_kind=(
        lambda s,t: KD(t, BinarySoftTarget()),
        'one class of several; use SoftTarget'),
    map_shapes=(
        lambda s,t: KD(t, TaskLoss()+FitNet(adapter=None)),
        'FitNet compares activations of one shape'),
    output=(
        lambda s,t: KD(Dicts(t), SoftTarget()),
        "the teacher returns a dict with 'out': say where the prediction is"))

@pytest.mark.parametrize('name', mistakes)
def test_mistakes(teacher, name):
    make,message = mistakes[name]
    says = partial(pytest.raises, (ValueError,TypeError), match=f'(?s){message}')
    learn = learner()
    was = state(learn.model),state(teacher)
    with says(): learn.fit(1, cbs=make(learn.model, teacher))
    assert_same(was[0], state(learn.model))
    assert_same(was[1], state(teacher))
    assert left(learn, teacher)==[]
    assert not any(p.grad is not None for p in learn.model.parameters())
    assert learn.opt is None or all(set(s)<={'do_wd','force_train'} for s in learn.opt.state.values())

    with says(): make(learn.model, teacher).plan(learn)
    assert_same(was[0], state(learn.model))
    assert left(learn, teacher)==[]

    learn.fit(1, cbs=KD(teacher, SoftTarget))
    assert left(learn, teacher)==[]

def test_no_labels(teacher):
    learn = learner(dls=tuples(X, n=32, valid=32), metrics=[], loss_func=lambda p,*y: p.pow(2).mean())
    with pytest.raises(ValueError, match=r'Labels\(\) reads the labels, and this batch has none'):
        learn.fit(1, cbs=KD(teacher, TaskLoss()+Labels()))

def test_learned_parts_stay_with_their_networks(teacher):
    "A loss that learned with one network goes on with another only if it has no learned parts, or says so"
    cb = KD(teacher, TaskLoss()+FitNet())
    learner(cbs=cb).fit(1)
    with pytest.raises(ValueError, match=r'FitNet\(\) has learned parts that were trained with another student'):
        learner(cbs=cb).fit(1)

    loss,student = TaskLoss()+FitNet(),net()
    learner(student, cbs=KD(teacher, loss)).fit(1)
    another = KD(copy.deepcopy(teacher), loss)
    with pytest.raises(ValueError, match='with another teacher'): learner(student, cbs=another).fit(1)
    with pytest.raises(ValueError, match='learned parts for its layers already'): loss.losses[1].at('layer1')

    cb = KD(teacher, TaskLoss()+SoftTarget())
    for _ in range(2): learner(cbs=cb).fit(1)

class OfOneHot(nn.MSELoss):
    def forward(self, p, y): return super().forward(p, F.one_hot(y, p.shape[1]).float())

def test_the_loss_that_suits_is_chosen_for_each_learner(teacher):
    cb = KD(teacher)
    learner(cbs=cb).fit(1)
    assert isinstance(cb.loss, SoftTarget)
    learner(loss_func=OfOneHot(), metrics=[], cbs=cb).fit(1)
    assert isinstance(cb.loss, Logits)

@pytest.mark.parametrize('kwargs', [dict(weight=SchedLin(0, 5)), dict(weight=.5, schedule=lambda pos: 3*pos)])
def test_a_weight_that_leaves_0_to_1(teacher, kwargs):
    learn = learner(cbs=KD(teacher, SoftTarget(), **kwargs))
    was = state(learn.model)
    with pytest.raises(ValueError, match='expected 0 to 1'): learn.fit(1)
    assert_same(state(learn.model), was)

def test_a_teacher_that_is_not_finite(teacher):
    with torch.no_grad(): teacher.fc.bias[0] = float('nan')
    refuses(learner(), 'the teacher predicts values that are not finite', KD(teacher, SoftTarget()))

def test_parts_are_those_of_the_last_batch(teacher):
    cb = KD(teacher, TaskLoss()+steps({0:1, 1:0})*FitNet())
    learner(cbs=cb).fit(2)
    assert set(cb.parts)=={'task_loss'}
    assert cb.history[0]['fit_net'] is not None
    assert cb.history[1]['fit_net'] is None

# ---- what others do to the optimizer, the compiler and the networks in the middle of a fit ----

class Anew(Callback):
    "Makes the optimizer's lists from the model alone before every step, as fasterai's pruning does"
    def __init__(self, order): self.order = order
    def before_step(self): self.learn.opt.param_lists = L([L([*self.learn.model.parameters()])])

@pytest.mark.parametrize('order', [0,7])
def test_lists_made_anew(teacher, order):
    def run(*cbs):
        fit,learn = FitNet(),learner()
        seed(3)
        learn.fit(2, cbs=[KD(teacher, TaskLoss()+fit),*cbs])
        assert left(learn, teacher)==[]
        return state(learn.model),state(fit)
    for p,q in zip(run(), run(Anew(order)), strict=True): assert_same(p, q)

def test_an_optimizer_made_anew(teacher):
    fit,seen,learn = FitNet(),[],learner()
    def note(l): seen.append(state(fit)['adapters.0.layers.0.weight'])
    learn.fit(1, cbs=[KD(teacher, TaskLoss()+fit),At('after_batch', lambda l: l.create_opt(), skip=0),
                      At('after_step', note)])
    assert all(not torch.equal(p, q) for p,q in zip(seen, seen[1:]))
    assert len(seen)==3
    assert left(learn, teacher)==[]

class Stopped(DistillLoss):
    "Stops the process in the middle of changing the stance"
    def forward(self, pred):
        if pred.requires_grad:
            torch.compiler.set_stance('force_eager')
            raise KeyboardInterrupt
        return pred.mean()

def test_the_compilers_stance_comes_back(teacher):
    "As an interrupt between the call and the `with` would leave it"
    import torch._dynamo.eval_frame as dynamo
    if not hasattr(torch.compiler, 'set_stance'): pytest.skip('from torch 2.6 on')
    for was in ('default','eager_on_recompile'):
        torch.compiler.set_stance(was)
        try:
            with pytest.raises(KeyboardInterrupt): learner().fit(1, cbs=KD(teacher, TaskLoss()+Stopped()))
            assert dynamo._stance.stance==was
        finally: torch.compiler.set_stance('default')

class Counts(nn.Module):
    "Counts its passes in a buffer and in an attribute"
    def __init__(self):
        super().__init__()
        self.n = 0
        self.register_buffer('m', torch.zeros(()))
    def forward(self, x):
        if self.training:
            self.n += 1
            self.m += 1
        return x

class Again(DistillLoss):
    def forward(self, student, xb): return student(*xb).pred.pow(2).mean()

def test_another_pass_is_not_remembered():
    m,count = net(),Counts()
    m.pool = nn.Sequential(count, m.pool)
    cb = KD(None, TaskLoss()+Again())
    learn = learner(m, cbs=cb)
    cb.plan()
    assert (count.n,count.m.item())==(0,0)
    learn.fit(1)
    assert (count.n,count.m.item())==(3,3)

class Peer(DistillLoss):
    def __init__(self, peer): self.peer = peer
    def forward(self, pred): return pred.mean()

def test_copies_at_other_layers_learn_apart(teacher):
    base = InfoNCE(learn_tau=True)
    a,b = base.at('layer2'),base.at('layer3')
    assert len({id(o.log_tau) for o in (base,a,b)})==3
    fitted(KD(teacher, TaskLoss()+a+b))
    assert a.log_tau!=b.log_tau
    assert base.log_tau.item()==pytest.approx(np.log(.07))
    peer = nn.Linear(2, 2)
    assert Peer(peer).at('layer2').peer is peer                          # a network that was given is that network

def test_batches_too_small_for_a_loss(teacher):
    learn = learner(net(bn=False), get_dls(4, bs=1))
    with pytest.raises(ValueError, match='needs batches of at least 2 items, these have 1'):
        learn.fit(1, cbs=KD(teacher, TaskLoss()+InfoNCE()))

class Tokens(nn.Module):
    "Tokens of a picture, and their mean"
    def __init__(self):
        super().__init__()
        self.embed,self.fc = nn.Conv2d(1, 4, 2, 2),nn.Linear(4, 10)
        self.tokens = nn.Sequential(nn.Flatten(2), Last())
    def forward(self, x): return self.fc(self.tokens(self.embed(x)).mean(1))

class Last(nn.Module):
    "Channels last"
    def forward(self, z): return z.transpose(1, 2)

class Wide(Callback):
    "Pictures twice as wide as high"
    order = -5
    def before_batch(self): self.learn.xb = (torch.cat([self.xb[0]]*2, 3),)

def test_tokens_of_other_proportions():
    kd = KD(Frozen(Tokens(), size=8), TaskLoss()+InfoNCE().at('layer3','tokens'))
    message = "'tokens' of the teacher returns tokens of pictures of 8×8, while the student sees 8×16"
    with pytest.raises(ValueError, match=message): learner().fit(1, cbs=[Wide(),kd])
