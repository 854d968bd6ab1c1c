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

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import KD,At,Watch,X,Y,assert_close,assert_same,get_dls,learner,left,lr,net,seed,state
from fastai.callback.core import (CancelBackwardException,CancelBatchException,CancelEpochException,CancelFitException,CancelStepException,CancelTrainException,CancelValidException,Callback)
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import MixUp
from fastai.callback.progress import CSVLogger
from fastai.callback.schedule import SchedCos,SchedLin
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientAccumulation,GradientClip
from fastai.interpret import ClassificationInterpretation
from fastai.losses import BCEWithLogitsLossFlat,MSELossFlat
from fastai.optimizer import Adam,OptimWrapper,SGD
from fastcore.foundation import L
from torch import nn

from fasterdistill.loss import DistillLoss,FeatureLoss,TaskLoss,after,ramp,steps
from fasterdistill.losses.attention import Attention
from fasterdistill.losses.fitnet import FitNet
from fasterdistill.losses.infonce import InfoNCE
from fasterdistill.losses.logits import BinarySoftTarget,Logits,SoftTarget
from fasterdistill.teachers.teacher import Frozen

torch.set_num_threads(1)

@pytest.fixture
def teacher(): return net(8, s=1)

def fitted(cb=None, n=2, **kwargs):
    "A Learner that has trained for `n` epochs"
    kwargs.setdefault('dls', get_dls(shuffle=False))
    learn = learner(**kwargs)
    seed(3); learn.fit(n, cbs=cb)
    return learn

# ---- what it computes ----

def by_hand(teacher, loss, n=2, student=None, extra=()):
    "The same steps without fastai: `loss(task, logits, teacher's logits, maps, teacher's maps)`"
    model = net() if student is None else student
    teacher = copy.deepcopy(teacher).eval()
    opt = torch.optim.SGD([*model.parameters(),*extra], lr=lr, momentum=.9)
    def maps(m, x):
        fm = []
        for k in ('layer1','layer2','layer3'): x = m.get_submodule(k)(x); fm.append(x)
        return m.fc(m.flat(m.pool(x))),fm
    vals,i = [],0
    for epoch in range(n):
        for b in range(3):
            x,y = X[b*32:b*32+32],Y[b*32:b*32+32]
            model.train()
            s,fs = maps(model, x)
            with torch.no_grad(): t,ft = maps(teacher, x)
            val = loss(F.cross_entropy(s, y), s, t, fs, ft, i/(3*n), epoch)
            val.backward(); opt.step(); opt.zero_grad()
            vals.append(val.item()); i += 1
    return model,vals

def kl(s, t, T=4.): return T*T*(F.softmax(t/T, 1)*(F.log_softmax(t/T, 1)-F.log_softmax(s/T, 1))).sum(1).mean()
def at_code(s, t): return (F.normalize(s.pow(2).sum(1).flatten(1))-F.normalize(t.pow(2).sum(1).flatten(1))).pow(2).mean()

class Seen(Callback):
    "The loss whose gradient is taken, batch by batch"
    order = 60
    def before_fit(self): self.vals = []
    def before_backward(self): self.vals.append(self.learn.loss_grad.item())

@pytest.mark.parametrize('kd,hand', [
    (lambda t: KD(t, SoftTarget),                                lambda task,s,t,fs,ft,pos,e: .5*task+.5*kl(s,t)),
    (lambda t: KD(t, SoftTarget(T=2), None, None, .9),           lambda task,s,t,fs,ft,pos,e: .1*task+.9*kl(s,t,2.)),
    (lambda t: KD(t, SoftTarget(), weight=SchedCos(1,.2)),       lambda task,s,t,fs,ft,pos,e: (1-SchedCos(1,.2)(pos))*task+SchedCos(1,.2)(pos)*kl(s,t)),
    (lambda t: KD(t, SoftTarget(), weight=.8, schedule=SchedLin(0,1)), lambda task,s,t,fs,ft,pos,e: (1-.8*pos)*task+.8*pos*kl(s,t)),
    (lambda t: KD(t, 2*SoftTarget()+Logits()),                   lambda task,s,t,fs,ft,pos,e: .5*task+.5*(2*kl(s,t)+(s-t).pow(2).mean())),
    (lambda t: KD(t, .1*TaskLoss()+.9*SoftTarget(T=4)+100*Attention()), lambda task,s,t,fs,ft,pos,e: .1*task+.9*kl(s,t)+100*sum(map(at_code, fs, ft))),
    (lambda t: KD(t, Attention(), ['layer3','layer1'], ['layer3','layer2'], .3), lambda task,s,t,fs,ft,pos,e: .7*task+.3*(at_code(fs[2],ft[2])+at_code(F.adaptive_avg_pool2d(fs[0], 4),ft[1]))),
    (lambda t: KD(t, TaskLoss()+ramp(2)*Logits()),               lambda task,s,t,fs,ft,pos,e: task+(e+1)/2*(s-t).pow(2).mean()),
    (lambda t: KD(t, steps({0:0,1:1})*TaskLoss()+steps({0:1,1:0})*Logits()), lambda task,s,t,fs,ft,pos,e: task if e else (s-t).pow(2).mean()),
    (lambda t: KD(t, TaskLoss()+3*after(1)*Logits()),            lambda task,s,t,fs,ft,pos,e: task+3*e*(s-t).pow(2).mean()),
    (lambda t: KD(t, TaskLoss()+SchedLin(1,0)*Logits()),         lambda task,s,t,fs,ft,pos,e: task+(1-pos)*(s-t).pow(2).mean()),
    (lambda t: KD(t, lambda pred, teacher_pred, **kwargs: F.l1_loss(pred, teacher_pred)), lambda task,s,t,fs,ft,pos,e: .5*task+.5*(s-t).abs().mean()),
], ids='lerp positional cosine schedule sum whole layers ramp phases after pos function'.split())
def test_steps_equal_a_loop(teacher, kd, hand):
    seen = Seen()
    learn = fitted([kd(teacher),seen])
    model,vals = by_hand(teacher, hand)
    np.testing.assert_allclose(seen.vals, vals, atol=2e-5, rtol=1e-5)
    assert_close(state(learn.model), state(model))
    assert left(learn, teacher)==[]

def test_learned_parts_equal_a_loop(teacher):
    "The adapter learns with the student, as if it were written into the same optimizer"
    loss = FitNet(adapter=lambda s,t: nn.Conv2d(s.shape[1], t.shape[1], 1)).at('layer2')
    with torch.no_grad(): z = [m.layer2(m.layer1(X[:4])) for m in (net().eval(),teacher)]
    loss.build(fm_s={'layer2':z[0]}, fm_t={'layer2':z[1]})
    conv = copy.deepcopy(loss.adapters[0])
    learn = fitted(KD(teacher, TaskLoss()+2*loss))
    model,_ = by_hand(teacher, lambda task,s,t,fs,ft,pos,e: task+2*(conv(fs[1])-ft[1]).pow(2).mean(), extra=conv.parameters())
    assert_close(state(learn.model), state(model))
    assert_close(state(loss.adapters[0]), state(conv))
    assert not torch.equal(conv.weight, nn.Conv2d(8, 16, 1).weight) and left(learn, teacher)==[]

