"What a shape says: grids of tokens with and without a picture at hand, and what a `Stage` says of itself"
import pickle
from copy import deepcopy

import pytest
import torch
from common import hf_block,hf_old
from torch import nn

from fasterdistill.networks.adapters import bridge,regressor
from fasterdistill.networks.exits import exit_head
from fasterdistill.networks.layouts import Stage,describe,from_map,is_grid,pooled,to_map
from fasterdistill.networks.stages import stages

picture,words = torch.zeros(2,3,32,32),torch.ones(2,7).long()

# ---- tokens without a picture ----

sure = {}   # tokens: rows and tokens before them, by counting up; the larger grid comes last and stays
for rows in range(2, 21):
    for before in (0,1,2,5): sure[rows*rows+before] = rows,before
sure[1] = 1,0

@pytest.mark.parametrize('L', range(1, 300))
def test_without_a_picture_a_grid_is_read_only_where_it_is_sure(L):
    rows,before = sure.get(L, (None,0))
    size = (L,) if rows is None else (rows,rows)
    assert describe((2,L,6))==Stage('', 6, size, 'BLC', before)

@pytest.mark.parametrize('L,stage', [(6, ((2,2),2)), (9, ((3,3),0))])
def test_of_two_grids_the_larger(L, stage):
    "Six tokens could be one behind five, nine 2×2 behind five"
    st = describe((2,L,6))
    assert (st.size,st.prefix)==stage

@pytest.mark.parametrize('L', [2,3,7,8])
def test_a_sequence_by_hand_is_pooled_over_all_of_it(L):
    z = torch.randn(2,L,6)
    assert torch.equal(pooled(z), z.mean(1))
    with pytest.raises(ValueError, match='a sequence without a grid'): to_map(z)

def test_seven_tokens_of_a_picture():
    "With the picture at hand they are still 2×2 behind three"
    z = torch.randn(2,7,6)
    assert describe(z, picture)==Stage('', 6, (2,2), 'BLC', 3)
    assert torch.equal(pooled(z, x=picture), z[:,3:].mean(1))
    assert to_map(z, x=picture).shape==(2,6,2,2)

@pytest.mark.parametrize('L', [7,9,50])
def test_words_are_a_sequence(L): assert describe((2,L,6), words)==Stage('', 6, (L,), 'BLC')

def test_adapters_of_sequences_by_hand():
    "As with the words at hand: a linear layer, not a convolution over a grid that is none"
    s,t = torch.randn(2,7,6),torch.randn(2,7,5)
    for make in (regressor,bridge):
        assert repr(make(s, t))==repr(make(s, t, words))
        assert make(s, t)(s).shape==t.shape
    assert repr(exit_head(s, 10))==repr(exit_head(s, 10, xb=words))
    with pytest.raises(ValueError, match='no regressor from'): regressor(s, torch.randn(2,5,2,2))

def test_tokens_that_are_no_grid_of_the_example():
    "An example of 8×12 positions; 6×9 of a smaller picture, and 25 that fit neither its columns nor its proportions"
    st = describe((2,96,6), torch.zeros(2,3,64,96))
    assert st.size==(8,12)
    assert to_map(torch.randn(2,54,6), st).shape==(2,6,6,9)
    with pytest.raises(ValueError, match='no grid in the proportions of 8×12'): to_map(torch.randn(2,25,6), st)

# ---- a Stage ----

shapes = [(2,6), (2,7,6), (2,64,6), (2,66,6), (2,6,8,8), (2,8,8,6), (2,6,6,6)]

@pytest.mark.parametrize('shape', shapes, ids=str)
def test_a_stage_knows_its_shape(shape):
    st = describe(shape)
    assert st.shape==shape[1:]
    assert str(st)==f"({', '.join(str(n) for n in shape[1:])})"
    assert st.area*st.channels+st.prefix*st.channels==torch.zeros(shape[1:]).numel()
    assert st.is_grid==is_grid(st)==(len(st.size)==2)
    if st.is_grid: assert from_map(to_map(torch.zeros(shape), st), st).shape==shape

@pytest.mark.parametrize('shape', shapes, ids=str)
def test_a_stage_is_a_tuple(shape):
    st = describe(shape, name='layer1')
    name,channels,size,layout,prefix = st
    assert st==(name,channels,size,layout,prefix) and hash(st)==hash(tuple(st))
    assert pickle.loads(pickle.dumps(st))==deepcopy(st)==st and type(deepcopy(st)) is Stage
    assert st._replace(name='')==describe(shape)

def test_no_stage():
    assert describe((2,)) is None and describe((2,3,4,5,6,7)) is None and not is_grid(None)
    with pytest.raises(ValueError, match='cannot be pooled'): pooled(torch.zeros(2,3,4,5,6,7))
    with pytest.raises(ValueError, match='cannot be read as a map'): to_map(torch.zeros(2,3,4,5,6,7))

