"""One process's part of a batch through shared batch norms: python joint_batch.py <problem> <folder>."""

import copy
import sys

import torch

from common import distributed
from common.distributed import sync_bn

device = distributed.init("cpu")
problem = torch.load(sys.argv[1], weights_only=True)
net = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4, affine=False))
net.load_state_dict(problem["net"])
sync_bn.convert(net, device)
rank = distributed.rank()
half = copy.deepcopy(net)
x = problem["x"].split(problem["sizes"])[rank].requires_grad_()
y = net(x)
(y * problem["slope"].split(problem["sizes"])[rank]).sum().backward()
gradients = {name: p.grad for name, p in net.named_parameters()}
net.eval()
with torch.autocast("cpu", torch.bfloat16):
    y16 = half(x.detach())  # batch norm of bfloat16, behind the convolution
    y16.sum().backward()
result = {"y": y.detach(), "x": x.grad, "gradients": gradients, "net": net.state_dict(), "evaluated": net(x).detach()}
result |= {"y16": y16.detach(), "net16": half.state_dict()}
torch.save(result, f"{sys.argv[2]}/{rank}.pth")
