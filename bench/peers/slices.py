"""GGUF files with the shapes of Moebius's synthetic slices, filled with seeded random values.

Owns the shapes and the bytes; knows nothing of who reads them. Experts are Q4_0 (18 bytes for 32
weights, exactly the bytes of INT4 in groups of 32 with bf16 scales) or Q4_K (144 bytes for 256, the
same 4.5 bits); everything else is BF16, norms F32 because GGUF readers want them so.

Values follow `moebius synth`: weights about N(0, 1/in), so that activations keep their size and tokens
spread evenly over experts. Nothing is tiled: every expert and every row differs.
"""

import json
import statistics
import struct
import zlib
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

CHUNK_ELEMENTS = 1 << 25  # Memory stays small whatever the tensor's size.
SEED = 1

K2 = dict(
    arch="deepseek2", hidden=7168, heads=64, q_lora=1536, kv_lora=512, nope=128, rope=64, v=128, inter=18432,
    experts=384, top_k=8, moe_inter=2048, shared=1, vocab=163840, dense=1, moe=1, context=262144, eps=1e-5,
    theta=50000.0,
)
QWEN3 = dict(
    arch="qwen3moe", hidden=2048, heads=32, kv_heads=4, head=128, inter=6144, experts=128, top_k=8, moe_inter=768,
    vocab=151936, dense=0, moe=8, context=40960, eps=1e-6, theta=1000000.0,
)
# The last two have a small vocabulary, so that logits of all tokens cost next to nothing, and the time
# of one K2 MoE layer (attention, router, shared and routed experts) is the difference of the two.
RECIPES = {
    "kimi-k2-slice": K2,
    "qwen3-30b-slice": QWEN3,
    "kimi-k2-moe": K2 | dict(vocab=2048),
    "kimi-k2-dense": K2 | dict(vocab=2048, moe=0),
}


def tensors(m, experts):
    """(name, shape [out, in], kind, mean, deviation) of every tensor, in the file's order."""
    hidden, layers = m["hidden"], m["dense"] + m["moe"]
    matrix = lambda name, *shape, gain=1.0: (name + ".weight", shape, Kind.BF16, 0.0, gain / shape[-1] ** 0.5)
    norm = lambda name, size: (name + ".weight", (size,), Kind.F32, 1.0, 0.05)
    routed = lambda name, *shape: (name + ".weight", shape, experts, 0.0, shape[-1] ** -0.5)

    yield ("token_embd.weight", (m["vocab"], hidden), Kind.BF16, 0.0, 1.0)
    yield norm("output_norm", hidden)
    yield ("output.weight", (m["vocab"], hidden), Kind.BF16, 0.0, 3.0 / hidden**0.5)
    for layer in range(layers):
        at = f"blk.{layer}."
        yield norm(at + "attn_norm", hidden)
        if m["arch"] == "deepseek2":
            heads, kv_lora = m["heads"], m["kv_lora"]
            yield matrix(at + "attn_q_a", m["q_lora"], hidden)
            yield norm(at + "attn_q_a_norm", m["q_lora"])
            yield matrix(at + "attn_q_b", heads * (m["nope"] + m["rope"]), m["q_lora"])
            yield matrix(at + "attn_kv_a_mqa", kv_lora + m["rope"], hidden)
            yield norm(at + "attn_kv_a_norm", kv_lora)
            # kv_b in the two halves that absorbed attention multiplies with; K transposed.
            yield (at + "attn_k_b.weight", (heads, kv_lora, m["nope"]), Kind.BF16, 0.0, kv_lora**-0.5)
            yield matrix(at + "attn_v_b", heads, m["v"], kv_lora)
            out = heads * m["v"]
        else:
            out, kv = m["heads"] * m["head"], m["kv_heads"] * m["head"]
            yield matrix(at + "attn_q", out, hidden)
            yield matrix(at + "attn_k", kv, hidden)
            yield matrix(at + "attn_v", kv, hidden)
            yield norm(at + "attn_q_norm", m["head"])
            yield norm(at + "attn_k_norm", m["head"])
        # As `moebius synth`: what attention adds is common to all tokens, and more would unite their routes.
        yield matrix(at + "attn_output", hidden, out, gain=0.5)
        yield norm(at + "ffn_norm", hidden)
        if layer < m["dense"]:
            yield matrix(at + "ffn_gate", m["inter"], hidden)
            yield matrix(at + "ffn_up", m["inter"], hidden)
            yield matrix(at + "ffn_down", hidden, m["inter"])
            continue
        count, inter = m["experts"], m["moe_inter"]
        yield matrix(at + "ffn_gate_inp", count, hidden)
        if m["arch"] == "deepseek2":
            yield (at + "exp_probs_b.bias", (count,), Kind.F32, 0.0, 0.01)
            for part, shape in [("gate", (inter, hidden)), ("up", (inter, hidden)), ("down", (hidden, inter))]:
                yield matrix(at + f"ffn_{part}_shexp", *shape)
        yield routed(at + "ffn_gate_exps", count, inter, hidden)
        yield routed(at + "ffn_up_exps", count, inter, hidden)
        yield routed(at + "ffn_down_exps", count, hidden, inter)