def test_tokens_of_other_sizes_keep_the_proportions():
    "Progressive resizing: after an example of 8×8, 4×4 and 16×16 are what they are, not 2×8 and 32×8"
    st = describe((2,64,6), torch.zeros(2,3,64,64))
    for n in (4,8,16):
        z = torch.arange(n*n).float().reshape(1,n*n,1).expand(2,-1,6)
        assert to_map(z, st).shape==(2,6,n,n)
    oblong = describe((2,24,6), torch.zeros(2,3,64,96))
    assert oblong.size==(4,6) and to_map(torch.zeros(2,96,6), oblong).shape==(2,6,8,12)
    assert to_map(torch.zeros(2,30,6), oblong).shape==(2,6,5,6)          # no proportions fit, its columns do

# ---- where stages end: names that were expected ----

def segmentation(name, **kw):
    "One of torchvision's, with random weights"
    models = pytest.importorskip('torchvision').models.segmentation
    return getattr(models, name)(weights=None, weights_backbone=None, num_classes=21, **kw)

def unet():
    from fastai.vision.models.unet import DynamicUnet
    resnet = pytest.importorskip('torchvision').models.resnet18()
    return DynamicUnet(nn.Sequential(*list(resnet.children())[:-2]), 5, (64,64))

def segformer():
    hf = pytest.importorskip('transformers')
    return hf.SegformerForSemanticSegmentation(hf.SegformerConfig(
        depths=[1,2,1,1], hidden_sizes=[8,16,24,32], decoder_hidden_size=16, num_attention_heads=[1,2,3,4],
        num_labels=40))

class Deep(nn.Module):
    "Three convolutions, with a head between them whose answer is an output too"
    def __init__(self):
        super().__init__()
        self.a,self.b,self.c = (nn.Conv2d(i, o, 3, 2, 1) for i,o in [(3,8),(8,16),(16,16)])
        self.aux,self.head = nn.Conv2d(16, 5, 1),nn.Conv2d(16, 5, 1)
    def forward(self, x):
        early = self.b(self.a(x))
        return self.aux(early),self.head(self.c(early))

def small(*more):
    "Two halvings, then what makes an answer of every position"
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(), *more)

resnet,mobile = ['backbone.relu','backbone.layer1','backbone.layer4'],['backbone.3','backbone.6','backbone.16']
segformers = [f'segformer.stages.{i}' for i in range(4)]
if hf_old:                                               # transformers 4 has no module for a stage
    segformers = [*(f'segformer.encoder.layer_norm.{i}' for i in range(3)),'segformer.encoder[last_hidden_state]']
dense = {
    'FCN': (lambda: segmentation('fcn_resnet50'), resnet),
    'FCN, auxiliary': (lambda: segmentation('fcn_resnet50', aux_loss=True), resnet),
    'FCN, normalised first': (lambda: nn.Sequential(nn.BatchNorm2d(3), segmentation('fcn_resnet50', aux_loss=True)),
                              ['0',*(f'1.{n}' for n in resnet)]),
    'DeepLab': (lambda: segmentation('deeplabv3_resnet50'), resnet),
    'DeepLab, auxiliary': (lambda: segmentation('deeplabv3_resnet50', aux_loss=True), resnet),
    'DeepLab, mobile': (lambda: segmentation('deeplabv3_mobilenet_v3_large'), mobile),      # its head has most weights
    'DeepLab, mobile, auxiliary': (lambda: segmentation('deeplabv3_mobilenet_v3_large', aux_loss=True), mobile),
    'LR-ASPP': (lambda: segmentation('lraspp_mobilenet_v3_large'), mobile),
    'U-Net': (unet, ['layers.0.4','layers.0.5','layers.0.6','layers.3']),
    'SegFormer': (segformer, segformers),
    'a head in the middle': (Deep, ['a','b','c']),
    'logits alone': (lambda: small(nn.Conv2d(8, 5, 1)), ['1','3']),
    'logits made larger': (lambda: small(nn.Conv2d(8, 5, 1), nn.Upsample(scale_factor=4)), ['1','3']),
    'one that grows': (lambda: small(nn.Conv2d(8, 5, 1), nn.ConvTranspose2d(5, 5, 4, 4)), ['1','4']),
}

@pytest.mark.parametrize('name', dense)
def test_stages_of_dense_networks(name):
    "They are of the trunk, none is a head's or the logits"
    make,want = dense[name]
    torch.manual_seed(0)
    assert [s.name for s in stages(make(), torch.randn(2, 3, 64, 64))]==want

