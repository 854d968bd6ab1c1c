"Some labels are missing: the task loss and the metrics are over the labelled items, distillation over all"
import pickle
import zipfile
from copy import deepcopy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from common import (KD,At,HalfCPU,Real,Rounded,X,Y,assert_close,assert_same,cpu,furthest,get_dls,in_float64,kl,learner,
                    left,net,raising,real,seed,state,tuples,unlabelled)
from fastai.callback.core import Callback,CancelFitException
from fastai.callback.mixup import CutMix,MixUp
from fastai.callback.training import GradientAccumulation,GradientClip
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner,Recorder,load_learner
from fastai.losses import BCEWithLogitsLossFlat,CrossEntropyLossFlat,MSELossFlat
from fastai.metrics import F1Score,F1ScoreMulti,accuracy,rmse,accuracy_multi,foreground_acc
from torch import nn

from fasterdistill.loss import DistillLoss,TaskLoss
from fasterdistill.losses.logits import SoftTarget
from fasterdistill.missing import MissingLabels,gaps,labels_of,refuse_gaps

nan = float('nan')

nan = float('nan')


# ---- labels, and the other opinion: losses over the labelled items, item by item ----

def holes(y, missing=-100, every=3, empty=slice(32, 64)):
    "Labels of which each `every`th is there and none in the second batch of 32"
    y = y.clone()
    gone = torch.arange(len(y))%every!=0
    gone[empty] = True
    y[gone] = missing
    return y
def bits(y): return torch.stack([(y&1).float(),(y>4).float(),(y%3==0).float()], 1)
def specks(y):
    "Yes-or-no labels, single ones missing, and all of the second batch"
    y = bits(y)
    y[torch.arange(y.numel()).reshape(y.shape)%5==2] = nan
    y[32:64] = nan
    return y

def hidden(y):
    "-7 for what is missing, which only the losses of this file know"
    return y.masked_fill((y==-100)|(y!=y), -7)
def there(t): return bool(t==t) and int(t) not in (-100,-7)

def mean_of(losses, pred):
    "Their mean; 0, that one can go back from, if there are none"
    losses = list(losses)
    return sum(losses)/len(losses) if losses else real(pred).sum()*0
def by_item(pred, y):
    rows = ((real(p),int(t)) for p,t in zip(pred, y, strict=True) if there(t))
    return mean_of((p.logsumexp(0)-p[t] for p,t in rows), pred)
def by_number(pred, y): return mean_of(((p[0]-t)**2 for p,t in zip(pred, y, strict=True) if there(t)), pred)
def by_bit(pred, y):
    bits = (o for ps,ts in zip(pred, y, strict=True) for o in zip(ps, ts, strict=True))
    return mean_of((F.softplus(p)-p*t for p,t in bits if there(t)), pred)

tasks = dict(                                          # labels, outputs, loss function, the same by hand, options
    classes=(holes(Y[:160]), 10, CrossEntropyLossFlat, by_item, {}),
    column=(holes(Y[:160])[:,None].to(torch.int8), 10, CrossEntropyLossFlat, by_item, {}),     # fastai's tabular labels
    torchs=(holes(Y[:160]), 10, nn.CrossEntropyLoss, by_item, {}),
    numbers=(holes(Y[:160].float()/9, nan), 1, MSELossFlat, by_number, {}),
    bits=(specks(Y[:160]), 3, BCEWithLogitsLossFlat, by_bit, dict(entries=True)))
every = pytest.mark.parametrize('task', tasks)

def dls(y, bs=32, val=None):
    "Digits and these labels, in their order; others to validate with"
    def load(items): return DataLoader(list(items), bs=bs, device=cpu, num_workers=0)
    return DataLoaders(load(zip(X[:96], y[:96])), load(zip(X[96:160], y[96:160]) if val is None else val))

def student(data=None, loss_func=None, *cbs, model=None, metrics=(), **kwargs):
    "A Learner whose batches are float64 where the test is"
    return learner(model, data, loss_func, cbs=[Real(),*cbs], metrics=list(metrics), **kwargs)

