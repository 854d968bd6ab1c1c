"""Real networks with random weights: names, stages, taps and cuts.
Other opinions: timm's `feature_info` (channels, reductions) and `forward_head`, a plain hook that clones, and the
network's own prediction."""
import random
from contextlib import contextmanager
from copy import deepcopy
from math import log2
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules import module as nn_module
from torch.utils._pytree import tree_leaves

from fasterdistill.networks.layouts import to_map
from fasterdistill.networks.names import find_layer,pair_layers
from fasterdistill.networks.net import Net
from fasterdistill.networks.stages import stages
from fasterdistill.networks.taps import Taps

timm = pytest.importorskip('timm')
tv = pytest.importorskip('torchvision').models

# ---- the networks: name, picture size, layout of the stages (NCHW if none is said), prefix tokens ----

convs = '''resnet10t regnety_002 densenet121 mobilenetv2_035 mobilenetv3_small_050 efficientnet_b0 convnext_atto
    convnextv2_atto repvgg_a0 ghostnet_050 mnasnet_small dla46_c lcnet_035 fasternet_t0 poolformer_s12 fastvit_t8
    edgenext_xx_small mobilevit_xxs tiny_vit_5m_224 efficientvit_b0 pvt_v2_b0'''.split()
more_convs = '''regnetx_002 efficientnetv2_rw_t tf_efficientnet_lite0 mobileone_s0 ghostnetv2_100 hardcorenas_a
    res2net50_14w_8s resnest14d rexnet_100 seresnet18 skresnet18 ese_vovnet19b_slim hgnet_tiny cspresnet50
    cspdarknet53 tresnet_m nfnet_l0 tinynet_e repvit_m0_9 repghostnet_050 inception_next_atto focalnet_tiny_srf
    rdnet_tiny swiftformer_xs poolformerv2_s12 convformer_s18 nextvit_small shvit_s1 convmixer_768_32 resnext26ts
    dpn48b resnetv2_50 darknet17 nf_regnet_b0 davit_tiny caformer_s18 starnet_s050 mobilevitv2_050'''.split()
fixed = [  # networks that are told their picture's size
    ('vit_tiny_patch16_224', 64, 'BLC', 1), ('deit_tiny_distilled_patch16_224', 64, 'BLC', 2),
    ('vit_small_patch14_reg4_dinov2', 56, 'BLC', 5), ('beit_base_patch16_224', 48, 'BLC', 1),
    ('swin_tiny_patch4_window7_224', 64, 'NHWC', 0), ('swinv2_tiny_window8_256', 64, 'NHWC', 0),
    ('swinv2_cr_tiny_ns_224', 64, 'NCHW', 0), ('mixer_s32_224', 64, 'BLC', 0), ('resmlp_12_224', 64, 'BLC', 0),
    ('cait_xxs24_224', 64, 'BLC', 0), ('xcit_nano_12_p16_224', 64, 'BLC', 0), ('maxvit_pico_rw_256', 64, 'NCHW', 0),
    ('coatnet_nano_rw_224', 64, 'NCHW', 0), ('vit_tiny_r_s16_p8_224', 64, 'BLC', 1),
    ('efficientformerv2_s0', 64, 'NCHW', 0), ('nest_tiny', 64, 'NCHW', 0)]
more_fixed = [
    ('hiera_tiny_224', 64, 'BLC', 0), ('mvitv2_tiny', 64, 'BLC', 0), ('coat_lite_tiny', 64, 'BLC', 1),
    ('vit_base_patch16_siglip_gap_224', 32, 'BLC', 0), ('maxvit_tiny_tf_224', 64, 'NCHW', 0),
    ('gcvit_xxtiny', 64, 'NCHW', 0), ('twins_pcpvt_small', 64, 'BLC', 0), ('twins_svt_small', 64, 'BLC', 0),
    ('vitamin_small_224', 64, 'BLC', 0), ('samvit_base_patch16_224', 64, 'NHWC', 0), ('volo_d1_224', 64, 'NHWC', 0),
    ('tnt_s_patch16_224', 64, 'BLC', 1), ('coat_tiny', 64, 'BLC', 1), ('gmlp_ti16_224', 64, 'BLC', 0),
    ('eva02_tiny_patch14_224', 56, 'BLC', 1), ('convit_tiny', 64, 'BLC', (0,0,0,1)),
    ('vit_relpos_small_patch16_224', 64, 'BLC', 0)]
