"What a shape says: grids of tokens with and without a picture at hand, and what a `Stage` says of itself"
import pickle
from copy import deepcopy

import pytest
import torch

from fasterdistill.networks.adapters import bridge,exit_head,regressor
from fasterdistill.networks.stages import Stage,describe,from_map,is_grid,pooled,to_map

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
    assert describe((2,)) is None and describe((2,3,4,5,6)) is None and not is_grid(None)
    with pytest.raises(ValueError, match='cannot be pooled'): pooled(torch.zeros(2,3,4,5,6))

def test_tokens_of_other_sizes_keep_the_proportions():
    "Progressive resizing: after an example of 8×8, 4×4 and 16×16 are what they are, not 2×8 and 32×8"
    st = describe((2,64,6), torch.zeros(2,3,64,64))
    for n in (4,8,16):
        z = torch.arange(n*n).float().reshape(1,n*n,1).expand(2,-1,6)
        assert to_map(z, st).shape==(2,6,n,n)
    oblong = describe((2,24,6), torch.zeros(2,3,64,96))
    assert oblong.size==(4,6) and to_map(torch.zeros(2,96,6), oblong).shape==(2,6,8,12)
    assert to_map(torch.zeros(2,30,6), oblong).shape==(2,6,5,6)          # no proportions fit, its columns do