def make(task, *cbs, loss=None, bs=32, val=None, bn=True, **kwargs):
    y,classes,loss_func,by_hand,_ = tasks[task]
    if loss=='by hand': y,loss = hidden(y),by_hand
    return student(dls(y, bs, val), loss or loss_func(), *cbs, model=net(classes=classes, bn=bn), **kwargs)
def missing(task): return MissingLabels(**tasks[task][-1])
def fit(learn, *cbs, n=2):
    "The weights after it"
    seed(3)
    learn.fit_one_cycle(n, .05, cbs=list(cbs))
    return state(learn.model)
def clean(learn, *teachers):
    assert left(learn, *teachers)==[]
    assert learn.missing_labels.batch is None and learn.pred is None

# ---- training ----

@in_float64
@every
@pytest.mark.parametrize('bs', [32, 1])
def test_task_loss(task, bs):
    "That of the labelled items, a batch without any among them"
    n,bn = (2,True) if bs>1 else (1,False)
    a,b = make(task, missing(task), bs=bs, bn=bn),make(task, loss='by hand', bs=bs, bn=bn)
    assert_close(fit(a, n=n), fit(b, n=n))
    clean(a)
    assert not torch.equal(a.model.fc.weight, net(classes=tasks[task][1], bn=bn).fc.weight)

class Written:
    "A Learner's loss function that distils as well while training: `task*by_hand + kd*(Hinton's, over all items)`"
    def __init__(self, teacher, task, kd):
        self.teacher,self.task,self.kd,self.learn = deepcopy(teacher).eval(),task,kd,None
    def __call__(self, pred, y):
        if not pred.requires_grad: return by_item(pred, y)
        with torch.no_grad(): t = self.teacher(self.learn.xb[0])
        return self.task*by_item(pred, y) + self.kd*kl(pred, t)

def written(teacher, task, kd, *cbs):
    f = Written(teacher, task, kd)
    f.learn = make('classes', loss=f)
    return fit(f.learn, *cbs)

@in_float64
@pytest.mark.parametrize('cbs', [lambda: [], lambda: [GradientAccumulation(64)], lambda: [GradientClip(.1)]],
                         ids=['plain','accumulation','clip'])
@pytest.mark.parametrize('loss,kwargs,task,kd', [
    (SoftTarget, dict(weight=.7), .3, .7), (lambda: .5*TaskLoss()+2*SoftTarget(), {}, .5, 2.)], ids=['share','sum'])
def test_distillation_sees_all(teacher, cbs, loss, kwargs, task, kd):
    learn = make('classes', KD(teacher, loss(), **kwargs), MissingLabels())
    assert_close(fit(learn, *cbs()), written(teacher, task, kd, *cbs()))
    clean(learn, teacher)
    alone = fit(make('classes', MissingLabels()), *cbs())
    assert not torch.allclose(alone['fc.weight'], learn.model.fc.weight, atol=1e-3)

def test_terms_see_the_whole_batch(teacher):
    seen = []
    class Look(DistillLoss):
        def forward(self, pred, teacher_pred, target):
            seen.append((len(pred),len(teacher_pred),target.clone()))
            return pred.mean()*0
    fit(make('classes', KD(teacher, Look()), MissingLabels()), n=1)
    assert all(a==b==32 for a,b,_ in seen)
    assert torch.equal(torch.cat([t for *_,t in seen[-3:]]), holes(Y[:96]))