sized = [  # of one size, or of one from which their strides count
    ('levit_128s', 224, 'BLC', 0), ('pit_ti_224', 224, 'NCHW', 0),
    ('efficientformer_l1', 224, ('NCHW','NCHW','NCHW','BLC'), 0), ('inception_v3', 139, 'NCHW', 0),
    ('visformer_tiny', 224, 'NCHW', 0), ('mambaout_femto', 64, 'NHWC', 0), ('sequencer2d_s', 64, 'NHWC', 0),
    ('test_vit', 160, 'BLC', 1), ('xception41', 64, 'NCHW', 0)]
more_sized = [
    ('selecsls42b', 64, 'NCHW', 0), ('hrnet_w18_small', 64, 'NCHW', 0), ('levit_conv_128s', 224, 'NCHW', 0),
    ('test_nfnet', 160, 'NCHW', 0), ('test_mambaout', 160, 'NHWC', 0), ('efficientvit_m0', 224, 'NCHW', 0),
    ('crossvit_9_240', 240, 'BLC', 1), ('inception_v4', 139, 'NCHW', 0), ('halonet26t', 256, 'NCHW', 0),
    ('pnasnet5large', 96, 'NCHW', 0)]
swin_layouts = 'NHWC','NHWC','NHWC','NCHW'
torchvision = [
    ('resnet18', 64, 'NCHW', 0, {}), ('regnet_y_400mf', 64, 'NCHW', 0, {}), ('densenet121', 64, 'NCHW', 0, {}),
    ('mobilenet_v2', 64, 'NCHW', 0, {}), ('mobilenet_v3_small', 64, 'NCHW', 0, {}),
    ('efficientnet_b0', 64, 'NCHW', 0, {}), ('convnext_tiny', 64, 'NCHW', 0, {}),
    ('shufflenet_v2_x0_5', 64, 'NCHW', 0, {}), ('squeezenet1_1', 96, 'NCHW', 0, {}),
    ('googlenet', 64, 'NCHW', 0, dict(init_weights=False)), ('mnasnet0_5', 64, 'NCHW', 0, {}),
    ('alexnet', 64, 'NCHW', 0, {}), ('vit_b_16', 32, 'BLC', 1, dict(image_size=32)),
    ('swin_t', 64, swin_layouts, 0, {})]
more_torchvision = [
    ('vgg11_bn', 64, 'NCHW', 0, {}), ('resnext50_32x4d', 64, 'NCHW', 0, {}),
    ('inception_v3', 139, 'NCHW', 0, dict(init_weights=False, aux_logits=False)),
    ('swin_v2_t', 64, swin_layouts, 0, {}), ('efficientnet_v2_s', 64, 'NCHW', 0, {}), ('maxvit_t', 224, 'NCHW', 0, {})]
fastai = [
    ('resnet18', 64, 'NCHW', 0), ('convnext_atto', 64, 'NCHW', 0), ('mobilenetv3_small_050', 64, 'NCHW', 0),
    ('test_vit', 160, 'BLC', 1)]

def _networks():
    "Whose, whether it is slow, name, size, layout, prefix tokens, options"
    for slow,rows in ((False,fixed), (True,more_fixed)): yield from (('timm',slow,*o,dict(img_size=o[1])) for o in rows)
    for slow,rows in ((False,convs), (True,more_convs)): yield from (('timm',slow,o,64,'NCHW',0,{}) for o in rows)
    for slow,rows in ((False,sized), (True,more_sized)): yield from (('timm',slow,*o,{}) for o in rows)
    for slow,rows in ((False,torchvision), (True,more_torchvision)): yield from (('torchvision',slow,*o) for o in rows)
    yield from (('fastai',False,*o,{}) for o in fastai)

zoo = [pytest.param(o, id=f'{o[0]}-{o[2]}', marks=[pytest.mark.slow]*o[1]) for o in _networks()]

# ---- what is not as in the others, and why ----

few = {  # networks with neither three nor four stages
    'volo_d1_224': 2,                                                # one change of resolution, after its outlooker
    'sequencer2d_s': 2}                                              # patches of 7, then one merging
