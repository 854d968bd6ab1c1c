"The residual networks for 32×32 images of He et al. (CVPR 2016, section 4.2): `resnet20`, `resnet56`, any depth 6n+2."
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

def resnet20(n_classes=100): return CifarResNet(20, n_classes)
def resnet56(n_classes=100): return CifarResNet(56, n_classes)