@pytest.mark.parametrize('loss_func,expected', [(None,SoftTarget), (nn.CrossEntropyLoss(label_smoothing=.1),SoftTarget), (BCEWithLogitsLossFlat(),BinarySoftTarget), (nn.BCEWithLogitsLoss(),BinarySoftTarget), (MSELossFlat(),Logits), (nn.L1Loss(),Logits)])
def test_loss_left_out(teacher, loss_func, expected):
    class OneHot(Callback):
        def before_batch(self):
            if not isinstance(self.loss_func, type(learner().loss_func)|nn.CrossEntropyLoss): self.learn.yb = F.one_hot(self.y, 10).float(),
    cb = KD(teacher)
    learn = learner(loss_func=loss_func, metrics=[])
    learn.fit(1, cbs=[OneHot(),cb])
    assert type(cb.loss) is expected and left(learn, teacher)==[]

def test_loss_left_out_unknown(teacher):
    with pytest.raises(ValueError, match='name one'): learner(loss_func=lambda p,y: (p**2).mean()).fit(1, cbs=KD(teacher))

# ---- what it leaves alone ----

def test_valid_loss_and_predictions_as_without(teacher):
    learn = fitted(n=1)
    dl,item = learn.dls.valid,(learn.dls.valid_ds[0][0],)
    def all_of_it():
        seed(4)
        interp = ClassificationInterpretation.from_learner(learn)
        top = interp.top_losses()
        return [torch.tensor(learn.validate()), *learn.get_preds(with_loss=True, with_input=True), learn.predict(item[0])[2], learn.tta(n=1)[0], *top, torch.tensor(interp.confusion_matrix())]
    a = all_of_it()
    learn.add_cb(KD(teacher, .5*SoftTarget()+100*FitNet(), weight=.9))
    b = all_of_it()
    assert len(a)==len(b) and all(torch.equal(p, q) for p,q in zip(a, b))
    learn.fit(1)
    with_cb = all_of_it(); learn.remove_cb(KD)
    assert all(torch.equal(p, q) for p,q in zip(with_cb, all_of_it())) and not torch.equal(a[0], with_cb[0])
    assert left(learn, teacher)==[]

def test_recorded_losses_are_the_task_loss(teacher):
    "In a fit, too: the same table as without, when the distillation adds nothing"
    a,b = fitted(),fitted(KD(teacher, TaskLoss()+Watch()))
    assert [o[:3] for o in a.recorder.values]==[o[:3] for o in b.recorder.values]
    c = fitted([KD(teacher, SoftTarget(), weight=1.),seen := Seen()])
    task = np.array([o.item() for o in c.recorder.losses])
    assert np.abs(task-np.array(seen.vals)).min()>.01

@pytest.mark.parametrize('loss', [lambda: TaskLoss()+Watch(), lambda: TaskLoss()+Watch()+0*SoftTarget()+0.*FitNet(), lambda: TaskLoss()+Aside()], ids=['teacher and hooks','weight 0','a learned part'])
def test_bit_equal_to_training_without(teacher, loss):
    a = fitted(opt_func=Adam, dls=get_dls())
    b = fitted(KD(teacher, loss()), opt_func=Adam, dls=get_dls())
    assert_same(state(a.model), state(b.model)); assert a.recorder.losses==b.recorder.losses

class Aside(DistillLoss):
    "Learns, with large gradients, from the student's activations without telling the student"
    layers = 'layer2'
    def build(self, fm_s): self.lin,self.idle = nn.Linear(8, 3),nn.Parameter(torch.ones(3))
    def forward(self, fm_s): return 1e3*(self.lin(fm_s['layer2'].detach().mean((2,3)))-1).pow(2).mean() + 0*self.idle.sum()

def test_clipping_of_the_student_is_as_without(teacher):
    a = fitted(GradientClip(.01))
    b = fitted([GradientClip(.01),cb := KD(None, TaskLoss()+Aside())])
    assert_same(state(a.model), state(b.model))
    norms = []
    fitted([GradientClip(.01),KD(None, TaskLoss()+(loss := Aside())),At('before_step', lambda l: norms.append(torch.stack([p.grad.norm() for p in loss.parameters()]).norm().item()))])
    np.testing.assert_allclose(norms, .01, rtol=1e-3)

def test_weight_decay_spares_biases_and_norms():
    loss = Aside()
    fitted(KD(None, TaskLoss()+loss), wd=.1)
    torch.testing.assert_close(loss.idle.detach(), torch.ones(3)*(1-lr*.1)**6)   # a weight that no gradient moves
    seen = {}
    def look(l): seen.update({n: l.opt.state[p].get('do_wd', True) for n,p in fit.named_parameters()})
    fit = FitNet()
    fitted([KD(net(8, s=1), TaskLoss()+fit),At('after_step', look)], wd=.1)
    assert len(seen)==3 and sorted(seen.values())==[False,False,True] and [p.ndim for n,p in fit.named_parameters() if seen[n]]==[4]

def test_gradient_accumulation_equals_the_larger_batch():
    t,res = net(8, bn=False, s=1),[]
    for bs,cbs in ((64,[]), (32,[GradientAccumulation(64)])):
        loss = FitNet(adapter=lambda s,t: nn.Conv2d(s.shape[1], t.shape[1], 1))
        learn = learner(net(bn=False), get_dls(128, bs=bs, shuffle=False))
        seed(3); learn.fit(2, cbs=[*cbs,KD(t, TaskLoss()+SoftTarget()+loss)])
        res.append((state(learn.model),state(loss)))
    for a,b in zip(*res): assert_close(a, b)

class HalfCPU(Callback):
    "Mixed precision on a CPU, where fastai's own does nothing"
    order = MixedPrecision.order
    def before_batch(self): self.amp = torch.autocast('cpu', dtype=torch.bfloat16); self.amp.__enter__()
    def after_pred(self): self.learn.pred = self.pred.float()
    def after_loss(self): self.amp.__exit__(None, None, None)
    def after_fit(self): assert not torch.is_autocast_enabled('cpu')

def test_autocast(teacher):
    seen,half = [],[]
    teacher.fc.register_forward_hook(lambda m,a,o: half.append((o.dtype,torch.is_autocast_enabled('cpu'))))
    def f(pred, teacher_pred, fm_s, fm_t, **k): seen.append({o.dtype for o in [pred,teacher_pred,*fm_s.values(),*fm_t.values(),pred@pred.T]})
    loss = TaskLoss()+SoftTarget()+FitNet()+Watch(f)
    n = []
    learn = fitted([HalfCPU(),KD(teacher, loss),At('before_batch', lambda l: n.append(len(half)))])
    assert half[n[0]:]==[(torch.bfloat16,True)]*6           # the teacher, in the six batches
    assert seen[1:]==[{torch.float32}]*6
    assert not torch.is_autocast_enabled('cpu') and np.isfinite(learn.recorder.values[-1]).all()

# ---- what is shown ----

def test_columns_and_csv(teacher, tmp_path):
    loss,log = TaskLoss()+SoftTarget()+.5*FitNet()+2*FitNet().at('layer1'),[]
    learn = learner(path=tmp_path, cbs=(cb := KD(teacher, loss)))
    learn.logger = log.append
    learn.fit(2, cbs=CSVLogger())
    names = ['epoch','train_loss','valid_loss','accuracy','soft_target','fit_net','fit_net_2','agreement','time']
    assert list(learn.recorder.metric_names)==names
    rows = [r.split(',') for r in (tmp_path/'history.csv').read_text().split()]
    assert rows[0]==names and [[float(o) for o in r[1:-1]] for r in rows[1:]]==[[float(o) for o in r[1:-1]] for r in log]==[list(r) for r in learn.recorder.values]
    for r,h in zip(learn.recorder.values, cb.history, strict=True): assert list(r)[3:]==[h[n] for n in names[4:-1]]
    assert list(cb.parts)==['task_loss','soft_target','fit_net','fit_net_2','agreement'] and set(cb.history[0])==set(cb.parts)
    assert left(learn, teacher)==[] and [m.name for m in learn.metrics]==['accuracy']
    learn.fit(1); assert list(learn.recorder.metric_names)==names and len(cb.history)==1