refused = {  # stage ends that are no cuts
    # a block hands a tuple on, and the next one also reads the item that was not asked for:
    'timm-pit_ti_224': ['transformers.0[0]','transformers.1[0]','transformers.2[0]'],         # the class token
    'timm-tnt_s_patch16_224': ['blocks.2[1]','blocks.5[1]','blocks.8[1]'],                    # the tokens of the pixels
    'timm-crossvit_9_240': ['blocks.0[0]','blocks.1[0]','blocks.2[0]'],                       # the second branch
    # timm's feature_info names an activation inside a block, and the block's own shortcut goes around it:
    'timm-xception41': ['blocks.1.stack.act3','blocks.2.stack.act3','blocks.11.stack.act3'],
    # every cell reads the two before it, and feature_info names a part of a cell:
    'timm-pnasnet5large': ['cell_stem_1.conv_1x1.act','cell_4.conv_1x1.act','cell_8.conv_1x1.act'],
    # its parallel blocks read all scales at once:
    'timm-coat_tiny': ['serial_blocks3.1','serial_blocks4.1'],
    # branches of several resolutions run side by side:
    'timm-hrnet_w18_small': ['transition1.0','transition1.1']}
unstated = {  # feature_info names modules that do not run so
    'hrnet_w18_small',                                               # of another class
    'coat_tiny'}                                                     # one name for three maps
heads = {  # the embedding goes into the last layer with weights; what timm calls so into the head, several layers:
    'deit_tiny_distilled_patch16_224', 'efficientformer_l1', 'efficientformerv2_s0', 'crossvit_9_240',    # side by side
    'levit_128s', 'levit_conv_128s', 'efficientvit_m0', 'repvit_m0_9', 'shvit_s1',               # a norm and a layer
    'caformer_s18', 'convformer_s18',                                                        # two, one after the other
    'volo_d1_224'}                                                                 # one more for every patch, run last

# ---- building ----

def enliven(name, p):
    "A parameter that is drawn anew if its network starts with it near zero"
    fan = p[0].numel() if p.ndim else 1
    if p.numel()==max(p.shape, default=1): p.add_(torch.rand_like(p)*(.1 if name.endswith('bias') else .5))
    elif p.square().mean()*fan < .05: p.normal_(std=fan**-.5)

def lively(model, x):
    """Random weights that matter: no gain, layer scale or head near zero, BatchNorm averages those of the data;
    else a cut that is none could go unseen"""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    was = [m.momentum for m in norms]
    with torch.no_grad():
        for n,p in model.named_parameters(): enliven(n, p)
        model.train()
        for m in norms: m.momentum = .9
        for _ in range(2): model(x)
        for m,w in zip(norms, was): m.momentum = w
    return model.eval()

@contextmanager
def drawn_apart():
    "The generator starts at 0, and the caller's is left alone"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield

def network(kind, name, kw):
    "With ten classes"
    if kind=='timm':
        if not timm.is_model(name): pytest.skip(f'this timm has no {name}')
        return timm.create_model(name, num_classes=10, **kw)
    if kind=='torchvision': return getattr(tv, name)(weights=None, num_classes=10, **kw)
    from fastai.vision.learner import create_timm_model,create_vision_model
    if hasattr(tv, name): return create_vision_model(getattr(tv, name), 10, pretrained=False)
    return create_timm_model(name, 10, pretrained=False)[0]

def build(kind, name, size=64, kw={}):
    "A network of 10 classes and two batches for it"
    with drawn_apart():
        model = network(kind, name, kw)
        x,x2 = torch.randn(2, 3, size, size),torch.randn(2, 3, size, size)
        return lively(model, torch.randn(4, 3, size, size)),x,x2

@pytest.fixture(scope='module', params=zoo)
def o(request):
    "A network of the zoo, with what is expected of it"
    kind,_,name,size,layout,prefix,kw = request.param
    model,x,x2 = build(kind, name, size, kw)
    found = stages(model, x)
    def each(o, one): return [o]*len(found) if isinstance(o, one) else list(o)
    id = f'{kind}-{name}'
    yield SimpleNamespace(
        kind=kind, name=name, size=size, model=model, x=x, x2=x2, stages=found, layout=each(layout, str),
        prefix=each(prefix, int), refused=refused.get(id, []), net=Net(model, x, [s.name for s in found]))

