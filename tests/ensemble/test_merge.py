"""Merged adapters are the weighted sum of the updates, and PEFT agrees."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ray_ensemble.config import AdapterConfig
from ray_ensemble.ensemble.merge import SHARES, Merged, divergence, merge_adapters, towards, truncate
from ray_ensemble.errors import InputError
from ray_ensemble.models import attach_adapters, draw_initial_adapter, load_base, lora_layers, save_adapter

CPU = torch.device("cpu")


def trained(tiny_model: Path, folder: Path, rank: int, alpha: int, seed: int, stabilized: bool = False) -> Path:
    config = AdapterConfig(rank=rank, alpha=alpha, seed=seed, rank_stabilized=stabilized)
    draw_initial_adapter(load_base(tiny_model, "none", CPU), config, folder / "init")
    model = attach_adapters(load_base(tiny_model, "none", CPU), {"default": folder / "init"})
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    save_adapter(model, folder / "adapter", "default")
    return folder / "adapter"


def updates(folder: Path) -> dict[str, torch.Tensor]:
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    scaling = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    return {
        name: scaling * tensors[name.replace("lora_A", "lora_B")].double() @ tensors[name].double()
        for name in tensors
        if "lora_A" in name
    }


def test_merged_update_is_the_weighted_sum_and_equals_peft(tiny_model, tmp_path):
    folders = [trained(tiny_model, tmp_path / "a", 4, 32, 1), trained(tiny_model, tmp_path / "b", 2, 3, 2)]
    merge_adapters(folders, [0.3, 0.7], tmp_path / "merged")
    first, second, merged = (updates(f) for f in (*folders, tmp_path / "merged"))
    for name, update in merged.items():
        torch.testing.assert_close(update, 0.3 * first[name] + 0.7 * second[name], rtol=1e-5, atol=1e-8)

    names = {"a": folders[0], "b": folders[1], "ours": tmp_path / "merged"}
    model = attach_adapters(load_base(tiny_model, "none", CPU), names)
    model.add_weighted_adapter(["a", "b"], [0.3, 0.7], "theirs", combination_type="cat")
    ids = torch.randint(10, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    outputs = {}
    for name in ("ours", "theirs", "a"):
        model.set_adapter(name)
        outputs[name] = model(input_ids=ids).logits
    torch.testing.assert_close(outputs["ours"], outputs["theirs"], rtol=1e-4, atol=1e-4)
    assert (outputs["ours"] - outputs["a"]).abs().max() > 1e-2


def test_rank_stabilised_adapters_merge_to_the_weighted_sum_as_the_model_runs_it(tiny_model, tmp_path):
    folders = [trained(tiny_model, tmp_path / "a", 4, 6, 1, True), trained(tiny_model, tmp_path / "b", 2, 3, 2)]
    merge_adapters(folders, [0.3, 0.7], tmp_path / "merged")
    names = {"a": folders[0], "b": folders[1], "merged": tmp_path / "merged"}
    model = attach_adapters(load_base(tiny_model, "none", CPU), names)
    for layer in lora_layers(model).values():
        a, b, merged = (layer.get_delta_weight(name) for name in names)
        assert layer.scaling["a"] == 6 / 4**0.5
        torch.testing.assert_close(merged, 0.3 * a + 0.7 * b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rank", [1, 5, 9])
def test_a_rank_budget_keeps_the_nearest_update_of_that_rank(tiny_model, tmp_path, rank):
    """Against numpy's singular values of the dense sums; ranks 4 and 6 make 10, and modules are at most 16 wide."""
    folders = [trained(tiny_model, tmp_path / "a", 4, 32, 1), trained(tiny_model, tmp_path / "b", 6, 3, 2, True)]
    whole = merge_adapters(folders, [0.3, -0.7], tmp_path / "whole")
    assert (whole.rank, whole.norm_kept, whole.vllm_max_lora_rank) == (10, 1.0, 16)
    cut = merge_adapters(folders, [0.3, -0.7], tmp_path / "cut", rank)
    first, second, found = (updates(f) for f in (*folders, tmp_path / "cut"))
    kept = total = 0.0
    for name, update in found.items():
        u, sigma, v = np.linalg.svd((0.3 * first[name] - 0.7 * second[name]).numpy(), full_matrices=False)
        np.testing.assert_allclose(update.numpy(), (u[:, :rank] * sigma[:rank]) @ v[:rank], atol=1e-7)
        kept, total = kept + (sigma[:rank] ** 2).sum(), total + (sigma**2).sum()
    assert cut.rank == rank
    assert cut.norm_kept == pytest.approx(kept / total)
    assert cut.norm_kept < 1
    model = attach_adapters(load_base(tiny_model, "none", CPU), {"cut": tmp_path / "cut"})
    for name, layer in lora_layers(model).items():
        wanted = found[f"base_model.model.{name}.lora_A.weight"].float()
        torch.testing.assert_close(layer.get_delta_weight("cut"), wanted, rtol=1e-5, atol=1e-7)


