"""Every kind of model of transformers with our attention: a table, and what it rests on.

Models are tiny and random, with weights that make attention sharp: more than a tenth of the
probabilities that entmax gives are zeros. Each is held to its own eager attention:

- ``softmax``: with ``alpha = 1`` it computes what eager computes.
- ``entmax``: with ``alpha = 1.5`` what eager computes with the package ``entmax`` in its softmax's
  place. Only softmaxes within the function ``eager_attention_forward`` are replaced, which layers
  ask for by that name: no router's, no other layer's. As many are replaced as layers called ours.
- ``left``, ``right``: the same for a batch padded on that side, at its tokens; "alone" where they
  also equal those of the sequence by itself. Where even eager's do not (places count padding,
  states run through it) it is "eager".
- ``causal``: another last token changes no logit before it.
- ``learned``: with an alpha for each head that begins at 1.5 it is the same, and each gets a
  gradient.

A model that cannot run our attention is refused by ``apply``, and keeps its own.

    python tests/architectures.py [part of a name ...]
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import entmax
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from adasplash2.integrations import transformers as integration

OLD = transformers.__version__.startswith("4.")
TOLERANCE = 1e-5
SHARP = 0.1
"""The least part of probabilities that entmax makes zero, of those that no mask hides."""

TOKENS = torch.arange(24).reshape(2, 12) * 7 % 50 + 3
SHORTER = TOKENS[:, :9] % 40 + 4

DECODER = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENCODER = {k: v for k, v in DECODER.items() if k not in ("head_dim", "num_key_value_heads")}
GPT = {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
SEQ2SEQ = {
    "vocab_size": 60,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
AUDIO = {
    **ENCODER,
    "conv_dim": [16, 16],
    "conv_kernel": [4, 4],
    "conv_stride": [4, 4],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
MAMBA = {"mamba_n_groups": 1, "mamba_d_state": 8}
BIG_BIRD = {**SEQ2SEQ, "attention_type": "block_sparse", "block_size": 4, "num_random_blocks": 1}
T5 = {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
T5 |= {"decoder_start_token_id": 0}
LOCAL = {**ENCODER, "local_attention": 4}
WHISPER = {**SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 16}
GPT_NEO = {"vocab_size": 60, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 4}
GPT_NEO |= {"attention_types": [[["global", "local"], 1]]}
MPT = {"vocab_size": 60, "d_model": 32, "d_inner": 48}
MOE = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
LLAMA4 = {"attention_chunk_size": 4, "moe_layers": [], "intermediate_size_mlp": 16}
GPT_OSS = {"num_local_experts": 2, "num_experts_per_tok": 1}
FALCON_H1 = {**MAMBA, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8}
BAMBA = {**MAMBA, "mamba_n_heads": 8, "mamba_d_head": 8, "attn_layer_indices": [1]}
JAMBA = {
    "num_experts": 2,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "mamba_d_state": 4,
    "use_mamba_kernels": False,
}
QWEN3_NEXT = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
GEMMA3N = {
    "intermediate_size": [48, 48],
    "activation_sparsity_pattern": [0.0, 0.0],
    "laurel_rank": 4,
    "altup_num_inputs": 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 60,
    "num_kv_shared_layers": 0,
}
GEMMA4 = {"global_head_dim": 16}
GEMMA4 |= {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 60}
BEIT = {**VISION, "use_relative_position_bias": True}
SWIN = {"image_size": 16, "patch_size": 2, "embed_dim": 16, "window_size": 2}
SWIN |= {"depths": [1, 1], "num_heads": [2, 2]}
PATCH_TST = {
    "num_input_channels": 1,
    "context_length": 32,
    "patch_length": 4,
    "patch_stride": 4,
    "d_model": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
MOONSHINE = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "encoder_num_hidden_layers": 2,
    "decoder_num_hidden_layers": 2,
    "encoder_num_attention_heads": 4,
    "decoder_num_attention_heads": 4,
}
LATENT = {
    "q_lora_rank": 16,
    "head_dim": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
}
INDEXER = {"index_topk": 4, "index_head_dim": 8, "index_n_heads": 2}
SEEING = {**DECODER, "vocab_size": 70, "sliding_window": 5}
ROTARY = {"rope_type": "default", "rope_theta": 1e4}
GEMMA3 = {"text_config": SEEING, "vision_config": VISION, "mm_tokens_per_image": 4}
GEMMA3 |= {"image_token_index": 65}
THREE = {**ROTARY, "type": "default", "mrope_section": [1, 1, 2]}
QWEN_VL = {
    "text_config": {**SEEING, "rope_parameters": THREE, "rope_scaling": THREE},
    "vision_config": {
        "depth": 2,
        "hidden_size": 32,
        "out_hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 1,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    },
    "image_token_id": 65,
    "vision_start_token_id": 66,
    "vision_end_token_id": 67,
    "video_token_id": 68,
}
MLLAMA = {
    "text_config": {
        **SEEING,
        "num_hidden_layers": 4,
        "cross_attention_layers": [1, 3],
        "rope_parameters": ROTARY,
        "rope_scaling": ROTARY,
    },
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 4,
        "image_size": 16,
        "patch_size": 4,
        "max_num_tiles": 2,
        "vision_output_dim": 64,
        "intermediate_layers_indices": [0],
        "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
    },
    "image_token_index": 65,
}

TEXT = {"input_ids": TOKENS}
PAIR = {"input_ids": TOKENS, "decoder_input_ids": SHORTER}
IMAGE = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).sin().reshape(2, 3, 16, 16)}
WAVE = {"input_values": torch.linspace(-9, 9, 2 * 320).sin().reshape(2, 320)}
SPECTRUM = torch.linspace(-9, 9, 2 * 8 * 32).cos().reshape(2, 8, 32)
VIDEO = {"pixel_values": torch.linspace(-9, 9, 2 * 4 * 3 * 256).sin().reshape(2, 4, 3, 16, 16)}
SERIES = {"past_values": torch.linspace(-9, 9, 2 * 32).sin().reshape(2, 32, 1)}
SPOKEN = {
    "input_values": torch.linspace(-99, 99, 2 * 4000).sin().reshape(2, 4000),
    "decoder_input_ids": SHORTER,
}
HEARD = {"input_features": SPECTRUM, "decoder_input_ids": SHORTER}
PICTURED = torch.where((torch.arange(12) >= 2) & (torch.arange(12) < 6), 65, TOKENS)
SEEN = {"input_ids": PICTURED, "token_type_ids": (PICTURED == 65).long(), **IMAGE}
PATCHES = {
    "input_ids": torch.where(torch.arange(12) == 1, 66, PICTURED),
    "pixel_values": torch.linspace(-9, 9, 32 * 48).sin().reshape(32, 48),
    "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]]),
}
if not OLD:
    PATCHES["mm_token_type_ids"] = (PICTURED == 65).long()
TILES = {
    "input_ids": TOKENS,
    "pixel_values": torch.linspace(-9, 9, 4 * 3 * 256).sin().reshape(2, 1, 2, 3, 16, 16),
    "aspect_ratio_ids": torch.tensor([[2], [1]]),
    "aspect_ratio_mask": torch.tensor([[[1, 1]], [[1, 0]]]),
    "cross_attention_mask": torch.tensor([1, 1, 1, 0]).reshape(2, 1, 1, 2).repeat(1, 12, 1, 1),
}


class Architecture(NamedTuple):
    """A model and what it is given. ``ours``: whether "all", "some" or "none" of its layers run our
    attention, with the oldest release perhaps another answer."""

    model: str
    config: str
    arguments: dict[str, Any]
    inputs: dict[str, Any] = TEXT
    ours: str = "all"
    ours_oldest: str = ""

    @property
    def name(self) -> str:
        window = self.arguments.get("sliding_window")
        return self.model + (f"-window{window}" if window else "")

    @property
    def decoded(self) -> str | None:
        """The argument that a causal decoder reads, None where there is none."""
        if "decoder_input_ids" in self.inputs:
            return "decoder_input_ids"
        kinds = "CausalLM", "HeadModel", "ConditionalGeneration"
        return "input_ids" if self.model.endswith(kinds) else None


def window(size: int, **more: Any) -> dict[str, Any]:
    return {**DECODER, "sliding_window": size, **more}


ARCHITECTURES = [
    # Decoders
    Architecture("LlamaForCausalLM", "Llama", DECODER),
    Architecture("Qwen2ForCausalLM", "Qwen2", DECODER),
    Architecture("Qwen3ForCausalLM", "Qwen3", DECODER),
    Architecture("PhiForCausalLM", "Phi", DECODER),
    Architecture("Phi3ForCausalLM", "Phi3", window(5)),
    Architecture("GPTNeoXForCausalLM", "GPTNeoX", DECODER),
    Architecture("GPT2LMHeadModel", "GPT2", GPT),
    Architecture("GPTBigCodeForCausalLM", "GPTBigCode", GPT),
    Architecture("OPTForCausalLM", "OPT", {**DECODER, "word_embed_proj_dim": 32, "ffn_dim": 48}),
    Architecture("BioGptForCausalLM", "BioGpt", DECODER),
    Architecture("BertLMHeadModel", "Bert", {**ENCODER, "is_decoder": True}, TEXT, "all", "none"),
    Architecture("BartForCausalLM", "Bart", SEQ2SEQ, TEXT, "some"),
    Architecture("GemmaForCausalLM", "Gemma", DECODER),
    Architecture("CohereForCausalLM", "Cohere", DECODER),
    Architecture("Cohere2ForCausalLM", "Cohere2", window(5)),
    Architecture("StableLmForCausalLM", "StableLm", DECODER, TEXT, "all", "none"),
    Architecture("Starcoder2ForCausalLM", "Starcoder2", window(5)),
    Architecture("GraniteForCausalLM", "Granite", DECODER),
    Architecture("GlmForCausalLM", "Glm", DECODER),
    Architecture("Glm4ForCausalLM", "Glm4", DECODER),
    Architecture("NemotronForCausalLM", "Nemotron", DECODER, TEXT, "all", "none"),
    Architecture("OlmoForCausalLM", "Olmo", DECODER),
    Architecture("Olmo2ForCausalLM", "Olmo2", DECODER),
    Architecture("Olmo3ForCausalLM", "Olmo3", window(5)),
    Architecture("SmolLM3ForCausalLM", "SmolLM3", DECODER),
    Architecture("PersimmonForCausalLM", "Persimmon", DECODER),
    Architecture("HeliumForCausalLM", "Helium", DECODER),
    Architecture("Ernie4_5ForCausalLM", "Ernie4_5", DECODER),
    Architecture("DogeForCausalLM", "Doge", DECODER),
    Architecture("DiffLlamaForCausalLM", "DiffLlama", DECODER, TEXT, "all", "none"),
    # Windows, chunks, caps, sinks
    Architecture("MistralForCausalLM", "Mistral", window(12)),
    Architecture("MistralForCausalLM", "Mistral", window(5)),
    Architecture("Gemma2ForCausalLM", "Gemma2", window(5)),
    Architecture("Gemma3ForCausalLM", "Gemma3Text", window(5)),
    Architecture("Gemma3nForCausalLM", "Gemma3nText", window(5, **GEMMA3N)),
    Architecture("Gemma4ForCausalLM", "Gemma4Text", window(5, **GEMMA4)),
    Architecture("Llama4ForCausalLM", "Llama4Text", {**DECODER, **LLAMA4}),
    Architecture("GptOssForCausalLM", "GptOss", window(5, **GPT_OSS)),
    # Mixtures of experts
    Architecture("OlmoeForCausalLM", "Olmoe", {**DECODER, **MOE}, TEXT, "all", "none"),
    Architecture("MixtralForCausalLM", "Mixtral", {**DECODER, **GPT_OSS}),
    Architecture("Qwen3MoeForCausalLM", "Qwen3Moe", {**DECODER, **MOE}),
    Architecture("GraniteMoeForCausalLM", "GraniteMoe", {**DECODER, **GPT_OSS}),
    Architecture("PhimoeForCausalLM", "Phimoe", {**DECODER, **GPT_OSS}, TEXT, "all", "none"),
    Architecture("DeepseekV3ForCausalLM", "DeepseekV3", {**DECODER, **LATENT}),
    Architecture("DeepseekV32ForCausalLM", "DeepseekV32", {**DECODER, **LATENT, **INDEXER}),
    Architecture("GlmMoeDsaForCausalLM", "GlmMoeDsa", {**DECODER, **LATENT, **INDEXER}),
    # Attention beside states
    Architecture("FalconH1ForCausalLM", "FalconH1", {**DECODER, **FALCON_H1}),
    Architecture("BambaForCausalLM", "Bamba", {**DECODER, **BAMBA}),
    Architecture("Lfm2ForCausalLM", "Lfm2", {**DECODER, "full_attn_idxs": [1]}),
    Architecture("JambaForCausalLM", "Jamba", {**DECODER, **JAMBA}, TEXT, "all", "none"),
    Architecture("Qwen3NextForCausalLM", "Qwen3Next", {**DECODER, **MOE, **QWEN3_NEXT}),
    Architecture("MiniMaxForCausalLM", "MiniMax", {**DECODER, **GPT_OSS}, TEXT, "some"),
    # Encoders
    Architecture("BertModel", "Bert", ENCODER, TEXT, "all", "none"),
    Architecture("RobertaModel", "Roberta", ENCODER, TEXT, "all", "none"),
    Architecture("ElectraModel", "Electra", ENCODER, TEXT, "all", "none"),
    Architecture("AlbertModel", "Albert", {**ENCODER, "embedding_size": 16}, TEXT, "all", "none"),
    Architecture("EsmModel", "Esm", {**ENCODER, "position_embedding_type": "rotary"}),
    Architecture("DistilBertModel", "DistilBert", {**ENCODER, "dim": 32}, TEXT, "all", "none"),
    Architecture("LayoutLMModel", "LayoutLM", ENCODER),
    Architecture("SplinterModel", "Splinter", ENCODER),
    Architecture("CLIPTextModel", "CLIPText", ENCODER),
    Architecture("ModernBertModel", "ModernBert", LOCAL, TEXT, "all", "none"),
    # Encoders with decoders
    Architecture("BartModel", "Bart", SEQ2SEQ, PAIR),
    Architecture("MBartModel", "MBart", SEQ2SEQ, PAIR),
    Architecture("PegasusModel", "Pegasus", SEQ2SEQ, PAIR),
    Architecture("MarianModel", "Marian", SEQ2SEQ, PAIR),
    Architecture("M2M100Model", "M2M100", SEQ2SEQ, PAIR),
    Architecture("T5Model", "T5", T5, PAIR, "all", "none"),
    Architecture("UMT5Model", "UMT5", T5, PAIR, "all", "none"),
    Architecture("LongT5Model", "LongT5", {**T5, "local_radius": 4}, PAIR, "some", "none"),
    Architecture("T5GemmaModel", "T5Gemma", {"encoder": window(5), "decoder": window(5)}, PAIR),
    Architecture("BigBirdPegasusModel", "BigBirdPegasus", BIG_BIRD, PAIR, "some"),
    # Images and sound
    Architecture("ViTModel", "ViT", VISION, IMAGE),
    Architecture("DeiTModel", "DeiT", VISION, IMAGE),
    Architecture("Dinov2Model", "Dinov2", VISION, IMAGE),
    Architecture("SiglipVisionModel", "SiglipVision", VISION, IMAGE, "some"),
    Architecture("CLIPVisionModel", "CLIPVision", VISION, IMAGE),
    Architecture("IJepaModel", "IJepa", VISION, IMAGE),
    Architecture("Wav2Vec2Model", "Wav2Vec2", AUDIO, WAVE),
    Architecture("HubertModel", "Hubert", AUDIO, WAVE),
    Architecture("WhisperModel", "Whisper", WHISPER, HEARD),
    Architecture("BeitModel", "Beit", BEIT, IMAGE, "all", "none"),
    Architecture("SwinModel", "Swin", SWIN, IMAGE, "all", "none"),
    Architecture("VideoMAEModel", "VideoMAE", {**VISION, "num_frames": 4}, VIDEO),
    Architecture("PatchTSTModel", "PatchTST", PATCH_TST, SERIES),
    Architecture("MoonshineModel", "Moonshine", MOONSHINE, SPOKEN),
    # Images and text
    Architecture("Gemma3ForConditionalGeneration", "Gemma3", GEMMA3, SEEN, "some"),
    Architecture("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VL", QWEN_VL, PATCHES),
    Architecture("MllamaForConditionalGeneration", "Mllama", MLLAMA, TILES),
    # These never ask for an attention.
    Architecture("BloomForCausalLM", "Bloom", DECODER, TEXT, "none"),
    Architecture("FalconForCausalLM", "Falcon", ENCODER, TEXT, "none"),
    Architecture("GPTJForCausalLM", "GPTJ", {**GPT, "rotary_dim": 8}, TEXT, "none"),
    Architecture("GPTNeoForCausalLM", "GPTNeo", GPT_NEO, TEXT, "none"),
    Architecture("MptForCausalLM", "Mpt", {**MPT, "n_layers": 2, "n_heads": 4}, TEXT, "none"),
    Architecture("XLNetModel", "XLNet", {**MPT, "n_layer": 2, "n_head": 4}, TEXT, "none"),
    Architecture("LongformerModel", "Longformer", {**ENCODER, "attention_window": 4}, TEXT, "none"),
    Architecture("WavLMModel", "WavLM", AUDIO, WAVE, "none"),
    Architecture("DebertaV2Model", "DebertaV2", ENCODER, TEXT, "none"),
]  # fmt: skip


def make(model: str, config: str, arguments: dict[str, Any], implementation: str = "eager") -> Any:
    torch.manual_seed(0)
    configuration = getattr(transformers, config + "Config")(**arguments)
    configuration._attn_implementation = implementation
    return getattr(transformers, model)(configuration).eval()


def run(model: nn.Module, **inputs: Any) -> Tensor:
    with torch.no_grad():
        out = model(**inputs)
    logits: Tensor = out.logits if "logits" in out else out.last_hidden_state
    return logits


def weigh(model: nn.Module, layers: tuple[str, ...], gain: float) -> None:
    """Random weights that keep the size of what they are given, times ``gain`` in attention."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            in_attention = any(name.startswith(layer + ".") for layer in layers)
            noise = torch.randn(weight.shape, generator=generator).to(weight.device)
            if weight.dim() > 1:
                weight.copy_(noise * weight[0].numel() ** -0.5 * (gain if in_attention else 1))
            elif in_attention and "norm" in name:
                weight.fill_(gain)
            else:
                weight.add_(0.1 * noise)