def test_column_values(teacher):
    "A column is the mean over the epoch's training batches"
    vals,agree = [],[]
    def f(pred, teacher_pred, **k): vals.append(kl(pred, teacher_pred).item()); agree.append((pred.argmax(1)==teacher_pred.argmax(1)).float().mean().item())
    cb = KD(teacher, SoftTarget()+Watch(f))
    learn = fitted(cb)
    vals,agree = vals[1:],agree[1:]                                # the first is the trial of the losses
    for e in range(2):
        assert cb.history[e]['soft_target']==pytest.approx(np.mean(vals[3*e:3*e+3]), rel=1e-5)
        assert cb.history[e]['agreement']==pytest.approx(np.mean(agree[3*e:3*e+3]), rel=1e-5)
    assert cb.parts['soft_target']==pytest.approx(vals[-1], rel=1e-5)

def test_logged_columns(teacher):
    class Logs(DistillLoss):
        logs = ('half',)
        def forward(self, pred): self.log('half', pred.new_tensor(.5)); return pred.mean()*0
    cb = KD(teacher, SoftTarget()+Logs())
    learn = fitted(cb)
    assert list(learn.recorder.metric_names)[4:-1]==['soft_target','logs','agreement','half'] and cb.history[0]['half']==.5
    class Twice(Logs):
        def __init__(self, half): self.half = half
        def forward(self, pred): self.log('half', pred.new_tensor(self.half)); return pred.mean()*0
    learn = fitted(cb := KD(teacher, TaskLoss()+Twice(.5)+Twice(.25)))                 # a name that is taken
    assert list(learn.recorder.metric_names)[4:-1]==['twice','twice_2','half','twice_2_half'] and [cb.history[0][k] for k in ('half','twice_2_half')]==[.5,.25]==[cb.parts[k] for k in ('half','twice_2_half')]
    class Wrong(Logs):
        def forward(self, pred): self.log('other', pred.mean()); return pred.mean()
    with pytest.raises(ValueError, match="logs 'other'"): fitted(KD(teacher, TaskLoss()+Wrong()))

def test_no_columns(teacher):
    learn = fitted(cb := KD(teacher, SoftTarget(), columns=False))
    assert list(learn.recorder.metric_names)==['epoch','train_loss','valid_loss','accuracy','time'] and cb.history[0]['soft_target']>0

@pytest.mark.parametrize('loss,has', [(lambda: SoftTarget(),True), (lambda: TaskLoss()+FitNet(),False), (lambda: TaskLoss()+Attention(),False)])
def test_agreement_only_where_the_prediction_is_read(teacher, loss, has):
    learn = fitted(KD(teacher, loss()))
    assert ('agreement' in learn.recorder.metric_names)==has

def test_mixup(teacher, tmp_path):
    "The teacher sees the mixed batch; agreement stays blank"
    seen,xs = [],[]
    class Reads(DistillLoss):
        def forward(self, pred, teacher_pred, xb, target, mix): seen.append((xb[0],target,mix)); return (pred-teacher_pred).pow(2).mean()
    learn = learner(path=tmp_path)
    learn.fit(1, cbs=[MixUp(.4),cb := KD(teacher, TaskLoss()+Reads()),CSVLogger(),At('after_loss', lambda l: l.training and xs.append((l.xb[0],*l.yb,l.mix_up.yb1[0],l.mix_up.lam)))])
    assert cb.history[0]['agreement'] is None and 'agreement' not in cb.parts
    assert (tmp_path/'history.csv').read_text().split()[1].split(',')[-2]=='None' and list(learn.recorder.metric_names)[-2]=='agreement'
    for (x,y,(y1,lam)),(x_,y_,y1_,lam_) in zip(seen[1:], xs, strict=True):
        assert type(x) is torch.Tensor and y.dtype==torch.int64 and all(torch.equal(a, b) for a,b in ((x,x_), (y,y_), (y1,y1_), (lam,lam_)))
    learn.fit(1, cbs=cb)
    assert cb.history[0]['agreement'] is not None and left(learn, teacher)==[]

@pytest.mark.parametrize('exc', [RuntimeError,KeyboardInterrupt])
def test_names_gone_after_an_exception(teacher, exc):
    def boom(l): raise exc('boom')
    learn = learner()
    with pytest.raises(exc): learn.fit(2, cbs=[KD(teacher, SoftTarget()),At('after_batch', boom, skip=1)])
    assert [m.name for m in learn.metrics]==['accuracy'] and left(learn, teacher)==[]
    learn.fit(1); assert 'soft_target' not in learn.recorder.metric_names

# ---- plan ----

def rngs(learn): return [torch.get_rng_state().tolist(),str(np.random.get_state()),random.getstate(),learn.dls.train.rng.getstate(),learn.dls.valid.rng.getstate()]

@pytest.mark.parametrize('fits', [0,1])
def test_plan_changes_nothing(teacher, fits):
    def run(plan):
        t,learn = copy.deepcopy(teacher),learner(net(),get_dls())
        learn.model.layer3.append(nn.Dropout(.2)); t.layer3.append(nn.Dropout(.2))
        cb = KD(t, .1*TaskLoss()+.9*SoftTarget()+Attention()+FitNet())
        learn.add_cb(cb)
        if fits: learn.fit(fits)
        before = state(learn.model),state(t),rngs(learn),{k:v for k,v in vars(learn).items()},[m.training for m in (*t.modules(),*learn.model.modules())],state(cb.loss)
        if plan:
            text = repr(cb.plan(learn)); learn.model.train(); learn.model.train(before[4][-1])
            assert 'layer3 (16, 2, 2) → layer3 (32, 2, 2)' in text and 'student  Sequential' in text
            now = state(learn.model),state(t),rngs(learn),{k:v for k,v in vars(learn).items()},[m.training for m in (*t.modules(),*learn.model.modules())],state(cb.loss)
            for i in (0,1,5): assert_same(before[i], now[i])
            assert before[2]==now[2] and before[4]==now[4] and before[3].keys()==now[3].keys() and all(before[3][k] is now[3][k] for k in before[3])
            assert left(learn, t)==[]
        learn.fit(2)
        return state(learn.model),state(t),state(cb.loss),learn.recorder.values
    a,b = run(False),run(True)
    for i in range(3): assert_same(a[i], b[i])
    assert a[3]==b[3]

def test_plan_counts(teacher):
    learn = learner()
    plan = KD(teacher, TaskLoss()+FitNet()).plan(learn)
    assert plan.learned==16*32+2*32 and plan.sizes==[sum(p.numel() for p in m.parameters()) for m in (learn.model,teacher)]
    with pytest.raises(ValueError, match='needs a Learner'): KD(teacher, SoftTarget()).plan()

# ---- several fits ----

