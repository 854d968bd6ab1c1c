"Some labels are missing: the task loss and the metrics are over the labelled items, distillation over all"
import pickle,zipfile
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from common import KD,At,X,Y,assert_close,assert_same,get_dls,learner,left,net,seed,state
from fastai.callback.core import Callback,CancelFitException
from fastai.callback.mixup import CutMix,MixUp
from fastai.callback.training import GradientAccumulation,GradientClip
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner,Recorder,load_learner
from fastai.losses import BCEWithLogitsLossFlat,CrossEntropyLossFlat,MSELossFlat
from fastai.metrics import F1Score,F1ScoreMulti,accuracy,accuracy_multi,foreground_acc,rmse
from test_unlabelled import HalfCPU
from torch import nn

from fasterdistill.loss import DistillLoss,TaskLoss
from fasterdistill.losses.logits import SoftTarget
from fasterdistill.missing import MissingLabels,gaps,labels_of,refuse_gaps

torch.set_num_threads(1)
nan = float('nan')

@pytest.fixture
def teacher(): return net(8, s=1)

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
    y[torch.arange(y.numel()).reshape(y.shape)%5==2] = nan; y[32:64] = nan
    return y

def hidden(y): "-7 for what is missing, which only the losses of this file know"; return y.masked_fill((y==-100)|(y!=y), -7)
def there(t): return bool(t==t) and int(t) not in (-100,-7)
def by_item(pred, y):
    ls = [p.float().logsumexp(0)-p.float()[int(t)] for p,t in zip(pred, y, strict=True) if there(t)]
    return sum(ls)/len(ls) if ls else pred.float().sum()*0
def by_number(pred, y):
    ls = [(p[0]-t)**2 for p,t in zip(pred, y, strict=True) if there(t)]
    return sum(ls)/len(ls) if ls else pred.float().sum()*0
def by_bit(pred, y):
    ls = [F.softplus(p)-p*t for ps,ts in zip(pred, y, strict=True) for p,t in zip(ps, ts, strict=True) if there(t)]
    return sum(ls)/len(ls) if ls else pred.float().sum()*0

tasks = dict(classes=(holes(Y[:160]), 10, CrossEntropyLossFlat, by_item, {}),
             column=(holes(Y[:160])[:,None].to(torch.int8), 10, CrossEntropyLossFlat, by_item, {}),     # fastai's tabular labels
             torchs=(holes(Y[:160]), 10, nn.CrossEntropyLoss, by_item, {}),
             numbers=(holes(Y[:160].float()/9, nan), 1, MSELossFlat, by_number, {}),
             bits=(specks(Y[:160]), 3, BCEWithLogitsLossFlat, by_bit, dict(entries=True)))
every = pytest.mark.parametrize('task', tasks)

def dls(y, bs=32, val=None):
    load = lambda items: DataLoader(items, bs=bs, device=torch.device('cpu'), num_workers=0)
    return DataLoaders(load(list(zip(X[:96], y[:96]))), load(list(zip(X[96:160], y[96:160])) if val is None else val))

def make(task, cbs=(), loss=None, bs=32, val=None, bn=True, **kwargs):
    y,c,f,by_hand,_ = tasks[task]
    if loss=='by hand': y,loss = hidden(y),by_hand
    return learner(net(classes=c, bn=bn), dls(y, bs, val), loss_func=f() if loss is None else loss, cbs=list(cbs), **{'metrics': [], **kwargs})
def missing(task): return MissingLabels(**tasks[task][-1])
def fit(learn, *cbs, n=2):
    seed(3); learn.fit_one_cycle(n, .05, cbs=list(cbs))
    return state(learn.model)
def clean(learn, *teachers):
    assert left(learn, *teachers)==[]
    assert learn.missing_labels.batch is None and learn.pred is None

# ---- training ----

