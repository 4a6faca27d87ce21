"""Hugging Face models with `experts_implementation="swiftmoe"` against their own eager experts."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import swiftmoe_lightning as sml
from swiftmoe_lightning.huggingface import experts as hf_experts
from swiftmoe_lightning.ops import backend
from tests import hf_models

transformers = pytest.importorskip("transformers")

# Halves and interleaved, transposed, biases, clamps, no gate, and gates by another activation.
FAMILIES = ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss", "granitemoe", "nemotron_h"]


@pytest.fixture(autouse=True)
def _registered() -> None:
    sml.register_hf_experts()


def results(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """Logits, and the gradient of every parameter."""
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    return {"logits": output.logits} | {name: p.grad for name, p in model.named_parameters()}


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def both(family: str, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Ours, and eager's; and ours was really called."""
    calls = []

    def counted(*inputs: Any) -> Tensor:
        calls.append(inputs)
        return hf_experts.run_hf_experts(*inputs)

    monkeypatch.setitem(transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS._global_mapping, "swiftmoe", counted)
    monkeypatch.setitem(transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS._local_mapping, "swiftmoe", counted)
    actual = []
    for name in ("swiftmoe", "eager"):
        model = hf_models.build(family)
        model.set_experts_implementation(name)
        actual.append(results(model, hf_models.tokens(0)))
    assert calls
    return actual[0], actual[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_all_gradients_equal_eager(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_equal(*both(family, monkeypatch))


def test_logits_and_all_gradients_equal_eager_on_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    fused = []
    monkeypatch.setattr("swiftmoe_lightning.ops.layer.fused_expert_layer", spy(fused))
    with backend.force_backend("triton"):
        assert_equal(*both("qwen3_moe", monkeypatch))
    assert fused


def spy(calls: list[Any]) -> Any:
    from swiftmoe_lightning.ops.fused import fused_expert_layer

    def call(*inputs: Any) -> Tensor:
        calls.append(inputs)
        return fused_expert_layer(*inputs)

    return call


def test_a_model_may_be_loaded_with_it() -> None:
    config = hf_models.build("olmoe").config
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="swiftmoe")
    assert model.config._experts_implementation == "swiftmoe"


def experts_of(family: str) -> Any:
    model = hf_models.build(family)
    model.set_experts_implementation("swiftmoe")
    return next(m for m in model.modules() if hasattr(m, "is_transposed"))


def inputs_of(experts: Any, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x_TD = torch.randn(9, 16, generator=generator).to(dtype)
    ids_TK = torch.rand(9, len(experts.down_proj), generator=generator).topk(2).indices
    return x_TD, ids_TK, torch.rand(9, 2, generator=generator).to(dtype)


def gradients_of(run: Any, experts: Any, inputs: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    """The output, and the gradients of the tokens and of every parameter."""
    x_TD = inputs[0].clone().requires_grad_()
    experts.zero_grad()
    out = run(x_TD, *inputs[1:])
    out.square().sum().backward()
    return {"out": out, "x": x_TD.grad} | {name: p.grad.clone() for name, p in experts.named_parameters()}


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("name", ["torch", "triton"])
def test_assignments_to_experts_elsewhere_add_nothing(family: str, name: str) -> None:
    if name == "triton":
        pytest.importorskip("triton")
    experts = experts_of(family)
    x_TD, ids_TK, weights_TK = inputs_of(experts)
    elsewhere_TK = torch.rand(ids_TK.shape, generator=torch.Generator().manual_seed(4)) < 0.4
    elsewhere_TK[0] = True
    with backend.force_backend(name):
        actual = [
            gradients_of(experts, experts, (x_TD, ids, weights))
            for ids, weights in (
                (ids_TK.masked_fill(elsewhere_TK, len(experts.down_proj)), weights_TK),
                (ids_TK, weights_TK.masked_fill(elsewhere_TK, 0.0)),
            )
        ]
    assert not actual[0]["out"][0].any()
    assert_equal(*actual)


@pytest.mark.parametrize("name", ["torch", "triton"])
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_compile_to_one_graph(family: str, name: str) -> None:
    if name == "triton":
        pytest.importorskip("triton")
    experts = experts_of(family)
    torch._dynamo.reset()
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager", dynamic=True)
    x_TD, ids_TK, weights_TK = inputs_of(experts)
    elsewhere_TK = ids_TK.clone()
    elsewhere_TK[::3, 0] = len(experts.down_proj)
    with backend.force_backend(name):
        for ids, stance in [(ids_TK, "default"), (elsewhere_TK[:7], "fail_on_recompile")]:
            inputs = (x_TD[: len(ids)], ids.clone(), weights_TK[: len(ids)].clone())
            with torch.compiler.set_stance(stance):
                actual = gradients_of(compiled, experts, inputs)
            assert_equal(actual, gradients_of(experts, experts, inputs))


def test_a_model_compiles_to_one_graph() -> None:
    model = hf_models.build("qwen3_moe")
    model.set_experts_implementation("swiftmoe")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = hf_models.tokens(0)
    torch.testing.assert_close(compiled(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


def test_a_norm_behind_the_experts_sees_only_rows_of_assignments() -> None:
    experts = experts_of("qwen3_moe")
    x_TD, ids_TK, weights_TK = inputs_of(experts)
    plain = experts(x_TD, ids_TK[:, :1], torch.ones(9, 1))
    experts.has_post_expert_norm = True
    experts.post_expert_norm = nn.RMSNorm(16)
    out = experts(x_TD, torch.stack([ids_TK[:, 0], torch.full((9,), 5)], dim=1), weights_TK)
    torch.testing.assert_close(out, experts.post_expert_norm(plain) * weights_TK[:, :1], rtol=1e-5, atol=1e-5)
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in experts.parameters())


def test_autocast_computes_in_its_dtype_and_returns_the_inputs() -> None:
    experts = experts_of("qwen3_moe")
    x_TD, ids_TK, weights_TK = inputs_of(experts)
    expected = experts(x_TD, ids_TK, weights_TK)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = experts(x_TD, ids_TK, weights_TK)
    assert out.dtype == torch.float32
    error = (out - expected).norm() / expected.norm()
    assert 1e-5 < error < 2e-2


def test_an_activation_is_named_where_our_kernels_have_it() -> None:
    experts = experts_of("qwen3_moe")
    assert hf_experts._activation_of(experts) == "swiglu"
    for act_fn in (nn.Tanh(), nn.GELU(), nn.PReLU()):
        experts.act_fn = act_fn
        assert hf_experts._activation_of(experts) == experts._apply_gate
    assert callable(hf_experts._activation_of(experts_of("gpt_oss")))
    squared = experts_of("nemotron_h")
    assert hf_experts._activation_of(squared) == "relu2"
    squared.act_fn = nn.ReLU()
    assert hf_experts._activation_of(squared) is squared.act_fn


def test_layers_of_one_kind_share_a_graph() -> None:
    torch._dynamo.reset()
    layers = [experts_of("qwen3_moe") for _ in range(3)]
    for layer, stance in zip(layers, ["default", "fail_on_recompile", "fail_on_recompile"], strict=True):
        layer.compile(backend="aot_eager", fullgraph=True)
        with torch.compiler.set_stance(stance):
            layer(*inputs_of(layer))


def test_importing_the_package_registers_it_where_transformers_is_loaded() -> None:
    code = (
        "import transformers, swiftmoe_lightning\n"
        "from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS\n"
        "print('swiftmoe' in ALL_EXPERTS_FUNCTIONS)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.stdout == "True\n", process.stderr


def test_without_transformers_5_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers.integrations.moe", None)
    message = 'needs transformers 5 or later: pip install "swiftmoe-lightning\\[hf\\]"'
    with pytest.raises(ImportError, match=message):
        sml.register_hf_experts()
