"""Maps before their activation, where losses ask for those of every stage: on torchvision's and timm's ResNets, whose
sums of two branches go into a ReLU that works in place and may be shared, in a fit."""
import pytest
import timm
import torch
from common import KD,learner,left,seed,tuples
from torchvision.models import resnet18

from fasterdistill.loss import DistillLoss,TaskLoss
from fasterdistill.losses import AB,OFD,ReviewKD
from fasterdistill.losses.ofd import bn_margin,norm_before
from fasterdistill.networks.net import Net

networks = dict(
    torchvision=lambda: resnet18(num_classes=10),
    timm=lambda: timm.create_model('resnet18', num_classes=10, zero_init_last=False))
each = pytest.mark.parametrize('make', networks.values(), ids=networks)

def made(make, s=0):
    seed(s)
    return make()

def pictures():
    "Two batches of eight, of noise"
    seed()
    return tuples(torch.randn(16, 3, 32, 32), torch.arange(16)%10, n=16, valid=0, bs=8)

class Both(DistillLoss):
    "Notes what it reads, before and behind the activations"
    layers = ['stages:pre','stages']
    def __init__(self): self.seen = []
    def forward(self, fm_s, fm_t):
        self.seen.append([[*fm_s.values()],[*fm_t.values()]])
        return sum(z.mean() for z in fm_s.values())*0

@each
def test_before_and_behind(make):
    "What is read before a stage's last activation becomes what the stage returns, and nothing wrote into it"
    loss = Both()
    learn = learner(made(make), pictures(), cbs=KD(made(make, 1), TaskLoss()+loss))
    learn.fit(1)
    assert len(loss.seen)==3                                   # the trial and two steps
    for maps in [o for seen in loss.seen for o in seen]:
        before,behind = maps[:4],maps[4:]
        for a,b in zip(before, behind, strict=True):
            assert a.min()<0
            assert torch.equal(a.relu(), b)

@each
def test_the_norm_before(make):
    "The block's own last one, also where the block has a shortcut with another"
    m = made(make)
    net = Net(m, torch.randn(2, 3, 32, 32))
    for i,width in enumerate((64,128,256,512), 1):
        stage = m.get_submodule(f'layer{i}')
        for k in (0,1): assert norm_before(net, f'layer{i}.{k}:pre', width) is stage[k].bn2

@each
@pytest.mark.parametrize('cls', [AB,OFD,ReviewKD])
def test_fit(cls, make):
    student,teacher = made(make),made(make, 1)
    loss = cls()
    cb = KD(teacher, TaskLoss()+.001*loss)
    learn = learner(student, pictures(), cbs=cb)
    learn.fit(1)
    assert not left(learn, teacher)
    assert all(torch.tensor(v).isfinite() for v in cb.parts.values())
    if cls is not OFD: return
    for i in range(4):
        bn = teacher.get_submodule(f'layer{i+1}')[1].bn2
        assert torch.equal(getattr(loss, f'margin{i}').flatten(), bn_margin(bn.weight, bn.bias))