@every
@pytest.mark.parametrize('bs', [32, 1])
def test_task_loss(task, bs):
    "That of the labelled items, a batch without any among them"
    n,kw = (2,{}) if bs>1 else (1,dict(bn=False))
    a,b = make(task, [missing(task)], bs=bs, **kw),make(task, loss='by hand', bs=bs, **kw)
    assert_close(fit(a, n=n), fit(b, n=n), 1e-5)
    clean(a)
    assert not torch.equal(a.model.fc.weight, net(classes=tasks[task][1], bn='bn' not in kw).fc.weight)

class Written:
    "A Learner's loss function that distils as well while training: `task*by_hand + kd*(Hinton's, over all items)`"
    def __init__(self, teacher, task, kd): self.teacher,self.task,self.kd,self.learn = deepcopy(teacher).eval(),task,kd,None
    def __call__(self, pred, y):
        with torch.no_grad(), torch.autocast('cpu', enabled=False): t = (self.teacher(self.learn.xb[0])/4).softmax(1)
        s = pred.float()/4
        return self.task*by_item(pred, y) + self.kd*16*sum((q*(q.log()-p.log_softmax(0))).sum() for p,q in zip(s, t))/len(pred) if pred.requires_grad else by_item(pred, y)
def written(teacher, task, kd, *cbs):
    f = Written(teacher, task, kd)
    f.learn = make('classes', loss=f)
    return fit(f.learn, *cbs)

@pytest.mark.parametrize('cbs', [lambda: [], lambda: [GradientAccumulation(64)], lambda: [GradientClip(.1)]], ids=['plain','accumulation','clip'])
@pytest.mark.parametrize('loss,kwargs,task,kd', [(SoftTarget, dict(weight=.7), .3, .7), (lambda: .5*TaskLoss()+2*SoftTarget(), {}, .5, 2.)], ids=['share','sum'])
def test_distillation_sees_all(teacher, cbs, loss, kwargs, task, kd):
    learn = make('classes', [KD(teacher, loss(), **kwargs),MissingLabels()])
    assert_close(fit(learn, *cbs()), written(teacher, task, kd, *cbs()), 2e-5)
    clean(learn, teacher)
    assert not torch.allclose(fit(make('classes', [MissingLabels()]), *cbs())['fc.weight'], learn.model.fc.weight, atol=1e-3)

def test_terms_see_the_whole_batch(teacher):
    seen = []
    class Look(DistillLoss):
        def forward(self, pred, teacher_pred, target): seen.append((len(pred),len(teacher_pred),target.clone())); return pred.mean()*0
    fit(make('classes', [KD(teacher, Look()),MissingLabels()]), n=1)
    y = holes(Y[:96])
    assert all(a==b==32 for a,b,_ in seen) and torch.equal(torch.cat([t for *_,t in seen[-3:]]), y)

def test_autocast(teacher):
    def masked(p, y): return F.cross_entropy(p[y>=0], y[y>=0]) if (y>=0).any() else p.float().sum()*0     # in the precision that autocast gives it
    f = lambda loss,y,*cbs: fit(learner(dls=dls(y), loss_func=loss, metrics=[], cbs=[KD(teacher, SoftTarget()),*cbs]), HalfCPU())
    y = holes(Y[:160])
    a,b = f(nn.CrossEntropyLoss(), y, MissingLabels()),f(masked, hidden(y))
    assert_close(a, b, 1e-6)
    assert not torch.equal(a['fc.weight'], fit(make('classes', [KD(teacher, SoftTarget()),MissingLabels()]))['fc.weight'])

def test_nothing_missing(teacher):
    "Changes nothing, to the last bit: weights, columns and random numbers"
    a,b = (learner(dls=get_dls(), cbs=[KD(teacher),*o]) for o in ([],[MissingLabels()]))
    assert_same(fit(a), fit(b))
    assert [r[:3] for r in a.recorder.values]==[r[:3] for r in b.recorder.values] and torch.equal(torch.stack(a.recorder.losses), torch.stack(b.recorder.losses))