def test_autocast(teacher):
    "In half precision, to what one rounding of the inputs changes in the fit by hand"
    def masked(p, y):                                  # in the precision that autocast gives it
        return F.cross_entropy(p[y>=0], y[y>=0]) if (y>=0).any() else p.float().sum()*0
    def f(loss, y, *cbs): return fit(student(dls(y), loss, KD(teacher, SoftTarget()), *cbs), HalfCPU(lift=False))
    y = holes(Y[:160])
    got,want = f(nn.CrossEntropyLoss(), y, MissingLabels()),f(masked, hidden(y))
    rounded = f(masked, hidden(y), Rounded())
    assert_close(got, want, min(furthest(rounded, want), 1e-6))
    whole = fit(make('classes', KD(teacher, SoftTarget()), MissingLabels()))
    assert not torch.equal(got['fc.weight'], whole['fc.weight'])

def test_nothing_missing(teacher):
    "Changes nothing, to the last bit: weights, columns and random numbers"
    a,b = (student(get_dls(), None, KD(teacher), *o, metrics=[accuracy]) for o in ([],[MissingLabels()]))
    assert_same(fit(a), fit(b))
    assert [r[:3] for r in a.recorder.values]==[r[:3] for r in b.recorder.values]
    assert torch.equal(torch.stack(a.recorder.losses), torch.stack(b.recorder.losses))

def distilled(data, teacher, *cbs):
    "Taught by the teacher alone"
    return student(data, nn.CrossEntropyLoss(), KD(teacher, SoftTarget(), weight=1.), *cbs, metrics=[accuracy])

def test_no_targets_at_all(teacher):
    bare = unlabelled(valid=False)
    assert_same(fit(distilled(bare, teacher)), fit(distilled(bare, teacher, MissingLabels())))

def test_no_label_at_all(teacher):
    "Labels that are all missing are data without labels"
    a = distilled(dls(torch.full((160,), -100)), teacher, MissingLabels())
    assert_same(fit(a), fit(distilled(unlabelled(valid=False), teacher)))
    assert a.recorder.losses==[]
    assert a.recorder.values[-1][1:3]==[None,None]

def test_torch_loaders(teacher):
    items = list(zip(X[:160], holes(Y[:160])))
    theirs = DataLoaders(*(torch.utils.data.DataLoader(o, batch_size=32) for o in (items[:96],items[96:])))
    cbs = lambda: [KD(teacher, SoftTarget()),MissingLabels()]
    assert_same(fit(student(theirs, None, *cbs())), fit(make('classes', *cbs())))

# ---- what is recorded ----

metrics = dict(
    classes=[accuracy,F1Score(average='macro')], column=[accuracy,F1Score(average='macro')], torchs=[accuracy],
    numbers=[lambda p,t: (p.view(-1)-t.view(-1)).abs().mean()],     # a root of a batch's mean depends on the batch
    bits=[accuracy_multi])

def labelled(t): return not (t.isnan() if t.is_floating_point() else t==-100).all()

@every
def test_validation(task):
    "That of a Learner which has the labelled items alone, in batches of another size"
    y = tasks[task][0]
    val = list(zip(X[:160], y))
    learn = make(task, missing(task), val=val, metrics=metrics[task])
    got = list(learn.validate())
    if task=='bits':
        p,k = learn.model.eval()(X[:160]).detach(),~y.isnan()
        want = [float(by_bit(p, y)),float(((p[k]>0)==(y[k]>0)).float().mean())]
    else: want = list(make(task, val=[o for o in val if labelled(o[1])], bs=7, metrics=metrics[task]).validate())
    assert got==pytest.approx(want, abs=1e-5)
    assert len(want)>0

def test_train_columns(teacher):
    "train_loss is fastai's smooth mean over batches with labels, train metrics are over labelled items"
    losses,hits = [],[]
    def look(l):
        if not l.training: return
        y,p = l.yb[0],l.pred.detach()
        assert len(p)==len(y)==32
        rows = [i for i in range(32) if y[i]!=-100]
        hits.extend(int(p[i].argmax())==int(y[i]) for i in rows)
        if rows: losses.append(float(by_item(p, y)))
    learn = student(dls(holes(Y[:160])), None, KD(teacher, SoftTarget()), MissingLabels(), Recorder(train_metrics=True),
                    metrics=[accuracy])
    learn.fit(1, cbs=At('after_pred', look, order=20))
    row = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[0]))
    assert len(learn.recorder.losses)==len(losses)==2
    assert row['train_accuracy']==pytest.approx(sum(hits)/len(hits), abs=1e-6)
    smooth = (.98*(.02*losses[0])+.02*losses[1])/(1-.98**2)
    assert row['train_loss']==pytest.approx(smooth, abs=1e-5)              # lerp(loss, 0, .98) loses digits

