"""
What a training step costs: this project's trainer against a bare loop, its model against transformers', bfloat16 against float32.

    python projects/bench/train.py                          # on a CPU, some minutes
    python projects/bench/train.py --gpu                    # gpt2 at 1024 tokens on a GPU: bfloat16 and torch.compile, with utilisation

Needs `pip install -e ".[test]"`. All ways take turns in one process; the figures are medians.
"""

import argparse
import statistics
import time

import numpy as np
import torch

from mingpt.model import GPT
from mingpt.trainer import Trainer

class Tokens(torch.utils.data.Dataset):
    """Windows of T tokens from a row of random ones, fetched a batch at a time."""

    def __init__(self, vocab_size: int, T: int):
        self.tokens, self.T = np.random.default_rng(0).integers(vocab_size, size=100_000), T

    def __len__(self):
        return len(self.tokens) - self.T

    def __getitems__(self, indices):
        windows = torch.from_numpy(self.tokens[np.asarray(indices)[:, None] + np.arange(self.T + 1)]) # (B, T + 1)
        return windows[:, :-1], windows[:, 1:]

def make_gpt(T: int, vocab_size: int = 65, pdrop: float = 0.0, **sizes) -> GPT:
    config = GPT.get_default_config()
    config.merge_from_dict(dict(vocab_size=vocab_size, block_size=T, embd_pdrop=pdrop, resid_pdrop=pdrop, attn_pdrop=pdrop) | sizes)
    return GPT(config)

class TheirGPT(torch.nn.Module):
    """transformers' GPT-2 of the same sizes, with our forward."""

    def __init__(self, gpt: GPT):
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel
        c = gpt.config
        self.gpt = GPT2LMHeadModel(GPT2Config(vocab_size=c.vocab_size, bos_token_id=None, eos_token_id=None, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer,
                                              n_head=c.n_head, embd_pdrop=c.embd_pdrop, resid_pdrop=c.resid_pdrop, attn_pdrop=c.attn_pdrop))

    def forward(self, x, y):
        logits = self.gpt(x, use_cache=False).logits
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())

class BareLoop:
    """Forward, backward, clip and AdamW over tensors that lie ready, and nothing else."""

    def __init__(self, model, dataset, batch_size: int, dtype=None):
        self.model, self.dtype = model.train(), dtype
        self.batches = [dataset.__getitems__(range(i, i + batch_size)) for i in range(10)]
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def run(self, steps: int) -> None:
        for step in range(steps):
            x, y = self.batches[step % 10]
            with torch.autocast("cpu", self.dtype, enabled=self.dtype is not None):
                _, loss = self.model(x, y)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

class TrainerLoop:
    """The same with the project's trainer."""

    def __init__(self, model, dataset, batch_size: int, dtype: str = "float32"):
        config = Trainer.get_default_config()
        config.merge_from_dict(dict(device="cpu", batch_size=batch_size, dtype=dtype, seed=0))
        self.trainer = Trainer(config, model, dataset)

    def run(self, steps: int) -> None:
        self.trainer.config.max_iters = steps
        self.trainer.run()

def compare(label: str, ways: dict, steps: int, rounds: int) -> None:
    """Prints the median milliseconds per step of each way, and the ratio of every way to the first."""
    for way in ways.values():
        way.run(steps)
    times = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way.run(steps)
            times[name].append((time.perf_counter() - start) / steps * 1000)
    first, *_ = medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"{label}: " + ", ".join(f"{name} {ms:.2f} ms ({ms / medians[first]:.3f})" for name, ms in medians.items()), flush=True)

def bench_cpu(rounds: int) -> None:
    for label, T, batch, steps, sizes in (("gpt-nano, T 64, B 32", 64, 32, 40, dict(model_type="gpt-nano")),
                                          ("gpt-mini, T 128, B 16", 128, 16, 5, dict(model_type="gpt-mini"))):
        data = Tokens(65, T)
        compare(label, {"bare loop": BareLoop(make_gpt(T, **sizes), data, batch), "trainer": TrainerLoop(make_gpt(T, **sizes), data, batch)}, steps, rounds)
    data, sizes = Tokens(65, 256), dict(n_layer=6, n_head=6, n_embd=384)
    gpt = make_gpt(256, **sizes)
    compare("6 x 384, T 256, B 16, one bare loop for all", {
        "mingpt": BareLoop(gpt, data, 16),
        "transformers": BareLoop(TheirGPT(gpt), data, 16),
        "mingpt bfloat16": BareLoop(make_gpt(256, **sizes), data, 16, torch.bfloat16),
    }, 1, rounds)

def bench_gpu(rounds: int) -> None:
    """gpt2 124M at T 1024: milliseconds, tokens/s, and the share of the matrix rate that is measured in the same run."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    rates = []
    for _ in range(20):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        a @ a
        end.record()
        torch.cuda.synchronize()
        rates.append(2 * 8192 ** 3 / (start.elapsed_time(end) / 1000))
    peak = statistics.median(rates)
    print(f"{torch.cuda.get_device_name()}: a bfloat16 product of 8192 x 8192 runs at {peak / 1e12:.0f} TFLOP/s")
    T = 1024
    for batch, compiled in ((8, False), (8, True), (32, True), (64, True)):
        model = make_gpt(T, vocab_size=50304, model_type="gpt2") # the vocabulary rounded up to a multiple of 64
        config = Trainer.get_default_config()
        config.merge_from_dict(dict(device="cuda", dtype="bfloat16", compile=compiled, batch_size=batch, seed=0, log_interval=0, max_iters=15 + 10 * rounds))
        trainer, ends = Trainer(config, model, Tokens(50257, T)), []

        def note(trainer):
            if trainer.iter_num >= 14 and (trainer.iter_num - 14) % 10 == 0:
                torch.cuda.synchronize()
                ends.append(time.perf_counter())

        trainer.set_callback("on_batch_end", note)
        trainer.run()
        seconds = statistics.median(b - a for a, b in zip(ends, ends[1:])) / 10
        c, parameters = model.config, sum(p.numel() for p in model.parameters()) - model.transformer.wpe.weight.numel()
        flops = batch * T * (6 * parameters + 12 * c.n_layer * c.n_embd * T) # PaLM, appendix B
        print(f"B {batch}, compile {compiled}: {seconds * 1000:.1f} ms, {batch * T / seconds:,.0f} tokens/s, "
              f"{flops / seconds / 1e12:.0f} TFLOP/s, {flops / seconds / peak:.1%} of the matrix rate, "
              f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB", flush=True)
        del trainer, model
        torch.cuda.empty_cache()

def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, medians of {args.rounds} rounds")
    (bench_gpu if args.gpu else bench_cpu)(args.rounds)

if __name__ == "__main__":
    main()