def test_no_targets_at_all(teacher):
    def f(*cbs):
        load = lambda o: DataLoader([(x,) for x in o], bs=32, device=torch.device('cpu'), num_workers=0)
        d = DataLoaders(load(X[:96]), load(X[96:160])); d.n_inp = 1
        return fit(learner(dls=d, loss_func=nn.CrossEntropyLoss(), cbs=[KD(teacher, SoftTarget(), weight=1.),*cbs]))
    assert_same(f(), f(MissingLabels()))

def test_no_label_at_all(teacher):
    "Labels that are all missing are data without labels"
    y = torch.full((160,), -100)
    load = lambda o: DataLoader(o, bs=32, device=torch.device('cpu'), num_workers=0)
    bare = DataLoaders(load([(x,) for x in X[:96]]), load([(x,) for x in X[96:160]])); bare.n_inp = 1
    a,b = learner(dls=dls(y), cbs=[KD(teacher, SoftTarget(), weight=1.),MissingLabels()]),learner(dls=bare, cbs=KD(teacher, SoftTarget(), weight=1.))
    assert_same(fit(a), fit(b))
    assert a.recorder.losses==[] and a.recorder.values[-1][1:3]==[None,None]

def test_torch_loaders(teacher):
    y = holes(Y[:160])
    load = lambda a,b: torch.utils.data.DataLoader(list(zip(X[a:b], y[a:b])), batch_size=32)
    a = learner(dls=DataLoaders(load(0, 96), load(96, 160)), cbs=[KD(teacher, SoftTarget()),MissingLabels()])
    assert_same(fit(a), fit(make('classes', [KD(teacher, SoftTarget()),MissingLabels()])))

# ---- what is recorded ----

@every
def test_validation(task):
    "That of a Learner which has the labelled items alone, in batches of another size"
    y,c,f,by_hand,kw = tasks[task]
    m = dict(classes=[accuracy,F1Score(average='macro')], column=[accuracy,F1Score(average='macro')], torchs=[accuracy], numbers=[rmse], bits=[accuracy_multi])[task]
    if task=='numbers': m = [lambda p,t: (p.view(-1)-t.view(-1)).abs().mean()]               # a root of a batch's mean would depend on the batch
    val = list(zip(X[:160], y))
    learn = make(task, [missing(task)], val=val, metrics=m)
    got = list(learn.validate())
    if task!='bits': want = make(task, val=[(x,t) for x,t in val if not (t.isnan() if t.is_floating_point() else t==-100).all()], bs=7, metrics=m).validate()
    else:
        p = learn.model.eval()(X[:160]).detach(); k = ~y.isnan()
        want = [float(by_bit(p, y)),float(((p[k]>0)==(y[k]>0)).float().mean())]
    assert got==pytest.approx(list(want), abs=1e-5) and 0<len(want)

def test_train_columns(teacher):
    "train_loss is fastai's smooth mean over batches with labels, train metrics are over labelled items"
    losses,hits = [],[]
    def look(l):
        if not l.training: return
        y,p = l.yb[0],l.pred.detach(); assert len(p)==len(y)==32
        rows = [i for i in range(32) if y[i]!=-100]
        hits.extend(int(p[i].argmax())==int(y[i]) for i in rows)
        if rows: losses.append(float(by_item(p, y)))
    learn = learner(dls=dls(holes(Y[:160])), cbs=[KD(teacher, SoftTarget()),MissingLabels(),Recorder(train_metrics=True)])
    learn.fit(1, cbs=At('after_pred', look, order=20))
    row = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[0]))
    assert len(learn.recorder.losses)==len(losses)==2 and row['train_accuracy']==pytest.approx(sum(hits)/len(hits), abs=1e-6)
    smooth = (.98*(.02*losses[0])+.02*losses[1])/(1-.98**2)
    assert row['train_loss']==pytest.approx(smooth, abs=1e-5)              # lerp(loss, 0, .98) loses digits