def close(a, b, scale=None, tol=1e-5): return (a-b).abs().max() <= tol*(b if scale is None else scale).abs().max()

def state(model):
    "Everything reading must leave as it was"
    mods = list(model.modules())
    return dict(
        weights={k: v.clone() for k,v in model.state_dict().items()}, grads=[p.grad for p in model.parameters()],
        mode=[m.training for m in mods], attrs=[set(vars(m)) for m in mods],
        hooks=[(list(m._forward_hooks),list(m._forward_pre_hooks),list(m._backward_hooks)) for m in mods],
        everywhere=[len(d) for d in (nn_module._global_forward_hooks,nn_module._global_forward_pre_hooks)],
        torch=torch.get_rng_state(), numpy=np.random.get_state(), python=random.getstate())

def same(a, b):
    "Bit by bit"
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, np.ndarray): return np.array_equal(a, b)
    if isinstance(a, dict): return a.keys()==b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list,tuple)): return len(a)==len(b) and all(map(same, a, b))
    return a==b

def stop(*_): raise KeyboardInterrupt

def changed(before, model):
    after = state(model)
    return [k for k in before if not same(before[k], after[k])]

def run_with(model, x, taps, read):
    "What `read` makes of the tapped layers, and the prediction"
    taps.attach()
    taps.clear(on=True)
    try:
        with torch.no_grad(): pred = model(x)
        return read(taps),pred
    finally: taps.remove()

# ---- stages and names ----

def test_stages(o):
    assert len(o.stages) in ([few[o.name]] if o.name in few else [3,4])
    sizes = [s.size for s in o.stages]
    assert all(len(s)==2 for s in sizes)
    assert sizes==sorted(sizes, reverse=True)
    assert [s.layout for s in o.stages]==o.layout
    assert [s.prefix for s in o.stages]==o.prefix
    names = [s.name for s in o.stages]
    assert len(set(names))==len(names)
    maps,_ = run_with(o.model, o.x, Taps(o.model, names, o.x), lambda t: [to_map(t[s.name], s) for s in o.stages])
    assert [tuple(m.shape) for m in maps]==[(2,s.channels,*s.size) for s in o.stages]

def test_feature_info(o):
    "timm's word on channels and reductions, at the module it names"
    infos = next((m.feature_info for m in o.model.modules() if hasattr(m, 'feature_info')), None)
    if infos is None or o.name in unstated: pytest.skip('says nothing about its stages')
    said = {i['reduction']: i for i in getattr(infos, 'info', infos)}
    for s in o.stages:
        def off(i): return abs(log2(o.size/s.size[0]/i['reduction']))
        i = min(said.values(), key=off)
        assert s.channels==i['num_chs'], (s,i)
        assert off(i)<.6, (s,i)                                           # unpadded convolutions lose a row or two

def test_names(o):
    mods,aliases = dict(o.model.named_modules()),[f'stage{i+1}' for i in range(len(o.stages))]
    for s,alias in zip(o.stages, aliases):
        l = find_layer(o.model, s.name)                                   # no run needed: the name says it all
        assert l.name in mods
        assert l.kind=='out'
        if alias not in mods: assert find_layer(o.model, alias, o.x)==l
    taps = Taps(o.model, ['output','embedding',*aliases], o.x)
    (output,emb),pred = run_with(o.model, o.x, taps, lambda t: (t['output'],t['embedding']))
    assert torch.equal(output, pred)
    assert pred.shape==(2,10)
    assert emb.shape[0]==2
    assert emb.isfinite().all()
    assert emb.shape[1:].numel()>10
    if o.kind=='timm' and o.name not in heads:
        with torch.no_grad(): want = o.model.forward_head(o.model.forward_features(o.x), pre_logits=True)
        assert torch.equal(emb.flatten(1), want.flatten(1))

# ---- cuts ----

def says_why(net, name, *args):
    "A layer that is no cut is refused by its name"
    assert not net.can_resume(name), name
    with pytest.raises(ValueError, match='cannot be cut at') as e: net.resume(name, *args)
    assert repr(name) in str(e.value)