def test_lr_find_leaves_all_as_it_was(teacher):
    def run(find):
        learn = learner(dls=get_dls(shuffle=False), opt_func=Adam, cbs=(cb := KD(teacher, TaskLoss()+FitNet())))
        learn.fit(1)
        if find:
            was = state(learn.model),state(cb.loss),copy.deepcopy(learn.opt.state_dict())
            learn.lr_find(num_it=8, show_plot=False)
            assert_same(was[0], state(learn.model)); assert_same(was[1], state(cb.loss))
            now = learn.opt.state_dict()
            assert len(was[2]['state'])==len(now['state']) and all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for a,b in zip(was[2]['state'], now['state']) for k in a)
            assert left(learn, teacher)==[]
        learn.fit(1, lr)
        return state(learn.model),state(cb.loss)
    for a,b in zip(run(False), run(True)): assert_same(a, b)

def test_lr_find_first(teacher):
    "Before any fit: what lr_find built and moved is put back to where it started"
    learn = learner(cbs=(cb := KD(teacher, TaskLoss()+FitNet())))
    starts = []
    learn.add_cb(At('after_pred', lambda l: starts or starts.append(state(cb.loss))))
    was = state(learn.model)
    learn.lr_find(num_it=8, show_plot=False)
    assert_same(was, state(learn.model)); assert_same(starts[0], state(cb.loss)); assert left(learn, teacher)==[]

@pytest.mark.parametrize('opt_func', [partial(SGD, mom=.9), Adam, partial(OptimWrapper, opt=torch.optim.AdamW), partial(OptimWrapper, opt=partial(torch.optim.SGD, momentum=.9))], ids=['SGD','Adam','torch AdamW','torch SGD'])
def test_two_fits_are_one(teacher, opt_func):
    "A second fit goes on with the learned parts and with what the optimizer knows of them"
    def run(ns):
        learn = learner(dls=get_dls(shuffle=False), opt_func=opt_func)
        cb = KD(teacher, TaskLoss()+FitNet()); seed(3)
        parts = []
        for n in ns: learn.fit(n, lr, cbs=cb); parts.append(list(cb.loss.parameters())); assert left(learn, teacher)==[]
        assert all(a is b for p in parts for a,b in zip(p, parts[0], strict=True)) and len(parts[0])==3
        return state(learn.model),state(cb.loss)
    a,b,c = run([2]),run([1,1]),run([1])
    for p,q in zip(a, b): assert_same(p, q)
    assert all((a[1][k]-c[1][k]).abs().max()>1e-4 for k in a[1] if k.endswith(('weight','bias')))        # they do learn

def test_fine_tune_and_groups(teacher):
    learn = learner(splitter=lambda m: [list(m[:2].parameters()),list(m[2:].parameters())])
    loss = TaskLoss()+FitNet()
    learn.add_cb(KD(teacher, loss))
    learn.fine_tune(2, 1e-2, freeze_epochs=1)
    first = list(loss.parameters())
    assert left(learn, teacher)==[] and len(learn.opt.param_lists)==2 and all(p.requires_grad for p in learn.model.parameters())
    learn.freeze(); was = state(learn.model); learn.fit_one_cycle(1, slice(1e-4,1e-2))
    assert torch.equal(was['layer1.0.weight'], learn.model.layer1[0].weight) and not torch.equal(was['fc.weight'], learn.model.fc.weight)
    assert all(a is b for a,b in zip(first, loss.parameters(), strict=True)) and left(learn, teacher)==[]
    learn.unfreeze(); learn.fit_flat_cos(1, 1e-3); assert left(learn, teacher)==[]

def test_save_model_with_optimizer(teacher, tmp_path):
    learn = learner(path=tmp_path, opt_func=Adam)
    with warnings.catch_warnings():
        warnings.filterwarnings('error', 'Could not load|Saved file')
        learn.fit(2, cbs=[KD(teacher, TaskLoss()+FitNet()),SaveModelCallback(with_opt=True)])
    assert left(learn, teacher)==[]
    learn.fit(1, cbs=KD(teacher, TaskLoss()+FitNet())); assert left(learn, teacher)==[]

# ---- the ways out of a fit ----

positions = 'before_fit before_epoch before_train before_batch after_pred after_loss before_backward after_backward before_step after_step after_batch after_train before_validate after_validate after_epoch after_fit'.split()
cancels = CancelBatchException,CancelTrainException,CancelValidException,CancelEpochException,CancelFitException,CancelStepException,CancelBackwardException

def distilled(t, **kwargs): return KD(t, TaskLoss()+SoftTarget()+FitNet()+Watch(), **kwargs)

@pytest.mark.parametrize('exc', [RuntimeError,KeyboardInterrupt,*cancels], ids=lambda o: o.__name__)
def test_an_exception_at_every_event(teacher, exc):
    teacher.layer1.eval(); teacher.fc.weight.requires_grad_(False)      # what was so stays so
    flags,modes,was = [p.requires_grad for p in teacher.parameters()],[m.training for m in teacher.modules()],state(teacher)
    dls,cb,ends,student = get_dls(64, 32),distilled(teacher),{},net()
    learner(student, dls).fit(1, cbs=cb)
    def boom(l): raise exc('boom')
    for order in (1,70):
        for e in positions:
            learn = learner(student, dls, cbs=cb)
            try: learn.fit(2, cbs=At(e, boom, order, skip=1 if e.endswith(('batch','step','loss','pred')) else 0))
            except BaseException as ex: ends[e] = type(ex)       # a misplaced Cancel is an error of fastai's
            assert set(left(learn, teacher)) <= {'teacher flags','teacher mode'}, (e,order)
            assert flags==[p.requires_grad for p in teacher.parameters()] and modes==[m.training for m in teacher.modules()], (e,order)
            assert not any(p.grad is not None for p in cb.loss.parameters()) and not cb.loss.training
    assert_same(was, state(teacher))
    if exc in (RuntimeError,KeyboardInterrupt): assert ends==dict.fromkeys(positions, exc)
    learn = learner(student, dls, cbs=cb); learn.fit(1); assert np.isfinite(learn.recorder.values[-1]).all()     # and all goes on

@pytest.mark.parametrize('exc', [RuntimeError,KeyboardInterrupt])
@pytest.mark.parametrize('where', ['student','teacher','loss','task loss','data','build','a hook of the user\'s'])
def test_an_exception_from_the_work_itself(teacher, where, exc):
    n = [0]
    def boom(*a, **k):
        n[0] += 1
        if n[0]==(1 if where=='build' else 5): raise exc('boom')
    learn,loss = learner(),TaskLoss()+SoftTarget()+FitNet()
    if where=='loss': loss = loss+Watch(boom)
    if where=='build': loss = loss+FitNet(adapter=lambda s,t: boom())
    if where=='task loss':
        own = learn.loss_func; learn.loss_func = CrossEntropyThat(boom)
    if where=='data': learn.dls.train.create_item = lambda i: (boom(), type(learn.dls.train).create_item(learn.dls.train, i))[1]
    hooked = {'student': learn.model.layer2, 'teacher': teacher.layer2, "a hook of the user's": learn.model.fc}.get(where)
    h = hooked.register_forward_hook(boom) if hooked is not None else None
    with pytest.raises(exc, match='boom'): learn.fit(3, cbs=KD(teacher, loss))
    if h: assert hooked._forward_hooks; h.remove()
    assert left(learn, teacher)==[]

class CrossEntropyThat(nn.CrossEntropyLoss):
    def __init__(self, f): super().__init__(); self.f = f
    def forward(self, *a): self.f(); return super().forward(*a)