def test_get_preds():
    y,_,_,_,_ = tasks['classes']
    learn = make('classes', [MissingLabels()], val=list(zip(X[:160], y)))
    p,t,l = learn.get_preds(with_loss=True)
    seen = learn.final_record[0]
    assert seen==pytest.approx(learn.validate()[0], abs=1e-6)
    raw = learn.model.eval()(X[:160]).detach()
    torch.testing.assert_close(p, raw.softmax(1)); assert torch.equal(t, y)
    want = torch.tensor([float(r.logsumexp(0)-r[k]) if k!=-100 else nan for r,k in zip(raw, y)])
    torch.testing.assert_close(l, want, equal_nan=True)
    assert l[32:64].isnan().all() and not l.isnan().all() and learn.loss_func.reduction=='mean'
    p,t = learn.get_preds(ds_idx=0)
    assert p.shape==(96,10) and torch.equal(t, y[:96])
    p2,_,l2 = learn.get_preds(with_loss=True, dl=learn.dls.valid.new(list(zip(X[:40], Y[:40]))))     # nothing is missing
    torch.testing.assert_close(l2, F.cross_entropy(raw[:40], Y[:40], reduction='none'))

def test_get_preds_single_labels():
    "The loss of an item is the mean over what is labelled of it"
    y = tasks['bits'][0]
    learn = make('bits', [MissingLabels(entries=True)], val=list(zip(X[:160], y)))
    p,t,l = learn.get_preds(with_loss=True)
    raw = learn.model.eval()(X[:160]).detach()
    torch.testing.assert_close(t, y, equal_nan=True); assert p.shape==(160,3)
    want = [float(by_bit(r[None], k[None])) if (k==k).any() else nan for r,k in zip(raw, y)]
    torch.testing.assert_close(l, torch.tensor(want), equal_nan=True)

def test_lr_find(teacher):
    "The first batch without labels: nothing is recorded yet that it could read"
    y = holes(Y[:160], empty=slice(0, 32))
    learn = learner(dls=dls(y), cbs=[KD(teacher, SoftTarget()),MissingLabels()]); was = state(learn.model)
    learn.lr_find(num_it=6, show_plot=False, suggest_funcs=[])
    assert_same(state(learn.model), was); assert len(learn.recorder.losses)==4
    bar = learner(dls=dls(y), cbs=MissingLabels(), bar=True)
    with bar.no_logging(): bar.fit(1)

# ---- pixels, tokens, points, several outputs and targets ----

class Dense(nn.Module):
    def __init__(self): super().__init__(); seed(); self.conv = nn.Conv2d(1, 3, 3, padding=1)
    def forward(self, x): return self.conv(x)
class Tokens(Dense):
    "The same with the classes last"
    def forward(self, x): return self.conv(x).movedim(1, -1).flatten(1, 2)

def masks():
    y = (X[:160,0]*2.99).long()
    y[(X[:160,0]>.3)&(X[:160,0]<.5)] = -100; y[40:70] = -100
    return y

@pytest.mark.parametrize('model,axis', [(Dense,1),(Tokens,-1)])
def test_dense(model, axis):
    "torch leaves out -100 by itself in training; the columns are over labelled pixels"
    y = masks() if model is Dense else masks().flatten(1)
    def f(*cbs): return learner(model(), dls(y, val=list(zip(X[:160], y))), loss_func=CrossEntropyLossFlat(axis=axis), metrics=lambda p,t: accuracy(p, t, axis=axis), cbs=list(cbs))
    a,b = f(MissingLabels(entries=True)),f()
    assert torch.isfinite(fit(a, n=1)['conv.weight']).all()
    b.model.load_state_dict(a.model.state_dict())
    p = b.model(X[:160]).detach()
    p = p if axis==-1 else p.movedim(1, -1)
    hit,loss,n = 0,0.,0
    for ps,ts in zip(p, y):
        for q,t in zip(ps.reshape(-1, 3), ts.flatten()):
            if t!=-100: hit += int(q.argmax()==t); loss += float(q.logsumexp(0)-q[t]); n += 1
    assert list(a.validate())==pytest.approx([loss/n,hit/n], abs=1e-4)
    assert n<y.numel()*.8 and list(b.validate())!=pytest.approx([loss/n,hit/n], abs=1e-2, nan_ok=True)    # what is wrong without it