def part_is_steady(o, pred2):
    "Some deep networks are off on a part of a batch all by themselves, in float32"
    with torch.no_grad(): return close(o.model(o.x2[:1]), pred2[:1], .3*pred2)

def test_resume(o):
    with torch.no_grad(): (pred,fm),(pred2,fm2) = o.net(o.x, bn='eval'),o.net(o.x2, bn='eval')
    assert (pred-pred2).abs().max() > 1e-3*pred.abs().max(), 'the prediction hardly depends on the input'
    steady = part_is_steady(o, pred2)
    for i,s in enumerate(o.stages):
        if s.name in o.refused:
            says_why(o.net, s.name, fm[s.name])
            continue
        assert not o.net.why_not(s.name)
        assert o.net.can_resume(s.name)
        with torch.no_grad():
            here = o.net.resume(s.name, fm[s.name], bn='eval')
            back = o.net.resume(s.name, fm2[s.name], bn='eval')           # from what the guard never saw
            part = o.net.resume(s.name, fm2[s.name][:1], bn='eval')
        assert close(here.pred, pred), s
        assert close(back.pred, pred2), s
        if steady: assert close(part.pred, pred2[:1], pred2), s
        assert list(back.fm)==[t.name for t in o.stages[i+1:]]
        for k,v in back.fm.items(): assert close(v, fm2[k]), (s,k)
    if not steady: part_in_float64(o)

def part_in_float64(o):
    model,kept = deepcopy(o.model).double(),{}
    x,x2 = o.x.double(),o.x2.double()
    net = Net(model, x)
    for s in o.stages:
        if s.name in o.refused or '[' in s.name: continue
        h = model.get_submodule(s.name).register_forward_hook(lambda m,_,out: kept.update(z=out.clone()))
        with torch.no_grad(): pred = model(x2)
        h.remove()
        with torch.no_grad(): part = net.resume(s.name, kept['z'][:1], bn='eval').pred
        assert close(part, pred[:1], pred), s

def resumed_and_broken_off(net, name, z):
    "Passes from a layer on, with and without errors"
    with torch.no_grad():
        net.resume(name, z, bn='batch')
        net.resume(name, z[:1], bn='eval')
    with pytest.raises(ValueError): net.resume(name, z[0])                # one axis too few
    h = net['embedding'].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt): net.resume(name, z)            # stopped in the middle of the pass
    h.remove()

def test_untouched(o):
    "Nothing is changed by reading, also in a network whose modules are in different modes"
    leaves = [m for m in o.model.modules() if isinstance(m, (nn.Conv2d,nn.Linear,nn.LayerNorm,nn.BatchNorm2d))]
    for m in leaves[::2]: m.training = True
    try:
        before = state(o.model)
        found = stages(o.model, o.x)
        net = Net(o.model, o.x, [*[s.name for s in found],'embedding','output'])
        with torch.no_grad(): _,fm = net(o.x2, bn='eval')
        assert changed(before, o.model)==[]
        for s in found:
            assert net.can_resume(s.name)==(s.name not in o.refused)
            if net.can_resume(s.name): resumed_and_broken_off(net, s.name, fm[s.name])
        assert changed(before, o.model)==[]
    finally: o.model.eval()

# ---- taps ----

def tensors_in(out): return [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]

def cloned(model, x):
    "What every module returned first, by plain hooks that clone at once"
    got = {}
    def keep(n):
        def hook(m, _, out):
            if n not in got: got[n] = [t.clone() for t in tensors_in(out)]
        return hook
    handles = [m.register_forward_hook(keep(n)) for n,m in model.named_modules() if n]
    try:
        with torch.no_grad(): model(x)
    finally:
        for h in handles: h.remove()
    return got

def tapped(model, names, x):
    "The same by taps, and which of them had to copy"
    def read(taps): return {n: tensors_in(taps[n]) for n in names},taps.copies
    return run_with(model, x, Taps(model, names, x), read)[0]

def test_taps(o):
    "Of every module of the network, whatever later ones write into its output"
    want = cloned(o.model, o.x)
    got,_ = tapped(o.model, list(want), o.x)
    assert [n for n in want if not same(want[n], got[n])]==[]