def test_get_preds():
    y = tasks['classes'][0]
    learn = make('classes', MissingLabels(), val=list(zip(X[:160], y)))
    p,t,l = learn.get_preds(with_loss=True)
    assert learn.final_record[0]==pytest.approx(learn.validate()[0], abs=1e-6)
    raw = learn.model.eval()(X[:160]).detach()
    torch.testing.assert_close(p, raw.softmax(1))
    assert torch.equal(t, y)
    want = torch.tensor([float(r.logsumexp(0)-r[k]) if k!=-100 else nan for r,k in zip(raw, y)])
    torch.testing.assert_close(l, want, equal_nan=True)
    assert l[32:64].isnan().all()
    assert not l.isnan().all()
    assert learn.loss_func.reduction=='mean'

    p,t = learn.get_preds(ds_idx=0)
    assert p.shape==(96,10)
    assert torch.equal(t, y[:96])
    whole = learn.dls.valid.new(list(zip(X[:40], Y[:40])))                 # nothing is missing
    _,_,l = learn.get_preds(with_loss=True, dl=whole)
    torch.testing.assert_close(l, F.cross_entropy(raw[:40], Y[:40], reduction='none'))

def test_get_preds_single_labels():
    "The loss of an item is the mean over what is labelled of it"
    y = tasks['bits'][0]
    learn = make('bits', MissingLabels(entries=True), val=list(zip(X[:160], y)))
    p,t,l = learn.get_preds(with_loss=True)
    raw = learn.model.eval()(X[:160]).detach()
    torch.testing.assert_close(t, y, equal_nan=True)
    assert p.shape==(160,3)
    want = [float(by_bit(r[None], k[None])) if (k==k).any() else nan for r,k in zip(raw, y)]
    torch.testing.assert_close(l, torch.tensor(want), equal_nan=True)

def test_lr_find(teacher):
    "The first batch without labels: nothing is recorded yet that it could read"
    data = dls(holes(Y[:160], empty=slice(0, 32)))
    learn = student(data, None, KD(teacher, SoftTarget()), MissingLabels(), metrics=[accuracy])
    was = state(learn.model)
    learn.lr_find(num_it=6, show_plot=False, suggest_funcs=[])
    assert_same(state(learn.model), was)
    assert len(learn.recorder.losses)==4
    bar = student(data, None, MissingLabels(), metrics=[accuracy], bar=True)
    with bar.no_logging(): bar.fit(1)

# ---- pixels, tokens, points, several outputs and targets ----

class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        seed()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
    def forward(self, x): return self.conv(x)
class Tokens(Dense):
    "The same with the classes last"
    def forward(self, x): return self.conv(x).movedim(1, -1).flatten(1, 2)

def masks(empty=True):
    "Three shades of ink, some unknown, those of a batch all, if it is `empty`"
    y = (X[:160,0]*2.99).long()
    y[(X[:160,0]>.3)&(X[:160,0]<.5)] = -100
    y[40:70] = -100 if empty else (X[40:70,0]*2.99).long()
    return y

def over_pixels(p, y):
    "The mean loss and the share that is right, of what is labelled, and how much that is; classes last"
    losses,hits = [],[]
    for q,t in zip(p.reshape(-1, 3), y.flatten()):
        if t==-100: continue
        hits.append(int(q.argmax()==t))
        losses.append(float(q.logsumexp(0)-q[t]))
    return [sum(losses)/len(losses),sum(hits)/len(hits)],len(hits)