def hugging(name, head='ForSequenceClassification', **kw):
    hf = pytest.importorskip('transformers')
    return getattr(hf, name+head)(getattr(hf, name+'Config')(**kw))

def bert(n): return hugging('Bert', hidden_size=16, num_hidden_layers=n, num_attention_heads=2, intermediate_size=32)
def albert(): return hugging('Albert', embedding_size=8, hidden_size=16, num_hidden_layers=8, num_attention_heads=2,
                             intermediate_size=32)
def gpt2(): return hugging('GPT2', 'LMHeadModel', n_embd=16, n_layer=6, n_head=2)
def table(*layers):
    from fastai.tabular.model import TabularModel
    return TabularModel([(4,3),(5,4)], 3, 2, list(layers))
def awd(make, config, **kw):
    from fastai.text.models import awdlstm,core
    config = {**getattr(awdlstm, f'awd_lstm_{config}_config'), **dict(emb_sz=8, n_hid=12, n_layers=3)}
    return getattr(core, make)(awdlstm.AWD_LSTM, 50, config=config, **kw)

class Recurrent(nn.Module):
    "Two recurrent layers that are no list, and the last word's answer"
    def __init__(self):
        super().__init__()
        self.emb,self.low = nn.Embedding(5000, 8),nn.GRU(8, 12, batch_first=True)
        self.high,self.fc = nn.LSTM(12, 16, 2, batch_first=True),nn.Linear(16, 2)
    def forward(self, x): return self.fc(self.high(self.low(self.emb(x))[0])[0][:,-1])

class Parallel(nn.Module):
    "Convolutions over words, side by side"
    def __init__(self):
        super().__init__()
        self.emb,self.fc = nn.Embedding(50, 8),nn.Linear(12, 2)
        self.convs = nn.ModuleList([nn.Conv1d(8, 6, k, padding=k//2) for k in (3,5)])
    def forward(self, x):
        z = self.emb(x).mT
        return self.fc(torch.cat([c(z).relu().amax(2) for c in self.convs], 1))

def mlp(*widths, first=()):
    layers = [o for i,w in zip(widths, widths[1:]) for o in (nn.Linear(i, w),nn.ReLU())]
    return nn.Sequential(*first, *layers[:-1])

text,row = torch.randint(2, 50, (4,30)),(torch.ones(4, 2).long(),torch.randn(4, 3))
def layers(path, *numbers): return [path.format(n) for n in numbers]
def blocks(path, *numbers): return [hf_block(n) for n in layers(path, *numbers)]
deep = {
    'BERT, 6 blocks': (lambda: bert(6), text, blocks('bert.encoder.layer.{}', 1, 2, 4, 5)),
    'BERT, 2 blocks': (lambda: bert(2), text, blocks('bert.encoder.layer.{}', 0, 1)),
    'ALBERT': (albert, text, None),
    'GPT-2': (gpt2, text, blocks('transformer.h.{}', 1, 2, 4, 5)),
    'AWD_LSTM, language model': (lambda: awd('get_language_model', 'lm'), text, layers('0.rnns.{}[0]', 0, 1, 2)),
    'AWD_LSTM, classifier': (lambda: awd('get_text_classifier', 'clas', n_class=2), text,
                             layers('0.module.rnns.{}[0]', 0, 1, 2)),
    'AWD_LSTM, in stretches': (lambda: awd('get_text_classifier', 'clas', n_class=2, seq_len=10), text, ['0[0]']),
    'recurrent': (Recurrent, text, ['low[0]','high[0]']),
    'convolutions over words': (Parallel, text, ['convs.0','convs.1']),
    'a table': (lambda: table(20, 10), row, ['layers.0','layers.1']),
    'a table, one layer': (lambda: table(20), row, ['layers.0']),
    'a table, uneven': (lambda: table(100, 10, 50, 20, 30), row, layers('layers.{}', 1, 2, 3, 4)),
    'linear layers': (lambda: mlp(5, 8, 8, 3), row[1].new_zeros(4, 5), ['0','2']),
    'linear layers on pictures': (lambda: mlp(48, 9, 8, 3, first=[nn.Flatten()]), torch.zeros(4, 3, 4, 4), ['1','3']),
    'nothing on the way': (lambda: mlp(5, 3), torch.zeros(4, 5), []),
}

@pytest.mark.parametrize('name', deep)
def test_stages_of_texts_and_tables(name):
    "By depth, whatever computes; without the logits"
    make,x,want = deep[name]
    torch.manual_seed(0)
    found = stages(make(), x)
    if name=='ALBERT':                                   # one module that runs eight times
        *_,last = found
        want = [hf_block(f'{last.name.partition("#")[0]}#{n}') for n in (2,4,6,8)]
    assert [s.name for s in found]==want
    assert all(s.size==((30,) if x is text else ()) for s in found)
