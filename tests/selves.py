"Six kinds of networks, and three steps of a loss without a teacher"
import pytest
import torch
from common import KD,StepLosses,left,learner,seed,tuples
from fastai.optimizer import SGD
from torch import nn
from torchvision.models import resnet18,resnet34

from fasterdistill.examples import CNN
from fasterdistill.loss import TaskLoss

timm = pytest.importorskip('timm')

def _vision_model():
    "The body and head that `vision_learner` makes, with random weights, without dropout"
    from fastai.vision.learner import create_vision_model
    return create_vision_model(resnet18, 5, pretrained=False, ps=0.)

def _vit(size):
    shape = dict(patch_size=8, embed_dim=32, depth=4, num_heads=2)
    return timm.create_model('vit_tiny_patch16_224', num_classes=5, img_size=size, **shape)

networks = dict(                                         # of five classes, by the size of pictures
    resnet18=lambda size: resnet18(num_classes=5), resnet34=lambda size: resnet34(num_classes=5),
    vision_learner=lambda size: _vision_model(), vit=_vit,
    convnext=lambda size: timm.create_model('convnext_atto', num_classes=5), cnn=lambda size: CNN(8, 5, ni=3))
quick = {('cnn',64),('vit',64)}
every = [pytest.param(name, size, id=f'{name}-{size}', marks=[pytest.mark.slow]*((name,size) not in quick))
         for name in networks for size in (64,96)]

def batch(*size, n=8):
    "Pictures of five classes, whose class is a colour"
    seed()
    y = torch.arange(n)%5
    return torch.randn(n, 3, *size)+torch.randn(5, 3, 1, 1)[y],y

def on_batch(model, x, y, *cbs, **kwargs):
    "A Learner that has nothing but this batch"
    data = tuples([*x]*2, [*y]*2, n=len(x), valid=len(x), bs=len(x))
    return learner(model, data, loss_func=nn.CrossEntropyLoss(), opt_func=SGD, metrics=[], cbs=list(cbs), **kwargs)

def three_steps(name, size, loss, lr=1e-3):
    "The values of three steps on one batch, and the network"
    seed(1)
    model,steps = networks[name](size),StepLosses()
    learn,keys = on_batch(model, *batch(size, size), KD(None, TaskLoss()+loss), steps),[*model.state_dict()]
    learn.fit(3, lr)
    assert [*model.state_dict()]==keys
    assert left(learn)==[]
    assert all(torch.tensor(steps.vals).isfinite())
    return steps.vals,model
