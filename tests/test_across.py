"""Networks of different kinds teach one another, unmodified from timm: three steps of each method on one batch, for
every pair of a teacher and a student. A quarter of the pairs, every network among them, runs in `make test`."""
import copy
from functools import partial

import pytest
import torch
from common import At,KD,StepLosses,asked,left,learner,seed,state,tuples
from fastai.optimizer import SGD
from torch import nn

from fasterdistill.loss import TaskLoss
from fasterdistill.losses.answers import HardTarget
from fasterdistill.losses.attention import Attention
from fasterdistill.losses.cc import CC
from fasterdistill.losses.crd import CRD
from fasterdistill.losses.embedding import SRD,Cosine
from fasterdistill.losses.fcfd import FCFD
from fasterdistill.losses.fitnet import FitNet
from fasterdistill.losses.infonce import InfoNCE
from fasterdistill.losses.nst import NST
from fasterdistill.losses.ofa import OFA
from fasterdistill.losses.pkt import PKT
from fasterdistill.losses.rkd import RKD
from fasterdistill.losses.sp import SP
from fasterdistill.losses.sskd import SSKD
from fasterdistill.losses.tas import TAS
from fasterdistill.losses.vid import VID

timm = pytest.importorskip('timm')
from timm.models.mlp_mixer import Affine,MlpMixer,ResBlock  # noqa: E402

px,n_classes,n = 64,5,20

def timms(name, **kwargs): return partial(timm.create_model, name, **kwargs)

tokens = dict(img_size=px, patch_size=8, embed_dim=32)
swin = timms('swin_tiny_patch4_window7_224', img_size=px, window_size=4, embed_dim=16, depths=(1,1,2,1),
             num_heads=(1,2,2,4), drop_path_rate=0.)                                      # one batch, one loss
convolutional = dict(ResNet=timms('resnet10t'), MobileNet=timms('mobilenetv2_035'))
teachers = dict(
    convolutional, ConvNeXt=timms('convnext_atto'),
    ViT=timms('vit_tiny_patch16_224', depth=4, num_heads=2, **tokens),
    Swin=swin,
    Mixer=partial(MlpMixer, num_blocks=4, **tokens))
students = dict(
    convolutional,
    DeiT=timms('deit_tiny_distilled_patch16_224', depth=4, num_heads=2, **tokens),
    Swin=swin,
    ResMLP=partial(MlpMixer, num_blocks=4, mlp_ratio=4, block_layer=ResBlock, norm_layer=Affine, **tokens))
methods = dict(OFA=OFA, InfoNCE=InfoNCE, TAS=TAS, RKD=RKD, SP=SP, PKT=PKT, CC=CC)
others = dict(CRD=CRD, SSKD=lambda: SSKD(nn.Identity()), SRD=SRD, Cosine=Cosine, VID=VID, NST=NST, FitNet=FitNet,
              Attention=Attention, FCFD=FCFD)            # cards that say so too: a pair each way, the rest slow
meet_without_parts = 'InfoNCE','RKD','SP','PKT','Cosine','NST','Attention'     # of equal widths, or of any
drawn = 'CRD','FCFD'                                     # each step compares with others, on another way

pairs = [pytest.param(t, s, id=f'{t}-{s}', marks=[pytest.mark.slow]*bool((i+j)%4))
         for i,t in enumerate(teachers) for j,s in enumerate(students)]

def test_the_quarter_meets_every_network():
    quick = [p.values for p in pairs if not p.marks]
    assert len(quick)==8
    assert {t for t,_ in quick}==teachers.keys()
    assert {s for _,s in quick}==students.keys()
    assert len(pairs)==30

def batch():
    "Images of five classes: their class is a colour, so that there is something to learn"
    seed()
    y = torch.arange(n)%n_classes
    return torch.randn(n, 3, px, px)+torch.randn(n_classes, 3, 1, 1)[y],y

each_way = 'ViT-ResNet','ResNet-DeiT'
cases = [pytest.param(*p.values, m, id=f'{p.id}-{m}', marks=p.marks) for p in pairs for m in methods]
cases += [pytest.param(*p.values, m, id=f'{p.id}-{m}', marks=[pytest.mark.slow]*(p.id not in each_way))
          for p in pairs for m in others]

@pytest.mark.parametrize('teacher,student,method', cases)
def test_three_steps(teacher, student, method):
    x,y = batch()
    seed(1)
    t = teachers[teacher](num_classes=n_classes).train()
    seed(2)
    s = students[student](num_classes=n_classes)
    was,keys,start = state(t),[*s.state_dict()],copy.deepcopy(s)
    kd,losses = KD(t, TaskLoss()+(methods|others)[method]()),StepLosses()
    learn = learner(s, tuples([*x,*x], [*y,*y], n=n, valid=n, bs=n), loss_func=nn.CrossEntropyLoss(),
                    opt_func=SGD, metrics=[], cbs=[kd,losses])

    # features of untrained networks hardly differ from item to item, so that InfoNCE is steep: a small rate
    learn.fit(3, 1e-5)

    assert len(losses.vals)==3
    assert all(torch.tensor(losses.vals).isfinite())
    if method not in drawn: assert losses.vals[-1]<losses.vals[0], losses.vals
    assert [*s.state_dict()]==keys
    assert left(learn, t)==[]
    assert all(torch.equal(v, was[k]) for k,v in t.state_dict().items())
    assert any(not torch.equal(a, b) for a,b in zip(s.parameters(), start.parameters(), strict=True))
    assert [*kd.loss.parameters()] or method in meet_without_parts

def test_distillation_token():
    "The teacher's class goes to the second answer of timm's DeiT alone, the label to the first"
    x,y = batch()
    seed(1)
    teacher = teachers['ResNet'](num_classes=n_classes)
    seed(2)
    student = students['DeiT'](num_classes=n_classes)
    student.set_distilled_training(True)
    def first(pred, y): return nn.functional.cross_entropy(pred[0] if isinstance(pred, tuple) else pred, y)
    grads = {}
    def note(learn): grads.update({n: p.grad.clone() for n,p in learn.model.named_parameters() if 'head' in n})
    kd = KD(teacher, .5*TaskLoss() + .5*HardTarget().at('head_dist'))
    learn = learner(student, tuples(x, y, n=n, valid=n, bs=n), loss_func=first, opt_func=SGD, metrics=[],
                    cbs=[kd,At('before_step', note)])
    twin = copy.deepcopy(student).train()
    learn.fit(1, 1e-5)

    says = asked(teacher, x).argmax(1)
    a,b = twin(x)
    loss = .5*nn.functional.cross_entropy(a, y) + .5*nn.functional.cross_entropy(b, says)
    loss.backward()
    for k,g in grads.items(): torch.testing.assert_close(g, twin.get_parameter(k).grad, rtol=1e-4, atol=1e-6)
    assert {*grads}=={'head.weight','head.bias','head_dist.weight','head_dist.bias'}
    assert (says!=y).any()
