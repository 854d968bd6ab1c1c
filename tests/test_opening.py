"What the opening of a fit costs in passes, what a second fit takes over, and what a plan says"
from functools import cached_property
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from common import KD,At,assert_same,get_dls,learner,left,net,state
from fasterdistill.fit.batch import Batch
from fasterdistill.fit.columns import Columns
from fasterdistill.fit.terms import Terms
from fasterdistill.loss import READS,DistillLoss,TaskLoss
from fasterdistill.losses import FCFD,TAS,Attention,FitNet,SoftTarget
from fasterdistill.networks import Net
from fasterdistill.teachers import Frozen

def small(w=4, s=0):
    "Four stages, so that FCFD has three places to cut each network"
    layers = dict(net(w, s=s).named_children())      # seeded, as what comes next is
    layers['fc'] = nn.Linear(8*w, 10)
    block = nn.Sequential(nn.Conv2d(4*w, 8*w, 3, 2, 1), nn.BatchNorm2d(8*w), nn.ReLU(inplace=True))
    names = ['layer1','layer2','layer3','layer4','pool','flat','fc']
    res = nn.Sequential()
    for name in names: res.add_module(name, layers.get(name, block))
    return res

class Stop(Exception): "Ends a fit before its first batch is trained"

def stop(learn): raise Stop('opened')

def opening(learn, teacher):
    "Passes of student and teacher, resumed ones counted, before a fit trains"
    counts = dict(student=0, teacher=0)
    def count(who):
        def hook(module, args): counts[who] += 1
        return hook
    networks = dict(student=learn.model, teacher=teacher)
    handles = [m.register_forward_pre_hook(count(who)) for who,m in networks.items()]
    try:
        with pytest.raises(Stop): learn.fit(1, cbs=At('before_batch', stop))
    finally:
        for h in handles: h.remove()
    return counts['student'],counts['teacher']

def pair(loss, **kwargs):
    "A Learner with the callback, and the teacher"
    teacher = small(6, s=1)
    return learner(small(), get_dls(n=32), cbs=KD(teacher, loss), **kwargs),teacher

costs = dict(
    predictions=(lambda: SoftTarget(), (1,1)),
    with_the_task=(lambda: TaskLoss()+SoftTarget(), (1,1)),
    layers_by_name=(lambda: FitNet().at(['layer2','layer3']), (1,1)),
    stages=(lambda: TaskLoss()+Attention().at('stages[:2]')+FitNet(), (2,2)),
    tas=(lambda: TaskLoss()+TAS(), (2,5)),
    fcfd=(lambda: TaskLoss()+FCFD(), (7,7)),
)

@pytest.mark.parametrize('name', costs)
def test_passes(name):
    make,cost = costs[name]
    learn,teacher = pair(make())
    assert opening(learn, teacher)==cost
    assert left(learn, teacher)==[]

# of a second fit: one pass for the example, and the paths that the loss itself takes
# (FCFD draws one of each kind, TAS has one)
seconds = dict(predictions=(1,1), layers_by_name=(1,1), stages=(1,1), tas=(1,2), fcfd=(2,2))

@pytest.mark.parametrize('name', seconds)
def test_passes_of_a_second_fit(name):
    learn,teacher = pair(costs[name][0]())
    learn.fit(1)
    assert opening(learn, teacher)==seconds[name]

def prune(learn, teacher):
    "Half the channels of a layer, where they are"
    conv,bn,after = learn.model.layer3[0],learn.model.layer3[1],learn.model.layer4[0]
    for o in (conv,bn): o.weight,o.bias = nn.Parameter(o.weight[:8].detach()),nn.Parameter(o.bias[:8].detach())
    bn.running_mean,bn.running_var,bn.num_features = bn.running_mean[:8],bn.running_var[:8],8
    after.weight = nn.Parameter(after.weight[:,:8].detach())
    learn.create_opt()

