from __future__ import annotations

import copy
import importlib
import pickle
import re
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swiftmoe_lightning as sml
from tests import hf_models

transformers = pytest.importorskip("transformers")

E, DIM, HIDDEN, TOP_K = 5, 16, 12, 2


def experts_of(model: nn.Module) -> list[sml.Experts]:
    return [m for m in model.modules() if isinstance(m, sml.Experts)]


# Whole models.


@pytest.mark.parametrize("family", hf_models.FAMILIES)
def test_loss_logits_and_all_gradients_of_a_converted_model_equal_the_original(family: str) -> None:
    ids = hf_models.tokens(0)
    outputs, gradients = [], []
    for model in (hf_models.build(family), sml.convert(hf_models.build(family))):
        outputs.append(model(input_ids=ids, labels=ids))
        outputs[-1].loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert experts_of(model)
    torch.testing.assert_close(outputs[1].loss, outputs[0].loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs[1].logits, outputs[0].logits, rtol=1e-5, atol=1e-5)
    assert (outputs[0].get("aux_loss") is None) == (outputs[1].get("aux_loss") is None) == (family != "mixtral")
    assert list(gradients[0]) == list(gradients[1])
    for name, expected in gradients[0].items():
        assert expected is not None, name
        torch.testing.assert_close(
            gradients[1][name], expected, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("family", hf_models.FAMILIES)
def test_what_a_converted_model_saves_loads_without_this_package(family: str, tmp_path: Path) -> None:
    model = sml.convert(hf_models.build(family)).eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = hf_models.tokens(0)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert not experts_of(loaded)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, loaded(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


def test_parameters_stay_the_same_objects_in_the_same_order() -> None:
    model = hf_models.build("gpt_oss")
    before = dict(model.named_parameters())
    assert sml.convert(model) is model
    after = dict(model.named_parameters())
    assert list(before) == list(after)
    assert all(before[name] is after[name] for name in before)


def test_converting_twice_changes_nothing() -> None:
    model = sml.convert(hf_models.build("mixtral"))
    first = experts_of(model)
    assert [id(m) for m in experts_of(sml.convert(model))] == [id(m) for m in first]


def test_a_converted_model_can_be_copied_and_pickled() -> None:
    model = sml.convert(hf_models.build("gpt_oss")).eval()
    ids = hf_models.tokens(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(input_ids=ids).logits, model(input_ids=ids).logits)
        assert {id(p) for p in other.parameters()}.isdisjoint({id(p) for p in model.parameters()})


def test_a_model_on_meta_is_converted_and_random_numbers_go_on_as_before() -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    with torch.device("meta"):
        model = sml.convert(fused_model())
    assert experts_of(model)[0].is_meta
    assert torch.equal(torch.rand(3), expected)


# Every fused experts class of the installed transformers, alone.


class AnyConfig:
    """Sizes and settings by what they are usually called."""

    _experts_implementation = "eager"
    swiglu_limit, swiglu_alpha, mlp_gate_softcap = 3.0, 1.702, 2.0
    hidden_act = hidden_activation = mlp_hidden_act = "silu"
    moe_latent_size, zero_expert_num, post_norm_eps = None, 0, 1e-6

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if "expert" in name and "intermediate" not in name and "hidden_size" not in name:
            return E
        return HIDDEN if "intermediate" in name or "ffn" in name else DIM


def fused_classes() -> list[str]:
    """module:class of everything in the installed transformers that owns a fused `down_proj` and its first half."""
    spec = find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    actual = []
    for path in sorted((Path(spec.origin).parent / "models").glob("*/modeling_*.py")):
        for name, body in re.findall(r"^class (\w*Experts)\(nn\.Module\):\n((?:    .*\n|\n)+)", path.read_text(), re.M):
            if "down_proj = nn.Parameter" in body and "up_proj = nn.Parameter" in body and "gate_proj =" not in body:
                actual.append(f"{path.parent.name}.{path.stem}:{name}")
    return actual


# What is left as it is, and why.
LEFT = {"MuseSparkExperts": r"it holds tensors besides those of the fused layout: \['post_expert_norm.weight'\]"}


@pytest.mark.parametrize("where", fused_classes())
def test_fused_experts_of_transformers_are_taken_over_or_named_with_the_reason(where: str) -> None:
    module, name = where.split(":")
    try:
        kind = getattr(importlib.import_module(f"transformers.models.{module}"), name)
    except ImportError as error:
        pytest.skip(f"{where} cannot be imported here: {error}")
    original = kind(AnyConfig())
    torch.manual_seed(0)
    for parameter in original.parameters():
        nn.init.normal_(parameter)
    if name in LEFT:
        with pytest.raises(ValueError, match=LEFT[name]):
            sml.convert(nn.ModuleDict({"experts": original}))
        return
    converted = sml.convert(nn.ModuleDict({"experts": copy.deepcopy(original)}))["experts"]
    assert isinstance(converted, sml.Experts)
    compare(original, converted, repeated="Llama4" in name)


def compare(original: nn.Module, converted: nn.Module, repeated: bool = False) -> None:
    """Outputs and gradients of both, on the same tokens."""
    torch.manual_seed(1)
    x_TD = torch.randn(7, DIM)
    weights_TE = torch.rand(7, E)
    weights_TK, ids_TK = weights_TE.topk(TOP_K)
    if repeated:
        kept_ET = torch.zeros(7, E).scatter(1, ids_TK, weights_TK).T
        inputs = [(kept_ET.unsqueeze(-1) * x_TD).flatten(0, 1).requires_grad_()]
        others: list[Tensor] = []
    else:
        inputs, others = [x_TD.requires_grad_(), weights_TK.requires_grad_()], [ids_TK]
    arguments = [inputs[0], *others, *inputs[1:]]
    actual, expected = converted(*arguments), original(*arguments)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)
    probe = torch.randn(expected.shape)
    names = [name for name, _ in original.named_parameters()]
    gradients = [
        torch.autograd.grad(out, [*inputs, *(dict(m.named_parameters())[n] for n in names)], probe)
        for m, out in ((converted, actual), (original, expected))
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


def test_most_families_are_found() -> None:
    assert len({where.split(".")[0] for where in fused_classes()}) > 30


# Structure decides, not names.


class Fused(nn.Module):
    """Experts as in transformers v5, of a family that nobody knows."""

    def __init__(self, dim: int = DIM, hidden: int = HIDDEN, transposed: bool = False) -> None:
        super().__init__()
        self.num_experts, self.transposed, self.act_fn = E, transposed, nn.SiLU()
        up, down = (2 * hidden, dim), (dim, hidden)
        self.gate_up_proj = nn.Parameter(torch.randn(E, *(up[::-1] if transposed else up)))
        self.down_proj = nn.Parameter(torch.randn(E, *(down[::-1] if transposed else down)))

    def _apply_gate(self, z: Tensor) -> Tensor:
        gate, up = z.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, k = torch.where(top_k_index == expert)
            up, down = self.gate_up_proj[expert], self.down_proj[expert]
            if not self.transposed:
                up, down = up.T, down.T
            y = self._apply_gate(hidden_states[token] @ up) @ down
            out.index_add_(0, token, y * top_k_weights[token, k, None])
        return out


def fused_model(**options: Any) -> nn.Module:
    return nn.ModuleDict({"feed_forward": nn.ModuleDict({"ffn": Fused(**options)})})


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("hidden", [HIDDEN, DIM, DIM // 2])
def test_the_layout_is_found_by_trial_where_shapes_fit_both(transposed: bool, hidden: int) -> None:
    model = fused_model(hidden=hidden, transposed=transposed)
    original = copy.deepcopy(model)["feed_forward"]["ffn"]
    experts = sml.convert(model)["feed_forward"]["ffn"]
    assert (experts.transposed, experts.hidden_dim, experts.activation) == (transposed, hidden, "swiglu")
    compare(original, experts)


class ClampedFarOut(Fused):
    def _apply_gate(self, z: Tensor) -> Tensor:
        return super()._apply_gate(z.clamp(max=1e3))


class RoundedLate(Fused):
    def _apply_gate(self, z: Tensor) -> Tensor:
        return super()._apply_gate(z.float()).to(z.dtype)


def test_an_activation_that_is_nearly_ours_stays_its_own() -> None:
    model = nn.ModuleDict({"experts": ClampedFarOut()})
    original = copy.deepcopy(model)["experts"]
    experts = sml.convert(model)["experts"]
    assert experts.activation != "swiglu"
    assert "ClampedFarOut" in repr(experts)
    compare(original, experts)


def test_an_activation_that_only_rounds_elsewhere_is_ours() -> None:
    model = nn.ModuleDict({"experts": RoundedLate()})
    original = copy.deepcopy(model)["experts"]
    experts = sml.convert(model)["experts"]
    assert experts.activation == "swiglu"
    compare(original, experts)


def test_a_module_in_two_places_stays_one() -> None:
    model = nn.ModuleList([fused_model(), nn.ModuleDict()])
    model[1]["again"] = model[0]["feed_forward"]["ffn"]
    sml.convert(model)
    assert isinstance(model[1]["again"], sml.Experts)
    assert model[1]["again"] is model[0]["feed_forward"]["ffn"]


def test_evaluation_and_frozen_parameters_stay() -> None:
    model = fused_model().eval()
    model["feed_forward"]["ffn"].down_proj.requires_grad_(False)
    (experts,) = experts_of(sml.convert(model))
    assert not experts.training
    assert (experts.gate_up_proj.requires_grad, experts.down_proj.requires_grad) == (True, False)


# What cannot be taken over.


def quantized() -> nn.Module:
    experts = Fused()
    experts.gate_up_proj = nn.Parameter(experts.gate_up_proj.detach().to(torch.float8_e4m3fn), requires_grad=False)
    return experts


class ParamWrapper(nn.Module):
    """As PEFT wraps experts, and not PEFT's."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer, self.lora_A = Fused(), nn.Linear(DIM, 2)

    def forward(self, *args: Tensor) -> Tensor:
        out: Tensor = self.base_layer(*args)
        return out


def parametrised() -> nn.Module:
    experts = Fused()
    nn.utils.parametrize.register_parametrization(experts, "down_proj", nn.Identity())
    return experts


def hooked() -> nn.Module:
    experts = Fused()
    experts.register_forward_hook(lambda *_: None)
    return experts


def replaced() -> nn.Module:
    experts = Fused()
    experts.forward = experts.forward  # type: ignore[method-assign]
    return experts


def with_scales() -> nn.Module:
    experts = Fused()
    experts.register_buffer("scales", torch.ones(E))
    return experts


def of_other_sizes() -> nn.Module:
    experts = Fused()
    experts.down_proj = nn.Parameter(torch.randn(E, DIM, HIDDEN + 1))
    return experts


def flattened() -> nn.Module:
    experts = Fused()
    experts.down_proj = nn.Parameter(experts.down_proj.detach().flatten())
    return experts


class Doubled(Fused):
    def forward(self, *args: Tensor) -> Tensor:
        return 2 * super().forward(*args)


class Failing(Fused):
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        raise RuntimeError("only on a full moon")


class Masked(Fused):
    def forward(self, hidden_states: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        return hidden_states * mask


class Silent(Fused):
    _apply_gate = None  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        del self.act_fn


def legacy() -> nn.Module:
    return nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(E))


REASONS: dict[Callable[[], nn.Module], str] = {
    quantized: r"gate_up_proj is quantized \(torch.float8_e4m3fn\): load the model without a quantization_config",
    ParamWrapper: r"its weights are wrapped \(not by PEFT's LoRA\): merge or unload the adapter before convert\(\)",
    parametrised: r"its weights are wrapped \(not by PEFT's LoRA\)",
    hooked: r"its forward is replaced or has hooks .*: convert\(\) before that",
    replaced: r"its forward is replaced or has hooks .*: convert\(\) before that",
    with_scales: r"it holds tensors besides those of the fused layout: \['scales'\]",
    of_other_sizes: r"do not fit together: \{'gate_up_proj': \[5, 24, 16\], 'down_proj': \[5, 16, 13\]\}",
    Doubled: r"computes something else than act\(x @ up\) @ down, weighted and summed: its outputs differ by 50%",
    Failing: r"RuntimeError: only on a full moon",
    Masked: r"its forward takes \['hidden_states', 'mask'\], not hidden states, expert ids and their weights",
    Silent: r"no act_fn or _apply_gate that says what its activation is",
    legacy: r"no 3-D tensors gate_up_proj \(or up_proj\) and down_proj, fused over experts as in v5",
    flattened: r"no 3-D tensors gate_up_proj \(or up_proj\) and down_proj, fused over experts as in v5",
}


@pytest.mark.parametrize("make", REASONS, ids=lambda make: make.__name__)
def test_what_cannot_be_taken_over_is_named_with_the_reason(make: Callable[[], nn.Module]) -> None:
    experts = make()
    with pytest.raises(ValueError, match=REASONS[make]) as caught:
        sml.convert(nn.ModuleDict({"mlp": nn.ModuleDict({"experts": experts})}))
    assert (
        f"convert() found no experts in ModuleDict that it can take over:\n  mlp.experts ({type(experts).__name__}): "
        in str(caught.value)
    )


def test_experts_inside_nested_adapters_are_left_whatever_their_name() -> None:
    wrapper = ParamWrapper()
    wrapper.base_layer = ParamWrapper()
    with pytest.raises(ValueError, match=r"take over:\n  ffn \(ParamWrapper\): its weights are wrapped"):
        sml.convert(nn.ModuleDict({"ffn": wrapper}))


def test_a_model_without_experts_is_refused() -> None:
    with pytest.raises(ValueError, match="found no experts in Linear that it can take over, and nothing in it looks"):
        sml.convert(nn.Linear(2, 2))


def test_experts_that_stay_beside_converted_ones_are_one_warning() -> None:
    model = nn.ModuleDict({"good": fused_model(), "old": nn.ModuleDict({"experts": legacy()})})
    model["older"] = nn.ModuleDict({"experts": legacy()})
    with pytest.warns(UserWarning, match=r"left these experts as they are") as caught:
        sml.convert(model)
    (warning,) = caught
    assert "old.experts and 1 more (ModuleList): it has no 3-D tensors" in str(warning.message)
    assert warning.filename == __file__
    assert len(experts_of(model)) == 1


def test_dense_models_around_the_experts_are_no_candidates() -> None:
    model = hf_models.build("deepseek_v3")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sml.convert(model)
    assert type(model.model.layers[1].mlp.shared_experts).__name__ == "DeepseekV3MLP"


def test_experts_of_our_own_need_no_conversion() -> None:
    block = sml.MoE(4, 4, 2)
    assert sml.convert(nn.Sequential(block))[0] is block


def test_router_weights_that_are_not_finite_are_refused_in_every_calling_convention() -> None:
    for family in ("mixtral", "llama4_text"):
        model = sml.convert(hf_models.build(family))
        with torch.no_grad():
            model.get_input_embeddings().weight.fill_(float("nan"))
        with pytest.raises(FloatingPointError, match="non-finite scores"):
            model(input_ids=hf_models.tokens(0))


def test_bfloat16_stays_within_its_rounding() -> None:
    original = Fused().bfloat16()
    model = nn.ModuleDict({"experts": copy.deepcopy(original)})
    x, ids = torch.randn(7, DIM).bfloat16(), torch.randint(E, (7, 1))
    weights = torch.rand(7, 1)
    actual, expected = sml.convert(model)["experts"](x, ids, weights), original.float()(x.float(), ids, weights)
    assert actual.dtype == torch.bfloat16
    assert F.mse_loss(actual.float(), expected) < 1e-3 * expected.square().mean()


def test_autocast_and_default_dtype_around_convert_do_not_matter() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            (experts,) = experts_of(sml.convert(fused_model()))
    finally:
        torch.set_default_dtype(torch.float32)
    assert experts.activation == "swiglu"


@pytest.mark.parametrize("model", [None, "allenai/OLMoE-1B-7B-0924", 3])
def test_what_is_no_model_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match=rf"convert\(\) takes a model, an nn\.Module, got {model!r}\. Load one"):
        sml.convert(model)
