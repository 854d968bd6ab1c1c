"""Networks up to a layer: what they return is what a whole pass returns there, and what lies deeper is not in them.
Real networks with random weights; other opinions: a hook of the test's own, and autograd through the whole network."""
import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from common import exports,hooked,net
from fasterdistill.networks.names import find_layer
from fasterdistill.networks.stages import stages
from fasterdistill.networks.upto import upto
from test_modes import Encoder
from test_until import Shared,names
from test_zoo import build,unet

quick = [('timm','resnet10t'), ('torchvision','mobilenet_v3_small'), ('timm','convnext_atto'),
         ('torchvision','googlenet'), ('timm','vit_tiny_patch16_224')]
slow = [('torchvision','resnet18'), ('torchvision','resnet50'), ('torchvision','mobilenet_v2'),
        ('torchvision','efficientnet_b0'), ('torchvision','densenet121'), ('torchvision','regnet_y_400mf'),
        ('torchvision','vgg11'), ('torchvision','shufflenet_v2_x0_5'), ('torchvision','squeezenet1_1'),
        ('torchvision','swin_t'), ('torchvision','convnext_tiny'), ('timm','deit_tiny_distilled_patch16_224'),
        ('timm','swinv2_tiny_window8_256'), ('timm','mixer_s32_224'), ('timm','cait_xxs24_224'),
        ('timm','beit_base_patch16_224'), ('timm','efficientformerv2_s0'),
        ('timm','pit_ti_224'), ('timm','edgenext_xx_small'), ('timm','mobilevit_xxs'),
        ('timm','levit_128s'), ('timm','repvgg_a0'), ('timm','ghostnet_050'), ('fastai','convnext_atto')]
told = dict(googlenet=dict(init_weights=False))
sizes = dict(pit_ti_224=224, levit_128s=224, squeezenet1_1=96, beit_base_patch16_224=48)
sized = 'vit','deit','swinv2','mixer','cait','beit','efficientformer'

def made(kind, name):
    size = sizes.get(name, 64)
    kw = dict(img_size=size) if kind=='timm' and any(k in name for k in sized) and name!='mobilevit_xxs' else {}
    return build(kind, name, size, {**kw, **told.get(name, {})})[:2]

def returned(model, layer, x):
    "What a call of a module takes or returns in a whole pass, by hooks of the test's own"
    got,module = [],model.get_submodule(layer.name)
    def note(o): got.append(copy.deepcopy(o))
    handle = (module.register_forward_pre_hook(lambda m, args: note(args[0])) if layer.kind=='in' else
              module.register_forward_hook(lambda m, args, out: note(out)))
    with torch.no_grad(): model(x)
    handle.remove()
    return got[layer.n-1] if layer.item is None else got[layer.n-1][int(layer.item)]

def same(a, b): return all(torch.equal(p, q) for p,q in zip(tree_leaves(a), tree_leaves(b), strict=True))

def needed(model, name, x):
    "Names of the parameters that a layer is made of, by autograd through the whole network"
    layer,got = find_layer(model, name, x),[]
    module = model.get_submodule(layer.name)
    def keep(m, args, out=None): got.append(args[0] if layer.kind=='in' else out)
    h = (module.register_forward_pre_hook if layer.kind=='in' else module.register_forward_hook)(keep)
    try: model(x)
    finally: h.remove()
    z = got[layer.n-1]
    if layer.item is not None: z = z[int(layer.item)]
    params = dict(model.named_parameters())
    outs = [t.sum() for t in tree_leaves(z) if t.requires_grad]
    grads = torch.autograd.grad(sum(outs), list(params.values()), allow_unused=True)
    return {n for n,g in zip(params, grads, strict=True) if g is not None}

