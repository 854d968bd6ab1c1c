"Data without labels: distillation, and nothing else, trains the student"
import pytest
import torch
from common import (KD,At,HalfCPU,X,assert_close,assert_same,cpu,in_float64,learner,left,net,refuses,seed,state,
                    unlabelled)
from fastai.callback.training import GradientAccumulation,GradientClip
from fastai.data.core import Datasets
from fastai.learner import Recorder
from fastai.torch_core import TensorImage
from torch import nn

from fasterdistill.loss import DistillLoss,TaskLoss
from fasterdistill.losses.fitnet import FitNet
from fasterdistill.losses.logits import SoftTarget

class Labels(DistillLoss):
    def forward(self, pred, target): return pred.mean()+0*target.sum()

class MaybeLabels(DistillLoss):
    def forward(self, pred, target=None):
        assert target is None
        return pred.pow(2).mean()

class NoCall(nn.CrossEntropyLoss):
    "Not to be called while training"
    def forward(self, pred, y):
        assert not pred.requires_grad, 'called on a batch without labels'
        return super().forward(pred, y)

def fit(teacher, loss, data, *cbs, n=2, loss_func=None, **kwargs):
    learn = learner(dls=data, loss_func=loss_func or NoCall(), cbs=KD(teacher, loss, **kwargs))
    seed(3)
    learn.fit_one_cycle(n, .05, cbs=list(cbs))
    assert left(learn, teacher)==[]
    return learn

@pytest.mark.parametrize('loss,kwargs', [
    (lambda: SoftTarget(), dict(weight=1.)), (lambda: 0*TaskLoss()+SoftTarget()+FitNet().at('layer3'), {})])
def test_equals_labels_that_do_not_count(teacher, loss, kwargs):
    "The fit with labels and a task loss of weight 0, to the last bit"
    a = fit(teacher, loss(), unlabelled(), **kwargs)
    b = fit(teacher, loss(), unlabelled(labels=True), loss_func=nn.CrossEntropyLoss(), **kwargs)
    assert_same(state(a.model), state(b.model))
    assert [r[1:3] for r in a.recorder.values]==[r[1:3] for r in b.recorder.values]           # validation has labels
    assert a.knowledge_distillation.history==b.knowledge_distillation.history
    assert not torch.equal(net().fc.weight, a.model.fc.weight)

@in_float64
def test_share_and_task_loss(teacher):
    "A share of the distillation is that share; a TaskLoss is 0"
    a = fit(teacher, SoftTarget(), unlabelled(), weight=.25)
    b = fit(teacher, TaskLoss()+.25*SoftTarget(), unlabelled())
    assert_close(state(a.model), state(b.model))
    assert b.knowledge_distillation.parts['task_loss']==0

def test_train_loss_is_what_is_trained(teacher):
    seen = []
    def note(l):
        if l.training: seen.append((float(l.loss),.5*l.knowledge_distillation.parts['soft_target']))
    learn = fit(teacher, .5*SoftTarget(), unlabelled(), At('after_batch', note), weight=1.)
    assert len(seen)==6
    assert all(abs(a-b)<1e-6 for a,b in seen)
    assert len(learn.recorder.losses)==6
    assert seen[-1][0]<seen[0][0]

def test_accumulation_clipping_autocast(teacher):
    def f(data, *cbs):
        loss = SoftTarget()+FitNet().at('layer3')
        return state(fit(teacher, loss, data, *cbs, weight=1., loss_func=nn.CrossEntropyLoss()).model)
    for cb in (lambda: GradientAccumulation(64), lambda: GradientClip(.1), lambda: HalfCPU(lift=False)):
        assert_same(f(unlabelled(), cb()), f(unlabelled(labels=True), cb()))
    assert not torch.equal(f(unlabelled())['fc.weight'], f(unlabelled(), GradientAccumulation(64))['fc.weight'])

def test_validation_without_labels(teacher):
    learn = fit(teacher, SoftTarget(), unlabelled(valid=False))
    assert learn.recorder.values[-1][1:3]==[None,None]                                       # as fastai's own
    assert learn.get_preds()[1] is None or len(learn.get_preds()[1])==0

def test_fastais_datasets(teacher):
    "One pipeline and no target; lr_find too"
    ds = Datasets([TensorImage(x) for x in X[:160]], [[lambda x: x]], splits=[range(96),range(96, 160)])
    data = ds.dataloaders(bs=32, num_workers=0, device=cpu)
    learn = learner(dls=data, loss_func=nn.CrossEntropyLoss(), metrics=[], cbs=KD(teacher))
    was = state(learn.model)
    learn.lr_find(num_it=4, show_plot=False)
    assert_same(state(learn.model), was)
    learn.fit(1)
    assert left(learn, teacher)==[]
    assert not torch.equal(was['fc.weight'], learn.model.fc.weight)

def test_losses_that_read_labels(teacher):
    learn = learner(dls=unlabelled(), loss_func=NoCall())
    refuses(learn, r'Labels\(\) reads the labels, and this batch has none', KD(teacher, TaskLoss()+Labels()),
            teachers=[teacher])
    fit(teacher, TaskLoss()+MaybeLabels(), unlabelled())
    learn = learner(dls=unlabelled(), cbs=[KD(teacher, SoftTarget()),Recorder(train_metrics=True)])
    with pytest.raises(ValueError, match='which has no labels'): learn.fit(1)

def test_a_fit_without_us_takes_no_step():
    "What makes this necessary: fastai's own loop leaves such batches"
    learn = learner(dls=unlabelled())
    was = state(learn.model)
    learn.fit(1)
    assert torch.equal(was['fc.weight'], learn.model.fc.weight)
