"Networks that run otherwise in training than in evaluation: fast paths, tuples, layers skipped, lost graphs, precision"
import torch
from torch import nn

import pytest
from common import KD,StepLosses,get_dls,learner,left,seed
from fasterdistill.loss import as_loss

def returned(model, name, x):
    "What a layer returns for `x`, by a hook of the test's own"
    got = []
    handle = model.get_submodule(name).register_forward_hook(lambda m, args, out: got.append(out))
    model(x)
    handle.remove()
    return got[0]

def apart(fm_s, fm_t):
    "The mean squared distance of paired activations of one width, summed: no learned part"
    return sum((s-t).square().mean() for s,t in zip(fm_s.values(), fm_t.values(), strict=True))

def first_step(student, loss, teacher, n=32, cbs=(), **kwargs):
    "What one step of a fit trains: the loss, and the student's gradients"
    steps,grads = StepLosses(),{}
    kd = KD(teacher, loss, weight=1., **kwargs)
    learn = learner(student, get_dls(n=n, shuffle=False), cbs=[kd,steps,*cbs], metrics=[])
    learn.fit(1, lr=0.)
    return steps.vals[0],learn

# ---- PyTorch's fast path for transformers ----

class Encoder(nn.Module):
    "Rows of the picture as tokens; with `padded` the last two of all pictures but the first are none"
    def __init__(self, padded=False, s=0, d=16):
        super().__init__()
        seed(s)
        self.embed,self.padded = nn.Linear(8, d),padded
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(d, 2, 2*d, 0., batch_first=True), 2)
        self.fc = nn.Linear(d, 10)
    def forward(self, x):
        z = self.embed(x[:,0])
        mask = torch.zeros(z.shape[:2], dtype=torch.bool)
        mask[1:,6:] = True
        z = self.encoder(z, src_key_padding_mask=mask if self.padded else None)
        return self.fc(z[:,:6].mean(1))

class Held(Encoder):
    "Its encoder is frozen, and stays in evaluation mode while the rest trains"
    def __init__(self, *args):
        super().__init__(*args)
        self.encoder.requires_grad_(False)
    def train(self, mode=True):
        super().train(mode)
        self.encoder.eval()
        return self

@pytest.mark.parametrize('layer', ['encoder.layers.0.linear2','encoder.layers.0','encoder.layers.1.norm2','encoder'])
@pytest.mark.parametrize('padded', [False,True])
@pytest.mark.parametrize('make', [Encoder,Held])
def test_inside_transformers(make, padded, layer):
    "The loss of the first step is that of hooks on networks that take the long way, since gradients are asked of them"
    student,teacher = make(padded),Encoder(padded, 1).eval()
    x = next(iter(get_dls(n=32, shuffle=False).train))[0].as_subclass(torch.Tensor)
    s,t = Encoder(padded).train(),Encoder(padded, 1).eval()
    want = apart({0: returned(s, layer, x)}, {0: returned(t, layer, x)})
    value,learn = first_step(student, as_loss(apart), teacher, activations_student=layer)
    assert abs(value-want.item()) < 1e-5*want
    assert torch.backends.mha.get_fastpath_enabled()
    assert not {*left(learn)}-{'optimizer'}                # fastai's leaves out what is frozen

def test_fast_path_comes_back_after_an_error():
    def broken(fm_s, fm_t):
        if not torch.is_grad_enabled(): return apart(fm_s, fm_t)     # the trial
        assert not torch.backends.mha.get_fastpath_enabled()
        raise ZeroDivisionError('in a step')
    s = Encoder()
    kd = KD(Encoder(s=1), as_loss(broken), activations_student='encoder')
    learn = learner(s, get_dls(n=32), cbs=kd)
    with pytest.raises(ZeroDivisionError, match='in a step'): learn.fit(1)
    assert torch.backends.mha.get_fastpath_enabled()
