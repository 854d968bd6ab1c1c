"""Beside fasterai: its callbacks that sparsify and prune the student while it learns from a teacher, and its own losses in our callback.
The other opinion is the same fit without us, the distillation written into the Learner's loss function, and fasterai's own callback for the same. Skipped where fasterai is not installed (it is no requirement of ours)."""
import copy

import pytest
import torch
from common import KD,At,X,assert_same,get_dls,learner,left,net,seed,state
from fastai.losses import CrossEntropyLossFlat
from torch import nn

from fasterdistill.loss import TaskLoss
from fasterdistill.losses.attention import Attention
from fasterdistill.losses.fcfd import FCFD
from fasterdistill.losses.fitnet import FitNet

pytest.importorskip('fasterai', reason='needs fasterai: pip install fasterai')
from fasterai.core.all import Schedule,agp,large_final,one_shot # noqa: E402
from fasterai.distill import all as theirs # noqa: E402
from fasterai.prune.all import PruneCallback # noqa: E402
from fasterai.sparse.all import SparsifyCallback # noqa: E402

torch.set_num_threads(1)

def kl(s, t, T=4.): return T*T*(t.div(T).softmax(1)*(t.div(T).log_softmax(1)-s.div(T).log_softmax(1))).sum(1).mean()

class Written:
    "A Learner's loss function that distils, half and half, while training"
    def __init__(self, teacher): self.base,self.teacher,self.learn = CrossEntropyLossFlat(),copy.deepcopy(teacher).eval(),None
    def __call__(self, pred, y):
        task = self.base(pred, y)
        if not self.learn.training: return task
        with torch.no_grad(): t = self.teacher(self.learn.xb[0])
        return .5*task+.5*kl(*(o.as_subclass(torch.Tensor) for o in (pred,t)))

def fit(cbs, loss_func=None, n=2, w=8, **kwargs):
    "A fit with callbacks made for its model"
    learn = learner(net(w), dls=get_dls(shuffle=False), loss_func=loss_func, **kwargs)
    if isinstance(loss_func, Written): loss_func.learn = learn
    learn.fit(n, cbs=[At('before_train', lambda l: l.epoch==0 and seed(3), order=-9),*cbs(learn)])      # after what others draw before they start
    return learn

def sparsify(): return SparsifyCallback(.5, 'weight', 'local', large_final, agp)
def prune(learn, schedule=one_shot, keep=()): return PruneCallback(.5, schedule, 'local', large_final, ignored_layers=[learn.model.fc,*(learn.model.get_submodule(k) for k in keep)], example_inputs=X[:1])
never = lambda: Schedule(lambda start,end,pos: 0.)
def convs(m): return [o for o in m.modules() if isinstance(o, nn.Conv2d)]
def zeros(m): return [int((o.weight==0).sum()) for o in convs(m)]
def widths(m): return [o.out_channels for o in convs(m)]


@pytest.fixture
def teacher(): return net(8, s=1)

def close(a, b):
    for k in a: torch.testing.assert_close(a[k], b[k], rtol=0, atol=1e-5)

# ---- sparse ----

@pytest.mark.parametrize('loss', [lambda: None,lambda: TaskLoss()+FitNet(),lambda: TaskLoss()+FCFD()], ids=['default','FitNet','FCFD'])
def test_sparsity(teacher, loss):
    "As many zeros in the student as without us, and none in what learns beside it"
    kd,start = KD(teacher, loss()),[]
    learn = fit(lambda l: [kd,sparsify(),At('after_pred', lambda l: start or start.append(state(kd.loss)))])
    alone = zeros(fit(lambda l: [sparsify()]).model)
    assert zeros(learn.model)==alone and min(alone)>0 and left(learn, teacher)==[]
    ps = dict(kd.loss.named_parameters())
    assert all((p!=0).all() for n,p in ps.items() if p.ndim>1)
    assert all(not torch.equal(p, start[0][n]) for n,p in ps.items())

def test_sparse_and_distilled(teacher):
    a,b = fit(lambda l: [KD(teacher),sparsify()]),fit(lambda l: [sparsify()], Written(teacher))
    close(state(a.model), state(b.model)); assert zeros(a.model)==zeros(b.model)

# ---- pruned ----

def test_pruned_and_distilled(teacher):
    "A student that becomes narrower in mid-fit"
    a,b = fit(lambda l: [KD(teacher),prune(l, agp)]),fit(lambda l: [prune(l, agp)], Written(teacher))
    assert widths(a.model)==widths(b.model)==[4,8,16] and left(a, teacher)==[]
    close(state(a.model), state(b.model))

def test_pruned_with_a_loss_that_learns_nothing(teacher):
    "Attention has no channels"
    learn = fit(lambda l: [KD(teacher, TaskLoss()+10*Attention()),prune(l)])
    assert widths(learn.model)==[4,8,16] and left(learn, teacher)==[]
    learn.fit(1, cbs=KD(teacher, TaskLoss()+FitNet())); assert left(learn, teacher)==[]        # and a fit of the narrow student

def test_parts_learn_beside_pruning(teacher):
    "PruneCallback makes the optimizer's lists anew before every step: one that prunes nothing changes nothing"
    res = []
    for cbs in (lambda l: [prune(l, never())],lambda l: []):
        kd = KD(teacher, TaskLoss()+FitNet())
        learn = fit(lambda l: [kd,*cbs(l)])
        res.append((state(learn.model),state(kd.loss))); assert left(learn, teacher)==[]
    for a,b in zip(*res): assert_same(a, b)

def test_parts_learn_where_the_layer_keeps_its_width(teacher):
    kd,start = KD(teacher, TaskLoss()+FitNet()),[]
    learn = fit(lambda l: [kd,prune(l, keep=['layer3.0']),At('after_pred', lambda l: start or start.append(state(kd.loss)))])
    assert widths(learn.model)==[4,8,32] and left(learn, teacher)==[]
    assert all(not torch.equal(p, start[0][n]) for n,p in kd.loss.named_parameters())

@pytest.mark.parametrize('loss,where', [(FitNet,'layer3'),(FCFD,'layer1')])
def test_a_layer_narrower_than_its_adapter(teacher, loss, where):
    "Parts that were built for the old width cannot go on, and say so"
    kd,learns = KD(teacher, TaskLoss()+loss()),[]
    with pytest.raises(ValueError, match=rf"{loss.__name__}\(\): '{where}' of the student had \d+ channels when the fit began and has \d+ now"):
        fit(lambda l: learns.append(l) or [kd,prune(l)])
    assert left(learns[0], teacher)==[]

# ---- the same names ----

@pytest.mark.parametrize('name,layers', [('SoftTarget',None),('Attention',['layer2','layer3'])])
def test_their_losses_and_their_callback(teacher, name, layers):
    "A function of fasterai's does in our callback what it does in theirs of the same name, and importing theirs changes nothing of ours"
    assert theirs.KnowledgeDistillationCallback is not KD
    loss,res = getattr(theirs, name),[]
    for cb in (KD,theirs.KnowledgeDistillationCallback):
        learn = fit(lambda l: [cb(teacher, loss, layers, layers, weight=.7)], w=4)
        res.append(state(learn.model)); teacher.train()
    close(*res)
    assert not torch.equal(res[0]['fc.weight'], fit(lambda l: [], w=4).model.fc.weight)
