"""Write the cases ``tests/cases/st_*``: LoRA of sentence-transformers, on the base of a BERT.

The base is that of ``make_peft_cases.py``, whose weights depend on their names only. What
sentence-transformers writes beside the adapter (tokenizer, model card) is left out. The
environment is that of ``make_diffusion_cases.py`` with sentence-transformers. From the root of
the repository::

    PYTHONHASHSEED=0 /tmp/diffusion/bin/python tools/make_sentence_cases.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import peft
import sentence_transformers
import torch
import transformers
from case_making import DEFAULT_FOLDER, CaseFacts, clean_folder, make, train, write_case
from make_peft_cases import BASES
from peft import LoraConfig, TaskType
from sentence_transformers.sentence_transformer import modules
from torch import nn
from transformers.integrations import peft as peft_integration

# transformers 5.24 asks for a PEFT that is not out yet; 0.21 has all that is used here.
peft_integration.check_peft_version = lambda **_: None

BASE = "bert_headless"
KEPT = ("*.json", "adapter_model.safetensors")


def embedder(folder: Path) -> sentence_transformers.SentenceTransformer:
    """Return the BERT of the base with mean pooling."""
    make(BASES[BASE]).bert.save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    bert = modules.Transformer(str(folder))
    pooling = modules.Pooling(bert.get_embedding_dimension())
    return sentence_transformers.SentenceTransformer(modules=[bert, pooling], device="cpu")


def trained(model: nn.Module) -> None:
    """Give the adapter's tensors values."""
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            train(parameter, name.replace(".default", ""), 0.3)


def write(name: str, *, wrapped: bool) -> None:
    """Write one case."""
    home = clean_folder(DEFAULT_FOLDER / name)
    config = LoraConfig(
        task_type=TaskType.FEATURE_EXTRACTION,
        r=4,
        lora_alpha=12,
        target_modules=["query", "value"],
    )
    with tempfile.TemporaryDirectory() as scratch:
        model = embedder(Path(scratch) / "bert")
        saved = Path(scratch) / "saved"
        if wrapped:
            whole = peft.PeftModel(model, config)
            trained(whole)
            whole.save_pretrained(saved)
        else:
            model.add_adapter(config)
            trained(model)
            model.save_pretrained(str(saved), create_model_card=False)
        adapter = clean_folder(home / "adapter")
        for pattern in KEPT:
            for file in saved.glob(pattern):
                if not file.name.startswith(("tokenizer", "special", "vocab")):
                    text = file.read_bytes().replace(str(scratch).encode(), b"models")
                    (adapter / file.name).write_bytes(text)
    inputs = dict(np.load(DEFAULT_FOLDER / "bases" / BASE / "inputs.npz"))
    with torch.no_grad():
        found = model[0].model.eval()(**{k: torch.from_numpy(v) for k, v in inputs.items()})
    expected = {k: found[k].numpy() for k in ("last_hidden_state", "pooler_output")}
    version = f"sentence-transformers {sentence_transformers.__version__}"
    facts = CaseFacts(name, BASE, version, KEYS[wrapped], "default")
    write_case(facts, BASES[BASE], expected, DEFAULT_FOLDER)


KEYS = {
    False: "the folder of a sentence-transformers model with an adapter in its root",
    True: "keys with 0.model., of PEFT around a sentence-transformers model",
}


if __name__ == "__main__":
    write("st_bert_lora", wrapped=False)
    write("st_bert_lora_wrapped", wrapped=True)