# The reference


class Replaced(TorchFunctionMode):
    """Softmax is entmax, and counts what it gave: zeros of those that nothing hides."""

    SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax)

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.zeros, self.seen = 0, 0, 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in self.SOFTMAX:
            return func(*args, **kwargs)
        scores, dim = (*args, kwargs.get("dim"))[:2]
        visible = scores > -1e9
        # In float64, where squares of what hides are numbers still.
        p = entmax.entmax15(scores.double().clamp(min=-1e9), dim)
        self.calls += 1
        self.zeros += int((visible & (p == 0)).sum())
        self.seen += int(visible.sum())
        return p.to(scores.dtype)


@contextlib.contextmanager
def entmax_for_softmax(model: nn.Module) -> Iterator[Replaced]:
    """Within, the eager attention of ``model`` is entmax."""
    replaced = Replaced()

    def inside(eager: Any) -> Any:
        def attention(*args: Any, **kwargs: Any) -> Any:
            with replaced:
                return eager(*args, **kwargs)

        return attention

    files = {base.__module__ for module in model.modules() for base in type(module).__mro__}
    with contextlib.ExitStack() as stack:
        for file in files:
            for name, function in vars(sys.modules[file]).copy().items():
                if name.endswith("eager_attention_forward"):
                    stack.enter_context(mock.patch(f"{file}.{name}", inside(function)))
        yield replaced