@pytest.mark.parametrize('model,axis', [(Dense,1), (Tokens,-1)])
def test_dense(model, axis):
    "torch leaves out -100 by itself in training; the columns are over labelled pixels"
    y = masks() if model is Dense else masks().flatten(1)
    data = dls(y, val=list(zip(X[:160], y)))
    make = partial(student, data, CrossEntropyLossFlat(axis=axis), metrics=[partial(accuracy, axis=axis)])
    a,b = make(MissingLabels(entries=True), model=model()),make(model=model())
    assert torch.isfinite(fit(a, n=1)['conv.weight']).all()
    b.model.load_state_dict(a.model.state_dict())
    want,n = over_pixels(b.model(X[:160]).detach().movedim(axis, -1), y)
    assert list(a.validate())==pytest.approx(want, abs=1e-4)
    assert n<y.numel()*.8
    assert list(b.validate())!=pytest.approx(want, abs=1e-2, nan_ok=True)  # what is wrong without it

@in_float64
def test_dense_training():
    "Without an empty batch, which alone is NaN, training is what torch's own ignore_index makes it"
    def f(*cbs): return fit(student(dls(masks(empty=False)), CrossEntropyLossFlat(axis=1), *cbs, model=Dense()), n=1)
    assert_close(f(MissingLabels(entries=True)), f())

def test_a_metric_of_images_fails_on_pixels():
    learn = student(dls(masks()), CrossEntropyLossFlat(axis=1), MissingLabels(entries=True), model=Dense(),
                    metrics=[foreground_acc])
    with pytest.raises(IndexError): learn.validate()

def points():
    "Where the ink is darkest, and a point that moves, every third time unknown: (B,2,2)"
    ink = X[:160,0]
    at = [ink.sum(1).argmax(1)/8, ink.sum(2).argmax(1)/8, torch.linspace(0, 1, 160).float(), torch.zeros(160).float()]
    y = torch.stack(at, 1).reshape(160, 2, 2)
    y[::3,1] = nan
    return y

@in_float64
def test_points():
    "`(B,2k)` predictions of `(B,k,2)` points, single ones unknown"
    def by_hand(p, y):
        pairs = [(q,t) for ps,ts in zip(p, y.flatten(1)) for q,t in zip(ps, ts) if t==t]
        return sum((q-t)**2 for q,t in pairs)/len(pairs)
    def f(loss, *cbs): return fit(student(dls(points()), loss, *cbs, model=net(classes=4)), n=1)
    assert_close(f(MSELossFlat(), MissingLabels(entries=True)), f(by_hand))

class Two(nn.Module):
    "Two predictions, one of them deep in containers"
    def __init__(self):
        super().__init__()
        self.net = net()
        seed(4)
        self.aux = nn.Linear(64, 10)
    def forward(self, x): return self.net(x),dict(aux=[self.aux(x.flatten(1))])

@in_float64
def test_predictions_in_containers(teacher):
    def of_both(crit): return lambda p,y: crit(p[0], y)+.3*crit(p[1]['aux'][0], y)
    def f(crit, y, *cbs):
        return fit(student(dls(y), of_both(crit), KD(teacher, SoftTarget(), output=0), *cbs, model=Two()))
    y = holes(Y[:160])
    assert_close(f(nn.CrossEntropyLoss(), y, MissingLabels()), f(by_item, hidden(y)))

@in_float64
def test_several_targets():
    def of_both(ce, mse): return lambda p,y,z: ce(p[:,:9], y.clamp(max=8))+mse(p[:,9:], z)
    def f(crits, z, *cbs):
        data = tuples(X, holes(Y[:160]), z)
        data.n_inp = 1
        return fit(student(data, of_both(*crits), *cbs))
    z = holes(Y[:160].float()/9, nan)
    torchs = nn.CrossEntropyLoss(),MSELossFlat()
    assert_close(f(torchs, z, MissingLabels()), f((by_item,by_number), z))
    z[0] = nan
    with pytest.raises(ValueError, match='item 0 of the batch has labels in some of its 2 targets'):
        f(torchs, z, MissingLabels())

