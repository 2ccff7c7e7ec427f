"""DIN attention against torch-rechub's ActivationUnit, eager and compiled: time, peak memory, share of sgemm's rate.

    python bench/bench_din_attention.py [--threads 2] [--shapes 1 2] [--modes eval train] [--memory]

Every contender computes the same attention on the same random inputs; what they return is compared before anything is
timed. Times are medians of interleaved runs. The flops are those the identity of csrc/cpu/din_attention.h needs.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
import warnings

import torch
from torch_rechub.models.ranking.din import ActivationUnit

from rankkernels.ops import din_attention

#: B, L, D, hidden widths, activation, softmax, mean length (None: no padding)
SHAPES = {
    1: (1024, 50, 16, [36], "dice", False, None),
    2: (2048, 50, 64, [80, 40], "dice", False, None),
    3: (4096, 100, 64, [36], "dice", False, None),
    4: (1024, 100, 64, [512, 256], "dice", True, None),
    5: (2048, 50, 64, [80, 40], "sigmoid", False, 12),
}


def flatten(unit):
    """The op's params and running_stats of a torch-rechub ActivationUnit."""
    params, stats = [], []
    for module in unit.attention.mlp:
        params += module.parameters()
        if isinstance(module, torch.nn.BatchNorm1d):
            stats += [module.running_mean, module.running_var]
    return params, stats


class Fused(torch.nn.Module):
    def __init__(self, unit, activation, use_softmax, lengths):
        super().__init__()
        self.params, self.stats = flatten(unit)
        self.flags = dict(activation=activation, batch_norm=True, use_softmax=use_softmax, lengths=lengths)

    def forward(self, history, target):
        out, batch_stats = din_attention(history, target, self.params, self.stats, training=self.training, **self.flags)
        if self.training:
            news = batch_stats.split([s.numel() for s in self.stats])
            torch._foreach_lerp_(self.stats, news, 0.1)
        return out


class Case:
    def __init__(self, number):
        B, L, D, self.dims, activation, use_softmax, mean_length = SHAPES[number]
        torch.manual_seed(0)
        self.unit = ActivationUnit(D, self.dims, activation, use_softmax)
        self.history = torch.randn(B, L, D).requires_grad_()
        self.target = torch.randn(B, D).requires_grad_()
        self.grad_out = torch.randn(B, D)
        lengths = None
        self.rows = B * L
        if mean_length is not None:
            lengths = torch.poisson(torch.full((B,), float(mean_length))).clamp(max=L).long()
            self.rows = int(lengths.sum())
            with torch.no_grad():
                self.history[torch.arange(L) >= lengths[:, None]] = 0
        self.fused = Fused(self.unit, activation, use_softmax, lengths)
        self.padded = lengths is not None
        products = D * self.dims[0] + sum(i * o for i, o in zip(self.dims, self.dims[1:] + [1])) + D
        self.flops = 2 * self.rows * products + 2 * B * 3 * D * self.dims[0]
        self.D, self.B, self.L = D, B, L

    def contenders(self, names):
        made = {"fused": self.fused, "eager": self.unit, "compile": None}
        if "compile" in names:
            torch._dynamo.reset()
            made["compile"] = torch.compile(self.unit)
        return {name: made[name] for name in names}

    def step(self, module, mode):
        if mode == "eval":
            with torch.inference_mode():
                return module(self.history, self.target)
        self.history.grad = self.target.grad = None
        self.unit.zero_grad(set_to_none=True)
        out = module(self.history, self.target)
        out.backward(self.grad_out)
        return out.detach()

    def check(self, modules, mode):
        """torch-rechub knows no lengths: padded rows are zeros, which change batch statistics and nothing else."""
        if self.padded and mode == "train":
            return
        results = {}
        for name, module in modules.items():
            out = self.step(module, mode)
            grads = [] if mode == "eval" else [self.history.grad, self.target.grad]
            grads += [] if mode == "eval" else [p.grad for p in self.fused.params if p.dim() == 2]
            results[name] = [out, *grads]
        for name, tensors in results.items():
            for a, b in zip(tensors, results["fused"]):
                error = float((a - b).norm() / a.norm())
                assert error < 1e-4, f"{name} and fused differ by {error:.1e}"


def interleaved(functions, seconds):
    """Median milliseconds of each function."""
    for f in functions.values():
        f()
    times = {name: [] for name in functions}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        for name, f in functions.items():
            start = time.perf_counter()
            f()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(t) for name, t in times.items()}


def peak_bytes(case, module):
    """Peak memory of a training step of this process beyond inputs, outputs and gradients (Linux)."""

    def status(key):
        with open("/proc/self/status") as f:
            return next(1024 * int(line.split()[1]) for line in f if line.startswith(key))

    case.step(module, "train")
    out = case.step(module, "train")
    leaves = [case.history, case.target, *case.fused.params]
    results = sum(t.numel() * t.element_size() for t in (out, *(leaf.grad for leaf in leaves)))
    for leaf in leaves:
        leaf.grad = None
    before = status("VmRSS")
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")
    case.step(module, "train")
    return status("VmHWM") - before - results


def print_memory(number):
    """One process a contender, so that none sees what another's allocator kept; freed buffers go back to the system."""
    mib, environment = {}, {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    for name in ("fused", "eager"):
        command = [sys.executable, __file__, "--shapes", str(number), "--contenders", name, "--peak-of-this-process"]
        result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        mib[name] = float(result.stdout)
    print(
        f"  peak   fused {mib['fused']:8.1f} MiB   eager {mib['eager']:8.1f} MiB = {mib['eager'] / mib['fused']:.0f} x"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shapes", type=int, nargs="+", default=list(SHAPES))
    parser.add_argument("--modes", nargs="+", default=["eval", "train"])
    parser.add_argument("--contenders", nargs="+", default=["fused", "eager", "compile"])
    parser.add_argument("--seconds", type=float, default=10, help="of each measurement")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time")
    parser.add_argument("--peak-of-this-process", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    if args.peak_of_this_process:
        case = Case(args.shapes[0])
        print(peak_bytes(case, case.contenders(args.contenders)[args.contenders[0]]) / 2**20)
        return
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    for number in args.shapes:
        case = Case(number)
        B, L, D, dims, activation, softmax, mean_length = SHAPES[number]
        print(f"B{B} L{L} D{D} {dims} {activation}{' softmax' * softmax}", end="")
        print(f", {case.rows} of {B * L} rows" if case.padded else "", flush=True)
        if args.memory:
            print_memory(number)
            continue
        for mode in args.modes:
            for module in (case.unit, case.fused):
                module.train(mode == "train")
            modules = case.contenders(args.contenders)
            case.check(modules, mode)
            functions = {name: (lambda m=m: case.step(m, mode)) for name, m in modules.items()}
            functions["sgemm"] = lambda: torch.mm(a, b)
            ms = interleaved(functions, args.seconds)
            line = f"  {mode:5}  fused {ms['fused']:8.2f} ms"
            for name in args.contenders:
                if name != "fused":
                    line += f"   {name} {ms[name]:8.2f} ms = {ms[name] / ms['fused']:5.1f} x"
            sgemm = 2 * 2048**3 / ms["sgemm"] / 1e6
            if mode == "eval":
                rate = case.flops / ms["fused"] / 1e6
                line += f"   {rate:.0f} GFLOP/s = {100 * rate / sgemm:.0f} % of sgemm's {sgemm:.0f}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
