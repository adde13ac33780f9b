"""The graph of a Llama-family decoder, node for node as the onnxruntime-genai builder writes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from nmonnx.models.config import LlamaConfig
from nmonnx.models.graph_builder import MICROSOFT, GraphBuilder, Shape
from nmonnx.models.linear import Linears
from nmonnx.models.source import Source

_MASK = "/model/attn_mask_reformat/attn_mask_subgraph"
_SEQLENS, _TOTAL = f"{_MASK}/Sub/Cast/output_0", f"{_MASK}/Gather/Cast/output_0"
_INT32, _INT64 = np.dtype(np.int32), np.dtype(np.int64)
_TO_INT32 = {"to": 6}


def write_llama(source: Source, dtype: str, fuse_qkv: bool) -> GraphBuilder:
    """The decoder of `source` in dtype "fp32", "fp16" or "int4"; weights are declared, not read.

    Inputs: input_ids [batch, sequence] and attention_mask [batch, past + sequence], int64; position_ids, like
    input_ids, when the head size is no multiple of 16; past_key_values.L.key and .value
    [batch, KV heads, past, head size]. Outputs: logits [batch, sequence, vocabulary], present.L.key and .value.

    Raises InputError when a tensor is missing, unknown, of a wrong shape, or has no lossless int4 form.
    """
    graph = GraphBuilder(np.dtype(np.float16 if dtype == "fp16" else np.float32))
    linears = Linears(source, graph, int4=dtype == "int4")
    _Decoder(source.config, graph, linears, fuse_qkv).write()
    linears.refuse_untaken()
    return graph


def needs_position_ids(config: LlamaConfig) -> bool:
    """GroupQueryAttention itself rotates only heads of a multiple of 16 channels."""
    return config.head_size % 16 != 0


@dataclass(frozen=True)
class _Decoder:
    config: LlamaConfig
    graph: GraphBuilder
    linears: Linears
    fuse_qkv: bool

    def write(self) -> None:
        vocabulary = self.linears.rows("model.embed_tokens.weight")
        self._inputs_and_outputs(vocabulary)
        self._mask()
        skip, x = self._embedding(vocabulary), ""
        for layer in range(self.config.layers):
            path = f"/model/layers.{layer}"
            y, skip = self._norm(f"{path}/input_layernorm", skip, x)
            x = self._attention(layer, path, y)
            y, skip = self._norm(f"{path}/post_attention_layernorm", skip, x)
            x = self._mlp(path, y)
        y, _ = self._norm(f"/model/layers.{self.config.layers}/final_norm_layernorm", skip, x, "model.norm")
        self.linears.write("/lm_head", self._head(vocabulary), y, self.config.hidden, "logits", exact=False)

    def _inputs_and_outputs(self, vocabulary: int) -> None:
        tokens, config = ("batch_size", "sequence_length"), self.config
        self.graph.input("input_ids", tokens, _INT64)
        self.graph.input("attention_mask", ("batch_size", "total_sequence_length"), _INT64)
        if needs_position_ids(config):
            self.graph.input("position_ids", tokens, _INT64)
        self.graph.output("logits", (*tokens, vocabulary))
        for part in ("key", "value"):
            for layer in range(config.layers):
                past = self._cache("past_sequence_length")
                self.graph.input(f"past_key_values.{layer}.{part}", past)
                self.graph.output(f"present.{layer}.{part}", self._cache("total_sequence_length"))

    def _cache(self, length: str) -> Shape:
        return ("batch_size", self.config.kv_heads, length, self.config.head_size)

    def _mask(self) -> None:
        """attention_mask -> index of the last token of each row, and the total length."""
        one, rows = self.graph.int64([1]), ("batch_size",)
        total = self._on_mask("ReduceSum", ["attention_mask", one], rows, {"keepdims": 0})
        last = self._on_mask("Sub", [total, one], rows)
        self._on_mask("Sub/Cast", [last], rows, _TO_INT32, _INT32)
        shape = self._on_mask("Shape", ["attention_mask"], (2,))
        length = self._on_mask("Gather", [shape, self.graph.int64(1)], (), {"axis": 0})
        self._on_mask("Gather/Cast", [length], (), _TO_INT32, _INT32)

    def _on_mask(
        self,
        name: str,
        inputs: Sequence[str],
        shape: Shape,
        attrs: Mapping[str, Any] | None = None,
        kind: np.dtype = _INT64,
    ) -> str:
        op, path = name.rsplit("/")[-1], f"{_MASK}/{name}"
        return self.graph.node(op, path, inputs, [(f"{path}/output_0", shape)], attrs, kind=kind)

    def _embedding(self, vocabulary: int) -> str:
        tensor, shape = "model.embed_tokens.weight", (vocabulary, self.config.hidden)
        path = "/model/embed_tokens"
        if self.config.tied:
            # The head's weight is the one that is stored: its MatMul wants [K, N].
            weight = self.linears.transposed("lm_head.MatMul.weight", tensor, shape)
            outputs = [(f"{path}/Transpose/output_0", shape)]
            table = self.graph.node("Transpose", f"{path}/Transpose", [weight], outputs, {"perm": [1, 0]})
        else:
            table = self.linears.plain(tensor, tensor, shape)
        return self._tokens("Gather", f"{path}/Gather", [table, "input_ids"], self.config.hidden)

    def _head(self, vocabulary: int) -> list[tuple[str, int]]:
        return [("model.embed_tokens" if self.config.tied else "lm_head", vocabulary)]

    def _norm(self, path: str, skip: str, x: str, module: str = "") -> tuple[str, str]:
        """RMS norm of skip + x (of skip when x is ""); returns the norm and the sum."""
        name, shape = path.strip("/").replace("/", "."), self._shape(self.config.hidden)
        weight = self.linears.plain(f"{name}.weight", f"{module or name}.weight", (self.config.hidden,))
        attrs, y = {"epsilon": self.config.rms_eps}, f"{path}/output_0"
        if not x:
            self._rms(f"{path}/LayerNorm", skip, weight, (y, shape))
            return y, skip
        total = f"{path}/output_3"
        outputs = [(y, shape)] if module else [(y, shape), ("", ()), ("", ()), (total, shape)]
        op = "SkipSimplifiedLayerNormalization"
        self.graph.node(op, f"{path}/SkipLayerNorm", [skip, x, weight], outputs, attrs, MICROSOFT)
        return y, total

    def _rms(self, path: str, x: str, weight: str, output: tuple[str, Shape]) -> str:
        attrs = {"epsilon": self.config.rms_eps, "axis": -1, "stash_type": 1}
        return self.graph.node("SimplifiedLayerNormalization", path, [x, weight], [output], attrs)

    def _attention(self, layer: int, path: str, x: str) -> str:
        config, size = self.config, self.config.head_size
        module, attn = f"model.layers.{layer}.self_attn", f"{path}/attn"
        q, k, v = self._qkv(attn, module, x)
        q = self._head_norm(attn, module, "q", q, config.heads)
        k = self._head_norm(attn, module, "k", k, config.kv_heads)
        caches = [self._rotary("cos_cache", np.cos), self._rotary("sin_cache", np.sin)]
        if needs_position_ids(config):
            q = self._rotate(f"{attn}/q_rotary", q, caches, config.heads * size)
            k = self._rotate(f"{attn}/k_rotary", k, caches, config.kv_heads * size)
            caches = []
        past = [f"past_key_values.{layer}.{part}" for part in ("key", "value")]
        y = self._grouped_query(layer, attn, [q, k, v, *past, _SEQLENS, _TOTAL, *caches])
        return self.linears.write(f"{attn}/o_proj", [(f"{module}.o_proj", config.hidden)], y, config.heads * size)

    def _qkv(self, attn: str, module: str, x: str) -> tuple[str, str, str]:
        """Three activations; or one packed, "" and "" when GroupQueryAttention takes it as it is."""
        kv = self.config.kv_heads * self.config.head_size
        sizes = {"q": self.config.heads * self.config.head_size, "k": kv, "v": kv}
        parts = {p: (f"{module}.{p}_proj", n) for p, n in sizes.items()}
        if not self.fuse_qkv:
            q, k, v = (
                self.linears.write(f"{attn}/{p}_proj", [part], x, self.config.hidden) for p, part in parts.items()
            )
            return q, k, v
        packed = self.linears.write(f"{attn}/qkv_proj", list(parts.values()), x, self.config.hidden)
        if not needs_position_ids(self.config) and not self.linears.has(f"{module}.q_norm.weight"):
            return packed, "", ""
        split = f"{attn}/qkv_proj/Split"
        outputs = [(f"{split}/output_{i}", self._shape(n)) for i, n in enumerate(sizes.values())]
        self.graph.node("Split", split, [packed, self.graph.int64(list(sizes.values()))], outputs, {"axis": -1})
        return outputs[0][0], outputs[1][0], outputs[2][0]

    def _head_norm(self, attn: str, module: str, part: str, x: str, heads: int) -> str:
        """Qwen3 normalises each head of q and k."""
        tensor, size = f"{module}.{part}_norm.weight", self.config.head_size
        if not self.linears.has(tensor):
            return x
        path = f"{attn}/{part}_norm"
        weight = self.linears.plain(f"{path.strip('/').replace('/', '.')}.layernorm.weight", tensor, (size,))
        per_head = ("batch_size", f"sequence_length_x_{heads}_heads", size)
        y = self._reshape(f"{path}/Reshape_1", x, [0, -1, size], per_head)
        norm = f"{path}/SimplifiedLayerNormalization"
        y = self._rms(norm, y, weight, (f"{norm}/output_0", per_head))
        return self._reshape(f"{path}/Reshape_2", y, [0, -1, heads * size], self._shape(heads * size))

    def _reshape(self, path: str, x: str, dims: list[int], shape: Shape) -> str:
        return self.graph.node("Reshape", path, [x, self.graph.int64(dims)], [(f"{path}/output_0", shape)])

    def _rotary(self, name: str, function: np.ufunc) -> str:
        shape = (self.config.context, self.config.head_size // 2)
        return self.graph.weight(name, shape, partial(_rotary_table, self.config, function))

    def _rotate(self, path: str, x: str, caches: list[str], n: int) -> str:
        attrs = {"interleaved": 0, "num_heads": 0, "rotary_embedding_dim": 0}
        inputs = [x, "position_ids", *caches]
        return self._tokens("RotaryEmbedding", f"{path}/RotaryEmbedding", inputs, n, attrs, MICROSOFT)

    def _grouped_query(self, layer: int, attn: str, inputs: Sequence[str]) -> str:
        config, path = self.config, f"{attn}/GroupQueryAttention"
        attrs = {
            "num_heads": config.heads,
            "kv_num_heads": config.kv_heads,
            "scale": config.head_size**-0.5,
            "local_window_size": -1,
            "softcap": 0.0,
            "do_rotary": int(not needs_position_ids(config)),
            "rotary_interleaved": 0,
        }
        present = self._cache("total_sequence_length")
        outputs = [(f"{path}/output_0", self._shape(config.heads * config.head_size))]
        outputs += [(f"present.{layer}.key", present), (f"present.{layer}.value", present)]
        return self.graph.node("GroupQueryAttention", path, inputs, outputs, attrs, MICROSOFT)

    def _mlp(self, path: str, x: str) -> str:
        hidden, inner, mlp = self.config.hidden, self.config.intermediate, f"{path}/mlp"
        module = mlp.strip("/").replace("/", ".")
        gate = self.linears.write(f"{mlp}/gate_proj", [(f"{module}.gate_proj", inner)], x, hidden)
        up = self.linears.write(f"{mlp}/up_proj", [(f"{module}.up_proj", inner)], x, hidden)
        sigmoid = self._tokens("Sigmoid", f"{mlp}/act_fn/Sigmoid", [gate], inner)
        silu = self._tokens("Mul", f"{mlp}/act_fn/Mul", [gate, sigmoid], inner)
        y = self._tokens("Mul", f"{mlp}/Mul", [silu, up], inner)
        return self.linears.write(f"{mlp}/down_proj", [(f"{module}.down_proj", hidden)], y, inner)

    def _tokens(
        self,
        op: str,
        path: str,
        inputs: Sequence[str],
        n: int,
        attrs: Mapping[str, Any] | None = None,
        domain: str = "",
    ) -> str:
        """A node with one output of `n` channels a token."""
        return self.graph.node(op, path, inputs, [(f"{path}/output_0", self._shape(n))], attrs, domain)

    def _shape(self, n: int) -> Shape:
        return ("batch_size", "sequence_length", n)


def _rotary_table(config: LlamaConfig, function: np.ufunc) -> np.ndarray:
    positions = np.arange(config.context, dtype=np.float32)
    return function(np.outer(positions, np.array(config.inv_freq, np.float32)))
