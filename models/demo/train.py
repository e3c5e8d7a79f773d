#!/usr/bin/env python3
"""Trains and packages the Moebius demo model: from one text file to a complete checkpoint.

    python train.py --text tinyshakespeare.txt --output DIR --minutes 35

Needs torch, numpy, regex and safetensors; runs on a CPU (two threads are enough).
The architecture and the file layout are those of Kimi K2-Thinking, only very small: MLA attention, a dense first
layer, then layers with sigmoid-routed experts plus one shared expert, experts stored as INT4 in groups of 32.
The last 10 % of the text is held out; the tokenizer and the model never see it.
"""
import argparse, base64, json, math, os, time
import numpy as np, torch
import torch.nn as nn, torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

from bpe import Tokenizer, train_bpe

# ------------------------------------------------------------------------------------------------ configuration
N_MERGES = 242                      # 256 bytes + 242 merges + 14 specials = 512 rows
SPECIALS = ["[BOS]", "[EOS]", "<|im_end|>", "<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>",
            "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>",
            "<|tool_call_argument_begin|>", "<|tool_call_end|>", "<|media_pad|>", "[PAD]"]
FIRST_SPECIAL = 256 + N_MERGES
BOS, EOS, PAD = FIRST_SPECIAL, FIRST_SPECIAL + 2, FIRST_SPECIAL + len(SPECIALS) - 1
CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "kimi_k2",
    "attention_bias": False, "attention_dropout": 0.0, "aux_loss_alpha": 0.001, "bos_token_id": BOS,
    "eos_token_id": EOS, "pad_token_id": PAD, "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 256,
    "initializer_range": 0.02, "intermediate_size": 768, "kv_lora_rank": 64, "max_position_embeddings": 2048,
    "moe_intermediate_size": 128, "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 16, "n_shared_experts": 1,
    "norm_topk_prob": True, "num_attention_heads": 4, "num_experts_per_tok": 4, "num_hidden_layers": 5,
    "num_key_value_heads": 4, "num_nextn_predict_layers": 0, "pretraining_tp": 1, "q_lora_rank": 128,
    "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64, "rms_norm_eps": 1e-6, "rope_scaling": None,
    "rope_theta": 50000.0, "routed_scaling_factor": 2.0, "scoring_func": "sigmoid", "seq_aux": True,
    "tie_word_embeddings": False, "topk_group": 1, "topk_method": "noaux_tc", "torch_dtype": "bfloat16",
    "transformers_version": "4.48.3", "use_cache": True, "vocab_size": FIRST_SPECIAL + len(SPECIALS),
    "quantization_config": {
        "config_groups": {"group_0": {
            "input_activations": None, "output_activations": None, "targets": ["Linear"],
            "weights": {"actorder": None, "block_structure": None, "dynamic": False, "group_size": 32, "num_bits": 4,
                        "observer": "minmax", "observer_kwargs": {}, "strategy": "group", "symmetric": True,
                        "type": "int"}}},
        "format": "pack-quantized",
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*",
                   "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"],
        "kv_cache_scheme": None, "quant_method": "compressed-tensors", "quantization_status": "compressed"},
}
# A base model: messages are plain text, and generation simply continues it.
CHAT_TEMPLATE = ("{%- for message in messages -%}{{ message['content'] }}"
                 "{%- if message['role'] == 'assistant' -%}{{ '\\n\\n' }}{%- else -%}{{ '\\n' }}{%- endif -%}"
                 "{%- endfor -%}")

# -------------------------------------------------------------------------------------------------------- INT4
def quantize(w):
    """Symmetric INT4 per 32 columns: (integers -8..7 as float, bf16 scale), w ~ integer * scale."""
    g = w.float().unflatten(-1, (-1, 32))
    scale = (g.abs().amax(-1, keepdim=True) / 7.5).clamp_min(1e-8).bfloat16().float()
    return (g / scale).round().clamp(-8, 7), scale


