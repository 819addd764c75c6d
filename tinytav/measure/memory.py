"""What a part of the work needs, memory and arithmetic, found by running it once on fake tensors.

Fake tensors have a shape, a type and a device, and no data. So a step of any size runs in seconds and takes no memory,
through the same code and in the same precision as the real one. Torch hands every operation to the innermost dispatch
mode: ours adds up the storages that are alive. What it cannot see is scratch memory within one operation, and what
Python and torch themselves take.
"""
import weakref
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass

import torch

# FakeTensorMode is not public. Public are only meta tensors: they choose another attention, which keeps its whole matrix.
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, register_flop_formula

from tinytav import pipeline
from tinytav.inflation import VideoUNet
from tinytav.stable_diffusion.ddim import Schedule
from tinytav.stable_diffusion.unet import ResnetBlock, Transformer, UNetConfig
from tinytav.stable_diffusion.vae import VAE, VAEConfig
from tinytav.tuning import Tuner, denoising_loss

# ---- What is simulated, and what comes out -------------------------------------------------------

@dataclass(frozen=True)
class Work:
    """The size of the work: a clip's latents (1, 4, frames, height, width), models and precision."""
    frames: int
    height: int
    width: int
    dtype: torch.dtype = torch.float32              # of the frozen weights; the tuned ones are float32
    device: str = "cpu"                             # its kind. Fake "cuda" needs a torch that has CUDA
    unet: UNetConfig = UNetConfig()
    vae: VAEConfig = VAEConfig()
    attention: str = "sparse-causal"
    norm: str = "clip"
    tokens: int = 77                                # of a prompt

    @property
    def shape(self):
        return 1, 4, self.frames, self.height, self.width

    def context(self):
        return torch.zeros(1, self.tokens, self.unet.cross_attention_dim)


@dataclass(frozen=True)
class Block:
    """What one resnet or transformer of the U-Net keeps for the gradient, in the order in which they run."""
    name: str
    kept: int                                       # bytes, beside its input and output
    flops: int                                      # of its forward: what computing it again costs


@dataclass(frozen=True)
class Cost:
    """What a simulation found, in bytes and floating-point operations."""
    weights: int                                    # alive before the work begins
    peak: int                                       # alive at the most, weights included
    flops: int                                      # of matrix products, convolutions and attention
    blocks: tuple[Block, ...] = ()                  # of tuning without recomputing
    peaks: tuple[int, ...] = ()                     # of tuning without recomputing, by place: see Meter.watch


def work_on(sd, net, shape):
    """The Work of tuning `net` on a clip whose latents have this shape (1, 4, f, h, w), or of sampling such a clip from it."""
    return Work(*shape[2:], sd.dtype, sd.device.type, net.cfg, sd.vae.cfg, net.attention, net.norm)


# ---- The simulation ------------------------------------------------------------------------------

class Meter(TorchDispatchMode):
    """Sees every operation: adds up the storages that are alive and the operation's FLOPs.

    `peaks` holds the most bytes alive in each `place`, a number that whoever runs the work may set.
    """

    def __init__(self):
        super().__init__()
        self.alive, self.known, self.flops = 0, set(), 0
        self.place, self.peaks = 0, defaultdict(int)
        self.weights, self.blocks = 0, []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = operation(*args, **kwargs)
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self.add(value.untyped_storage())
        formula = flop_registry.get(operation.overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        return result

    def add(self, storage):
        """Counts a storage, once, until the last tensor that uses it is gone."""
        key, size = storage._cdata, storage.nbytes()        # where it lies; a fake storage has no data_ptr()
        if key not in self.known:
            self.known.add(key)
            self.alive += size
            weakref.finalize(storage, self.remove, key, size)
        self.peaks[self.place] = max(self.peaks[self.place], self.alive)

    def remove(self, key, size):
        self.known.remove(key)
        self.alive -= size

    def begin(self):
        """The models are there: what follows is the work."""
        self.weights = self.alive
        self.peaks.clear()
        self.flops = 0

    def watch(self, name, block):
        """Notes what a block keeps and computes, and the peaks by place.

        The n-th block to run has place 2 * n, forward and backward; between it and the next one is place 2 * n + 1.
        """
        before = {}

        def enter(block, inputs):
            before.update(number=len(self.blocks), alive=self.alive, flops=self.flops)
            self.place = 2 * before["number"]

        def leave(block, inputs, output):
            kept = self.alive - before["alive"] - output.nbytes
            self.blocks.append(Block(name, kept, self.flops - before["flops"]))
            self.place = 2 * before["number"] + 1
            if output.requires_grad:
                output.register_hook(enter_backward)

        def enter_backward(gradient):
            self.place = 2 * before["number"]

        block.register_forward_pre_hook(enter)
        block.register_forward_hook(leave)

    def cost(self):
        peaks = tuple(self.peaks[place] for place in range(max(self.peaks) + 1))
        return Cost(self.weights, max(peaks), self.flops, tuple(self.blocks), peaks)


@contextmanager
def simulation(device):
    """Within it tensors are fake, new ones are on `device`, and a Meter counts."""
    with FakeTensorMode(), torch.device(device), Meter() as meter:
        yield meter


# Torch's formulas know the flash attention of CUDA, but not that of a CPU.
@register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu)
def attention_flops(query, key, *rest, out_shape=None, **settings):
    """Two matrix products for each head. Shapes: query (b, heads, n, d), key (b, heads, m, d)."""
    batch, heads, n, d = query
    return 4 * batch * heads * n * key[2] * d


