"""
The GPT: a stack of Transformer blocks that reads a row of tokens and predicts the next one.

    from mingpt.model import GPT
    config = GPT.get_default_config()
    config.model_type, config.vocab_size, config.block_size = 'gpt2', 50257, 1024
    model = GPT(config)                                     # fresh weights
    logits, loss = model(idx, targets)                      # train on it
    idx = model.generate(idx, max_new_tokens=20)            # or let it write

    model = GPT.from_pretrained('gpt2')                     # OpenAI's weights

Letters in the shape comments: B batch, T time (tokens in a row), C channels (n_embd), V vocabulary, nh heads, hs head size.
The shape of the network is GPT-2's: "Language Models are Unsupervised Multitask Learners", section 2.3.
"""

import json
import logging
import math
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn import functional as F

from mingpt.utils import WEIGHT_FILES, CfgNode, eval_mode, load_repository, replacing

logger = logging.getLogger(__name__)

SIZES = { # model_type: n_layer, n_head, n_embd
    "openai-gpt":  (12, 12, 768),  # 117M parameters, GPT-1
    "gpt2":        (12, 12, 768),  # 124M
    "gpt2-medium": (24, 16, 1024), # 355M
    "gpt2-large":  (36, 20, 1280), # 774M
    "gpt2-xl":     (48, 25, 1600), # 1558M
    "gopher-44m":  (8, 16, 512),   # the smallest of the Gopher paper, table 1
    "gpt-mini":    (6, 6, 192),
    "gpt-micro":   (4, 4, 128),
    "gpt-nano":    (3, 3, 48),
}

# -----------------------------------------------------------------------------

class CausalSelfAttention(nn.Module):
    """Each token gathers from itself and the tokens before it what they have to say to it, in n_head independent ways."""

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd={config.n_embd} does not divide into n_head={config.n_head} heads of equal size; "
                             "choose n_embd as a multiple of n_head")
        self.n_head = config.n_head
        self.attn_pdrop, self.resid_pdrop = config.attn_pdrop, config.resid_pdrop
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd) # query, key and value of all heads in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: torch.Tensor, cache: "KVCache | None" = None) -> torch.Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head) # (B, T, 3C) -> (B, T, 3, nh, hs)
        qkv = qkv.permute(2, 0, 3, 1, 4) # (3, B, nh, T, hs)
        past = 0 if cache is None else cache.length
        q, (k, v) = qkv[0], qkv[1:] if cache is None else cache.append(self, qkv[1:]) # (B, nh, S, hs), S = past + T for k and v
        mask = None # query i of T is token past + i: it sees that one and those before it
        if past > 0 and T > 1:
            mask = torch.ones(T, past + T, dtype=torch.bool, device=x.device).tril(past) # (T, S)
        dropout_p = self.attn_pdrop if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal=past == 0 and T > 1) # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C) # the heads side by side again
        return F.dropout(self.c_proj(y), self.resid_pdrop, self.training)

class MLP(nn.Module):
    """What each token makes of what it gathered: two layers, the inner one four times as wide."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.gelu_approximate, self.resid_pdrop = config.gelu_approximate, config.resid_pdrop

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.gelu(self.c_fc(x), approximate=self.gelu_approximate) # (B, T, C) -> (B, T, 4C)
        return F.dropout(self.c_proj(x), self.resid_pdrop, self.training) # -> (B, T, C)

class Block(nn.Module):
    """Attention, then MLP; each reads a normalised copy of the residual stream and adds its result to it."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, cache: "KVCache | None" = None) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))

class KVCache:
    """The keys and values of the tokens that a model has read, so that it reads on without reading them again.

    cache = KVCache(model.block_size); model(idx, cache=cache) appends to it: call on with the tokens that follow, one or more.
    """

    def __init__(self, max_length: int):
        self.max_length = max_length # tokens that it has room for
        self.length = 0 # tokens in it
        self.kv = {} # attention module -> (2, B, nh, max_length, hs)

    def append(self, layer: nn.Module, kv: torch.Tensor) -> torch.Tensor:
        """Adds keys and values of a layer, (2, B, nh, T, hs); returns all that it has of the layer, (2, B, nh, length + T, hs)."""
        two, B, nh, T, hs = kv.shape
        if layer not in self.kv:
            self.kv[layer] = kv.new_empty(two, B, nh, self.max_length, hs)
        self.kv[layer].narrow(3, self.length, T).copy_(kv)
        return self.kv[layer].narrow(3, 0, self.length + T)

# -----------------------------------------------------------------------------