overwritten = dict(
    resnet18=['bn1','layer1.0.bn1'], densenet121=['features'], mobilenet_v2=['features.0.1'], vgg11_bn=['features.1'],
    mobilenet_v3_small=['features.0.1'])

@pytest.mark.parametrize('name', overwritten)
def test_taps_overwritten(name):
    model,x,_ = build('torchvision', name)
    got,copies = tapped(model, overwritten[name]+['output'], x)
    assert copies==set(overwritten[name])                                 # these and no other are copied
    want = cloned(model, x)
    for n in overwritten[name]:
        assert same(got[n], want[n])
        assert got[n][0].min()<0                                          # before the ReLU

@pytest.mark.parametrize('name,names', [
    ('mobilenet_v3_small',['avgpool','classifier.1']), ('efficientnet_b0',['avgpool'])],
    ids=['mobilenet_v3_small','efficientnet_b0'])
def test_taps_overwritten_in_training(name, names):
    "A dropout that works in place writes in training alone"
    model,x,_ = build('torchvision', name)
    model.train()
    for m in model.modules():
        if not isinstance(m, nn.Dropout): continue
        assert m.inplace
        m.p = .5
    with drawn_apart(): want = cloned(model, x)
    with drawn_apart(): got,_ = tapped(model, names, x)
    for n in names: assert same(want[n], got[n]), n

# ---- pairs ----

def to_resnet(*names): return [(n,f'layer{i+1}') for i,n in enumerate(names)]
def of_resnet(*names): return [p[::-1] for p in to_resnet(*names)]
def made(name, kind='timm'):
    told = any(k in name for k in ('vit','swin','nest'))
    return build(kind, name, 64, dict(img_size=64) if told else {})[0]

swin,vit = 'swin_tiny_patch4_window7_224','vit_tiny_patch16_224'

@pytest.mark.parametrize('s,t,want', [
    (('resnet18','torchvision'), ('resnet34','torchvision'), to_resnet('layer1', 'layer2', 'layer3', 'layer4')),
    (('resnet18','fastai'), ('resnet10t',), to_resnet('0.4', '0.5', '0.6', '0.7')),
    (('mobilenet_v2','torchvision'), ('resnet10t',),
     to_resnet('features.3', 'features.6', 'features.13', 'features.18')),
    (('resnet10t',), (swin,), of_resnet('layers.0', 'layers.1', 'layers.2', 'layers.3')),
    (('resnet10t',), (vit,), of_resnet('blocks.2', 'blocks.5', 'blocks.8', 'blocks.11')),
    (('nest_tiny',), ('resnet10t',), to_resnet('levels.0', 'levels.1', 'levels.2')),
    (('test_vit',), (vit,),
     [('blocks.1','blocks.2'),('blocks.2','blocks.5'),('blocks.4','blocks.8'),('blocks.5','blocks.11')]),
], ids=lambda o: o[0] if isinstance(o, tuple) else '')
def test_pairs(s, t, want):
    s,t,x = made(*s),made(*t),torch.zeros(2, 3, 64, 64)
    assert pair_layers(s, t, x)==want
    assert pair_layers(t, s, x)==[p[::-1] for p in want]
    assert pair_layers(s, t, x, n=2)==want[-2:]

# ---- a network in training ----

vit_start = ['cls_token','pos_embed','patch_embed',*[f'blocks.{i}' for i in range(6)]]

@pytest.mark.parametrize('kind,name,kw,cut,earlier', [
    ('torchvision', 'resnet18', {}, 'layer2', ['conv1','bn1','layer1','layer2']),
    ('timm', 'vit_tiny_patch16_224', dict(img_size=64), 'blocks.5', vit_start),
    ('timm', 'convnext_atto', {}, 'stages.1', ['stem','stages.0','stages.1']),
    ('timm', 'edgenext_xx_small', {}, 'stages.2', ['stem','stages.0','stages.1','stages.2'])])