def check(model, x, name, other):
    "A network up to a layer, against the whole one, on inputs that it was not made with"
    before,hooks = {k: v.clone() for k,v in model.state_dict().items()},list(hooked(model))
    up = upto(model, name, x)
    layer = find_layer(model, name, x)
    with torch.no_grad():
        for o in (x,other,other[:1]): assert same(up(o), returned(model, layer, o))
    mine = {n.removeprefix('model.') for n,_ in up.named_parameters()}
    mine = {n for n in mine if 'attention_biases' not in n}      # LeViT's, which it keeps from a pass without gradients
    assert mine=={n for n in needed(model, name, x) if 'attention_biases' not in n}
    params = dict(model.named_parameters())
    assert all(torch.equal(p, params[n.removeprefix('model.')]) for n,p in up.named_parameters())
    assert {k.removeprefix('model.') for k in up.state_dict()} <= model.state_dict().keys()
    assert all(torch.equal(v, before[k]) for k,v in model.state_dict().items())
    assert list(hooked(model))==hooks
    return up

def checked(kind, name, export=True):
    model,x = made(kind, name)
    ends = [s.name for s in stages(model, x)]
    other = torch.randn_like(torch.cat([x,x]))
    for end in (ends[0],ends[-2],'embedding'): up = check(model, x, end, other)
    assert sum(p.numel() for p in up.parameters()) < sum(p.numel() for p in model.parameters())
    up = upto(model, ends[-2], x)
    again = pickle.loads(pickle.dumps(up))
    with torch.no_grad(): assert same(again(other), up(other))
    if export and exports: exported(model, up, x, other)

def exported(model, up, x, other):
    "The graph holds what it needs, and runs at another size of the batch"
    program = torch.export.export(up, (x,), dynamic_shapes=({0: torch.export.Dim('items', min=2, max=64)},))
    with torch.no_grad(): got,want = program.module()(other),up(other)
    for a,b in zip(tree_leaves(got), tree_leaves(want), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    def convs(p): return sum('conv' in str(n.target) or 'linear' in str(n.target) for n in p.graph.nodes)
    assert convs(program)<convs(torch.export.export(model, (x,)))
    assert {k.removeprefix('model.') for k in program.state_dict}=={k.removeprefix('model.') for k in up.state_dict()}

@pytest.mark.parametrize('kind,name', quick, ids=lambda o: o)
def test_networks(kind, name): checked(kind, name, name in ('resnet10t','vit_tiny_patch16_224'))

@pytest.mark.slow
@pytest.mark.parametrize('kind,name', slow, ids=lambda o: o)
def test_more_networks(kind, name): checked(kind, name)

@pytest.mark.parametrize('name', names)
def test_every_kind_of_name(name):
    "A network whose layers share an activation, which works in place; a tuple inside"
    model,x = Shared().eval(),torch.randn(2, 1, 8, 8)
    check(model, x, name, torch.randn(4, 1, 8, 8))

@pytest.mark.parametrize('last_cross', [False,True])
def test_unets(last_cross):
    "fastai's, which keeps what it saw in hooks, and holds a graph there after a pass in training"
    x,x2,model,no_cuts,cuts = unet(last_cross)
    model(x)
    for name in ('layers.0.5','layers.4',cuts[0]): check(model, x, name, x2)

class Careless(nn.Module):
    "A scale that counts without a gradient, one that nothing is made of, a head for training, attention by hand"
    def __init__(self):
        super().__init__()
        self.first,self.last = nn.Linear(4, 4),nn.Linear(4, 3)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.used,self.late = nn.Parameter(torch.ones(4)),nn.Parameter(torch.ones(4))
        self.head = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))
        self.detached = None
    def forward(self, x):
        z = self.first(x)*self.used
        if self.detached is not None: z = z*self.detached.detach()
        z = self.attention(z, z, z)[0]
        if self.training: self.head(z.mean(1))
        return self.last(z)*self.late[:3]