def replace(learn, teacher):
    learn.model.layer2 = nn.Sequential(*learn.model.layer2)
    learn.create_opt()

def freeze(learn, teacher): learn.model.layer1.requires_grad_(False)

def resize(learn, teacher):
    def twice(l): l.xb = nn.functional.interpolate(l.xb[0], scale_factor=2),
    learn.add_cb(At('before_batch', twice, order=0))

@pytest.mark.parametrize('change,again', [(prune,(2,1)), (replace,(2,1)), (freeze,(2,1)), (resize,(2,2))])
def test_what_has_changed_is_looked_at_again(change, again):
    "Attention has no learned parts, which other widths would not fit"
    learn,teacher = pair(TaskLoss()+20*Attention().at('stages[:2]'))
    learn.fit(1)
    change(learn, teacher)
    assert opening(learn, teacher)==again
    learn.fit(1)
    assert left(learn, teacher)==[]

def test_a_second_fit_is_the_same():
    "To the last bit: with what the first one found out, and without"
    def run(forget):
        learn,teacher = pair(TaskLoss()+FCFD()+FitNet())
        learn.fit(1)
        if forget: learn.knowledge_distillation.findings.clear()
        learn.fit(1)
        return state(learn.model)
    a,b = run(False),run(True)
    assert all(torch.equal(a[k], b[k]) for k in a)

@pytest.mark.parametrize('loss', [SoftTarget(), TaskLoss()+FCFD(teacher_bn='batch'), TaskLoss()+TAS()], ids=repr)
def test_inputs_of_the_teacher_are_made_once_a_batch(loss):
    made = []
    class Counted(Frozen):
        def inp(self, *xb):
            made.append(1)
            return super().inp(*xb)
    learn = learner(small(), get_dls(n=96), cbs=KD(Counted(small(6, s=1), mean=[.5], std=[.25]), loss))
    learn.fit(2)
    assert len(made)==2*3+1                          # two epochs of three batches, and the opening

def test_every_readable_name_is_a_property_of_the_batch():
    assert {k for k,v in vars(Batch).items() if isinstance(v, cached_property)}==set(READS)

# ---- cuts ----

class Outside(nn.Module):
    "Keeps a skip outside its modules, from before the second block to behind it"
    kept = {}
    def __init__(self):
        super().__init__()
        self.a,self.b,self.c = (nn.Sequential(nn.Conv2d(i, 8, 3, 1, 1), nn.ReLU()) for i in (1,8,8))
        self.fc = nn.Linear(8, 10)
    def forward(self, x):
        self.kept['a'] = self.a(x)
        self.kept['b'] = self.b(self.kept['a'])
        return self.fc((self.c(self.kept['b'])+self.kept['a']).mean((2,3)))

@pytest.mark.parametrize('order', [['a','b','c'],['c','b','a']])
def test_state_outside_modules_fakes_no_cut(order):
    "Whatever order the places are asked for in: behind `b` the skip still comes from before it"
    torch.manual_seed(0)
    model = Outside().eval()
    together,alone = (Net(model, torch.randn(4,1,8,8)) for _ in range(2))
    together.why_not(order)
    want = dict(a=True, b=False, c=False)
    assert {k: together.can_resume(k) for k in order}=={k: want[k] for k in order}
    assert {k: alone.can_resume(k) for k in order}=={k: want[k] for k in order}

def test_what_is_known_holds_no_activation():
    "Findings outlive the fit; what networks returned does not"
    learn,teacher = pair(TaskLoss()+FCFD())
    learn.fit(1)
    kd = learn.knowledge_distillation
    assert set(kd.findings)=={'student','teacher'}
    for found in kd.findings.values():
        places = [tried for known in found.sizes.values() for tried in known.values()]
        assert len(places)==3
        for rec in (found.rec,*(tried.cut.rec for tried in places)):
            assert (rec.raw,rec.result,rec.kept,rec.prints)==(None,None,{},[])

# ---- what a plan says ----