class Lines:
    "Raise KeyboardInterrupt at the `at`-th line that a fit executes in fastai, here, or in torch's modules and optimizers (count them all if None)"
    parts = '/fastai/','/fasterdistill/','/torch/nn/modules/','/torch/optim/'
    def __init__(self, at=None, only=None): self.at,self.only,self.n,self.done,self.where = at,only,0,False,None
    def call(self, frame, event, arg): return self.line if any(p in (c := frame.f_code).co_filename for p in self.parts) and (not self.only or c.co_name in self.only and 'fasterdistill' in c.co_filename) else None
    def line(self, frame, event, arg):
        if event=='line' and not self.done:
            self.n += 1
            if self.n==self.at:
                self.done,self.where = True,f'{frame.f_code.co_filename.split("/")[-1]}:{frame.f_lineno} {frame.f_code.co_name}'
                raise KeyboardInterrupt
        return self.line
    def __enter__(self): self.was = sys.gettrace(); sys.settrace(self.call); return self
    def __exit__(self, *a): sys.settrace(self.was)

def interrupted(n=None, offset=0, only=None):
    "Fits interrupted at `n` of their lines, evenly spread (or at each of those in our functions `only`): which of them left what"
    teacher,dls,dirty,hit = net(8, s=1),get_dls(64, 32),[],0
    def one(at):
        learn,lines = learner(dls=dls),Lines(at, only)
        cb = distilled(teacher)
        try:
            with lines: learn.fit(1, cbs=cb)
        except KeyboardInterrupt: pass
        gc.collect()
        return learn,lines
    total = one(None)[1].n
    n = n or total
    gc.collect(); gc.freeze()
    for i in range(n):
        learn,lines = one(1+(i*total+offset)//n)
        hit += lines.done
        l = left(learn, teacher) + ['no gradients']*(not torch.is_grad_enabled())
        if l: dirty.append((lines.where,l))
        torch.set_grad_enabled(True)
        for m in (learn.model,teacher):                               # a fault must not count twice
            for o in m.modules(): o._forward_hooks.clear(); o._forward_pre_hooks.clear(); o.train().requires_grad_(True)
        vars(dls.train).pop('get_idxs', None)
    gc.unfreeze()
    assert hit>.98*n, f'{hit} of {n} interrupts were delivered'
    return dirty

def test_ctrl_c_at_any_line():
    dirty = interrupted(150)
    assert len(dirty)<=1, dirty

@pytest.mark.parametrize('n', [120,pytest.param(None, marks=pytest.mark.slow)])
def test_ctrl_c_while_opening_and_closing(n):
    "Where it is most delicate: none may leave anything"
    assert interrupted(n, only={'_open','attach','remove','_join_optimizer','_leave_optimizer','_close','tidy','setup','close','unhook','reading','rng_kept','_values'})==[]

@pytest.mark.slow
def test_ctrl_c_at_any_of_many_lines():
    dirty = interrupted(1500, offset=700)
    assert len(dirty)<=3, dirty

def test_resnet18_teacher():
    from torchvision.models import resnet18
    t = resnet18(num_classes=10)
    t.conv1 = nn.Conv2d(1, 64, 3, bias=False)
    t.layer2.requires_grad_(False); t.bn1.eval()
    flags,modes,was,opt = [p.requires_grad for p in t.parameters()],[m.training for m in t.modules()],state(t),None
    assert len(flags)==62 and 0<sum(flags)<62
    learn = learner(dls=get_dls(32, 16, bs=16))
    learn.fit(1, cbs=KD(t, TaskLoss()+SoftTarget()+Attention().at(['layer1','layer2'])+FitNet().at('layer3')))
    assert [p.grad for p in t.parameters()]==[None]*62
    assert flags==[p.requires_grad for p in t.parameters()] and modes==[m.training for m in t.modules()]
    assert_same(was, state(t)); assert set(left(learn, t))=={'teacher flags','teacher mode'}

# ---- what a step costs ----

class Counted(nn.Module):
    def __init__(self, m): super().__init__(); self.m,self.n = m,0
    def forward(self, x): self.n += 1; return self.m(x)

@pytest.mark.parametrize('loss,per_batch', [
    (lambda: TaskLoss(), 0), (lambda: TaskLoss()+ReadsStudent(), 0), (lambda: TaskLoss()+ReadsOptional(), 0), (lambda: SoftTarget(), 1),
    (lambda: TaskLoss()+SoftTarget()+Logits()+FitNet().at('layer3','m.layer3')+Attention().at('layer2','m.layer2'), 1), (lambda: TaskLoss()+FitNet().at('layer3','m.layer3'), 1),
    (lambda: TaskLoss()+steps({0:0,1:1})*SoftTarget(), (0,1))])
def test_teacher_runs_once_a_batch_where_a_term_needs_it(teacher, loss, per_batch):
    t,ns,valid = Counted(teacher),[],[]
    learn = learner()
    learn.fit(2, cbs=[KD(t, loss()),At('after_pred', lambda l: (ns if l.training else valid).append(t.n)),At('after_batch', lambda l: (ns if l.training else valid).append(t.n))])
    runs = [b-a for a,b in zip(ns[::2], ns[1::2])]
    assert runs==([per_batch]*6 if isinstance(per_batch, int) else [per_batch[0]]*3+[per_batch[1]]*3)
    assert all(a==b for a,b in zip(valid[::2], valid[1::2])) and len(set(valid))<=2
    if not per_batch: assert t.n==0

class ReadsStudent(DistillLoss):
    layers = 'last'
    def forward(self, fm_s, pred): return sum(o.pow(2).mean() for o in fm_s.values())+0*pred.sum()

class ReadsOptional(DistillLoss):
    def forward(self, pred, teacher_pred=None): assert teacher_pred is None; return pred.pow(2).mean()

@pytest.mark.parametrize('loss,n', [(lambda: SoftTarget(),0), (lambda: TaskLoss()+FitNet(),2), (lambda: TaskLoss()+FitNet()+Attention().at(['layer2','layer3']),4)])
def test_hooks_only_where_a_term_reads(teacher, loss, n):
    seen = []
    learn = learner()
    learn.fit(1, cbs=[KD(teacher, loss()),At('after_batch', lambda l: l.training and seen.append(sum(len(m._forward_hooks) for o in (l.model,teacher) for m in o.modules())))])
    assert seen==[n]*3

def test_nothing_of_a_batch_is_kept(teacher):
    refs,alive = [],[]
    def f(pred, teacher_pred, fm_s, fm_t, **k): refs.append([weakref.ref(o) for o in [teacher_pred,*fm_s.values(),*fm_t.values()]])
    def look(l): gc.collect(); alive.append(sum(r() is not None for rs in refs for r in rs))
    cb = KD(teacher, TaskLoss()+SoftTarget()+Watch(f)+FitNet())
    learn = learner(cbs=cb)
    xs = []
    gc.collect(); gc.freeze()                                   # makes collecting fast
    learn.fit(2, cbs=[At('after_batch', look),At('before_validate', look),At('after_pred', lambda l: xs.append(weakref.ref(l.xb[0])))])
    gc.collect()
    assert len(refs)==7 and not any(alive), alive
    assert not any(r() is not None for r in xs)
    def boom(l): raise KeyboardInterrupt
    refs.clear()
    try: learn.fit(1, cbs=At('before_backward', boom))
    except KeyboardInterrupt: pass
    del learn.loss_grad                                        # fastai's own, with the graph behind it
    learn._end_cleanup(); gc.collect(); gc.unfreeze()
    assert refs and not any(r() is not None for rs in refs for r in rs)

@pytest.mark.cuda
def test_no_host_synchronisation(teacher):
    "A step never waits for the GPU"
    dls = get_dls(); dls.to('cuda')
    learn = learner(net().cuda(), dls)
    class Strict(Callback):
        order = 4
        def after_loss(self): torch.cuda.set_sync_debug_mode('error' if self.training and self.learn.iter else 'default')
    class Lax(Callback):
        order = 8
        def after_loss(self): torch.cuda.set_sync_debug_mode('default')
    learn.fit(2, cbs=[Strict(),Lax(),KD(teacher, TaskLoss()+SoftTarget()+Attention()+FitNet())])
    assert {p.device.type for p in teacher.parameters()}=={'cuda'} and left(learn, teacher)==[]

# ---- what comes out ----

class Named(nn.Module):
    "Its layers are called as attributes of a Learner are"
    def __init__(self, m): super().__init__(); self.model,self.opt = m[:3],m[3:]
    def forward(self, x): return self.opt(self.model(x))

def test_names_are_those_of_the_network(teacher):
    "Not of the Learner, and 'model.…' may be written or not; the order is the one asked for"
    seen = []
    class Keys(DistillLoss):
        def forward(self, fm_s, fm_t): seen.append((list(fm_s),list(fm_t),[o.shape[1] for o in fm_s.values()])); return sum(o.mean() for o in fm_s.values())*0
    learn = learner(Named(net()))
    learn.fit(1, cbs=KD(teacher, TaskLoss()+Keys().at(['opt','model','model.layer1','layer1'], ['fc','model.layer3','layer1','layer1'])))
    assert seen==[(['opt','model','model.layer1','layer1'],['fc','model.layer3','layer1','layer1@2'],[10,16,4,4])]*4 and left(learn, teacher)==[]

@pytest.mark.parametrize('event', ['after_batch','after_train','after_epoch'])
def test_predictions_inside_a_fit(teacher, event):
    "What fastai makes of them is its own; nothing more goes wrong"
    learn = learner(cbs=KD(teacher, TaskLoss()+SoftTarget()+FitNet()))
    learn.fit(2, cbs=At(event, lambda l: l.get_preds(inner=True), skip=0))
    assert left(learn, teacher)==[]
    learn.remove_cbs([cb for cb in learn.cbs if isinstance(cb, At)]); learn.fit(1); assert left(learn, teacher)==[]

def test_two_callbacks_are_refused(teacher):
    learn = learner(cbs=KD(teacher, SoftTarget))
    was = state(learn.model)
    with pytest.raises(ValueError, match='2 KnowledgeDistillationCallbacks'): learn.fit(1, cbs=KD(teacher, Logits()))
    assert_same(was, state(learn.model)); assert left(learn, teacher)==[] and len([cb for cb in learn.cbs if isinstance(cb, KD)])==1

alone = '''
import sys
class Blocked:
    def find_spec(self, name, *a):
        if name.split('.')[0]=='fasterdistill': raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
import pickle,warnings,torch; warnings.simplefilter('ignore')
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

def test_exports_load_where_the_package_is_not(teacher, tmp_path):
    "After a fit and between its epochs; the Learner trains on, and so does a copy of it"
    preds,x = {},X[:8]
    def pred(m):
        m = copy.deepcopy(m).eval()
        with torch.no_grad(): return m(x)
    def write(learn, name):
        preds.update({f'{k}_{name}': pred(learn.model) for k in ('learn','pickle','model')})
        (tmp_path/f'pickle_{name}.pkl').write_bytes(pickle.dumps(learn))
        torch.save(learn.model, tmp_path/f'model_{name}.pkl')
        learn.export(f'learn_{name}.pkl')
    def run(name, *cbs):
        learn = learner(net(16), path=tmp_path, cbs=cbs)
        learn.fit(1); write(learn, f'{name}_after')
        learn.fit(2, cbs=At('after_epoch', lambda l: write(l, f'{name}_mid'), skip=0))
        write(learn, f'{name}_end')
        return learn
    learn = run('kd', KD(teacher, TaskLoss()+SoftTarget()+Attention()+FitNet())); run('bare')
    assert left(learn, teacher)==[]
    torch.save(x, tmp_path/'x.pth')
    size = lambda n: os.path.getsize(tmp_path/f'{n}.pkl')
    for n in ('after','mid','end'): assert abs(size(f'learn_kd_{n}')/size(f'learn_bare_{n}')-1)<.01, n
    subprocess.run([sys.executable,'-c',alone,str(tmp_path)], check=True, cwd=tmp_path, env={k:v for k,v in os.environ.items() if k!='PYTHONPATH'})
    res = torch.load(tmp_path/'res.pth')
    assert res.keys()==preds.keys()
    for n,(p,keys,hooks) in res.items(): assert torch.equal(p, preds[n]) and keys==list(learn.model.state_dict()), n
    assert not any(h for n,(_,_,h) in res.items() if 'mid' not in n)

@pytest.mark.parametrize('loss', [lambda: SoftTarget(), lambda: TaskLoss()+SoftTarget()+FitNet()], ids=['plain','learned'])
def test_export_in_mid_fit_changes_nothing(teacher, loss, tmp_path):
    def run(f):
        learn = learner(path=tmp_path, opt_func=Adam, dls=get_dls(shuffle=False))
        seed(3); learn.fit(3, cbs=[KD(teacher, loss()),At('after_epoch', f, order=1, skip=0)])
        assert left(learn, teacher)==[]
        return state(learn.model),len(learn.dls.train_ds)
    a,b,c = run(lambda l: None),run(lambda l: pickle.dumps(l)),run(lambda l: l.export())
    assert_same(a[0], b[0]); assert_same(a[0], c[0]); assert a[1]==b[1]==c[1]==96

@pytest.mark.parametrize('when', ['before','between','mid'])
def test_a_copy_trains_on(teacher, when):
    "`deepcopy(learn)`: the copy distils with the same teacher, from the same point, and neither disturbs the other"
    copies,ref = [],learner(dls=get_dls(shuffle=False), opt_func=Adam, cbs=KD(teacher, TaskLoss()+SoftTarget()+FitNet()))
    if when!='before': ref.fit(1, cbs=At('after_epoch', lambda l: copies.append(copy.deepcopy(l)) if when=='mid' else None))
    if when!='mid': copies.append(copy.deepcopy(ref))
    c, = copies
    assert ref.metrics and left(ref, teacher)==[]
    was = state(ref.model)
    for l in (c,ref): seed(5); l.fit(1)
    assert left(c, teacher)==[] and left(ref, teacher)==[]
    kds = [next(cb for cb in l.cbs if isinstance(cb, KD)) for l in (c,ref)]
    assert kds[0].teacher is kds[1].teacher and kds[0].loss is not kds[1].loss and list(c.recorder.metric_names)==list(ref.recorder.metric_names)
    assert_same(state(c.model), state(ref.model)); assert_same(state(kds[0].loss), state(kds[1].loss))
    assert not torch.equal(was['fc.weight'], ref.model.fc.weight) and c.model is not ref.model

def test_same_keys_as_without(teacher):
    assert list(fitted().model.state_dict())==list(fitted(KD(teacher, TaskLoss()+FitNet())).model.state_dict())

# ---- errors, before anything is trained ----

class Unused(nn.Sequential):
    def forward(self, x): return self[1](self[0](x))

class NoStages(nn.Module):
    def __init__(self): super().__init__(); self.fc = nn.Linear(64, 10)
    def forward(self, x): return self.fc(x.flatten(1))

class Vector(DistillLoss):
    def forward(self, pred): return pred.mean(1)

class Number(DistillLoss):
    def forward(self, pred): return 0.

class NoLayers(FeatureLoss):
    layers = None
    def pair(self, s, t): return (s-t).pow(2).mean()

class Labels(DistillLoss):
    def forward(self, pred, target): return F.cross_entropy(pred, target)

mistakes = dict(
    unknown_student=(lambda s,t: KD(t, TaskLoss()+FitNet().at('layr3','layer3')), r"the student \(Sequential\) has no layer 'layr3'; nearest: 'layer3'"),
    unknown_teacher=(lambda s,t: KD(t, TaskLoss()+FitNet().at('layer3','layer9')), r"the teacher \(Sequential\) has no layer 'layer9'; nearest: .*'layer3'"),
    unknown_activations=(lambda s,t: KD(t, Attention(), 'layer3', 'body.9'), r"the teacher \(Sequential\) has no layer 'body.9'"),
    unequal=(lambda s,t: KD(t, Attention(), ['layer1','layer2'], ['layer1']), r"2 of the student \('layer1', 'layer2'\) and 1 of the teacher \('layer1'\).*give as many"),
    unequal_at=(lambda s,t: KD(t, TaskLoss()+Attention().at('layer1',['layer1','layer2'])), 'give as many of each'),
    unequal_stages=(lambda s,t: KD(t, TaskLoss()+Attention().at('stages',['layer1','layer2'])), 'give as many of each'),
    several=(lambda s,t: KD(t, Attention()+FitNet(), ['layer1'], ['layer1']), r'here are 2: Attention\(\), FitNet\(\)\. Say the layers of each with \.at'),
    none_reads=(lambda s,t: KD(t, SoftTarget(), ['layer1'], ['layer1']), 'reads no activations'),
    no_layers=(lambda s,t: KD(t, TaskLoss()+NoLayers()), r'NoLayers\(\) reads activations and has no layers of its own: name them with \.at'),
    function_no_layers=(lambda s,t: KD(t, lambda fm_s, fm_t, **kwargs: 0), 'has no layers of its own'),
    weight_beside=(lambda s,t: KD(t, TaskLoss()+SoftTarget(), weight=.9), r'holds TaskLoss\(\), so it is the whole loss; weight=0.9'),
    schedule_beside=(lambda s,t: KD(t, TaskLoss()+SoftTarget(), schedule=SchedLin(0,1)), r'holds TaskLoss\(\)'),
    weight_above=(lambda s,t: KD(t, SoftTarget(), weight=5), r'weight=5: expected a number from 0 to 1.*TaskLoss\(\) \+ 5\*'),
    weight_below=(lambda s,t: KD(t, SoftTarget(), weight=-.1), 'weight=-0.1: expected a number from 0 to 1'),
    weight_nan=(lambda s,t: KD(t, SoftTarget(), weight=float('nan')), 'expected a number from 0 to 1'),
    weight_kind=(lambda s,t: KD(t, SoftTarget(), weight='half'), "'half' cannot weigh a loss"),
    schedule_kind=(lambda s,t: KD(t, SoftTarget(), schedule=lambda a,b: 1), 'cannot weigh a loss'),
    classes=(lambda s,t: KD(net(8, classes=7), SoftTarget()), r'the student returns \(32, 10\) and the teacher \(32, 7\): the same classes'),
    vocab=(lambda s,t: KD(learner(t, get_dls(vocab=[f'd{i}' for i in range(10)], label=lambda y: f'd{y}')), SoftTarget()), r"the teacher does not know 10 of the student's 10 classes: 0, 1, 2, 3, 4 and 5 more; it knows 'd0'"),
    never_runs=(lambda s,t: KD(Unused(t,nn.Identity(),nn.Linear(3,3)), TaskLoss()+Attention().at('layer3','2')), r"the layer '2' of the teacher \(Unused\) does not run on this batch"),
    never_runs_again=(lambda s,t: KD(t, TaskLoss()+Attention().at('layer3#2','layer3')), "'layer3#2' of the student .* does not run 2 times"),
    itself=(lambda s,t: KD(s, SoftTarget()), 'the teacher is the student itself'),
    itself_in_list=(lambda s,t: KD([t,s], SoftTarget()), 'the teacher is the student itself'),
    shared=(lambda s,t: KD(nn.Sequential(s,nn.Identity()), SoftTarget()), r'teacher and student share 14 parameters.*deepcopy'),
    a_class=(lambda s,t: KD(NoStages, SoftTarget()), 'the teacher is the class NoStages: expected a trained network'),
    no_teacher_at_all=(lambda s,t: KD(3, SoftTarget()), '3 cannot teach'),
    no_stages=(lambda s,t: KD(NoStages(), TaskLoss()+Attention()), r'no stages were found in the teacher \(NoStages\): name its layers'),
    stage_number=(lambda s,t: KD(t, TaskLoss()+FitNet().at('stages[7]')), r"reads 'stages\[7\]'"),
    not_scalar=(lambda s,t: KD(t, TaskLoss()+Vector()), r'Vector\(\) returns \(32,\): expected a scalar'),
    not_tensor=(lambda s,t: KD(t, TaskLoss()+Number()), r'Number\(\) returns float: expected a scalar'),
    none_reads_teacher=(lambda s,t: KD(None, SoftTarget()), r"SoftTarget\(\) reads 'teacher_pred', but the teacher is None"),
    none_reads_maps=(lambda s,t: KD(None, TaskLoss()+FitNet()), r"FitNet\(\) reads 'fm_t', but the teacher is None"),
    ensemble_maps=(lambda s,t: KD([t,net(8)], TaskLoss()+FitNet()), 'reads the layers of one network.*give a single teacher'),
    no_loss=(lambda s,t: KD(t, 3), '3 is no loss'),
    wrong_kind=(lambda s,t: KD(t, BinarySoftTarget()), 'one class of several; use SoftTarget'),
    map_shapes=(lambda s,t: KD(t, TaskLoss()+FitNet(adapter=None)), 'FitNet compares activations of one shape'),
    output=(lambda s,t: KD(Dicts(t), SoftTarget()), "the teacher returns a dict with 'out': say where the prediction is"),
)

class Dicts(nn.Module):
    def __init__(self, m): super().__init__(); self.m = m
    def forward(self, x): return dict(out=self.m(x))

@pytest.mark.parametrize('name', mistakes)
def test_mistakes(teacher, name):
    make,message = mistakes[name]
    learn = learner()
    was = state(learn.model),state(teacher)
    with pytest.raises((ValueError,TypeError), match=f'(?s){message}'): learn.fit(1, cbs=make(learn.model, teacher))
    assert_same(was[0], state(learn.model)); assert_same(was[1], state(teacher)); assert left(learn, teacher)==[]
    assert not any(p.grad is not None for p in learn.model.parameters())
    assert learn.opt is None or all(set(s)<={'do_wd','force_train'} for s in learn.opt.state.values())
    with pytest.raises((ValueError,TypeError), match=f'(?s){message}'): make(learn.model, teacher).plan(learn)
    assert_same(was[0], state(learn.model)); assert left(learn, teacher)==[]
    learn.fit(1, cbs=KD(teacher, SoftTarget)); assert left(learn, teacher)==[]

def test_no_labels(teacher):
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    dl = DataLoader([(x,) for x in X[:64]], bs=32, device=torch.device('cpu'))
    learn = learner(dls=DataLoaders(dl, dl), metrics=[], loss_func=lambda p,*y: p.pow(2).mean())
    with pytest.raises(ValueError, match=r'Labels\(\) reads the labels, and this batch has none'): learn.fit(1, cbs=KD(teacher, TaskLoss()+Labels()))

def test_learned_parts_stay_with_their_networks(teacher):
    "A loss that learned with one student (or teacher) does not go on with another without a word; one without learned parts may"
    cb = KD(teacher, TaskLoss()+FitNet()); learner(cbs=cb).fit(1)
    with pytest.raises(ValueError, match=r'FitNet\(\) has learned parts that were trained with another student'): learner(cbs=cb).fit(1)
    loss,student = TaskLoss()+FitNet(),net(); learner(student, cbs=KD(teacher, loss)).fit(1)
    with pytest.raises(ValueError, match='with another teacher'): learner(student, cbs=KD(copy.deepcopy(teacher), loss)).fit(1)
    with pytest.raises(ValueError, match='learned parts for its layers already'): loss.losses[1].at('layer1')
    cb = KD(teacher, TaskLoss()+SoftTarget()); learner(cbs=cb).fit(1); learner(cbs=cb).fit(1)

def test_the_loss_that_suits_is_chosen_for_each_learner(teacher):
    cb = KD(teacher); learner(cbs=cb).fit(1); assert isinstance(cb.loss, SoftTarget)
    dls = get_dls()
    class Hot(nn.MSELoss):
        def forward(self, p, y): return super().forward(p, F.one_hot(y, p.shape[1]).float())
    learner(dls=dls, loss_func=Hot(), metrics=[], cbs=cb).fit(1); assert isinstance(cb.loss, Logits)

@pytest.mark.parametrize('kwargs', [dict(weight=SchedLin(0, 5)),dict(weight=.5, schedule=lambda pos: 3*pos)])
def test_a_weight_that_leaves_0_to_1(teacher, kwargs):
    learn = learner(cbs=KD(teacher, SoftTarget(), **kwargs)); was = state(learn.model)
    with pytest.raises(ValueError, match='expected 0 to 1'): learn.fit(1)
    assert_same(state(learn.model), was)

def test_a_teacher_that_is_not_finite(teacher):
    with torch.no_grad(): teacher.fc.bias[0] = float('nan')
    learn = learner(cbs=KD(teacher, SoftTarget())); was = state(learn.model)
    with pytest.raises(ValueError, match='the teacher predicts values that are not finite'): learn.fit(1)
    assert_same(state(learn.model), was)

def test_parts_are_those_of_the_last_batch(teacher):
    cb = KD(teacher, TaskLoss()+steps({0:1, 1:0})*FitNet()); learner(cbs=cb).fit(2)
    assert set(cb.parts)=={'task_loss'} and cb.history[0]['fit_net'] is not None and cb.history[1]['fit_net'] is None

# ---- what others do to the optimizer, the compiler and the networks in the middle of a fit ----

class Anew(Callback):
    "Makes the optimizer's lists from the model alone before every step, as fasterai's pruning does"
    def __init__(self, order): self.order = order
    def before_step(self): self.learn.opt.param_lists = L([L([*self.learn.model.parameters()])])

@pytest.mark.parametrize('order', [0,7])
def test_lists_made_anew(teacher, order):
    a,b = [],[]
    for seen,cbs in ((a,[]),(b,[Anew(order)])):
        fit = FitNet(); learn = learner()
        seed(3); learn.fit(2, cbs=[KD(teacher, TaskLoss()+fit),*cbs])
        seen += [state(learn.model),state(fit)]; assert left(learn, teacher)==[]
    for p,q in zip(a, b, strict=True): assert_same(p, q)

def test_an_optimizer_made_anew(teacher):
    fit,seen = FitNet(),[]
    learn = learner()
    learn.fit(1, cbs=[KD(teacher, TaskLoss()+fit),At('after_batch', lambda l: l.create_opt(), skip=0),At('after_step', lambda l: seen.append(state(fit)['adapters.0.layers.0.weight']))])
    assert all(not torch.equal(p, q) for p,q in zip(seen, seen[1:])) and len(seen)==3 and left(learn, teacher)==[]

def test_the_compilers_stance_comes_back(teacher):
    "As an interrupt between the call and the `with` would leave it"
    import torch._dynamo.eval_frame as dynamo
    if not hasattr(torch.compiler, 'set_stance'): pytest.skip('from torch 2.6 on')
    class Stopped(DistillLoss):
        def forward(self, pred):
            if pred.requires_grad: torch.compiler.set_stance('force_eager'); raise KeyboardInterrupt
            return pred.mean()
    for was in ('default','eager_on_recompile'):
        torch.compiler.set_stance(was)
        try:
            with pytest.raises(KeyboardInterrupt): learner().fit(1, cbs=KD(teacher, TaskLoss()+Stopped()))
            assert dynamo._stance.stance==was
        finally: torch.compiler.set_stance('default')

class Counts(nn.Module):
    "Counts its passes in a buffer and in an attribute"
    def __init__(self): super().__init__(); self.n = 0; self.register_buffer('m', torch.zeros(()))
    def forward(self, x):
        if self.training: self.n += 1; self.m += 1
        return x

class Again(DistillLoss):
    def forward(self, student, xb): return student(*xb).pred.pow(2).mean()

def test_another_pass_is_not_remembered():
    m,count = net(),Counts(); m.pool = nn.Sequential(count, m.pool)
    learn = learner(m, cbs=(cb := KD(None, TaskLoss()+Again())))
    cb.plan(); assert (count.n,count.m.item())==(0,0)
    learn.fit(1); assert (count.n,count.m.item())==(3,3)

def test_copies_at_other_layers_learn_apart(teacher):
    base = InfoNCE(learn_tau=True)
    a,b = base.at('layer2'),base.at('layer3')
    assert len({id(o.log_tau) for o in (base,a,b)})==3
    fitted(KD(teacher, TaskLoss()+a+b)); assert a.log_tau!=b.log_tau and base.log_tau.item()==pytest.approx(np.log(.07))
    peer = nn.Linear(2, 2)
    class Peer(DistillLoss):
        def __init__(self, peer): self.peer = peer
        def forward(self, pred): return pred.mean()
    assert Peer(peer).at('layer2').peer is peer                            # a network that was given is that network

def test_batches_too_small_for_a_loss(teacher):
    with pytest.raises(ValueError, match='needs batches of at least 2 items, these have 1'): learner(net(bn=False), get_dls(4, bs=1)).fit(1, cbs=KD(teacher, TaskLoss()+InfoNCE()))

def test_tokens_of_other_proportions():
    class Tokens(nn.Module):
        def __init__(self): super().__init__(); self.embed,self.fc = nn.Conv2d(1, 4, 2, 2),nn.Linear(4, 10)
        def forward(self, x): return self.fc(self.tokens(self.embed(x)).mean(1))
    t = Tokens(); t.tokens = nn.Sequential(nn.Flatten(2), At_last())
    learn = learner(); wide = lambda l: setattr(l.learn, 'xb', (torch.cat([l.xb[0]]*2, 3),))
    class Wide(Callback):
        order = -5
        def before_batch(self): wide(self)
    with pytest.raises(ValueError, match="'tokens' of the teacher returns tokens of pictures of 8×8, while the student sees 8×16"):
        learn.fit(1, cbs=[Wide(),KD(Frozen(t, size=8), TaskLoss()+InfoNCE().at('layer3','tokens'))])

class At_last(nn.Module):
    def forward(self, z): return z.transpose(1, 2)