@register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward)
def attention_backward_flops(gradient, query, key, *rest, out_shape=None, **settings):
    """Five matrix products: the logits once more, and the gradients of V, of the softmax, of Q and of K."""
    return attention_flops(query, key) * 5 // 2


# ---- The parts of the work -----------------------------------------------------------------------

def tuning(work, recomputed=()):
    """Cost of one step of tuning. recomputed: names of the blocks that the gradient computes again (see recompute.py)."""
    with simulation(work.device) as meter:
        net = video_unet(work)
        blocks = checkpointable(net)
        for name in recomputed:
            blocks[name].checkpointing = True
        meter.begin()
        schedule, noise = Schedule(), torch.zeros(work.shape)
        mean, std = torch.zeros(work.shape), torch.zeros(work.shape)
        tuner = Tuner(net, schedule, mean, std, work.context())
        parameters = list(tuner.parameters.values())
        for p in parameters:
            p.grad = torch.zeros_like(p)
        tuner.optimizer.step()                              # a first step of the optimiser makes its moments
        tuner.optimizer.zero_grad()
        if not recomputed:
            for name, block in blocks.items():
                meter.watch(name, block)
        loss = denoising_loss(net, schedule, mean + std * noise, noise, 0, tuner.context)
        loss.backward()
        meter.place = 0
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        tuner.optimizer.step()
        return meter.cost()


def sampling(work, guidance=12.5):
    """Cost of one step of sampling. At guidance 1 it is also that of a step of inversion."""
    with simulation(work.device) as meter:
        net = video_unet(work)
        meter.begin()
        steps = pipeline.sample(net, Schedule(), torch.zeros(work.shape), work.context(), work.context(), 1, guidance)
        pipeline.last(steps)
        return meter.cost()


def encoding(work):
    """Cost of encoding the clip."""
    with simulation(work.device) as meter:
        vae = in_precision(VAE(work.vae), work.dtype)
        meter.begin()
        factor = work.vae.factor
        pipeline.encode(vae, torch.zeros(work.frames, 3, factor * work.height, factor * work.width))
        return meter.cost()


def decoding(work):
    """Cost of decoding the clip."""
    with simulation(work.device) as meter:
        vae = in_precision(VAE(work.vae), work.dtype)
        meter.begin()
        pipeline.decode(vae, torch.zeros(work.shape))
        return meter.cost()


def checkpointable(net):
    """{name: block} of the U-Net's resnets and transformers, which may be computed again for the gradient."""
    return {name: block for name, block in net.named_modules() if isinstance(block, (ResnetBlock, Transformer))}


def video_unet(work):
    """The U-Net as inflate() makes it: frozen weights in the work's precision, tuned ones in float32."""
    net = VideoUNet(work.unet, work.frames, work.attention, work.norm)
    return in_precision(net, work.dtype, net.tuned())


def on_meta(work):
    """The U-Net without any memory: for its names and shapes."""
    with torch.device("meta"):
        return VideoUNet(work.unet, work.frames, work.attention, work.norm)


def in_precision(model, dtype, tuned=()):
    for name, p in model.named_parameters():
        if name not in tuned:
            p.data = p.data.to(dtype)
    return model.requires_grad_(False)
