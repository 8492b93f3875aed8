"""
What bench.py compares minGPT with: GPT-2 as other libraries build it, from the same sizes, with one interface.

    model = PEERS["transformers"](config)                   # config: model.config of a mingpt.model.GPT
    logits, loss = model(x, y)                              # as GPT's
    model.generate(idx, 20)                                 # greedy, with the cache of that library if it has one

All have learned positions, LayerNorm before attention and MLP, GELU in its tanh form, the embedding again as output
layer, and dropout at GPT-2's four places. What a library cannot do in this way stands at its class.
"""

import functools

import torch
import torch.nn as nn
from torch.nn import functional as F

class Peer(nn.Module):
    """A model of another library; the loss is computed as in mingpt.model."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.logits(x) # (B, T, V)
        return logits, F.cross_entropy(logits.flatten(0, 1), y.flatten()) # (B*T, V), (B*T)

class Transformers(Peer):
    """GPT2LMHeadModel."""

    def __init__(self, c):
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel
        self.net = GPT2LMHeadModel(GPT2Config(
            vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
            embd_pdrop=c.embd_pdrop, resid_pdrop=c.resid_pdrop, attn_pdrop=c.attn_pdrop,
            bos_token_id=None, eos_token_id=None)) # no token ends a text

    def logits(self, x):
        return self.net(x, use_cache=False).logits

    def generate(self, idx, new):
        mask = torch.ones_like(idx)
        return self.net.generate(idx, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0)

class LitGPT(Peer):
    """Rotates by the position instead of adding a learned one; has no dropout."""

    def __init__(self, c):
        super().__init__()
        from litgpt.config import Config
        from litgpt.model import GPT
        self.net = GPT(Config(
            n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, block_size=c.block_size, padded_vocab_size=c.vocab_size,
            rotary_percentage=1.0, parallel_residual=False, attn_bias=True, gelu_approximate="tanh"))
        self.net.apply(self.net._init_weights)
        self.net.lm_head.weight = self.net.transformer.wte.weight
        self.logits = self.net

    def generate(self, idx, new):
        from litgpt.generate.base import batched_generate_fn, generate
        (B, T), greedy = idx.shape, dict(temperature=0.0, top_p=0.0)
        self.net.max_seq_length = T + new
        self.net.set_kv_cache(B, device=idx.device, dtype=self.net.lm_head.weight.dtype)
        if B == 1:
            generate(self.net, idx[0], T + new, **greedy)
        else:
            list(batched_generate_fn(self.net, idx, T + new, sample_args=greedy, include_prompt=False,
                                     include_eos=False))
        self.net.clear_kv_cache()
        self.net.max_seq_length = self.net.config.block_size

class XTransformers(Peer):
    """Has no biases in attention and LayerNorm."""

    def __init__(self, c):
        super().__init__()
        from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper
        layers = Decoder(
            dim=c.n_embd, depth=c.n_layer, heads=c.n_head, attn_dim_head=c.n_embd // c.n_head, attn_flash=True,
            attn_dropout=c.attn_pdrop, attn_sublayer_dropout=c.resid_pdrop, ff_sublayer_dropout=c.resid_pdrop,
            ff_custom_activation=nn.GELU(approximate="tanh"))
        self.logits = TransformerWrapper(num_tokens=c.vocab_size, max_seq_len=c.block_size, attn_layers=layers,
                                         tie_embedding=True, emb_dropout=c.embd_pdrop)
        self.wrapper = AutoregressiveWrapper(self.logits)

    def generate(self, idx, new):
        return self.wrapper.generate(idx, new, temperature=0.0, cache_kv=True)

class TorchEncoder(Peer):
    """torch.nn.TransformerEncoder has no cache: each token reads all again."""

    def __init__(self, c):
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            c.n_embd, c.n_head, 4 * c.n_embd, c.resid_pdrop, functools.partial(F.gelu, approximate="tanh"),
            batch_first=True, norm_first=True)
        layer.dropout.p = 0.0 # inside the MLP, where GPT-2 has none
        self.encoder = nn.TransformerEncoder(layer, c.n_layer, nn.LayerNorm(c.n_embd), enable_nested_tensor=False)
        self.wte, self.wpe = nn.Embedding(c.vocab_size, c.n_embd), nn.Embedding(c.block_size, c.n_embd)
        for embedding in (self.wte, self.wpe):
            nn.init.normal_(embedding.weight, std=0.02)
        self.drop = nn.Dropout(c.embd_pdrop)

    def features(self, x):
        T = x.size(1)
        mask = nn.Transformer.generate_square_subsequent_mask(T, device=x.device, dtype=self.wte.weight.dtype) # (T, T)
        embedded = self.drop(self.wte(x) + self.wpe.weight[:T]) # (B, T, C)
        return self.encoder(embedded, mask, is_causal=True)

    def logits(self, x):
        return F.linear(self.features(x), self.wte.weight) # (B, T, C) -> (B, T, V)

    @torch.inference_mode()
    def generate(self, idx, new):
        for _ in range(new):
            scores = F.linear(self.features(idx[:, -len(self.wpe.weight):])[:, -1], self.wte.weight) # (B, V)
            idx = torch.cat([idx, scores.argmax(-1, keepdim=True)], dim=1)
        return idx

PEERS = {"transformers": Transformers, "litgpt": LitGPT, "x-transformers": XTransformers, "torch.nn": TorchEncoder}