def describe(w, m):
    """Key-value pairs; no tokenizer, since only token ids are fed."""
    arch = m["arch"]
    w.add_vocab_size(m["vocab"])
    w.add_context_length(m["context"])
    w.add_embedding_length(m["hidden"])
    w.add_block_count(m["dense"] + m["moe"])
    w.add_feed_forward_length(m["inter"])
    w.add_head_count(m["heads"])
    w.add_layer_norm_rms_eps(m["eps"])
    w.add_rope_freq_base(m["theta"])
    w.add_expert_count(m["experts"])
    w.add_expert_used_count(m["top_k"])
    w.add_expert_feed_forward_length(m["moe_inter"])
    w.add_tokenizer_model("none")
    if arch == "qwen3moe":
        w.add_head_count_kv(m["kv_heads"])
        w.add_key_length(m["head"])
        w.add_value_length(m["head"])
        return
    w.add_head_count_kv(1)  # Absorbed attention: one latent head that all query heads share.
    w.add_q_lora_rank(m["q_lora"])
    w.add_kv_lora_rank(m["kv_lora"])
    w.add_key_length(m["kv_lora"] + m["rope"])
    w.add_value_length(m["kv_lora"])
    w.add_key_length_mla(m["nope"] + m["rope"])
    w.add_value_length_mla(m["v"])
    w.add_rope_dimension_count(m["rope"])
    w.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    w.add_rope_scaling_factor(64.0)
    w.add_rope_scaling_orig_ctx_len(4096)
    w.add_rope_scaling_yarn_log_mul(0.1)
    w.add_leading_dense_block_count(m["dense"])
    w.add_expert_shared_count(m["shared"])
    w.add_expert_weights_scale(2.827)
    w.add_expert_weights_norm(True)
    w.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def bf16(values):
    return ((np.asarray(values, np.float32).view(np.uint32) + 0x8000) >> 16).astype(np.uint16)


# A value is one of 4096 quantiles of the normal distribution: a table look-up is several times as fast
# as drawing normals, and gigabytes are drawn.
NORMAL = np.array([statistics.NormalDist().inv_cdf((i + 0.5) / 4096) for i in range(4096)])
# No nibble is 0, so that the mean is 8 and the weights' mean 0: a bias would grow from layer to layer.
NIBBLES = np.array([(b if b & 15 else b | 8) | (0 if b >> 4 else 128) for b in range(256)], np.uint8)


def q4_k_scales(rng, sets):
    """Packed 6-bit scales and minima of so many blocks; every minimum is its scale, see `values`."""
    s = rng.integers(32, 64, (sets, 8), dtype=np.uint8)
    low, high = s[:, :4], s[:, 4:]
    top = low | (high >> 4) << 6
    return np.concatenate([top, top, (high & 15) | (high & 15) << 4], axis=1)