# The checks


class Outcome(NamedTuple):
    """A line of the table: a refusal, or what was found by each check."""

    ours: int
    layers: int
    checks: dict[str, str]
    refusal: str = ""

    def __str__(self) -> str:
        found = self.refusal or "  ".join(f"{name} {told}" for name, told in self.checks.items())
        return f"{self.ours:>3} of {self.layers:<3} {found}"


def error(found: Tensor, expected: Tensor) -> float:
    """The largest distance, relative to what is larger than 1."""
    return ((found - expected).abs() / expected.abs().clamp(min=1)).max().item()


def check(name: str, found: Tensor, expected: Tensor) -> str:
    far = error(found, expected)
    if not far <= TOLERANCE:
        raise AssertionError(f"{name}: {far:.1e} away, allowed {TOLERANCE:.0e}")
    return f"{far:.0e}"


class Examined:
    """A model that is run in one way after another."""

    def __init__(self, architecture: Architecture, device: str) -> None:
        self.device = device
        self.model = make(*architecture[:3]).to(device)
        self.inputs = {name: tensor.to(device) for name, tensor in architecture.inputs.items()}
        self.calls = 0
        self.sharpness = 0.0

    def apply(self, **arguments: Any) -> integration.Coverage:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"(?s).*attention layers run")
            return integration.apply(self.model, observer=self._count, **arguments)

    def _count(self, *call: Any) -> None:
        self.calls += 1

    def ours(self, inputs: dict[str, Any], alpha: float = 1.5) -> Tensor:
        self.apply(alpha=alpha)
        return run(self.model, **inputs)

    def eager(self, inputs: dict[str, Any], alpha: float = 1.5) -> Tensor:
        """The same by the model's own attention."""
        self.calls = 0
        self.ours(inputs)
        integration.restore(self.model)
        if alpha == 1.0:
            return run(self.model, **inputs)
        with entmax_for_softmax(self.model) as replaced:
            out = run(self.model, **inputs)
        if replaced.calls != self.calls:
            raise AssertionError(f"{replaced.calls} softmaxes replaced, {self.calls} calls of ours")
        self.sharpness = replaced.zeros / replaced.seen
        return out

    def sharpen(self, layers: tuple[str, ...]) -> None:
        """Weights that make attention sharp enough to see what it does, and no sharper: rounding
        grows with it."""
        for gain in (0.5, 0.7, 1.0, 1.4, 2.0, 2.8):
            weigh(self.model, layers, gain)
            self.eager(self.inputs)
            if self.sharpness >= SHARP:
                return
        raise AssertionError(f"blind: only {self.sharpness:.0%} of the probabilities are zero")