def test_dense_training():
    "Without an empty batch, which alone is NaN, training is what torch's own ignore_index makes it"
    y = masks(); y[40:70] = (X[40:70,0]*2.99).long()
    f = lambda *cbs: fit(learner(Dense(), dls(y), loss_func=CrossEntropyLossFlat(axis=1), metrics=[], cbs=list(cbs)), n=1)
    assert_close(f(MissingLabels(entries=True)), f(), 1e-6)

def test_a_metric_of_images_fails_on_pixels():
    learn = learner(Dense(), dls(masks()), loss_func=CrossEntropyLossFlat(axis=1), metrics=foreground_acc, cbs=MissingLabels(entries=True))
    with pytest.raises(IndexError): learn.validate()

def test_points():
    "`(B,2k)` predictions of `(B,k,2)` points, single ones unknown"
    y = torch.stack([X[:160,0].sum(1).argmax(1)/8,X[:160,0].sum(2).argmax(1)/8,torch.linspace(0, 1, 160),torch.zeros(160)], 1).reshape(160, 2, 2)
    y[::3,1] = nan
    def by_hand(p, t):
        k = [(i,j) for i in range(len(t)) for j in range(4) if t[i].flatten()[j]==t[i].flatten()[j]]
        return sum((p[i,j]-t[i].flatten()[j])**2 for i,j in k)/len(k)
    f = lambda loss,*cbs: fit(learner(net(classes=4), dls(y), loss_func=loss, metrics=[], cbs=list(cbs)), n=1)
    assert_close(f(MSELossFlat(), MissingLabels(entries=True)), f(by_hand), 1e-5)

class Two(nn.Module):
    def __init__(self): super().__init__(); self.net = net(); seed(4); self.aux = nn.Linear(64, 10)
    def forward(self, x): return self.net(x),dict(aux=[self.aux(x.flatten(1))])

def test_predictions_in_containers(teacher):
    f = lambda crit: lambda p,y: crit(p[0], y)+.3*crit(p[1]['aux'][0], y)
    y = holes(Y[:160])
    g = lambda loss,y,*cbs: fit(learner(Two(), dls(y), loss_func=loss, metrics=[], cbs=[KD(teacher, SoftTarget(), output=0),*cbs]))
    assert_close(g(f(nn.CrossEntropyLoss()), y, MissingLabels()), g(f(by_item), hidden(y)), 1e-5)

def test_several_targets():
    y,z = holes(Y[:160]),holes(Y[:160].float()/9, nan)
    def data(z):
        load = lambda a,b: DataLoader(list(zip(X[a:b], y[a:b], z[a:b])), bs=32, device=torch.device('cpu'), num_workers=0)
        d = DataLoaders(load(0, 96), load(96, 160)); d.n_inp = 1
        return d
    f = lambda ce,mse: lambda p,y,z: ce(p[:,:9], y.clamp(max=8))+mse(p[:,9:], z)
    g = lambda loss,z,*cbs: fit(learner(dls=data(z), loss_func=loss, metrics=[], cbs=list(cbs)))
    assert_close(g(f(nn.CrossEntropyLoss(), MSELossFlat()), z, MissingLabels()), g(f(by_item, by_number), z), 1e-5)
    z[0] = nan
    with pytest.raises(ValueError, match='item 0 of the batch has labels in some of its 2 targets'): g(f(nn.CrossEntropyLoss(), MSELossFlat()), z, MissingLabels())