def test_plan_says_the_share():
    def half(pos): return 1-pos/2
    learn = learner(small(), cbs=KD(small(6, s=1), SoftTarget(), weight=.8, schedule=half))
    kd = learn.knowledge_distillation
    assert "lerp(the Learner's loss, SoftTarget(), 0.8*half)" in repr(kd.plan())
    assert repr(kd)=='KnowledgeDistillationCallback(Frozen(Sequential), SoftTarget(), weight=0.8, schedule=half)'
    assert repr(KD(small(), SoftTarget()))=='KnowledgeDistillationCallback(Frozen(Sequential), SoftTarget())'

def test_plan_asks_the_learners_loss_function():
    "In the `weight=` form no term reads it, and a fit would die in it all the same"
    def broken(pred, *yb): raise ZeroDivisionError('of the loss function')
    learn = learner(small(), loss_func=broken, cbs=KD(small(6, s=1), SoftTarget()))
    with pytest.raises(ZeroDivisionError, match='of the loss function'): learn.knowledge_distillation.plan()
    fine = learner(small(), cbs=KD(small(6, s=1), SoftTarget()))
    assert fine.knowledge_distillation.plan().task>0

def test_plan_writes_functions_by_name():
    "A weight that is a function, in the table as in the expression"
    def late(epoch): return float(epoch>0)
    learn = learner(small(), cbs=KD(small(6, s=1), TaskLoss()+late*SoftTarget()))
    plan = learn.knowledge_distillation.plan()
    assert plan.rows[1].weight=='late'
    assert ' at 0x' not in repr(plan)

def test_columns_keep_float64():
    "A third, which float32 does not hold"
    columns = Columns(SimpleNamespace(kind=None), Terms(TaskLoss()))
    columns.note('task_loss', torch.tensor(1/3, dtype=torch.float64))
    columns.end_epoch()
    assert columns.last('task_loss')==1/3

def test_a_place_is_tried_again_where_something_else_is_read():
    "What is known of it says which of the layers read come behind it"
    model,x,known = small().eval(),torch.randn(4, 1, 8, 8),{}
    first = Net(model, x, ['layer1','layer2'], sizes=known)
    assert list(first.resume('layer1', model.layer1(x)).fm)==['layer2']
    second = Net(model, x, ['layer1','layer3'], sizes=known)
    assert list(second.resume('layer1', model.layer1(x)).fm)==['layer3']


# ---- passes that move averages ----

class Again(DistillLoss):
    "Runs both networks once more, and lets that move their averages"
    def forward(self, pred, student, teacher, xb):
        seen,said = student(*xb, bn='update').pred,teacher(*xb, bn='update').pred
        return (pred-seen).pow(2).mean()+(pred-said.detach()).pow(2).mean()

def norms(model): return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]

def test_averages_move_in_training_alone():
    "`plan` and the trial put them back; a step moves the student's twice, its own pass and the loss's"
    teacher,seen = net(6, s=1),[]
    learn = learner(net(), get_dls(n=96, bs=32), cbs=KD(teacher, TaskLoss()+Again()), metrics=[])
    def counts(*_): return [int(m.num_batches_tracked) for o in (learn.model,teacher) for m in norms(o)]
    before = state(learn.model),state(teacher)
    learn.knowledge_distillation.plan()
    for was,m in zip(before, (learn.model,teacher), strict=True): assert_same(state(m), was)
    opened = []
    def note(learn):
        if not seen: opened.append((state(learn.model),state(teacher)))
        seen.append(counts())
    learn.fit(2, cbs=At('before_batch', note))
    for was,now in zip(before, opened[0], strict=True): assert_same(now, was)      # behind the trial
    trained = [c for i,c in enumerate(seen) if i%5<3]           # of five batches of an epoch, two validate
    assert [c[:3] for c in trained]==[[n]*3 for n in (0,2,4,6,8,10)]
    assert [c[3:] for c in trained]==[[n]*3 for n in (0,1,2,3,4,5)]