def test_a_rank_budget_that_is_not_reached_changes_nothing(tiny_model, tmp_path):
    folders = [trained(tiny_model, tmp_path / "a", 4, 32, 1), trained(tiny_model, tmp_path / "b", 2, 3, 2)]
    for name, rank in (("free", None), ("exact", 6), ("roomy", 64)):
        assert merge_adapters(folders, [0.3, 0.7], tmp_path / name, rank) == Merged(6, 1.0)
    for file in (tmp_path / "free").iterdir():
        for name in ("exact", "roomy"):
            assert (tmp_path / name / file.name).read_bytes() == file.read_bytes()


def test_a_module_smaller_than_the_rank_is_filled_up_with_zeros():
    b, a = torch.randn(3, 8), torch.randn(8, 20)
    new_b, new_a, squares = truncate(b, a, 5)
    assert (new_b.shape, new_a.shape, squares.shape) == ((3, 5), (5, 20), (3,))
    torch.testing.assert_close(new_b @ new_a, b @ a)


@pytest.mark.parametrize(("rank", "limit"), [(1, 1), (2, 8), (16, 16), (17, 32), (257, 320), (512, 512), (513, None)])
def test_vllm_needs_the_next_rank_that_it_knows(rank, limit):
    assert Merged(rank, 1.0).vllm_max_lora_rank == limit


def test_zero_weights_are_left_out(tiny_model, tmp_path):
    folders = [trained(tiny_model, tmp_path / "a", 4, 32, 1), trained(tiny_model, tmp_path / "b", 2, 3, 2)]
    merge_adapters(folders, [1.0, 0.0], tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "adapter_config.json").read_text())["r"] == 4
    with pytest.raises(InputError, match="every weight is zero"):
        merge_adapters(folders, [0.0, 0.0], tmp_path / "none")


def test_what_is_not_plain_lora_is_refused(tiny_model, tmp_path):
    folder = trained(tiny_model, tmp_path / "a", 4, 32, 1)
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_dora": True}))
    with pytest.raises(InputError, match="plain LoRA"):
        merge_adapters([folder], [1.0], tmp_path / "merged")


def test_a_booster_counts_by_its_difference_from_a_warm_start(tiny_model, tmp_path):
    """Near the start the merged model's change is that of the ensemble with its booster; twice as near, four times nearer."""
    start = trained(tiny_model, tmp_path / "start", 4, 32, 1)
    gaps = []
    for scale in (1e-3, 5e-4):
        folders = [
            moved(start, tmp_path / f"{name}-{scale}", scale, seed) for seed, name in enumerate(("group", "booster"))
        ]
        merge_adapters([*folders, start], [1.0, 3.0, -3.0], tmp_path / f"merged-{scale}")
        names = {"start": start, "group": folders[0], "booster": folders[1], "merged": tmp_path / f"merged-{scale}"}
        model = attach_adapters(load_base(tiny_model, "none", CPU).double(), names)
        model.double()
        ids = torch.randint(10, 100, (2, 9), generator=torch.Generator().manual_seed(0))
        logits = {}
        for name in names:
            model.set_adapter(name)
            with torch.no_grad():
                logits[name] = model(input_ids=ids).logits
        ensemble = logits["group"] + 3.0 * (logits["booster"] - logits["start"])
        gaps.append(float((logits["merged"] - ensemble).abs().max()))
        assert gaps[-1] < 0.1 * float((ensemble - logits["start"]).abs().max())
    assert gaps[1] < 0.3 * gaps[0]


def moved(start: Path, folder: Path, scale: float, seed: int) -> Path:
    tensors = load_file(start / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir()
    changed = {name: value + scale * torch.randn(value.shape, generator=generator) for name, value in tensors.items()}
    save_file(changed, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_bytes((start / "adapter_config.json").read_bytes())
    return folder


def test_shares_go_from_the_main_adapter_to_the_whole_combination():
    parts = {"a": 0.75, "b": 0.25, "booster": 0.5, "start": -0.5}
    assert towards(parts, "a", 1.0) == parts
    assert towards(parts, "a", 0.0) == {"a": 1.0}
    assert towards(parts, "a", 0.5) == {"a": 0.875, "b": 0.125, "booster": 0.25, "start": -0.25}
    for share in SHARES:
        assert sum(towards(parts, "b", share).values()) == pytest.approx(1.0)


def test_divergence_is_that_of_the_predictions():
    scores = np.random.default_rng(0).normal(size=(2, 50, 3)).astype(np.float32)
    p, q = (np.exp(each) / np.exp(each).sum(axis=1, keepdims=True) for each in scores.astype(np.float64))
    slow = sum(p[i, k] * np.log(p[i, k] / q[i, k]) for i in range(50) for k in range(3)) / 50
    assert divergence(scores[0], scores[1]) == pytest.approx(slow)
    assert divergence(scores[0], scores[0] + 7) == pytest.approx(0, abs=1e-6)
    assert divergence(scores[0], scores[1]) > 0