def test_uint8():
    "156 is no -100"
    p,(y,),keep = MissingLabels().part(torch.zeros(2, 200), (torch.tensor([156,3], dtype=torch.uint8),))
    assert keep is None and y.tolist()==[156,3]
    assert MissingLabels(missing=255).part(torch.zeros(2, 200), (torch.tensor([255,3], dtype=torch.uint8),))[1][0].tolist()==[3]

# ---- refused ----

def refused(learn, match, *cbs):
    was,f = deepcopy(dict(learn.model.named_parameters())),learn.loss_func
    with pytest.raises(ValueError, match=match): learn.fit(1, cbs=list(cbs))
    assert_same(dict(learn.model.named_parameters()), was); assert learn.loss_func is f

@pytest.mark.parametrize('mix', [MixUp,CutMix])
def test_mixing(mix): refused(make('classes', [MissingLabels()]), f'MissingLabels beside {mix().name}', mix())

def test_refused():
    refused(make('bits', [MissingLabels()]), r'item 0 of the batch has 2 of its 3 labels: MissingLabels\(entries=True\)')
    refused(make('bits', [MissingLabels(entries=True)], metrics=F1ScoreMulti()), 'f1_score is computed for each output by its place')
    refused(make('bits', [MissingLabels(entries=True)], loss=nn.BCEWithLogitsLoss(pos_weight=torch.ones(3))), r'weighs 3 outputs by their place \(pos_weight\)')
    many = tasks['bits'][0].repeat(1, 2)
    refused(learner(net(classes=3), dls(many), loss_func=MSELossFlat(), cbs=MissingLabels(entries=True)), r'labels \(32, 6\), some missing, and a prediction \(32, 3\)')
    class Folded(nn.Module):
        def __init__(self): super().__init__(); self.net = net()
        def forward(self, x): return self.net(x).reshape(-1, 5)
    refused(learner(Folded(), dls(holes(Y[:160])), loss_func=by_item, cbs=MissingLabels()), r'which of the 32 items cannot be told: it is \(64, 5\)')
    for o in ('text', [1]):
        with pytest.raises(TypeError, match=f'this target is a {type(o).__name__}'): MissingLabels().part(torch.zeros(1, 2), (o,))

# ---- the Learner as a thing ----

def test_after_an_exception(teacher):
    "A batch that is left in the middle is forgotten by the next, in which nothing is missing"
    y = holes(Y[:160]); y[:32] = Y[:32]
    def f(*events):
        learn = learner(dls=dls(y), cbs=[KD(teacher, SoftTarget()),MissingLabels()])
        for ev,order in events:
            def stop(l): raise RuntimeError('stop')
            with pytest.raises(RuntimeError, match='stop'): learn.fit(1, .05, cbs=At(ev, stop, order=order, skip=1))
            learn.model.load_state_dict(net().state_dict()); learn.model.zero_grad()          # the stopped fit's, which fastai leaves
        learn.opt = None
        res = fit(learn)
        clean(learn, teacher)
        return res
    want = f()
    for o in (('after_pred', 55),('after_loss', 3),('after_loss', 55),('before_step', 3),('after_batch', 20)): assert_same(f(o), want)

def test_a_fit_that_is_cancelled():
    def stop(l): raise CancelFitException
    learn = make('classes', [MissingLabels()])
    learn.fit(1, cbs=At('after_loss', stop, skip=1))
    clean(learn)

def test_copies(teacher):
    learn = make('classes', [KD(teacher, SoftTarget()),MissingLabels(missing=-100, entries=True)])
    twin = deepcopy(learn)
    assert twin.missing_labels.entries and twin.missing_labels is not learn.missing_labels and repr(twin.missing_labels)=='MissingLabels(-100, entries=True)'
    assert_same(fit(learn), fit(twin))
    assert type(pickle.loads(pickle.dumps(learn.missing_labels))) is Callback