def test_uint8():
    "156 is no -100"
    def part(labels, *y): return labels.part(torch.zeros(2, 200), (torch.tensor(y, dtype=torch.uint8),))
    p,(y,),keep = part(MissingLabels(), 156, 3)
    assert keep is None
    assert y.tolist()==[156,3]
    _,(y,),_ = part(MissingLabels(missing=255), 255, 3)
    assert y.tolist()==[3]

# ---- refused ----

def refused(learn, match, *cbs):
    "The same loss function and weights as before"
    was,f = deepcopy(dict(learn.model.named_parameters())),learn.loss_func
    with pytest.raises(ValueError, match=match): learn.fit(1, cbs=list(cbs))
    assert_same(dict(learn.model.named_parameters()), was)
    assert learn.loss_func is f

@pytest.mark.parametrize('mix', [MixUp,CutMix])
def test_mixing(mix): refused(make('classes', MissingLabels()), f'MissingLabels beside {mix().name}', mix())

class Folded(nn.Module):
    "More rows than items"
    def __init__(self):
        super().__init__()
        self.net = net()
    def forward(self, x): return self.net(x).reshape(-1, 5)

def test_refused():
    one_by_one = partial(make, 'bits', MissingLabels(entries=True))
    refused(make('bits', MissingLabels()), r'item 0 of the batch has 2 of its 3 labels: MissingLabels\(entries=True\)')
    refused(one_by_one(metrics=[F1ScoreMulti()]), 'f1_score is computed for each output by its place')
    refused(one_by_one(loss=nn.BCEWithLogitsLoss(pos_weight=torch.ones(3))),
            r'weighs 3 outputs by their place \(pos_weight\)')
    many = tasks['bits'][0].repeat(1, 2)
    refused(student(dls(many), MSELossFlat(), MissingLabels(entries=True), model=net(classes=3)),
            r'labels \(32, 6\), some missing, and a prediction \(32, 3\)')
    refused(student(dls(holes(Y[:160])), by_item, MissingLabels(), model=Folded()),
            r'which of the 32 items cannot be told: it is \(64, 5\)')
    for o in ('text', [1]):
        with pytest.raises(TypeError, match=f'this target is a {type(o).__name__}'):
            MissingLabels().part(torch.zeros(1, 2), (o,))

# ---- the Learner as a thing ----

ends = [('after_pred',55),('after_loss',3),('after_loss',55),('before_step',3),('after_batch',20)]

def test_after_an_exception(teacher):
    "A batch that is left in the middle is forgotten by the next, in which nothing is missing"
    y = holes(Y[:160])
    y[:32] = Y[:32]
    def f(*events):
        learn = student(dls(y), None, KD(teacher, SoftTarget()), MissingLabels())
        for event,order in events:
            stop = At(event, raising(RuntimeError('stop')), order=order, skip=1)
            with pytest.raises(RuntimeError, match='stop'): learn.fit(1, .05, cbs=stop)
            learn.model.load_state_dict(net().state_dict())
            learn.model.zero_grad()                                        # the stopped fit's, which fastai leaves
        learn.opt = None
        res = fit(learn)
        clean(learn, teacher)
        return res
    want = f()
    for o in ends: assert_same(f(o), want)

def test_a_fit_that_is_cancelled():
    learn = make('classes', MissingLabels())
    learn.fit(1, cbs=At('after_loss', raising(CancelFitException), skip=1))
    clean(learn)

def test_copies(teacher):
    learn = make('classes', KD(teacher, SoftTarget()), MissingLabels(missing=-100, entries=True))
    twin = deepcopy(learn)
    assert twin.missing_labels.entries
    assert twin.missing_labels is not learn.missing_labels
    assert repr(twin.missing_labels)=='MissingLabels(-100, entries=True)'
    assert_same(fit(learn), fit(twin))
    assert type(pickle.loads(pickle.dumps(learn.missing_labels))) is Callback

