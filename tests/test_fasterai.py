"""Beside fasterai: its callbacks that sparsify and prune the student while it learns from a teacher, and its own losses
in our callback. The other opinion is the same fit without us, the distillation written into the Learner's loss
function, and fasterai's own callback for the same. Skipped where fasterai is not installed: we do not require it."""
import copy

import pytest
import torch
from common import KD,At,X,assert_close,assert_same,get_dls,in_float64,kl,learner,left,net,real,seed,state
from fastai.losses import CrossEntropyLossFlat
from torch import nn

from fasterdistill.loss import TaskLoss
from fasterdistill.losses.attention import Attention
from fasterdistill.losses.fcfd import FCFD
from fasterdistill.losses.fitnet import FitNet

pytest.importorskip('fasterai', reason='needs fasterai: pip install fasterai')
from fasterai.core.all import Schedule,agp,large_final,one_shot  # noqa: E402
from fasterai.distill import all as theirs  # noqa: E402
from fasterai.prune.all import PruneCallback  # noqa: E402
from fasterai.sparse.all import SparsifyCallback  # noqa: E402

pytest.importorskip('fasterai', reason='needs fasterai: pip install fasterai')

def plain(o): return o.as_subclass(torch.Tensor)

class Written:
    "A Learner's loss function that distils, half and half, while training"
    def __init__(self, teacher):
        self.base,self.teacher,self.learn = CrossEntropyLossFlat(),copy.deepcopy(teacher).eval(),None
    def __call__(self, pred, y):
        task = self.base(pred, y)
        if not self.learn.training: return task
        with torch.no_grad(): t = self.teacher(self.learn.xb[0])
        return .5*task+.5*kl(plain(pred), plain(t))

def fit(cbs, loss_func=None, n=2, w=8, **kwargs):
    "A fit with callbacks made for its model"
    learn = learner(net(w), dls=get_dls(shuffle=False), loss_func=loss_func, **kwargs)
    if isinstance(loss_func, Written): loss_func.learn = learn
    def start(l):                                              # after what others draw before they start
        if l.epoch==0: seed(3)
    learn.fit(n, cbs=[At('before_train', start, order=-9),*cbs(learn)])
    return learn

def sparsify(): return SparsifyCallback(.5, 'weight', 'local', large_final, agp)
def prune(learn, schedule=one_shot, keep=()):
    ignored = [learn.model.fc,*(learn.model.get_submodule(k) for k in keep)]
    return PruneCallback(.5, schedule, 'local', large_final, ignored_layers=ignored, example_inputs=real(X[:1]))
def never(): return Schedule(lambda start,end,pos: 0.)
def convs(m): return [o for o in m.modules() if isinstance(o, nn.Conv2d)]
def zeros(m): return [int((o.weight==0).sum()) for o in convs(m)]
def widths(m): return [o.out_channels for o in convs(m)]

class Starts:
    "The learned parts of a loss before the first step"
    def __init__(self, kd): self.kd,self.state = kd,None
    def __call__(self, learn):
        if self.state is None: self.state = state(self.kd.loss)
    def differ(self): return all(not torch.equal(p, self.state[n]) for n,p in self.kd.loss.named_parameters())

# ---- sparse ----

@pytest.mark.parametrize('loss', [lambda: None, lambda: TaskLoss()+FitNet(), lambda: TaskLoss()+FCFD()],
                         ids=['default','FitNet','FCFD'])
def test_sparsity(teacher, loss):
    "As many zeros in the student as without us, and none in what learns beside it"
    kd = KD(teacher, loss())
    starts = Starts(kd)
    learn = fit(lambda l: [kd,sparsify(),At('after_pred', starts)])
    alone = zeros(fit(lambda l: [sparsify()]).model)
    assert zeros(learn.model)==alone
    assert min(alone)>0
    assert left(learn, teacher)==[]
    assert all((p!=0).all() for p in kd.loss.parameters() if p.ndim>1)
    assert starts.differ()

@in_float64
def test_sparse_and_distilled(teacher):
    a,b = fit(lambda l: [KD(teacher),sparsify()]),fit(lambda l: [sparsify()], Written(teacher))
    assert_close(state(a.model), state(b.model))
    assert zeros(a.model)==zeros(b.model)

# ---- pruned ----

@in_float64
def test_pruned_and_distilled(teacher):
    "A student that becomes narrower in mid-fit"
    a,b = fit(lambda l: [KD(teacher),prune(l, agp)]),fit(lambda l: [prune(l, agp)], Written(teacher))
    assert widths(a.model)==widths(b.model)==[4,8,16]
    assert left(a, teacher)==[]
    assert_close(state(a.model), state(b.model))

def test_pruned_with_a_loss_that_learns_nothing(teacher):
    "Attention has no channels"
    learn = fit(lambda l: [KD(teacher, TaskLoss()+10*Attention()),prune(l)])
    assert widths(learn.model)==[4,8,16]
    assert left(learn, teacher)==[]
    learn.fit(1, cbs=KD(teacher, TaskLoss()+FitNet()))         # and a fit of the narrow student
    assert left(learn, teacher)==[]

def test_parts_learn_beside_pruning(teacher):
    "PruneCallback makes the optimizer's lists anew before every step: one that prunes nothing changes nothing"
    def run(cbs):
        kd = KD(teacher, TaskLoss()+FitNet())
        learn = fit(lambda l: [kd,*cbs(l)])
        assert left(learn, teacher)==[]
        return state(learn.model),state(kd.loss)
    for a,b in zip(run(lambda l: [prune(l, never())]), run(lambda l: [])): assert_same(a, b)

def test_parts_learn_where_the_layer_keeps_its_width(teacher):
    kd = KD(teacher, TaskLoss()+FitNet())
    starts = Starts(kd)
    learn = fit(lambda l: [kd,prune(l, keep=['layer3.0']),At('after_pred', starts)])
    assert widths(learn.model)==[4,8,32]
    assert left(learn, teacher)==[]
    assert starts.differ()

@pytest.mark.parametrize('loss,where', [(FitNet,'layer3'), (FCFD,'layer1')])
def test_a_layer_narrower_than_its_adapter(teacher, loss, where):
    "Parts that were built for the old width cannot go on, and say so"
    kd,learns = KD(teacher, TaskLoss()+loss()),[]
    says = rf"{loss.__name__}\(\): '{where}' of the student had \d+ channels when the fit began and has \d+ now"
    def cbs(learn):
        learns.append(learn)
        return [kd,prune(learn)]
    with pytest.raises(ValueError, match=says): fit(cbs)
    assert left(learns[0], teacher)==[]

# ---- the same names ----

@in_float64
@pytest.mark.parametrize('name,layers', [('SoftTarget',None), ('Attention',['layer2','layer3'])])
def test_their_losses_and_their_callback(teacher, name, layers):
    "A function of fasterai's does the same in our callback and in theirs of that name, whose import changes nothing"
    assert theirs.KnowledgeDistillationCallback is not KD
    loss = getattr(theirs, name)
    def run(cb):
        learn = fit(lambda l: [cb(teacher, loss, layers, layers, weight=.7)], w=4)
        teacher.train()
        return state(learn.model)
    mine,own = run(KD),run(theirs.KnowledgeDistillationCallback)
    assert_close(mine, own)
    assert not torch.equal(mine['fc.weight'], fit(lambda l: [], w=4).model.fc.weight)