def fake_quantize(w):
    """INT4 in the forward pass, identity in the backward pass: the weights learn to live on the grid."""
    with torch.no_grad():
        q, scale = quantize(w)
        delta = (q * scale).flatten(-2) - w
    return w + delta


def pack(w):
    q, scale = quantize(w)
    nibbles = (q.flatten(-2) + 8).numpy().astype(np.uint32).reshape(w.shape[0], -1, 8)
    words = (nibbles << (4 * np.arange(8, dtype=np.uint32))).sum(-1, dtype=np.uint32)
    return (torch.from_numpy(words.view(np.int32).copy()), scale.squeeze(-1).bfloat16().contiguous(),
            torch.tensor(w.shape, dtype=torch.int32))


def unpack(words, scale, shape):
    nibbles = (words.numpy().view(np.uint32)[..., None] >> (4 * np.arange(8, dtype=np.uint32))) & 15
    q = torch.from_numpy(nibbles.reshape(tuple(shape.tolist())).astype(np.float32)) - 8
    return (q.unflatten(-1, (-1, 32)) * scale.float()[..., None]).flatten(-2)


# ------------------------------------------------------------------------------------------------------- model
class Linear(nn.Linear):
    """No bias; computes in the type of its input (bf16 in training, f32 in the final measurements)."""
    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class Norm(nn.Module):
    def __init__(self, n, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(n)), eps

    def forward(self, x):
        return F.rms_norm(x.float(), x.shape[-1:], self.weight, self.eps)


class Attention(nn.Module):
    """Multi-head latent attention, materialised form."""
    def __init__(self, c):
        super().__init__()
        self.h, self.dn, self.dr, self.dv = (c["num_attention_heads"], c["qk_nope_head_dim"], c["qk_rope_head_dim"],
                                             c["v_head_dim"])
        self.rank, self.scale = c["kv_lora_rank"], (self.dn + self.dr) ** -0.5
        hid = c["hidden_size"]
        self.q_a_proj, self.q_a_layernorm = Linear(hid, c["q_lora_rank"]), Norm(c["q_lora_rank"])
        self.q_b_proj = Linear(c["q_lora_rank"], self.h * (self.dn + self.dr))
        self.kv_a_proj_with_mqa, self.kv_a_layernorm = Linear(hid, self.rank + self.dr), Norm(self.rank)
        self.kv_b_proj = Linear(self.rank, self.h * (self.dn + self.dv))
        self.o_proj = Linear(self.h * self.dv, hid)

    @staticmethod
    def rotate(x, cos, sin):                                 # interleaved pairs (x[2j], x[2j+1])
        a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(x.dtype)

    def forward(self, x, cos, sin):
        B, T, _ = x.shape
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)).to(x.dtype)).view(B, T, self.h, -1).transpose(1, 2)
        latent, k_pe = self.kv_a_proj_with_mqa(x).split((self.rank, self.dr), -1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent).to(x.dtype)).view(B, T, self.h, -1).transpose(1, 2)
        k_nope, v = kv.split((self.dn, self.dv), -1)
        k_pe = self.rotate(k_pe, cos, sin)[:, None].expand(-1, self.h, -1, -1)
        q = torch.cat((q[..., :self.dn], self.rotate(q[..., self.dn:], cos, sin)), -1)
        k = torch.cat((k_nope, k_pe), -1)
        if T > 256:                                          # the fused kernel wants v as wide as k
            y = F.scaled_dot_product_attention(q, k, F.pad(v, (0, self.dn + self.dr - self.dv)), is_causal=True,
                                               scale=self.scale)[..., :self.dv]
        else:                                                # short sequences: the plain form is faster on a CPU
            future = torch.full((T, T), float("-inf"), dtype=x.dtype).triu(1)
            scores = torch.baddbmm(future.expand(B * self.h, -1, -1), q.flatten(0, 1), k.flatten(0, 1).mT,
                                   alpha=self.scale)
            y = (scores.softmax(-1) @ v.flatten(0, 1)).view(B, self.h, T, -1)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, hid, inter):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = Linear(hid, inter), Linear(hid, inter), Linear(inter, hid)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Dropout(nn.Module):
    """Same as nn.Dropout; the mask comes from NumPy's byte stream, which is many times faster on a CPU."""
    def __init__(self, p, seed):
        super().__init__()
        self.p, self.rng = p, np.random.Generator(np.random.SFC64(seed))

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        mask = torch.frombuffer(bytearray(self.rng.bytes(x.numel())), dtype=torch.uint8) >= round(self.p * 256)
        return x * mask.view(x.shape).to(x.dtype).mul_(1 / (1 - round(self.p * 256) / 256))


