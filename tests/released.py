"""What tests of the registry share: small releases with all that the gate asks for, as a coordinator writes them."""

import json
from pathlib import Path
from typing import Any

import timm
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from timm.models import save_for_hf

from wardround.registry import release, signing
from wardround.signatures import fingerprint

KEY, OTHER = (Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32) for number in (1, 2))
PIN, OTHER_PIN = (fingerprint(key.public_key()) for key in (KEY, OTHER))
SET = "5" * 64
LINEAGE: dict[str, Any] = {
    "federation": "lungs",
    "protocol_digest": "c0ffee",
    "round": 1,
    "sites": {"lyon": {"weight": 1.0, "rounds": 1}},
    "software": {"wardround": "0.1.0"},
    "gate": {"tolerance": 0.01, "epsilon": None},
    "features": {"effective_rank": 9.0, "feature_spread": 0.8, "of": "64 images"},
    "differential_privacy": "none",
    "evaluation": {"set": SET, "probes": {"linear": {"backbone": 0.8, "random": 0.6, "raw pixels": 0.5}}},
}


def write_release(folder: Path, name: str, seed: int, key: Ed25519PrivateKey | None = KEY, **changes: Any) -> Path:
    """Write a release whose weights are those of a seed, signed as a release of a name."""
    torch.manual_seed(seed)
    arguments = {"img_size": 16, "patch_size": 8, "in_chans": 1, "depth": 1, "embed_dim": 24, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", **arguments, num_classes=0)
    save_for_hf(model, str(folder), model_args=arguments, safe_serialization=True)
    gate = {**LINEAGE["gate"], **changes.pop("gate", {})}
    said = {**LINEAGE, **changes, "gate": gate, "sha256": release.file_hashes(folder)}
    (folder / release.PROVENANCE).write_text(json.dumps(said))
    if key is not None:
        signing.write_manifest(folder, name, release.file_hashes(folder), key)
    return folder


def linear(score: float, over: str = SET) -> dict[str, Any]:
    """Return the change of a lineage to another linear probe, or to one on another set."""
    return {"evaluation": {"set": over, "probes": {"linear": {"backbone": score}}}}