def test_weights_beside_modules():
    model,x = Careless().eval(),torch.randn(2, 3, 4)
    up = check(model, x, 'last:in', torch.randn(5, 3, 4))
    kept = {n.removeprefix('model.').split('.')[0] for n in up.state_dict()}
    assert kept=={'first','attention','used'}
    assert up.train()(x).shape==(2,3,4)                  # the head for training runs on blanks
    with torch.no_grad(): assert same(up(x), up.model.attention(*[up.model.first(x)]*3)[0])

def test_weights_without_a_gradient_stay():
    model,x = Careless(),torch.randn(2, 3, 4)
    model.detached = nn.Parameter(torch.full((4,), 2.))
    up = upto(model.eval(), 'last:in', x)
    assert 'model.detached' in up.state_dict()
    with torch.no_grad(): assert same(up(x), returned(model, find_layer(model, 'last:in'), x))

def test_mode_frozen_and_norms():
    "The copy is in the network's mode, with the same parameters frozen, and its averages move as the network's"
    model,x = net().train(),torch.randn(4, 1, 8, 8)
    model.layer1.requires_grad_(False)
    model.layer2[1].eval()
    up = upto(model, 'layer2', x)
    assert up.training and not up.model.layer2[1].training
    assert [p.requires_grad for p in up.parameters()]==[False]*4+[True]*4
    want = copy.deepcopy(model)
    want.layer2(want.layer1(x)),up(x)
    for a,b in zip(up.buffers(), [*want.layer1.buffers(),*want.layer2.buffers()], strict=True): assert torch.equal(a, b)
    assert model.layer1[1].num_batches_tracked==0

def test_several_inputs_and_by_name():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b,self.c = nn.Linear(2, 3),nn.Linear(4, 3),nn.Linear(3, 1)
        def forward(self, x, y, scale=1.): return self.c(input=self.a(x)+scale*self.b(y))
    model,x,y = Sum(),torch.randn(3, 2),torch.randn(3, 4)
    for name in ('c:in','c:in[input]'):
        up = upto(model, name, (x,y))
        assert same(up(x, y), model.a(x)+model.b(y))
        assert same(up(x, y=y, scale=2.), model.a(x)+2*model.b(y))

def test_transformers_fast_path():
    "PyTorch's own calls no modules inside of a layer"
    model = Encoder().eval()
    x = torch.randn(2, 1, 8, 8)
    up = upto(model, 'encoder.layers.1.linear1', x)
    with torch.no_grad(): assert up(x).shape==(2,8,32)
    assert not any('layers.1.linear2' in k for k in up.state_dict())
    assert torch.backends.mha.get_fastpath_enabled()

def test_text_and_tables():
    from fastai.tabular.model import TabularModel
    from fastai.text.models.awdlstm import AWD_LSTM,awd_lstm_clas_config
    from fastai.text.models.core import get_text_classifier
    config = {**awd_lstm_clas_config, **dict(emb_sz=8, n_hid=12, n_layers=2)}
    text = get_text_classifier(AWD_LSTM, 30, 2, seq_len=5, config=config, lin_ftrs=[6]).eval()
    words = torch.randint(2, 30, (3, 12))
    for name in ('1.layers.0','embedding'):
        up,layer = upto(text, name, words),find_layer(text, name, words)
        other = torch.randint(2, 30, (4, 12))
        with torch.no_grad(): assert same(up(other), returned(text, layer, other))
        assert sum(p.numel() for p in up.parameters())<sum(p.numel() for p in text.parameters())
    table = TabularModel([(5,3),(4,2)], 2, 3, [8,6]).eval()
    rows = torch.randint(0, 4, (4, 2)),torch.randn(4, 2)
    up = upto(table, 'layers.0', rows)
    embedded = [e(rows[0][:,i]) for i,e in enumerate(table.embeds)]
    with torch.no_grad(): assert same(up(*rows), table.layers[0](torch.cat([*embedded,table.bn_cont(rows[1])], 1)))
    assert 'model.layers.1.0.weight' not in up.state_dict()