def logits_to_probs(logits: torch.Tensor, temperature: float = 1.0, top_k: int | None = None,
                    top_p: float | None = None) -> torch.Tensor:
    """The distribution to draw the next token from: (B, V) logits -> (B, V) probabilities.

    temperature (> 0) flattens it above 1 and sharpens it below; top_k leaves the k likeliest tokens; top_p then leaves the
    fewest that hold this much of the probability together (nucleus sampling, Holtzman et al. 2019, section 3.1).
    """
    logits = logits.float() / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:] # (B, 1)
        logits = logits.masked_fill(logits < kth, -torch.inf)
    probs = logits.softmax(-1)
    if top_p is not None:
        ordered, order = probs.sort(descending=True) # (B, V)
        superfluous = ordered.cumsum(-1) - ordered >= top_p # the likelier tokens hold enough without this one
        probs = probs.masked_fill(superfluous.scatter(-1, order, superfluous), 0.0) # back in the order of the vocabulary
        probs = probs / probs.sum(-1, keepdim=True)
    return probs

class GPT(nn.Module):
    """A GPT language model."""

    @staticmethod
    def get_default_config() -> CfgNode:
        C = CfgNode()
        C.model_type = "gpt" # a name in SIZES, or leave it and give n_layer, n_head and n_embd
        C.n_layer = None
        C.n_head = None
        C.n_embd = None # channels
        C.vocab_size = None # required: number of different tokens
        C.block_size = None # required: the most tokens that the model can look back on
        C.embd_pdrop = 0.1 # dropout after the embedding; 0 is off
        C.resid_pdrop = 0.1 # dropout where attention and MLP join the residual stream
        C.attn_pdrop = 0.1 # dropout on the attention weights
        C.gelu_approximate = "tanh" # the form of GELU that GPT-2 was trained with; 'none' is the exact one
        C.tie_weights = True # one matrix embeds the tokens and scores them at the end, as in the GPT papers
        return C

    def __init__(self, config: CfgNode):
        """Builds the model with fresh weights. `config` stays as it is; what became of it is `self.config`."""
        super().__init__()
        self.config = config = resolve_config(config)
        self.block_size = config.block_size
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd), # what a token is
            wpe=nn.Embedding(config.block_size, config.n_embd), # where it stands
            drop=nn.Dropout(config.embd_pdrop),
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.transformer.wte.weight
        self._init_weights()
        self.register_load_state_dict_pre_hook(_adapt_state_dict)
        logger.info("number of parameters: %.2fM", sum(p.numel() for p in self.parameters()) / 1e6)

    def _init_weights(self) -> None:
        """GPT-2's initialisation: N(0, 0.02), and smaller for what adds to the residual stream, which 2 n_layer terms share."""
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if name.endswith("c_proj") else 0.02
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None,
                cache: KVCache | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scores every next token: idx (B, T) -> logits (B, T, V), and the mean cross-entropy in nats if targets are given.

        targets (B, T) holds the tokens to be predicted; positions where it is -1 are not counted. With a cache, idx goes on
        where the cache ends. Raises ValueError if there are more than block_size tokens or, on a CPU, unknown ones.
        """
        logits = self.lm_head(self._features(idx, cache)) # (B, T, V)
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1) # (B*T, V), (B*T)
        return logits, loss

    def _features(self, idx: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """All of the model but its last layer: (B, T) tokens -> (B, T, C)."""
        past = 0 if cache is None else cache.length
        end = past + idx.size(1)
        if end > self.block_size:
            raise ValueError(f"got a sequence of {end} tokens, but block_size is {self.block_size}; "
                             "shorten it, or build the model with a larger block_size")
        try:
            tok_emb = self.transformer.wte(idx) # (B, T, C)
        except IndexError:
            raise ValueError(f"got tokens from {idx.min()} to {idx.max()}, but the vocabulary goes from 0 to "
                             f"{self.config.vocab_size - 1}; is this the right encoder for the model?") from None
        pos_emb = self.transformer.wpe(torch.arange(past, end, device=idx.device)) # (T, C)
        x = self.transformer.drop(tok_emb + pos_emb)
        for block in self.transformer.h:
            x = block(x, cache)
        if cache is not None:
            cache.length = end
        return self.transformer.ln_f(x)

    def configure_optimizers(self, train_config) -> torch.optim.AdamW:
        """AdamW with the weight decay on the matrices of Linear layers; biases, LayerNorm and embeddings go without.

        Reads learning_rate, betas and weight_decay. A head tied to the embedding counts as embedding.
        """
        decay = {m.weight for m in self.modules() if isinstance(m, nn.Linear)} - {self.transformer.wte.weight}
        groups = [
            {"params": [p for p in self.parameters() if p in decay], "weight_decay": train_config.weight_decay},
            {"params": [p for p in self.parameters() if p not in decay], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=train_config.learning_rate, betas=train_config.betas, fused=True)

    def generate(self, idx: torch.Tensor, max_new_tokens: int, temperature: float = 1.0, do_sample: bool = False,
                 top_k: int | None = None, top_p: float | None = None, stop_token: int | None = None,
                 use_cache: bool = True) -> torch.Tensor:
        """Continues a prompt: idx (B, T) -> (B, T + max_new_tokens), the likeliest token each time, or drawn if do_sample.

        temperature, top_k and top_p shape the draw (see logits_to_probs); temperature 0 is greedy. A row that came to
        stop_token repeats it from there, and all end once every row has. The model sees the last block_size tokens.
        It is in eval mode meanwhile. Raises ValueError for an empty prompt or a setting out of range.
        """
        new = list(self.stream(idx, max_new_tokens, temperature, do_sample, top_k, top_p, stop_token, use_cache))
        return torch.cat([idx] + [token[:, None] for token in new], dim=1) # (B,) each -> (B, T + new)

    def stream(self, idx: torch.Tensor, max_new_tokens: int, temperature: float = 1.0, do_sample: bool = False,
               top_k: int | None = None, top_p: float | None = None, stop_token: int | None = None, use_cache: bool = True):
        """What generate adds to the prompt, token by token as they come: yields (B,), at most max_new_tokens times."""
        if idx.dim() != 2 or idx.size(1) == 0:
            raise ValueError(f"got a prompt of shape {tuple(idx.shape)}, expected (B, T) with at least one token per row; "
                             "to start from nothing, give the token that separates texts")
        if max_new_tokens < 0:
            raise ValueError(f"got max_new_tokens={max_new_tokens}, expected 0 or more")
        if not temperature >= 0:
            raise ValueError(f"got temperature={temperature}, expected 0 (greedy) or more")
        if top_k is not None and top_k < 1:
            raise ValueError(f"got top_k={top_k}, expected at least 1, or None for all tokens")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"got top_p={top_p}, expected a share above 0 and up to 1, or None for all tokens")
        if not do_sample or temperature == 0:
            choose = lambda logits: logits.argmax(-1) # (B, V) -> (B,)
        else:
            choose = lambda logits: torch.multinomial(logits_to_probs(logits, temperature, top_k, top_p), 1)[:, 0]
        return self._stream(idx, max_new_tokens, choose, stop_token, use_cache)

    @torch.inference_mode()
    def _stream(self, idx, max_new_tokens, choose, stop_token, use_cache):
        with eval_mode(self):
            cache = KVCache(min(idx.size(1) + max_new_tokens, self.block_size)) if use_cache else None
            stopped = torch.zeros(idx.size(0), dtype=torch.bool, device=idx.device) # (B,)
            text, unread = [idx], idx # pieces (B, T), (B, 1), (B, 1), ...; and what of them the cache lacks
            for _ in range(max_new_tokens):
                if cache is not None and cache.length + unread.size(1) > self.block_size:
                    cache = None # the window moves, and with it the position of each token: what was kept holds no more
                if cache is None:
                    unread = torch.cat(text, dim=1)[:, -self.block_size:]
                x = self._features(unread, cache)[:, -1] # (B, C): only what follows the last token is asked for
                token = choose(self.lm_head(x)) # (B,)
                if stop_token is not None:
                    token = torch.where(stopped, stop_token, token)
                    stopped |= token == stop_token
                yield token
                if stop_token is not None and stopped.all():
                    break
                unread = token[:, None] # (B, 1)
                text.append(unread)

    @classmethod
    def from_pretrained(cls, name: str) -> "GPT":
        """Loads a model of the GPT-2 type, in eval mode, with its weights in the precision in which they are stored.

        name: 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', 'distilgpt2', any 'owner/repository' on the Hugging Face hub, or
        a folder. Raises ValueError, naming the field, for a model that this class cannot represent.
        """
        hf_config, raw = load_repository(HUB_NAMES.get(name, name))
        config = _config_from_gpt2(hf_config)
        config.tie_weights = hf_config.get("tie_word_embeddings", True) or "lm_head.weight" not in raw
        if config.tie_weights:
            raw.pop("lm_head.weight", None)
        state = {}
        for key, tensor in raw.items():
            key = key if key.startswith(("transformer.", "lm_head.")) else "transformer." + key # as a model without head has it
            state[key] = tensor.t() if key.endswith(TRANSPOSED) else tensor # a view: the file stays the only copy in memory
        with torch.device("meta"): # no memory, no random numbers: the weights are about to come
            model = cls(config)
        try:
            model.load_state_dict(state, assign=True)
        except RuntimeError as error:
            raise ValueError(f"the weights of {name} do not fit its config.json: {error}") from None
        if config.tie_weights:
            model.lm_head.weight = model.transformer.wte.weight
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and pytorch_model.bin, for from_pretrained and for GPT2LMHeadModel of transformers."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if others := [file for file in WEIGHT_FILES[1:] if (folder / file).exists()]:
            raise ValueError(f"{folder} holds other weights, {', '.join(others)}; save to a folder of its own")
        state = {key: tensor.t().contiguous() if key.endswith(TRANSPOSED) else tensor for key, tensor in self.state_dict().items()}
        if self.config.tie_weights:
            del state["lm_head.weight"]
        with replacing(folder / WEIGHT_FILES[0]) as part:
            torch.save(state, part)
        c = self.config
        eot = 50256 if c.vocab_size > 50256 else None # GPT-2's <|endoftext|>, where there can be one
        hf_config = dict(
            architectures=["GPT2LMHeadModel"], model_type="gpt2", vocab_size=c.vocab_size, n_positions=c.block_size,
            n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, n_inner=None, layer_norm_epsilon=1e-5,
            activation_function="gelu_new" if c.gelu_approximate == "tanh" else "gelu", embd_pdrop=c.embd_pdrop,
            resid_pdrop=c.resid_pdrop, attn_pdrop=c.attn_pdrop, tie_word_embeddings=c.tie_weights,
            bos_token_id=eot, eos_token_id=eot, dtype=str(self.lm_head.weight.dtype).removeprefix("torch."))
        with replacing(folder / "config.json") as part:
            part.write_text(json.dumps(hf_config, indent=2) + "\n", encoding="utf-8")

# -----------------------------------------------------------------------------

def resolve_config(config: CfgNode) -> CfgNode:
    """A complete copy of a model configuration, with the sizes that its model_type stands for; ValueError if it has gaps."""
    resolved = GPT.get_default_config()
    resolved.merge_from_dict(vars(config))
    names, name = ("n_layer", "n_head", "n_embd"), resolved.model_type
    if name in SIZES:
        preset = dict(zip(names, SIZES[name]))
        given = {key: getattr(resolved, key) for key in names if getattr(resolved, key) is not None}
        if given != {key: preset[key] for key in given}:
            raise ValueError(f"model_type {name!r} means {preset}, but the configuration says {given}; give one or the other")
        resolved.merge_from_dict(preset)
    elif name not in ("gpt", None):
        raise ValueError(f"unknown model_type {name!r}; choose one of {', '.join(SIZES)}, or give n_layer, n_head and n_embd")
    missing = [key for key in (*names, "vocab_size", "block_size") if getattr(resolved, key) is None]
    if missing:
        hint = "" if name in SIZES else f" (a model_type such as 'gpt2' sets {', '.join(names)})"
        raise ValueError(f"the model configuration lacks {', '.join(missing)}{hint}")
    return resolved

def _adapt_state_dict(model, state, prefix, *args) -> None:
    """Lets weights load that were saved without the tied head, or with the mask that minGPT and old transformers store."""
    for key in [key for key in state if key.endswith((".attn.bias", ".attn.masked_bias"))]:
        del state[key]
    wte, head = prefix + "transformer.wte.weight", prefix + "lm_head.weight"
    if model.config.tie_weights and wte in state and not torch.equal(state.setdefault(head, state[wte]), state[wte]):
        raise ValueError("these weights have an output layer of their own; build the model with config.tie_weights = False")

# -----------------------------------------------------------------------------
# checkpoints of the GPT-2 type, as the Hugging Face hub keeps them

HUB_NAMES = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
HUB_NAMES["distilgpt2"] = "distilbert/distilgpt2"
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight") # stored as (in, out)
GELUS = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_fast": "tanh", "gelu": "none"}

def _config_from_gpt2(hf: dict) -> CfgNode:
    """The configuration of a GPT that is what a GPT-2 type config.json describes."""
    sizes = ("n_layer", "n_head", "n_embd", "vocab_size", "n_positions")
    if missing := [field for field in sizes if field not in hf]:
        raise ValueError(f"config.json lacks {', '.join(missing)}")
    possible = dict(model_type=("gpt2",), activation_function=tuple(GELUS), n_inner=(None, 4 * hf["n_embd"]),
                    layer_norm_epsilon=(1e-5,), scale_attn_weights=(True,), scale_attn_by_inverse_layer_idx=(False,),
                    add_cross_attention=(False,))
    for field, values in possible.items():
        if hf.get(field, values[0]) not in values:
            raise ValueError(f"config.json has {field} = {hf[field]!r}; this model can only be {' or '.join(map(repr, values))} there")
    config = GPT.get_default_config()
    config.merge_from_dict({field: hf[field] for field in (*sizes[:4], "embd_pdrop", "resid_pdrop", "attn_pdrop") if field in hf})
    config.block_size = hf["n_positions"]
    config.gelu_approximate = GELUS[hf.get("activation_function", "gelu_new")]
    return config
