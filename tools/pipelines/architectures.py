"""The tiny models that every pipeline gets, with random weights that depend on names only.

Transformers 4 and 5 make the same weights, so that an adapter trained with one fits the
ONNX model that a pipeline made with the other. The weights are such that quantisation to 8
bit, to 4 bit and to NF4 keeps each of them: what is left to a quantised model is how it
rounds activations, and a model that does not round them gives the numbers of PyTorch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
import transformers
from case_making import Arrays, generator, randomise
from torch import nn

VOCABULARY = 60
HIDDEN = 32
INNER = 64
LAYERS = 2
ROWS, LENGTH, DECODED = 3, 6, 5
FRAMES, MELS = 16, 8
STEP = 0.25


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A model that several pipelines export.

    Attributes:
        build: Makes the model.
        inputs: Makes what PyTorch computes the answers from.
        attention: Modules of the narrow LoRA: queries and values.
        keys: Modules that IA3 scales, and which of them it scales before the Linear.
        task: What optimum calls the model's task.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], Arrays]
    attention: tuple[str, ...]
    keys: tuple[tuple[str, ...], tuple[str, ...]]
    task: str


def build_bert() -> nn.Module:
    """Return a BERT classifier."""
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=INNER,
        max_position_embeddings=16,
        num_labels=3,
    )
    return transformers.BertForSequenceClassification(config)


def build_albert() -> nn.Module:
    """Return an ALBERT classifier, which runs one layer twice."""
    config = transformers.AlbertConfig(
        vocab_size=VOCABULARY,
        embedding_size=16,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=INNER,
        max_position_embeddings=16,
        num_labels=3,
    )
    return transformers.AlbertForSequenceClassification(config)


def build_deberta() -> nn.Module:
    """Return a DeBERTa classifier, which calls two projections twice."""
    config = transformers.DebertaV2Config(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=INNER,
        max_position_embeddings=16,
        type_vocab_size=0,
        relative_attention=True,
        position_buckets=8,
        pos_att_type=["p2c", "c2p"],
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        num_labels=3,
    )
    return transformers.DebertaV2ForSequenceClassification(config)


def build_gpt2() -> nn.Module:
    """Return a GPT-2 language model."""
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=HIDDEN,
        n_layer=LAYERS,
        n_head=4,
        n_inner=INNER,
        n_positions=16,
        bos_token_id=0,
        eos_token_id=1,
    )
    return transformers.GPT2LMHeadModel(config)


def decoder(kind: str) -> Callable[[], nn.Module]:
    """Return what makes a `Llama`, `Qwen3` or `Phi3` with two query heads to a key."""

    def build() -> nn.Module:
        config = getattr(transformers, f"{kind}Config")(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=INNER,
            max_position_embeddings=64,
            head_dim=16,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
            tie_word_embeddings=False,
            # Phi-3 has no longer context than this one.
            original_max_position_embeddings=64,
        )
        return getattr(transformers, f"{kind}ForCausalLM")(config)

    return build


def build_t5() -> nn.Module:
    """Return a T5."""
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=HIDDEN,
        d_kv=8,
        d_ff=INNER,
        num_layers=1,
        num_decoder_layers=1,
        num_heads=4,
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


def build_bart() -> nn.Module:
    """Return a BART."""
    config = transformers.BartConfig(
        vocab_size=VOCABULARY,
        d_model=HIDDEN,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=INNER,
        decoder_ffn_dim=INNER,
        max_position_embeddings=32,
        decoder_start_token_id=2,
    )
    return transformers.BartForConditionalGeneration(config)


def build_whisper() -> nn.Module:
    """Return a Whisper that hears 16 frames."""
    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY,
        num_mel_bins=MELS,
        d_model=HIDDEN,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=INNER,
        decoder_ffn_dim=INNER,
        max_source_positions=FRAMES // 2,
        max_target_positions=64,
        pad_token_id=1,
        bos_token_id=1,
        eos_token_id=1,
        decoder_start_token_id=2,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return transformers.WhisperForConditionalGeneration(config)


def tokens(length: int) -> np.ndarray:
    """Return token ids of shape ``(rows, length)``."""
    random = np.random.default_rng(7)
    return random.integers(3, VOCABULARY, (ROWS, length), dtype=np.int64)


def text_inputs() -> Arrays:
    """Return token ids and a mask; the last row ends with padding."""
    mask = np.ones((ROWS, LENGTH), np.int64)
    mask[-1, -2:] = 0
    return {"input_ids": tokens(LENGTH), "attention_mask": mask}


def prompt_inputs() -> Arrays:
    """Return token ids without padding, as a generating loop begins."""
    return {"input_ids": tokens(LENGTH), "attention_mask": np.ones((ROWS, LENGTH), np.int64)}


def bert_inputs() -> Arrays:
    """Return what BERT takes; the second half of each text is another sentence."""
    kinds = np.tile(np.arange(LENGTH) // 3, (ROWS, 1)).astype(np.int64)
    return text_inputs() | {"token_type_ids": kinds}


def translation_inputs() -> Arrays:
    """Return text for the encoder, and tokens that the decoder has so far."""
    return prompt_inputs() | {"decoder_input_ids": tokens(DECODED)}


def speech_inputs() -> Arrays:
    """Return a spectrogram for the encoder, and tokens that the decoder has so far."""
    random = np.random.default_rng(7)
    features = random.normal(size=(ROWS, MELS, FRAMES)).astype(np.float32)
    return {"input_features": features, "decoder_input_ids": tokens(DECODED)}


CAUSAL = "text-generation-with-past"
GATED = (("k_proj", "v_proj", "down_proj"), ("down_proj",))
PLAIN = (("k_proj", "v_proj", "fc2"), ("fc2",))
PHI = (("qkv_proj", "down_proj"), ("down_proj",))
ARCHITECTURES = {
    "bert": Architecture(
        build_bert,
        bert_inputs,
        ("query", "value"),
        (("key", "value", "output.dense"), ("output.dense",)),
        "text-classification",
    ),
    "albert": Architecture(
        build_albert,
        bert_inputs,
        ("query", "value"),
        (("key", "value", "ffn_output"), ("ffn_output",)),
        "text-classification",
    ),
    "deberta": Architecture(
        build_deberta,
        text_inputs,
        ("query_proj", "value_proj"),
        (("key_proj", "value_proj", "output.dense"), ("output.dense",)),
        "text-classification",
    ),
    "gpt2": Architecture(
        build_gpt2,
        prompt_inputs,
        ("c_attn",),
        (("c_attn", "mlp.c_proj"), ("mlp.c_proj",)),
        CAUSAL,
    ),
    "llama": Architecture(
        decoder("Llama"), prompt_inputs, ("q_proj", "v_proj"), GATED, CAUSAL
    ),
    "qwen3": Architecture(
        decoder("Qwen3"), prompt_inputs, ("q_proj", "v_proj"), GATED, CAUSAL
    ),
    "phi3": Architecture(decoder("Phi3"), prompt_inputs, ("qkv_proj",), PHI, CAUSAL),
    "t5": Architecture(
        build_t5,
        translation_inputs,
        ("q", "v"),
        (("k", "v", "wo"), ("wo",)),
        "text2text-generation-with-past",
    ),
    "bart": Architecture(
        build_bart,
        translation_inputs,
        ("q_proj", "v_proj"),
        PLAIN,
        "text2text-generation-with-past",
    ),
    "whisper": Architecture(
        build_whisper,
        speech_inputs,
        ("q_proj", "v_proj"),
        PLAIN,
        "automatic-speech-recognition-with-past",
    ),
}


def make(name: str) -> nn.Module:
    """Return an architecture with its random weights."""
    torch.manual_seed(0)
    model = ARCHITECTURES[name].build().eval()
    randomise(model)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.copy_(exact(key, parameter, outputs=int(name == "gpt2")))
    model.tie_weights()
    return model


def exact(key: str, weight: torch.Tensor, outputs: int) -> torch.Tensor:
    """Return a weight that quantisation keeps: each output has one number, or zero.

    An example: `[[0.25, 0, 0.25], [0, -0.25, -0.25]]` for two outputs of three inputs. In
    blocks of 4 bits a scale of `0.25 / -8` turns the first row into `[-8, 0, -8]`, which is
    0.25, 0 and 0.25 again; a scale of `-0.25 / -8` does the same for the second.

    Args:
        key: Name of the weight, from which it is made.
        weight: The weight, for its shape.
        outputs: The axis of the outputs.
    """
    random = generator(f"exact.{key}")
    kept = torch.randint(0, 2, weight.shape, generator=random)
    signs = torch.randint(0, 2, (weight.shape[outputs],), generator=random) * 2 - 1
    shape = [-1 if axis == outputs else 1 for axis in range(weight.ndim)]
    return STEP * kept * signs.reshape(shape)