def test_export_does_not_name_the_package(tmp_path):
    learn = Learner(get_dls(), nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), loss_func=CrossEntropyLossFlat(), path=tmp_path, cbs=MissingLabels())
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    learn.export()
    with zipfile.ZipFile(tmp_path/'export.pkl') as z: assert len(z.namelist())>2 and not any(b'fasterdistill' in z.read(n) for n in z.namelist())
    assert_same(state(load_learner(tmp_path/'export.pkl').model), state(learn.model))

# ---- beside the distillation callback, where its opening reads the labels ----

def test_task_loss_of_a_first_batch_without_labels(teacher):
    "Its opening tries TaskLoss on that batch"
    y = holes(Y[:160], empty=slice(0, 32))
    f = lambda loss,y,*cbs: fit(learner(dls=dls(y), loss_func=loss, metrics=[], cbs=[KD(teacher, TaskLoss()+SoftTarget()),*cbs]))
    assert_close(f(nn.CrossEntropyLoss(), y, MissingLabels()), f(by_item, hidden(y)), 1e-5)

@pytest.mark.parametrize('task', ['numbers','bits'])
def test_task_loss_of_missing_numbers(task):
    t = net(8, classes=tasks[task][1], s=1)
    f = lambda loss,*cbs: fit(make(task, [KD(t, TaskLoss()+(lambda pred,teacher_pred: (pred-teacher_pred).pow(2).mean())),*cbs], loss=loss))
    assert_close(f(None, missing(task)), f('by hand'), 1e-5)

class Exit(DistillLoss):
    "The task's criterion on something else, as the exits of self-distillation do"
    def forward(self, pred, target, criterion): return criterion(pred*2, target)

@every
def test_criterion(task):
    f = lambda loss,*cbs: fit(make(task, [KD(None, TaskLoss()+Exit()),*cbs], loss=loss))
    assert_close(f(None, missing(task)), f('by hand'), 1e-5)

def test_it_is_asked_for(teacher):
    for task in ('classes','numbers'):
        t = net(8, classes=tasks[task][1], s=1)
        refused(make(task, [KD(t)], metrics=[accuracy] if task=='classes' else []), 'MissingLabels')
    fit(make('classes', [KD(teacher)], loss=nn.CrossEntropyLoss()))            # -100 is what this one leaves out, and there is no metric to mislead

def test_who_looks_after_them():
    class Own(MissingLabels): "One that does more"
    for cb in (MissingLabels(),Own()): assert labels_of(make('classes', [At('after_fit', len),cb])) is cb
    assert labels_of(make('classes')) is None

@pytest.mark.parametrize('y,criterion,metrics,n', [
    (holes(Y[:32], empty=[]), CrossEntropyLossFlat(), [accuracy], 21),
    (holes(Y[:32], empty=[]), CrossEntropyLossFlat(), [], 0),                  # the loss function leaves them out
    (holes(Y[:32], empty=[]), nn.CrossEntropyLoss(ignore_index=255), [], 21),
    (holes(Y[:32], empty=[]), MSELossFlat(), [rmse], 0),                       # -100 is a number
    (holes(Y[:32]/9., nan, empty=[]), MSELossFlat(), [], 21),
    (specks(Y[:32])[:3], BCEWithLogitsLossFlat(), [], 0)], ids=['metric','left out','another label','numbers','nan','single'])
def test_gaps_refused(y, criterion, metrics, n):
    learn = make('classes', loss=criterion); learn.yb = (y,)
    assert gaps(y, -100).all(1).sum()==n or n==0
    if n:
        with pytest.raises(ValueError, match=f'^{n} of the 32 items of the first batch have no label'): refuse_gaps(learn, metrics)
    else: refuse_gaps(learn, metrics)
    learn.add_cb(MissingLabels()); refuse_gaps(learn, metrics)
