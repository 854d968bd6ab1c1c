"Data without labels: distillation, and nothing else, trains the student"
import pytest
import torch
from common import KD,At,X,Y,assert_close,assert_same,left,learner,net,seed,state
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation,GradientClip
from fastai.data.core import DataLoaders,Datasets
from fastai.data.load import DataLoader
from fastai.learner import Recorder
from fastai.torch_core import TensorImage
from torch import nn

from fasterdistill.loss import DistillLoss,TaskLoss
from fasterdistill.losses.fitnet import FitNet
from fasterdistill.losses.logits import SoftTarget

torch.set_num_threads(1)

@pytest.fixture
def teacher(): return net(8, s=1)

class Labels(DistillLoss):
    def forward(self, pred, target): return pred.mean()+0*target.sum()
class MaybeLabels(DistillLoss):
    def forward(self, pred, target=None): assert target is None; return pred.pow(2).mean()

def dls(labels=False, valid=True, bs=32):
    load = lambda items: DataLoader(items, bs=bs, device=torch.device('cpu'), num_workers=0)
    res = DataLoaders(load([(x,y) if labels else (x,) for x,y in zip(X[:96], Y[:96])]), load([(x,y) if valid else (x,) for x,y in zip(X[96:160], Y[96:160])]))
    res.n_inp = 1
    return res

class NoCall(nn.CrossEntropyLoss):
    "Not to be called while training"
    def forward(self, pred, y): assert not pred.requires_grad, 'called on a batch without labels'; return super().forward(pred, y)

def fit(teacher, loss, data, cbs=(), n=2, loss_func=None, **kwargs):
    learn = learner(dls=data, loss_func=loss_func or NoCall(), cbs=KD(teacher, loss, **kwargs)); seed(3)
    learn.fit_one_cycle(n, .05, cbs=list(cbs))
    assert left(learn, teacher)==[]
    return learn

@pytest.mark.parametrize('loss,kwargs', [(lambda: SoftTarget(), dict(weight=1.)), (lambda: 0*TaskLoss()+SoftTarget()+FitNet().at('layer3'), {})])
def test_equals_labels_that_do_not_count(teacher, loss, kwargs):
    "The fit with labels and a task loss of weight 0, to the last bit"
    a,b = fit(teacher, loss(), dls(), **kwargs),fit(teacher, loss(), dls(labels=True), loss_func=nn.CrossEntropyLoss(), **kwargs)
    assert_same(state(a.model), state(b.model))
    assert [r[1:3] for r in a.recorder.values]==[r[1:3] for r in b.recorder.values]           # validation has labels
    kd = a.knowledge_distillation
    assert kd.history==b.knowledge_distillation.history and not torch.equal(net().fc.weight, a.model.fc.weight)

def test_share_and_task_loss(teacher):
    "A share of the distillation is that share; a TaskLoss is 0"
    a,b = fit(teacher, SoftTarget(), dls(), weight=.25),fit(teacher, TaskLoss()+.25*SoftTarget(), dls())
    assert_close(state(a.model), state(b.model))
    assert b.knowledge_distillation.parts['task_loss']==0

def test_train_loss_is_what_is_trained(teacher):
    seen = []
    learn = fit(teacher, .5*SoftTarget(), dls(), [At('after_batch', lambda l: seen.append((float(l.loss), .5*l.knowledge_distillation.parts['soft_target'])) if l.training else None)], weight=1.)
    assert len(seen)==6 and all(abs(a-b)<1e-6 for a,b in seen) and len(learn.recorder.losses)==6 and seen[-1][0]<seen[0][0]

class HalfCPU(Callback):
    "What MixedPrecision does, on a CPU"
    order = 10
    def before_batch(self): self.a = torch.autocast('cpu', dtype=torch.bfloat16); self.a.__enter__()
    def after_loss(self): self.a.__exit__(None, None, None)

def test_accumulation_clipping_autocast(teacher):
    f = lambda data,*cbs: state(fit(teacher, SoftTarget()+FitNet().at('layer3'), data, cbs, weight=1., loss_func=nn.CrossEntropyLoss()).model)
    for cbs in (lambda: [GradientAccumulation(64)],lambda: [GradientClip(.1)],lambda: [HalfCPU()]): assert_same(f(dls(), *cbs()), f(dls(labels=True), *cbs()))
    assert not torch.equal(f(dls())['fc.weight'], f(dls(), GradientAccumulation(64))['fc.weight'])

def test_validation_without_labels(teacher):
    learn = fit(teacher, SoftTarget(), dls(valid=False))
    assert learn.recorder.values[-1][1:3]==[None,None]                                       # as fastai's own
    assert learn.get_preds()[1] is None or len(learn.get_preds()[1])==0

def test_fastais_datasets(teacher):
    "One pipeline and no target; lr_find too"
    ds = Datasets([TensorImage(x) for x in X[:160]], [[lambda x: x]], splits=[range(96),range(96,160)])
    learn = learner(dls=ds.dataloaders(bs=32, num_workers=0, device=torch.device('cpu')), loss_func=nn.CrossEntropyLoss(), metrics=[], cbs=KD(teacher))
    was = state(learn.model)
    learn.lr_find(num_it=4, show_plot=False)
    assert_same(state(learn.model), was)
    learn.fit(1); assert left(learn, teacher)==[]
    assert not torch.equal(was['fc.weight'], learn.model.fc.weight)

def test_losses_that_read_labels(teacher):
    def refused(loss, match):
        learn = learner(dls=dls(), loss_func=NoCall(), cbs=KD(teacher, loss)); was = state(learn.model)
        with pytest.raises(ValueError, match=match): learn.fit(1)
        assert_same(state(learn.model), was); assert left(learn, teacher)==[]
    refused(TaskLoss()+Labels(), r'Labels\(\) reads the labels, and this batch has none')
    fit(teacher, TaskLoss()+MaybeLabels(), dls())
    learn = learner(dls=dls(), cbs=[KD(teacher, SoftTarget()),Recorder(train_metrics=True)], default_cbs=True)
    with pytest.raises(ValueError, match='which has no labels'): learn.fit(1)

def test_a_fit_without_us_takes_no_step():
    "What makes this necessary: fastai's own loop leaves such batches"
    learn = learner(dls=dls()); was = state(learn.model)
    learn.fit(1)
    assert torch.equal(was['fc.weight'], learn.model.fc.weight)