def values(rng, kind, mean, deviation, elements):
    """The bytes of so many elements."""
    pick = lambda table, count: table.take(np.frombuffer(rng.bytes(2 * count), np.uint16) & (len(table) - 1))
    if kind == Kind.F32:
        return pick((mean + deviation * NORMAL).astype(np.float32), elements)
    if kind == Kind.BF16:
        return pick(bf16(mean + deviation * NORMAL), elements)
    spread = np.linspace(0.75, 1.25, 256)  # Scales lie within a quarter of their mean.
    width, size = gguf.GGML_QUANT_SIZES[kind]
    out = np.empty((elements // width, size), np.uint8)
    half = lambda x: x.astype(np.float16).view(np.uint8).reshape(-1, 2)
    if kind == Kind.Q4_0:  # f16 scale, 16 bytes of nibbles; the root mean square of the nibbles is 4.18
        scales = half(deviation / 4.18 * spread).view(np.uint16).ravel()
        out[:, :2] = pick(scales, len(out)).view(np.uint8).reshape(-1, 2)
    else:  # Q4_K: f16 scale and minimum, 12 bytes of 6-bit factors, nibbles 0 to 15. The minimum is 8
        # scales: weights are (nibble - 8) * scale * factor, as above; factors are about 48.
        scale = deviation / 4.18 / 48 * spread
        pairs = np.concatenate([half(scale), half(8 * scale)], axis=1).view(np.uint32).ravel()
        out[:, :4] = pick(pairs, len(out)).view(np.uint8).reshape(-1, 4)
        factors = q4_k_scales(rng, 4096)
        out[:, 4:16] = factors[np.frombuffer(rng.bytes(2 * len(out)), np.uint16) & 4095]
    codes = size - width // 2
    out[:, codes:] = NIBBLES.take(np.frombuffer(rng.bytes(out[:, codes:].size), np.uint8)).reshape(len(out), -1)
    return out


def write(name, path, experts="q4_0", layers=None, vocab=None, seed=SEED):
    """Writes a recipe; `layers` counts those with experts. Returns bytes: (routed experts, all else)."""
    m = dict(RECIPES[name])
    if layers is not None:
        m["moe"] = layers
    if vocab is not None:
        m["vocab"] = vocab
    experts = {"q4_0": Kind.Q4_0, "q4_k": Kind.Q4_K}[experts]
    path, part = Path(path), Path(str(path) + ".part")
    writer = gguf.GGUFWriter(part, m["arch"])
    describe(writer, m)
    listed, sizes = list(tensors(m, experts)), [0, 0]
    for tensor, shape, kind, _, _ in listed:
        width, size = gguf.GGML_QUANT_SIZES[kind]
        nbytes = int(np.prod(shape)) // width * size
        sizes[kind != experts] += nbytes
        writer.add_tensor_info(tensor, shape, np.float32, nbytes, raw_dtype=kind)
    # The writer makes the header only: its own way of writing tensors wants each whole in memory.
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    align = lambda file: file.write(bytes(-file.tell() % writer.data_alignment))
    with part.open("ab") as file:
        for tensor, shape, kind, mean, deviation in listed:
            align(file)
            rng = np.random.Generator(np.random.SFC64([seed, zlib.crc32(tensor.encode())]))
            elements = int(np.prod(shape))
            for start in range(0, elements, CHUNK_ELEMENTS):
                count = min(CHUNK_ELEMENTS, elements - start)
                file.write(values(rng, kind, mean, deviation, count).data)
        align(file)
    part.rename(path)
    return tuple(sizes)


def checkpoint_bytes(folder):
    """Bytes (routed experts, all else) of a safetensors folder, from its headers."""
    sizes = [0, 0]
    for path in Path(folder).glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        for tensor, info in header.items():
            if tensor != "__metadata__":
                begin, end = info["data_offsets"]
                sizes[".experts." not in tensor] += end - begin
    return tuple(sizes)


def gguf_bytes(path):
    """The same of a GGUF file."""
    sizes = [0, 0]
    for tensor in gguf.GGUFReader(path).tensors:
        sizes["_exps." not in tensor.name] += int(tensor.n_bytes)
    return tuple(sizes)