def examine(architecture: Architecture, device: str = "cpu") -> Outcome:
    """Holds a model to all that this file's text says, on a device.

    Raises:
        AssertionError: one of it does not hold.
    """
    of = Examined(architecture, device)
    inputs = of.inputs
    expected = architecture.ours_oldest if OLD and architecture.ours_oldest else architecture.ours
    try:
        found = of.apply(example=inputs)
    except ValueError as refusal:
        if expected != "none" or of.model.config._attn_implementation != "eager":
            raise AssertionError(str(refusal)) from refusal
        first, reason, *_ = str(refusal).splitlines()
        return Outcome(0, int(first.split("0 of ")[1].split()[0]), {}, reason.strip())
    if expected != ("some" if found.others else "all"):
        raise AssertionError(f"{expected} layers should be ours: {found}")
    of.sharpen(found.ours)
    checks = {"zeros": f"{of.sharpness:.0%}"}
    checks |= {"softmax": check("softmax", of.ours(inputs, 1.0), of.eager(inputs, 1.0))}
    whole = of.ours(inputs)
    checks["entmax"] = check("entmax", whole, of.eager(inputs))
    for side, padding in (("left", slice(4)), ("right", slice(8, None))):
        if "input_ids" in inputs.keys() <= PAIR.keys():
            checks[side] = check_padded(side, padding, of)
    if architecture.decoded:
        changed = inputs[architecture.decoded].clone()
        changed[:, -1] = 5
        other = of.ours({**inputs, architecture.decoded: changed})
        if (other - whole)[:, -1].abs().max() < 1e-3:
            raise AssertionError("another last token changes nothing")
        checks["causal"] = check("causal", other[:, :-1], whole[:, :-1])
    checks["learned"] = check_learned(of, whole)
    return Outcome(len(found.ours), len(found.ours) + len(found.others), checks)


