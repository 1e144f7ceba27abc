"""LoRA on packed linears: gradients, training, saving and loading, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import qkit
from qkit.errors import QkitError
from qkit.kernels.codes import codes_of
from qkit.methods import rtn
from qkit.runtime import QuantLinear
from qkit.spec import CHANNEL, integer

ATTENTION = ["q_proj", "v_proj"]


@pytest.fixture(scope="session")
def folder(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("peft") / "w4"
    qkit.convert(llama, out, scheme="w4a16-asym", method="rtn", group_size=32)
    return out


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(5))


def model(folder: Path, **options: Any) -> PeftModel:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=ATTENTION, task_type="CAUSAL_LM", **options)
    return get_peft_model(qkit.load(folder, device="cpu", dtype="float32"), qkit.lora(config))


def train(peft: Any, tokens: torch.Tensor, steps: int = 4) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(steps):
        loss = peft(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", [integer(4, 32), integer(4, 64, symmetric=False), integer(8, CHANNEL)])
@pytest.mark.parametrize("shape", [(1, 128), (2, 40, 128)])
def test_input_gradient_is_that_of_the_dequantized_weight(dtype, scheme, shape):
    torch.manual_seed(1)
    layer = QuantLinear(rtn.quantize(torch.randn(96, 128), scheme), torch.randn(96).to(dtype))
    plain = nn.Linear(128, 96, dtype=dtype)
    plain.weight.data, plain.bias.data = layer.dequantize(dtype), layer.bias
    x = torch.randn(shape).to(dtype)
    grads = []
    for m in (layer, plain):
        leaf = x.clone().requires_grad_()
        y = m(leaf)
        y.float().square().sum().backward()
        grads.append(leaf.grad)
    assert grads[0].dtype == dtype
    bound = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    assert float((grads[0] - grads[1]).float().norm() / grads[1].float().norm()) < bound
    assert torch.equal(layer(x), layer(x.clone().requires_grad_()).detach())  # the same kernel either way


def test_the_graph_keeps_no_dequantized_weight_and_no_input():
    layer = QuantLinear(rtn.quantize(torch.randn(96, 128), integer(4, 32)))
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(4, 128, requires_grad=True))
    assert not kept


def test_trains_and_only_the_adapter(folder, tokens):
    peft = model(folder)
    assert sum(isinstance(m, QuantLinear) for m in peft.modules()) == 14
    before = [m.quantized() for m in peft.modules() if isinstance(m, QuantLinear)]
    assert all("lora_" in n for n, p in peft.named_parameters() if p.requires_grad)
    losses = train(peft, tokens)
    assert losses[-1] < losses[0] - 0.05
    after = [m.quantized() for m in peft.modules() if isinstance(m, QuantLinear)]
    for a, b in zip(after, before, strict=True):
        assert torch.equal(codes_of(a), codes_of(b)) and torch.equal(a.scale, b.scale)


def test_checkpointing_gives_the_same_gradients(folder, tokens):
    grads = []
    for checkpointing in (False, True):
        peft = model(folder, init_lora_weights="gaussian").train()
        if checkpointing:
            peft.enable_input_require_grads()
            peft.gradient_checkpointing_enable({"use_reentrant": False})
        peft(input_ids=tokens, labels=tokens).loss.backward()
        grads.append({n: p.grad for n, p in peft.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) == 8
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name])


def test_gradients_are_those_on_dequantized_linears(folder, tokens):
    """Through the frozen packed layers down to the first adapter."""
    grads = []
    for dense in (False, True):
        base = qkit.load(folder, device="cpu", dtype="float32")
        for name, module in list(base.named_modules()):
            if dense and isinstance(module, QuantLinear):
                plain = nn.Linear(module.in_features, module.out_features, bias=False)
                plain.weight = nn.Parameter(module.dequantize(), requires_grad=False)
                base.set_submodule(name, plain)
        torch.manual_seed(0)
        peft = get_peft_model(base, qkit.lora(LoraConfig(r=4, target_modules=ATTENTION, task_type="CAUSAL_LM")))
        peft(input_ids=tokens, labels=tokens).loss.backward()
        grads.append({n: p.grad for n, p in peft.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name], atol=1e-6, rtol=1e-4)


def test_adapter_saves_loads_and_unloads(folder, tokens, tmp_path):
    peft = model(folder)
    train(peft, tokens, steps=2)
    with torch.no_grad():
        trained = peft(input_ids=tokens).logits
        with peft.disable_adapter():
            plain = peft(input_ids=tokens).logits
    peft.save_pretrained(tmp_path)
    base = qkit.load(folder, device="cpu", dtype="float32")
    again = PeftModel.from_pretrained(base, tmp_path, config=qkit.lora(tmp_path))
    with torch.no_grad():
        assert torch.equal(again(input_ids=tokens).logits, trained)
        assert not torch.allclose(plain, trained, atol=1e-3)
        assert torch.equal(again.unload()(input_ids=tokens).logits, plain)


def test_bfloat16_model_generates_with_an_adapter(folder):
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=ATTENTION, init_lora_weights=False, task_type="CAUSAL_LM")
    peft = get_peft_model(qkit.load(folder, device="cpu"), qkit.lora(config))
    out = peft.generate(input_ids=torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False)
    assert out.shape[1] > 3


def test_merging_is_refused(folder):
    peft = model(folder)
    for merge in (peft.merge_adapter, peft.merge_and_unload):
        with pytest.raises(QkitError, match="cannot be merged"):
            merge()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"use_dora": True}, "dense weights"),
        ({"target_modules": "all-linear"}, "all-linear"),
    ],
)
def test_what_needs_dense_weights_is_refused(options, match, folder):
    config = LoraConfig(**{"r": 4, "target_modules": ATTENTION, **options})
    with pytest.raises(QkitError, match=match):
        get_peft_model(qkit.load(folder, device="cpu"), qkit.lora(config))


def test_not_an_adapter(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3", "target_modules": ["q_proj"]}')
    with pytest.raises(QkitError, match="not a LoRA adapter"):
        qkit.lora(tmp_path)