class Dispatch(torch.autograd.Function):
    """Copies token rows into expert order. The backward pass is a gather as well (a scatter-add is slow on a CPU)."""
    @staticmethod
    def forward(ctx, x, source, position, k):
        ctx.position, ctx.k = position, k
        return x.index_select(0, source // k)

    @staticmethod
    def backward(ctx, grad):
        return grad.index_select(0, ctx.position).unflatten(0, (-1, ctx.k)).sum(1), None, None, None


class Combine(torch.autograd.Function):
    """Sums the k expert rows of each token."""
    @staticmethod
    def forward(ctx, y, source, position, k):
        ctx.source, ctx.k = source, k
        return y.index_select(0, position).unflatten(0, (-1, k)).sum(1)

    @staticmethod
    def backward(ctx, grad):                                 # padding rows get a gradient too; their weight is 0
        return grad.index_select(0, ctx.source // ctx.k), None, None, None


class MoE(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.E, self.k, self.scaling = c["n_routed_experts"], c["num_experts_per_tok"], c["routed_scaling_factor"]
        hid, inter = c["hidden_size"], c["moe_intermediate_size"]
        self.gate = nn.Parameter(torch.empty(self.E, hid))
        self.register_buffer("bias", torch.zeros(self.E))    # e_score_correction_bias: selects, never weighs
        self.gate_up = nn.Parameter(torch.empty(self.E, 2, inter, hid))
        self.down = nn.Parameter(torch.empty(self.E, hid, inter))
        self.shared_experts = MLP(hid, inter * c["n_shared_experts"])
        self.qat, self.load = False, torch.zeros(self.E)

    def forward(self, x):                                    # x [N, hidden]
        scores = torch.sigmoid(F.linear(x.float(), self.gate))
        chosen = (scores.detach() + self.bias).topk(self.k, -1).indices
        weight = scores.gather(-1, chosen)
        weight = weight / (weight.sum(-1, keepdim=True) + 1e-20) * self.scaling
        # (token, slot) pairs grouped by expert, every group padded to the same number of rows: three batched matrix
        # products per layer, and few distinct shapes, so that the kernels generated for them are reused
        slots = chosen.flatten()
        counts = torch.bincount(slots, minlength=self.E)
        self.load += counts
        rows = (int(counts.max()) + 127) // 128 * 128
        order = slots.argsort(stable=True)
        grouped = slots[order]
        place = torch.arange(len(order)) - (counts.cumsum(0) - counts)[grouped] + grouped * rows
        source = torch.zeros(self.E * rows, dtype=torch.long)
        source[place] = order
        position = torch.empty_like(order)
        position[order] = place
        row_weight = weight.new_zeros(self.E * rows).index_put((place,), weight.flatten()[order])
        gate_up, down = (fake_quantize(w) if self.qat else w for w in (self.gate_up, self.down))
        x_rows = Dispatch.apply(x, source, position, self.k).view(self.E, rows, -1)
        a, b = torch.bmm(x_rows, gate_up.flatten(1, 2).to(x.dtype).mT).chunk(2, -1)
        h = F.silu(a) * b * row_weight.view(self.E, rows, 1).to(x.dtype)  # before `down`: the same, and narrower
        y = torch.bmm(h, down.to(x.dtype).mT).flatten(0, 1)
        return Combine.apply(y, source, position, self.k) + self.shared_experts(x)


class Layer(nn.Module):
    def __init__(self, c, index):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = Norm(c["hidden_size"]), Norm(c["hidden_size"])
        self.self_attn = Attention(c)
        dense = index < c["first_k_dense_replace"]
        self.mlp = MLP(c["hidden_size"], c["intermediate_size"]) if dense else MoE(c)

    def forward(self, x, cos, sin, dtype, dropout):
        x = x + dropout(self.self_attn(self.input_layernorm(x).to(dtype), cos, sin))
        return x + dropout(self.mlp(self.post_attention_layernorm(x).to(dtype).flatten(0, 1)).view_as(x))


class Model(nn.Module):
    def __init__(self, c, dropout=0.0):
        super().__init__()
        self.config, self.dtype, self.dropout = c, torch.float32, Dropout(dropout, 1)
        self.embed_tokens = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.layers = nn.ModuleList(Layer(c, i) for i in range(c["num_hidden_layers"]))
        self.norm, self.lm_head = Norm(c["hidden_size"]), Linear(c["hidden_size"], c["vocab_size"])
        d = c["qk_rope_head_dim"]
        self.inv_freq = c["rope_theta"] ** (-torch.arange(0, d, 2).double() / d)
        for name, p in self.named_parameters():
            if name.startswith("embed"):
                nn.init.normal_(p, std=0.1)
            elif p.dim() > 1:                                # outputs into the residual stream start small
                out = name.split(".")[-2 if name.endswith("weight") else -1] in ("o_proj", "down_proj", "down")
                nn.init.normal_(p, std=p.shape[-1] ** -0.5 * (0.25 if out else 1.0) * (0.3 if "head" in name else 1.0))

    def moe_layers(self):
        return [layer.mlp for layer in self.layers if isinstance(layer.mlp, MoE)]

    def forward(self, ids):
        angle = (torch.arange(ids.shape[1]).double()[:, None] * self.inv_freq).float()
        cos, sin = angle.cos(), angle.sin()
        x = self.dropout(self.embed_tokens(ids))             # the residual stream stays f32
        for layer in self.layers:
            x = layer(x, cos, sin, self.dtype, self.dropout)
        return self.lm_head(self.norm(x).to(self.dtype)).float()


# --------------------------------------------------------------------------------------------------- optimiser
class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates: on a small run it needs far fewer steps than AdamW.
    The last two dimensions are the matrix, so the experts of a layer are handled in one batch."""
    def __init__(self, params, lr, weight_decay, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                buf = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buf.mul_(group["momentum"]).add_(p.grad)
                u = buf.bfloat16()                           # the scale is irrelevant: normalised below
                tall = u.shape[-2] > u.shape[-1]
                u = u.mT if tall else u
                shape, u = u.shape, (u / (u.norm(dim=(-2, -1), keepdim=True) + 1e-7)).view(-1, *u.shape[-2:])
                for _ in range(5):                           # Newton-Schulz towards the nearest semi-orthogonal matrix
                    a = u @ u.mT
                    u = torch.baddbmm(u, torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315), u, beta=3.4445)
                u = u.view(shape)
                u = (u.mT if tall else u)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(u, alpha=-group["lr"] * max(1.0, p.shape[-2] / p.shape[-1]) ** 0.5)


# -------------------------------------------------------------------------------------------------- measurement
@torch.no_grad()
def total_bits(model, ids, window, stride):
    """Bits to encode ids[1:]. Windows of `window` tokens; each but the first scores its last `stride` only, so
    every token is scored once, with at least window - stride tokens of context (except near the beginning)."""
    model.eval()
    n, nats = len(ids) - 1, 0.0
    x, y = torch.zeros(0), torch.full((n + window,), -100)
    x = torch.cat((ids, torch.zeros(window, dtype=torch.long)))
    y[:n] = ids[1:]
    starts = list(range(0, max(1, n - window + stride), stride))
    for i in range(0, len(starts), 16):
        xs = torch.stack([x[s:s + window] for s in starts[i:i + 16]])
        ys = torch.stack([y[s:s + window] for s in starts[i:i + 16]])
        for row, s in enumerate(starts[i:i + 16]):
            if s:
                ys[row, :window - stride] = -100
        nats += F.cross_entropy(model(xs).flatten(0, 1), ys.flatten(), ignore_index=-100, reduction="sum").item()
    return nats / math.log(2)


def bits_per_byte(model, ids, n_bytes, window=256, stride=256):
    # the very first token has no context: charged at log2(vocabulary)
    return (total_bits(model, ids, window, stride) + math.log2(model.config["vocab_size"])) / n_bytes


# -------------------------------------------------------------------------------------------------- checkpoint
def export(model, tokens, path):
    """Writes model.safetensors (bf16, experts INT4), the configuration and the tokenizer."""
    out, c = {}, model.config
    for name, p in model.state_dict().items():
        name = name if name.startswith("lm_head") else "model." + name
        if name.endswith(".mlp.gate"):
            out[name + ".weight"] = p.bfloat16()
        elif name.endswith(".mlp.bias"):
            out[name.replace(".bias", ".gate.e_score_correction_bias")] = p.float()
        elif name.endswith((".gate_up", ".down")):
            base = name.rsplit(".", 1)[0]
            for e in range(p.shape[0]):
                parts = {"down": p[e]} if name.endswith(".down") else {"gate": p[e, 0], "up": p[e, 1]}
                for part, w in parts.items():
                    for suffix, t in zip(("packed", "scale", "shape"), pack(w)):
                        out[f"{base}.experts.{e}.{part}_proj.weight_{suffix}"] = t
        else:
            out[name] = p.bfloat16()
    save_file({k: v.contiguous() for k, v in sorted(out.items())}, os.path.join(path, "model.safetensors"),
              metadata={"format": "pt"})
    added = {str(FIRST_SPECIAL + i): {"content": s, "lstrip": False, "normalized": False, "rstrip": False,
                                      "single_word": False, "special": True} for i, s in enumerate(SPECIALS)}
    files = {"config.json": c,
             "generation_config.json": {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD,
                                        "do_sample": True, "temperature": 0.8, "top_p": 0.95, "max_new_tokens": 256},
             "tokenizer_config.json": {
                 "add_bos_token": False, "add_prefix_space": False, "added_tokens_decoder": added,
                 "bos_token": "[BOS]", "eos_token": "<|im_end|>", "pad_token": "[PAD]", "unk_token": None,
                 "clean_up_tokenization_spaces": False, "errors": "replace",
                 "model_max_length": c["max_position_embeddings"], "tokenizer_class": "TikTokenTokenizer",
                 "chat_template": CHAT_TEMPLATE}}
    for name, content in files.items():
        with open(os.path.join(path, name), "w") as f:
            json.dump(content, f, indent=1)
            f.write("\n")
    with open(os.path.join(path, "tiktoken.model"), "wb") as f:
        for rank, token in enumerate(tokens):
            f.write(base64.b64encode(token) + b" %d\n" % rank)


def load(path):
    """Reads a checkpoint in this layout back into an f32 model: what the engine will compute, in plain torch."""
    with open(os.path.join(path, "config.json")) as f:
        model = Model(json.load(f)).eval()
    tensors = {}
    for file in sorted(f for f in os.listdir(path) if f.endswith(".safetensors") and f.startswith("model")):
        with safe_open(os.path.join(path, file), "pt") as f:
            tensors.update({k: f.get_tensor(k) for k in f.keys()})
    expert = lambda base, e, part: unpack(*(tensors[f"{base}.experts.{e}.{part}_proj.weight_{s}"]
                                            for s in ("packed", "scale", "shape")))
    state = {}
    for name in model.state_dict():
        full = name if name.startswith("lm_head") else "model." + name
        base, last = full.rsplit(".", 1)
        experts = range(model.config["n_routed_experts"])
        if last == "gate":
            state[name] = tensors[full + ".weight"].float()
        elif full.endswith(".mlp.bias"):
            state[name] = tensors[base + ".gate.e_score_correction_bias"]
        elif last == "gate_up":
            state[name] = torch.stack([torch.stack([expert(base, e, "gate"), expert(base, e, "up")]) for e in experts])
        elif last == "down":
            state[name] = torch.stack([expert(base, e, "down") for e in experts])
        else:
            state[name] = tensors[full].float()
    model.load_state_dict(state)
    return model


@torch.no_grad()
def golden(model, tok, held_ids):
    """Facts an engine can check itself against: f32 arithmetic on the de-quantised weights of the files."""
    text = "ROMEO:\nBut soft"
    prompt = tok.encode(text)
    ids, margins = list(prompt), []
    for step in range(32):
        last = model(torch.tensor([ids]))[0, -1]
        if step == 0:
            logits = last
        top = last.topk(2).values
        margins.append(round((top[0] - top[1]).item(), 5))
        ids.append(last.argmax().item())
    top = logits.topk(5)
    chunks = held_ids[:2000].view(8, 250)
    nats = [F.cross_entropy(model(c[None])[0, :-1], c[1:], reduction="sum").item() for c in chunks]
    n_bytes = sum(len(tok.tokens[i]) for c in chunks.tolist() for i in c[1:])
    samples = ["ROMEO:\n", "To be, or not to be: that is the question.\n\n", "I'll don't WE'RE  two  spaces ",
               "na\u00efve \u4e2d\u6587 \U0001f600 12345\ttab"]
    return {
        "reference": f"torch {torch.__version__.split('+')[0]}, CPU, float32, de-quantised INT4 experts, bf16 rest up-cast",
        "prompt": text, "prompt_ids": prompt, "greedy_ids": ids[len(prompt):], "greedy_margin": margins,
        "greedy_text": tok.decode(ids[len(prompt):]).decode(errors="replace"),
        "top5_ids": top.indices.tolist(), "top5_logits": [round(v, 5) for v in top.values.tolist()],
        "last_logits": [round(v, 5) for v in logits.tolist()],
        "held_out": {"how": "first 2000 tokens of the held-out text as 8 independent chunks of 250; the first token of "
                            "each chunk is context only; nats per chunk, and bits per byte over all scored tokens",
                     "ids": chunks.flatten().tolist(), "nats": [round(v, 4) for v in nats], "scored_bytes": n_bytes,
                     "bits_per_byte": round(sum(nats) / math.log(2) / n_bytes, 6)},
        "tokenizer": [{"text": s, "ids": tok.encode(s)} for s in samples],
        "chat": [{"messages": [{"role": "user", "content": "ROMEO:"}], "rendered": "ROMEO:\n"},
                 {"messages": [{"role": "system", "content": "A street."}, {"role": "user", "content": "ROMEO:"},
                               {"role": "assistant", "content": "Ay me."}, {"role": "user", "content": "JULIET:"}],
                  "rendered": "A street.\nROMEO:\nAy me.\n\nJULIET:\n"}],
    }


# ---------------------------------------------------------------------------------------------------- training
def train(model, data, held, held_bytes, args):
    muon, adam = [], []
    for name, p in model.named_parameters():
        matrix = p.dim() > 1 and not name.startswith(("embed", "lm_head")) and not name.endswith(".gate")
        (muon if matrix else adam).append(p)
    opts = [Muon(muon, lr=args.lr, weight_decay=args.weight_decay),
            torch.optim.AdamW([{"params": [p for p in adam if p.dim() > 1], "weight_decay": 0.1},
                               {"params": [p for p in adam if p.dim() == 1], "weight_decay": 0.0}],
                              lr=3e-3, betas=(0.9, 0.95), fused=True)]
    for opt in opts:
        for g in opt.param_groups:
            g["peak"] = g["lr"]
    rng, start, step, seen, recent = np.random.default_rng(args.seed), time.time(), 0, 0, []
    best, best_bpb, points = None, 1e9, [0.1, 0.25, 0.5, 0.75, args.qat_from, 0.9, 0.95, 1.0]
    model.dtype = torch.bfloat16
    while True:
        done = max(step / args.steps, 0) if args.steps else (time.time() - start) / (60 * args.minutes)
        if step % 100 == 0 and recent:
            print(f"{100 * done:5.1f} %  step {step}  train {sum(recent[-100:]) / len(recent[-100:]):.4f}", flush=True)
        if done >= points[0]:                                # a few evaluations; the best weights are kept
            bpb = bits_per_byte(model, held, held_bytes)
            loss = sum(recent) / max(1, len(recent))
            if bpb < best_bpb and (done > args.qat_from or best is None or not model.moe_layers()[0].qat):
                best, best_bpb = {k: v.clone() for k, v in model.state_dict().items()}, bpb
                if args.checkpoint:
                    torch.save(best, args.checkpoint)
            print(f"{100 * done:5.1f} %  step {step}  {time.time() - start:5.0f} s  {seen / len(data):5.1f} epochs  "
                  f"train {loss:.4f} nats/token  held-out {bpb:.4f} bits/byte", flush=True)
            if done >= 1:
                break
            recent, points = [], [p for p in points if p > done]
            for m in model.moe_layers():
                if done >= args.qat_from and not m.qat:
                    m.qat, best_bpb = True, 1e9              # from here on only INT4-trained weights count
        lr = min((step + 1) / 40, 1.0, (1 - done) / (1 - args.decay_from))
        for opt in opts:
            for g in opt.param_groups:
                g["lr"] = g["peak"] * lr
        # short sequences first (cheaper attention), then 256; one step in eight sees long ones, so that positions
        # beyond 256 are not new to the model
        T = 1024 if step % 8 == 7 and done > 0.2 else 128 if done < args.short_until else 256
        at = rng.integers(0, len(data) - T - 1, args.tokens // T)
        x = torch.stack([data[i:i + T] for i in at])
        y = torch.stack([data[i + 1:i + T + 1] for i in at])
        model.train()
        # dropout only in the second half: the first epochs cannot overfit, and dropout would slow them down
        model.dropout.p = args.dropout if done > 0.5 else 0.0
        for m in model.moe_layers():
            m.load.zero_()
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        for opt in opts:
            opt.zero_grad()
        loss.backward()
        for opt in opts:
            opt.step()
        for m in model.moe_layers():                         # balancing without an auxiliary loss: move the bias only
            m.bias += 2e-3 * min(1.0, lr) * torch.sign(m.load.mean() - m.load)
        step, seen = step + 1, seen + x.numel()
        recent.append(loss.item())
    print(f"trained: {step} steps, {seen} tokens, {time.time() - start:.0f} s, best {best_bpb:.4f} bits/byte")
    model.load_state_dict(best)


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("--text", required=True)
    ap.add_argument("--output", required=True)
    ap.add_argument("--minutes", type=float, default=35.0, help="length of the training (evaluations included)")
    ap.add_argument("--steps", type=int, help="length in steps instead: reproducible on the same machine")
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--seed", type=int, default=1)
    ap.add_argument("--tokens", type=int, default=2048, help="tokens per step")
    ap.add_argument("--lr", type=float, default=0.02)
    ap.add_argument("--weight-decay", type=float, default=0.2)
    ap.add_argument("--dropout", type=float, default=0.1)
    ap.add_argument("--decay-from", type=float, default=0.4, help="part of the run after which the rate falls to 0")
    ap.add_argument("--qat-from", type=float, default=0.85, help="part of the run after which experts train as INT4")
    ap.add_argument("--short-until", type=float, default=0.4, help="part of the run that uses 128-token sequences")
    ap.add_argument("--checkpoint", help="file for the best f32 weights so far")
    ap.add_argument("--package-only", action="store_true", help="no training: package the weights in --checkpoint")
    args = ap.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    os.makedirs(args.output, exist_ok=True)

    raw = open(args.text, "rb").read()
    cut = len(raw) - len(raw) // 10
    train_text, held_text = raw[:cut].decode(), raw[cut:].decode()
    tokens = train_bpe(train_text, N_MERGES)
    tok = Tokenizer(tokens)
    data, held = torch.tensor(tok.encode(train_text)), torch.tensor(tok.encode(held_text))
    held_bytes = len(raw) - cut
    assert tok.decode(held.tolist()) == raw[cut:]
    model = Model(CONFIG, args.dropout)
    total = sum(p.numel() for p in model.parameters())
    routed = sum(m.gate_up.numel() + m.down.numel() for m in model.moe_layers())
    active = total - routed * (1 - CONFIG["num_experts_per_tok"] / CONFIG["n_routed_experts"])
    print(f"{total} parameters, {active:.0f} active per token; training part {cut} bytes = {len(data)} tokens, "
          f"held out {held_bytes} bytes = {len(held)} tokens", flush=True)
    if args.package_only:
        model.load_state_dict(torch.load(args.checkpoint))
    else:
        train(model, data, held, held_bytes, args)

    # Final measurements in f32. Before: the weights as trained. After: read back from the written files.
    for m in model.moe_layers():
        m.qat = False
    model.dtype = torch.float32
    export(model, tokens, args.output)
    shipped = load(args.output)
    print("f32, windows of 256 with a stride of 128:")
    before, after = (bits_per_byte(m, held, held_bytes, 256, 128) for m in (model, shipped))
    print(f"  held-out before INT4 {before:.4f} bits/byte, after {after:.4f}, difference {after - before:+.4f}")
    for w in (256, 512, 1024, 2048):
        print(f"  after INT4, windows of {w} without overlap: {bits_per_byte(shipped, held, held_bytes, w, w):.4f}")
    part = data[:len(held)]
    part_bytes = len(tok.decode(part.tolist()))
    print(f"  training text (first {part_bytes} bytes), after INT4, windows of 256: "
          f"{bits_per_byte(shipped, part, part_bytes):.4f}")
    for m in shipped.moe_layers():
        m.load.zero_()
    bits_per_byte(shipped, held, held_bytes)
    for i, m in enumerate(shipped.moe_layers()):
        share = m.load / m.load.sum() * len(m.load)
        print(f"  layer {i + CONFIG['first_k_dense_replace']}: expert load on the held-out text, as a multiple of the "
              f"mean: min {share.min():.3f} max {share.max():.3f}")
        assert share.min() > 0
    with open(os.path.join(args.output, "golden.json"), "w") as f:
        json.dump(golden(shipped, tok, held), f)
        f.write("\n")
    size = {n: os.path.getsize(os.path.join(args.output, n)) for n in sorted(os.listdir(args.output))}
    print(f"  {sum(size.values())} bytes in {args.output}: {size}")
    torch.manual_seed(args.seed)
    ids = tok.encode("ROMEO:\n")
    for _ in range(200):
        p = torch.softmax(shipped(torch.tensor([ids[-256:]]))[0, -1].detach() / 0.8, -1)
        ids.append(torch.multinomial(p, 1).item())
    print(tok.decode(ids).decode(errors="replace"))


if __name__ == "__main__":
    main()