def check_padded(side: str, padding: slice, of: Examined) -> str:
    inputs = of.inputs
    tokens = torch.ones_like(TOKENS).bool()
    tokens[0, padding] = False
    padded = {**inputs, "attention_mask": tokens.long().to(of.device)}
    alone = {name: tensor[:1] for name, tensor in inputs.items()}
    alone["input_ids"] = TOKENS[:1][tokens[:1]][None].to(of.device)
    kept = torch.ones_like(SHORTER).bool() if "decoder_input_ids" in inputs else tokens
    batch, reference = of.ours(padded)[kept], of.eager(padded)[kept]
    told = check(side, batch, reference)
    first = int(kept[0].sum())
    if error(reference[:first], of.eager(alone)[0]) > TOLERANCE:
        return told + " eager"
    check(side, batch[:first], of.ours(alone)[0])
    return told + " alone"


def check_learned(of: Examined, whole: Tensor) -> str:
    of.apply(example=of.inputs, learn=True)
    out = of.model(**of.inputs)[0]
    out.square().mean().backward()
    logits = [p for name, p in of.model.named_parameters() if name.endswith("adasplash2.logit")]
    if not all(p.grad.isfinite().all() and p.grad.all() for p in logits):
        raise AssertionError("learned: a head's alpha gets no gradient")
    return check("learned", run(of.model, **of.inputs), whole)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="parts of names; default all")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    options = parser.parse_args()
    names = options.names
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    failed = 0
    for architecture in ARCHITECTURES:
        if names and not any(part in architecture.name for part in names):
            continue
        if not hasattr(transformers, architecture.model):
            line = f"not in transformers {transformers.__version__}"
        else:
            try:
                line = str(examine(architecture, options.device))
            except Exception as failure:
                failed += 1
                line = f"FAILED {type(failure).__name__}: {failure}"
        print(f"{architecture.name:<30} {line}", flush=True)
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
