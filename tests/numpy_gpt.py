"""
GPT-2's forward pass in NumPy: the oracle of the tests, and a lesson of its own.

    from numpy_gpt import compute_logits
    logits = compute_logits(weights, [15496, 11], n_head=12)    # weights of OpenAI's gpt2

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3. The
weights have OpenAI's names and layout: a layer's matrix is (in, out). There is one row of tokens
and no batch. T tokens in the row, C channels, V vocabulary, nh heads, hs head size (C / nh).
"""

import numpy as np


def softmax(x):
    """Turns scores into shares: each row is above 0 and sums up to 1."""
    exps = np.exp(x - x.max(axis=-1, keepdims=True))
    return exps / exps.sum(axis=-1, keepdims=True)


def gelu(x):
    """Bends a number smoothly: the tanh form of Hendrycks and Gimpel 2016."""
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def layer_norm(x, w, name):
    """Gives each token mean 0 and variance 1, then a learned scale and shift (Ba et al. 2016)."""
    x = (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-5)
    return x * w[name + ".weight"] + w[name + ".bias"]  # (T, C)


def linear(x, w, name):
    return x @ w[name + ".weight"] + w[name + ".bias"]  # (T, in) @ (in, out) -> (T, out)


def attention(x, w, name, n_head):
    """Collects the values of earlier tokens, as their keys fit (Vaswani et al. 2017)."""
    T, C = x.shape
    hs = C // n_head
    q, k, v = np.split(linear(x, w, name + ".c_attn"), 3, axis=1)  # (T, 3C) -> three of (T, C)
    collected = []
    for i in range(n_head):
        head = slice(i * hs, (i + 1) * hs)
        scores = q[:, head] @ k[:, head].T / np.sqrt(hs)  # (T, hs) @ (hs, T) -> (T, T)
        scores[np.triu_indices(T, k=1)] = -np.inf
        collected.append(softmax(scores) @ v[:, head])  # (T, T) @ (T, hs) -> (T, hs)
    return linear(np.concatenate(collected, axis=1), w, name + ".c_proj")  # nh of (T, hs) -> (T, C)


def compute_logits(weights, tokens, n_head):
    """Scores every next token: a list of T tokens -> (T, V), in float64.

    Without `lm_head.weight` the embedding scores the tokens, as in GPT-2.
    """
    w = {name: np.asarray(value, dtype=np.float64) for name, value in weights.items()}
    x = w["wte.weight"][tokens] + w["wpe.weight"][:len(tokens)]  # (T, C)
    layer = 0
    while f"h.{layer}.ln_1.weight" in w:
        h = f"h.{layer}"
        x = x + attention(layer_norm(x, w, h + ".ln_1"), w, h + ".attn", n_head)  # (T, C)
        inner = gelu(linear(layer_norm(x, w, h + ".ln_2"), w, h + ".mlp.c_fc"))  # (T, 4C)
        x = x + linear(inner, w, h + ".mlp.c_proj")  # (T, C)
        layer += 1
    head = w.get("lm_head.weight", w["wte.weight"])  # (V, C)
    return layer_norm(x, w, "ln_f") @ head.T  # (T, C) @ (C, V) -> (T, V)


def openai_layout(model):
    """Returns the weights of a GPT of this library in OpenAI's names and layout."""
    weights = {}
    for name, tensor in model.state_dict().items():
        array = tensor.double().numpy()
        # torch stores the matrix of a layer as (out, in).
        is_layer = ".h." in name and array.ndim == 2
        weights[name.removeprefix("transformer.")] = array.T if is_layer else array
    return weights