@pytest.mark.usefixtures('float64')
def test_training(kind, name, kw, cut, earlier):
    model,x,_ = build(kind, name, 64, kw)
    model.train()
    net,buffers = Net(model, x, [cut]),{k: v.clone() for k,v in model.named_buffers()}
    pred,fm = net(x, bn='batch')
    pred.square().sum().backward()
    want = {n: p.grad for n,p in model.named_parameters()}
    model.zero_grad()
    z = fm[cut].detach().requires_grad_()
    back = net.resume(cut, z, bn='batch')
    assert close(back.pred, pred, tol=1e-10)

    back.pred.square().sum().backward()
    assert same(buffers, dict(model.named_buffers()))
    assert all(m.training for m in model.modules())
    assert z.grad.abs().sum()>0
    def before(n): return any(n==e or n.startswith(e+'.') for e in earlier)
    for n,p in model.named_parameters():
        if before(n): assert p.grad is None, n
        else: assert close(p.grad, want[n], tol=1e-8), n                  # the gradients of the ordinary pass
    assert any(map(before, want))
    assert not all(map(before, want))

    net.resume(cut, z.detach(), bn='update')
    assert same(buffers, dict(model.named_buffers()))==(not net.passes.norms)

# ---- U-Nets ----

def unet(last_cross):
    "Two batches, the U-Net, its layers that are no cuts, and those that are"
    from fastai.vision.models.unet import DynamicUnet
    with drawn_apart():
        body = nn.Sequential(*list(tv.resnet18(weights=None).children())[:-2])
        model = lively(DynamicUnet(body, 3, (32,32), last_cross=last_cross), torch.randn(4, 3, 32, 32))
        x,x2 = torch.randn(2, 3, 32, 32),torch.randn(2, 3, 32, 32)
    kinds = [type(m).__name__ for m in model.layers]
    blocks = [i for i,k in enumerate(kinds) if k=='UnetBlock']
    last = kinds.index('MergeLayer') if last_cross else blocks[-1]        # what joins a skip last
    no_cuts = [*[f'layers.0.{i}' for i in (4,5,6,7)],*[f'layers.{i}' for i in range(last)]]
    cuts,first = [f'layers.{i}' for i in range(last, len(kinds))],['layers.0.0','layers.0.2']
    if last_cross: no_cuts += first                                       # the picture itself is the last skip
    else: cuts += first                                                   # all comes after the first hook's module
    return x,x2,model,no_cuts,cuts

@pytest.mark.parametrize('last_cross', [True,False])
def test_unet(last_cross):
    """Its hooks hold the encoder's maps of the last pass:
    a guard that resumes right after an ordinary pass would be deceived"""
    x,x2,model,no_cuts,cuts = unet(last_cross)
    before = state(model)
    ends = ['layers.0.4','layers.0.5','layers.0.6','layers.3']            # the encoder's, and what ends the bottom
    assert [s.name for s in stages(model, x)]==ends
    net = Net(model, x, cuts)
    with torch.no_grad(): (pred,_),(pred2,fm2) = net(x, bn='eval'),net(x2, bn='eval')
    assert (pred-pred2).abs().max() > 1e-3*pred.abs().max()
    for name in no_cuts:
        with torch.no_grad(): model(x)                                    # the hooks now hold this very batch
        says_why(net, name, torch.zeros(1))
    for name in cuts:
        assert not net.why_not(name)
        assert net.can_resume(name), name
        with torch.no_grad():
            whole = net.resume(name, fm2[name], bn='eval').pred
            part = net.resume(name, fm2[name][:1], bn='eval').pred
        assert close(whole, pred2), name
        assert close(part, pred2[:1], pred2), name
    assert changed({k: v for k,v in before.items() if k!='attrs'}, model)==[]

# ---- fastai's heads ----

@pytest.mark.parametrize('name,names', [
    ('resnet18', ['0.4','0.5','0.6','0.7']), ('convnext_atto', [f'0.model.stages.{i}' for i in range(4)])])
def test_vision_model(name, names):
    model,x,_ = build('fastai', name)
    assert [s.name for s in stages(model, x)]==names
    for i,n in enumerate(names, 1):
        assert find_layer(model, f'layer{i}', x).name==n
        assert find_layer(model, f'stage{i}', x).name==n
    if name=='convnext_atto': assert find_layer(model, 'stages.3').name==names[3]      # an ending only one module has
    last = [n for n,m in model.named_modules() if isinstance(m, nn.Linear)][-1]
    assert find_layer(model, 'embedding', x)[:2]==(last,'in')
    assert find_layer(model, 'output').name==''