class Decides(nn.Module):
    "What is positive goes another way"
    def __init__(self):
        super().__init__()
        self.first,self.low,self.high = nn.Linear(2, 2),nn.Linear(2, 2),nn.Linear(2, 2)
    def forward(self, x):
        if x.sum()>0: return self.low(self.first(x))
        return self.first(self.high(x))

def test_what_runs_depends_on_the_inputs():
    "What was not in the example is not left out without a word"
    up = upto(Decides().eval(), 'first', torch.ones(2, 2))
    up(torch.ones(3, 2))
    with pytest.raises(RuntimeError, match="'high' runs before 'first' here, and did not on the example"):
        up(-torch.ones(3, 2))
    with pytest.raises(ValueError, match="the layer 'low' .* does not run"): upto(Decides(), 'low', -torch.ones(2, 2))

@pytest.mark.parametrize('name,match', [
    ('layr2', "has no layer 'layr2'; nearest: 'layer"),
    ('layer2#2', "the layer 'layer2#2' of the network .* does not run"),
    ('two[5]', "'two.5.': the layer returns 2 items"), ('two:in[x]', "takes no input 'x'")])
def test_errors(name, match):
    model = Shared()
    with pytest.raises(ValueError, match=match): upto(model, name, torch.randn(2, 1, 8, 8))
    assert list(hooked(model))==[]

def test_what_cannot_be_copied():
    model = net()
    model.handle = (o for o in ())                       # no generator can
    with pytest.raises(ValueError, match="Sequential cannot be copied .TypeError: cannot pickle 'generator'"):
        upto(model, 'layer2', torch.randn(2, 1, 8, 8))

def test_scripted_networks_are_refused():
    with pytest.raises(ValueError, match='TorchScript and exported programs run as a whole'):
        upto(torch.jit.script(net()), 'layer2', torch.randn(2, 1, 8, 8))

def test_of_itself():
    "Networks up to a layer may be nested, and be made of the weights that another one left"
    model,x = net(),torch.randn(2, 1, 8, 8)
    up = upto(upto(model, 'layer2', x), 'layer1', x)
    assert same(up.eval()(x), model.eval().layer1(x))
    own = {k for k in model.state_dict() if k.startswith('layer1')}
    assert {k.removeprefix('model.model.') for k in up.state_dict()}==own

there = '''
import sys, torch
program = torch.export.load(sys.argv[1]).module()
x,want = torch.load(sys.argv[2])
assert not [m for m in sys.modules if m.startswith(('fast','torchvision','timm'))]
assert torch.allclose(program(x), want, atol=1e-6)
'''

@pytest.mark.skipif(not exports, reason='torch 2.4 does not export it')
def test_exported_loads_where_only_torch_is(tmp_path):
    model,x = net().eval(),torch.randn(2, 1, 8, 8)
    up = upto(model, 'layer2', x)
    program = torch.export.export(up, (x,), dynamic_shapes=({0: torch.export.Dim('n', min=2)},))
    torch.export.save(program, tmp_path/'up.pt2')
    other = torch.randn(5, 1, 8, 8)
    torch.save((other,up(other).detach()), tmp_path/'io.pt')
    subprocess.run([sys.executable, '-c', there, tmp_path/'up.pt2', tmp_path/'io.pt'], check=True, cwd=tmp_path,
                   env={'PATH': '/usr/bin:/bin', 'HOME': str(tmp_path)})

def test_torch_saves_and_traces(tmp_path):
    model,x = net().eval(),torch.randn(2, 1, 8, 8)
    up = upto(model, 'layer2:pre', x)
    torch.save(up, file := io.BytesIO())
    file.seek(0)
    other = torch.randn(5, 1, 8, 8)
    assert same(torch.load(file, weights_only=False)(other), up(other))
    assert same(copy.deepcopy(up)(other), up(other))
    assert same(torch.jit.trace(up, x)(other), up(other))
