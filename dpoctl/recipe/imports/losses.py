"""The preference loss of TRL's DPO, and of the tools that use it."""

import dataclasses
from typing import Any

from dpoctl.losses import LOSSES
from dpoctl.recipe.foreign_keys import LOSS_NAMES
from dpoctl.recipe.imports.translation import Translation, short

SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")
"""The losses for which TRL reads its `label_smoothing`."""
DIVERGENCES = {"forward_kl": "forward_kl", "js_divergence": "js", "alpha_divergence": "alpha"}


def carry_loss(
    job: Translation, *, beta_keys: tuple[str, ...] = ("beta",), kinds: Any = None, name: str = "loss_type"
) -> None:
    """Carry the loss of a DPO config of TRL over.

    Args:
        job: The config.
        beta_keys: The names of beta.
        kinds: The losses, where the tool has another key for them.
        name: The name of that key.
    """
    given = job.take("loss_type", "dpo_loss_type") if kinds is None else kinds
    names = [given] if isinstance(given, str) else list(given or ["sigmoid"])
    weights = list(job.take("loss_weights") or [1.0] * len(names))
    key, beta = job.take_named(*beta_keys)
    smoothing = job.take("label_smoothing", "dpo_label_smoothing")
    theirs = f"{name}: {', '.join(names)}" if given is not None else f"{name}: sigmoid (its default)"
    theirs += f", {key}: {beta if beta is not None else '0.1 (its default)'}"
    beta = 0.1 if beta is None else float(beta)
    found = [_spec(job, one, beta, smoothing) for one in names]
    specs = [spec for spec in found if spec is not None] or [{"type": "sigmoid", "beta": beta}]
    imitation = float(job.take("rpo_alpha", default=0) or 0)
    if imitation:
        specs[0]["sft_weight"] = imitation
        theirs += f", rpo_alpha: {imitation}"
    loss: Any = specs[0]
    if len(specs) > 1:
        loss = [{**spec, "weight": float(weight)} for spec, weight in zip(specs, weights, strict=False)]
    job.put("dpo.loss", loss)
    job.note(theirs, f"dpo.loss: {short(loss)}")
    _carry_reference(job)


def _spec(job: Translation, name: str, beta: float, smoothing: Any) -> dict[str, Any] | None:
    """Return a loss of a recipe; None for one that is not offered, which is reported."""
    kind = name if name in LOSSES else LOSS_NAMES.get(name.lower().replace("-", "_"))
    if name == "sft":
        return {"type": "sft"}
    if kind is None:
        job.lose(f"loss_type: {name}", "this loss is not offered; the recipe has sigmoid")
        return None
    if kind == "sigmoid":
        kind = _variant(job) or kind
    spec: dict[str, Any] = {"type": kind}
    known = {field.name for field in dataclasses.fields(LOSSES[kind])}
    if "beta" in known:
        spec["beta"] = beta
    spec |= _options_of(job, kind)
    if smoothing and (kind in SMOOTHED or name == "cdpo"):
        spec["label_smoothing"] = float(smoothing)
    elif smoothing:
        job.drop(f"label_smoothing: {smoothing}", f"TRL does not read it for the loss {name}")
    return spec


def _variant(job: Translation) -> str | None:
    """Return the loss that options make of TRL's sigmoid loss."""
    if job.has("use_weighting"):
        job.take("use_weighting")
        return "wpo"
    if job.peek("ld_alpha") is not None:
        return "ld_dpo"
    if job.peek("f_divergence_type") in DIVERGENCES:
        return "f_dpo"
    return None


def _options_of(job: Translation, kind: str) -> dict[str, Any]:
    """Return the hyperparameters of one loss that TRL has as keys of their own."""
    if kind == "bco_pair":
        return {"running_mean": False}
    if kind == "wpo":
        return {"clamp": False}
    if kind == "discopop":
        return {"tau": float(job.take("discopop_tau", default=0.05))}
    if kind == "ld_dpo":
        return {"alpha": float(job.take("ld_alpha"))}
    if kind == "f_dpo":
        divergence = DIVERGENCES[job.take("f_divergence_type")]
        alpha = job.take("f_alpha_divergence_coef", default=0.5)
        return {"divergence": divergence} | ({"alpha": float(alpha)} if divergence == "alpha" else {})
    if kind == "simpo":
        ratio = job.take("simpo_gamma_beta_ratio", default=0.5)
        return {"gamma_beta_ratio": float(ratio)}
    return {}


def _carry_reference(job: Translation) -> None:
    """Carry the reference model over."""
    for key in ("precompute_ref_log_probs", "precompute_ref_batch_size"):
        if job.has(key):
            job.drop(f"{key}: {job.take(key)}", "the reference is computed once and kept on disk anyway")
    if job.has("sync_ref_model"):
        job.take("sync_ref_model")
        job.carry("ref_model_sync_steps", "dpo.reference.sync_steps", default=512)
        job.carry("ref_model_mixup_alpha", "dpo.reference.sync_alpha", default=0.6)
    for key in ("ref_model_sync_steps", "ref_model_mixup_alpha", "f_divergence_type", "f_alpha_divergence_coef"):
        if (value := job.take(key)) is not None:
            job.drop(f"{key}: {value}", "nothing in this config uses it")
    for key in ("ref_model", "ref_model_name_or_path"):
        if job.has(key):
            job.carry(key, "dpo.reference.path")
