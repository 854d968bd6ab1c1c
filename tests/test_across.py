"""Networks of different kinds teach one another, unmodified from timm: three steps of each method on one batch for every pair of a teacher and a student.
A quarter of the pairs, every network among them, runs in `make test`, all of them in `make test-all`."""
import copy
from functools import partial

import pytest
import torch
from common import KD,left,seed,state
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import SGD
from torch import nn

from fasterdistill.loss import TaskLoss
from fasterdistill.losses.infonce import InfoNCE
from fasterdistill.losses.ofa import OFA
from fasterdistill.losses.tas import TAS

timm = pytest.importorskip('timm')
from timm.models.mlp_mixer import Affine,MlpMixer,ResBlock  # noqa: E402
torch.set_num_threads(1)

px,n_classes,n = 64,5,20
tokens = dict(img_size=px, patch_size=8, embed_dim=32)
swin = partial(timm.create_model, 'swin_tiny_patch4_window7_224', img_size=px, window_size=4, embed_dim=16, depths=(1,1,2,1), num_heads=(1,2,2,4), drop_path_rate=0.)   # one batch, one loss
convolutional = dict(ResNet=partial(timm.create_model, 'resnet10t'), MobileNet=partial(timm.create_model, 'mobilenetv2_035'))
teachers = dict(convolutional, ConvNeXt=partial(timm.create_model, 'convnext_atto'), ViT=partial(timm.create_model, 'vit_tiny_patch16_224', depth=4, num_heads=2, **tokens),
                Swin=swin, Mixer=partial(MlpMixer, num_blocks=4, **tokens))
students = dict(convolutional, DeiT=partial(timm.create_model, 'deit_tiny_distilled_patch16_224', depth=4, num_heads=2, **tokens),
                Swin=swin, ResMLP=partial(MlpMixer, num_blocks=4, mlp_ratio=4, block_layer=ResBlock, norm_layer=Affine, **tokens))
methods = dict(OFA=OFA, InfoNCE=InfoNCE, TAS=TAS)
pairs = [pytest.param(t, s, id=f'{t}-{s}', marks=[pytest.mark.slow]*bool((i+j)%4)) for i,t in enumerate(teachers) for j,s in enumerate(students)]

def test_the_quarter_meets_every_network():
    quick = [p.values for p in pairs if not p.marks]
    assert len(quick)==8 and {t for t,_ in quick}==teachers.keys() and {s for _,s in quick}==students.keys() and len(pairs)==30

def batch():
    "Images of five classes: their class is a colour, so that there is something to learn"
    seed(); y = torch.arange(n)%n_classes
    return torch.randn(n,3,px,px)+torch.randn(n_classes,3,1,1)[y],y

class Losses(Callback):
    "The loss of each step"
    def __init__(self): self.vals = []
    def before_backward(self): self.vals.append(self.learn.loss_grad.item())

@pytest.mark.parametrize('method', methods)
@pytest.mark.parametrize('teacher,student', pairs)
def test_three_steps(teacher, student, method):
    x,y = batch()
    item = list(zip(x, y))
    dls = DataLoaders.from_dsets(item, item, bs=n, shuffle=False, num_workers=0, device=torch.device('cpu'))
    seed(1); t = teachers[teacher](num_classes=n_classes).train(); seed(2); s = students[student](num_classes=n_classes)
    was,keys,start = state(t),[*s.state_dict()],copy.deepcopy(s)
    # features of untrained networks hardly differ from item to item, so that InfoNCE is steep: a small rate
    learn = Learner(dls, s, loss_func=nn.CrossEntropyLoss(), opt_func=SGD, lr=1e-5, cbs=[kd := KD(t, TaskLoss()+methods[method]()),seen := Losses()])
    with learn.no_bar(), learn.no_logging(): learn.fit(3)
    assert len(seen.vals)==3 and all(torch.tensor(seen.vals).isfinite()) and seen.vals[-1]<seen.vals[0], seen.vals
    assert [*s.state_dict()]==keys and left(learn, t)==[] and all(torch.equal(v, was[k]) for k,v in t.state_dict().items())
    assert any(not torch.equal(a, b) for a,b in zip(s.parameters(), start.parameters(), strict=True))
    learned = [p for p in kd.loss.parameters()]
    assert learned if method!='InfoNCE' else True
