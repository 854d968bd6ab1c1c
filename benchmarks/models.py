"""The residual networks for 32×32 images of He et al. (CVPR 2016, section 4.2): `resnet8`, `resnet20`, `resnet56`,
any depth 6n+2; and two variants that trained weights are found for."""
import torch.nn.functional as F
from torch import nn

class Block(nn.Module):
    """Two 3×3 convolutions and a shortcut; where the size changes the shortcut is strided and padded with zeros,
    without parameters"""
    def __init__(self, ni, nf, stride=1):
        super().__init__()
        self.conv1,self.bn1 = nn.Conv2d(ni, nf, 3, stride, 1, bias=False),nn.BatchNorm2d(nf)
        self.conv2,self.bn2 = nn.Conv2d(nf, nf, 3, 1, 1, bias=False),nn.BatchNorm2d(nf)
        self.stride,self.pad = stride,(nf-ni)//2
    def forward(self, x):
        z = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.pad: x = F.pad(x[:,:,::self.stride,::self.stride], (0,0,0,0,self.pad,self.pad))
        return F.relu(z+x)

def stage(n, ni, nf, stride):
    "`n` blocks, of which the first changes width and size"
    return nn.Sequential(Block(ni, nf, stride), *[Block(nf, nf) for _ in range(n-1)])

class CifarResNet(nn.Module):
    "`depth` is 6n+2: three stages of n blocks, 16, 32 and 64 channels wide"
    def __init__(self, depth, n_classes=100):
        super().__init__()
        n = (depth-2)//6
        self.conv1,self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False),nn.BatchNorm2d(16)
        self.layer1,self.layer2,self.layer3 = stage(n, 16, 16, 1),stage(n, 16, 32, 2),stage(n, 32, 64, 2)
        self.fc = nn.Linear(64, n_classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d): nn.init.kaiming_normal_(m.weight, mode='fan_out')
    def forward(self, x, maps=False):
        "The logits; with `maps` also what the three stages return, as a loop written by hand would have it"
        a = self.layer1(F.relu(self.bn1(self.conv1(x))))
        b = self.layer2(a)
        c = self.layer3(b)
        pred = self.fc(c.mean((2,3)))
        return (pred,[a,b,c]) if maps else pred

class Projecting(nn.Module):
    "A block whose shortcut is, where width or size changes, a 1×1 convolution with BatchNorm"
    def __init__(self, ni, nf, stride, act):
        super().__init__()
        self.conv1,self.bn1 = nn.Conv2d(ni, nf, 3, stride, 1, bias=False),nn.BatchNorm2d(nf)
        self.conv2,self.bn2 = nn.Conv2d(nf, nf, 3, 1, 1, bias=False),nn.BatchNorm2d(nf)
        self.shortcut,self.act = nn.Sequential(),act
        if stride>1 or ni!=nf:
            self.shortcut = nn.Sequential(nn.Conv2d(ni, nf, 1, stride, bias=False), nn.BatchNorm2d(nf))
    def forward(self, x):
        z = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return self.act(z+self.shortcut(x))

class PublishedResNet(nn.Module):
    """Networks of 6n+2 layers as trained ones are found: `stem` channels before the three stages; `late` has no ReLU
    behind a block but one behind each stage, and a head that sees 2×2 places"""
    def __init__(self, depth, stem=16, late=False, n_classes=100):
        super().__init__()
        def stage(ni, nf, stride):
            blocks = [Projecting(i, nf, s, nn.Identity() if late else nn.ReLU())
                      for i,s in [(ni,stride), *[(nf,1)]*((depth-2)//6-1)]]
            return nn.Sequential(*blocks, *[nn.ReLU()]*late)
        self.conv1,self.bn1,self.places = nn.Conv2d(3, stem, 3, 1, 1, bias=False),nn.BatchNorm2d(stem),1+late
        self.layer1,self.layer2,self.layer3 = stage(stem, 16, 1),stage(16, 32, 2),stage(32, 64, 2)
        self.linear = nn.Linear(64*self.places**2, n_classes)
    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(F.avg_pool2d(x, x.shape[-1]//self.places).flatten(1))

def wide_stem(depth): return PublishedResNet(depth, stem=64, late=True)

def resnet8(n_classes=100): return CifarResNet(8, n_classes)
def resnet20(n_classes=100): return CifarResNet(20, n_classes)
def resnet56(n_classes=100): return CifarResNet(56, n_classes)