def test_export_does_not_name_the_package(tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    learn = Learner(get_dls(), model, loss_func=CrossEntropyLossFlat(), path=tmp_path, cbs=MissingLabels())
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    learn.export()
    with zipfile.ZipFile(tmp_path/'export.pkl') as z: files = [z.read(n) for n in z.namelist()]
    assert len(files)>2
    assert not any(b'fasterdistill' in o for o in files)
    assert_same(state(load_learner(tmp_path/'export.pkl').model), state(learn.model))

# ---- beside the distillation callback, where its opening reads the labels ----

@in_float64
def test_task_loss_of_a_first_batch_without_labels(teacher):
    "Its opening tries TaskLoss on that batch"
    y = holes(Y[:160], empty=slice(0, 32))
    def f(loss, y, *cbs): return fit(student(dls(y), loss, KD(teacher, TaskLoss()+SoftTarget()), *cbs))
    assert_close(f(nn.CrossEntropyLoss(), y, MissingLabels()), f(by_item, hidden(y)))

def mse(pred, teacher_pred): return (pred-teacher_pred).pow(2).mean()

@in_float64
@pytest.mark.parametrize('task', ['numbers','bits'])
def test_task_loss_of_missing_numbers(task):
    t = net(8, classes=tasks[task][1], s=1)
    def f(loss, *cbs): return fit(make(task, KD(t, TaskLoss()+mse), *cbs, loss=loss))
    assert_close(f(None, missing(task)), f('by hand'))

class Exit(DistillLoss):
    "The task's criterion on something else, as the exits of self-distillation do"
    def forward(self, pred, target, criterion): return criterion(pred*2, target)

@in_float64
@every
def test_criterion(task):
    def f(loss, *cbs): return fit(make(task, KD(None, TaskLoss()+Exit()), *cbs, loss=loss))
    assert_close(f(None, missing(task)), f('by hand'))

def test_it_is_asked_for(teacher):
    for task,metric in (('classes',[accuracy]),('numbers',[])):
        t = net(8, classes=tasks[task][1], s=1)
        refused(make(task, KD(t), metrics=[accuracy] if task=='classes' else []), 'MissingLabels')
    # -100 is what this one leaves out, and there is no metric to mislead
    fit(make('classes', KD(teacher), loss=nn.CrossEntropyLoss()))

def test_who_looks_after_them():
    class Own(MissingLabels): "One that does more"
    for cb in (MissingLabels(),Own()): assert labels_of(make('classes', At('after_fit', len), cb)) is cb
    assert labels_of(make('classes')) is None

@pytest.mark.parametrize('y,criterion,metrics,n', [
    (holes(Y[:32], empty=[]), CrossEntropyLossFlat(), [accuracy], 21),
    (holes(Y[:32], empty=[]), CrossEntropyLossFlat(), [], 0),                  # the loss function leaves them out
    (holes(Y[:32], empty=[]), nn.CrossEntropyLoss(ignore_index=255), [], 21),
    (holes(Y[:32], empty=[]), MSELossFlat(), [rmse], 0),                       # -100 is a number
    (holes(Y[:32]/9., nan, empty=[]), MSELossFlat(), [], 21),
    (specks(Y[:32])[:3], BCEWithLogitsLossFlat(), [], 0)],
    ids=['metric','left out','another label','numbers','nan','single'])
def test_gaps_refused(y, criterion, metrics, n):
    learn = make('classes', loss=criterion)
    learn.yb = (y,)
    assert gaps(y, -100).all(1).sum()==n or n==0
    if n:
        with pytest.raises(ValueError, match=f'^{n} of the 32 items of the first batch have no label'):
            refuse_gaps(learn, metrics)
    else: refuse_gaps(learn, metrics)
    learn.add_cb(MissingLabels())
    refuse_gaps(learn, metrics)
