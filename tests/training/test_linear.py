"""Linear layers through oneDNN: the numbers of float64, the state of `nn.Linear`, and a rule that decides."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from rlhf.errors import ConfigError
from rlhf.training import linear as subject
from rlhf.training.linear import (
    VARIABLE,
    FastLinear,
    linear,
    linear_onto,
    onednn_pays,
    pack,
    use_fast_linear,
    weight_gradient,
)

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture(autouse=True)
def _forget_the_choice() -> Iterator[None]:
    onednn_pays.cache_clear()
    yield
    onednn_pays.cache_clear()


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "onednn")


def _exact(rows: Tensor, weight: Tensor, bias: Tensor | None, gradient: Tensor) -> list[Tensor]:
    """Output and gradients by torch's own linear layer in float64."""
    leaves = [tensor.double().requires_grad_() for tensor in (rows, weight, bias) if tensor is not None]
    output = nn.functional.linear(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, gradient.double())]


@needs_onednn
@pytest.mark.parametrize("shape", [(2000,), (40, 50)])
@pytest.mark.parametrize(("width_in", "width_out"), [(96, 160), (160, 96)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_output_and_gradients_are_those_of_float64(
    onednn: None, shape: tuple[int, ...], width_in: int, width_out: int, with_bias: bool
) -> None:
    torch.manual_seed(0)
    rows = torch.randn(*shape, width_in, requires_grad=True)
    weight = torch.randn(width_out, width_in, requires_grad=True)
    bias = torch.randn(width_out, requires_grad=True) if with_bias else None
    output = linear(rows, weight, bias)
    assert type(output.grad_fn).__name__ == "_LinearBackward"  # not torch's own: oneDNN computed it
    gradient = torch.randn_like(output)
    leaves = [tensor for tensor in (rows, weight, bias) if tensor is not None]
    found = [output.detach(), *torch.autograd.grad(output, leaves, gradient)]
    for got, exact in zip(found, _exact(rows, weight, bias, gradient), strict=True):
        assert got.shape == exact.shape
        # Float32 rounds each of n additions by at most 2^-24 of the sum so far; n is at most 2000.
        assert (got - exact).abs().max() < 2**-24 * math.sqrt(2000) * 4 * exact.abs().max()


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@needs_onednn
@pytest.mark.parametrize("rows_count", [1024, 2032, 4050])
@pytest.mark.parametrize(("width_in", "width_out"), [(96, 160), (160, 96), (64, 64)])
def test_weight_gradients_as_those_of_convolutions(
    onednn: None, threads: int, monkeypatch: pytest.MonkeyPatch, rows_count: int, width_in: int, width_out: int
) -> None:
    heights = []
    real = subject.convolved_gradient
    monkeypatch.setattr(
        subject,
        "convolved_gradient",
        lambda *operands, height: heights.append(height) or real(*operands, height=height),
    )
    torch.manual_seed(0)
    gradient, rows = torch.randn(rows_count, width_out), torch.randn(rows_count, width_in)
    found, exact = weight_gradient(gradient, rows), gradient.double().t() @ rows.double()
    # One thread wants 16 images: of 251 rows or of 127.
    assert heights == ({1024: [], 2032: [127], 4050: [251]}[rows_count] if threads == 1 else [251])
    assert found.shape == (width_out, width_in)
    assert (found - exact).abs().max() < 2**-24 * math.sqrt(rows_count) * 4 * exact.abs().max()
    assert torch.equal(found, weight_gradient(gradient, rows))  # the same sums in the same order


@pytest.mark.parametrize("rows_count", [5, 9, 14, 15])
def test_rows_beyond_whole_images_count(rows_count: int) -> None:
    gradient, rows = torch.randn(rows_count, 24), torch.randn(rows_count, 40)
    found = subject.convolved_gradient(gradient, rows, height=5)
    torch.testing.assert_close(found, gradient.t() @ rows, atol=1e-4, rtol=1e-4)


@needs_onednn
def test_a_large_gradient_odd_widths_and_strided_rows_stay_products(
    onednn: None, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject, "convolved_gradient", None)
    for gradient, rows in (
        (torch.randn(1024, 512), torch.randn(1024, 640)),  # 512 x 640 numbers, more than 256 for each row
        (torch.randn(1023, 64), torch.randn(1023, 64)),
        (torch.randn(2048, 128)[:, ::2], torch.randn(2048, 64)),
        (torch.randn(2048, 100), torch.randn(2048, 64)),
    ):
        torch.testing.assert_close(weight_gradient(gradient, rows), gradient.t() @ rows, atol=1e-3, rtol=1e-4)


@needs_onednn
def test_a_frozen_weight_gets_no_gradient_and_costs_none(onednn: None) -> None:
    rows = torch.randn(2000, 96, requires_grad=True)
    weight, bias = torch.randn(160, 96), torch.randn(160)
    linear(rows, weight, bias).sum().backward()
    assert rows.grad is not None
    assert torch.allclose(rows.grad, weight.sum(dim=0).expand(2000, -1), atol=1e-4)  # d sum(X W^T) / dX
    assert weight.grad is None


@needs_onednn
@pytest.mark.parametrize("rows_count", [2000, 2])
@pytest.mark.parametrize("with_bias", [True, False])
def test_adding_onto_a_residual(onednn: None, rows_count: int, with_bias: bool) -> None:
    rows, residual = torch.randn(rows_count, 96), torch.randn(rows_count, 160)
    weight, bias = torch.randn(160, 96), torch.randn(160) if with_bias else None
    before = residual.clone()
    expected = residual.double() + nn.functional.linear(
        rows.double(), weight.double(), None if bias is None else bias.double()
    )
    assert torch.allclose(linear_onto(residual, rows, weight, bias).double(), expected, atol=1e-4)
    assert torch.equal(residual, before)


@needs_onednn
@pytest.mark.parametrize("rows_count", [2000, 700, 2])
def test_a_packed_weight_multiplies_as_the_weight(onednn: None, rows_count: int) -> None:
    rows, residual = torch.randn(rows_count, 96), torch.randn(rows_count, 160)
    weight, bias = torch.randn(160, 96), torch.randn(160)
    expected = nn.functional.linear(rows.double(), weight.double(), bias.double())
    packed = pack(weight)
    assert packed is not None
    assert torch.allclose(linear(rows, weight, bias, packed=packed).double(), expected, atol=1e-4)
    sums = linear_onto(residual, rows, weight, bias, packed=packed)
    assert torch.allclose(sums.double(), residual.double() + expected, atol=1e-4)
    assert pack(weight.double()) is None  # oneDNN does not multiply these


@needs_onednn
def test_layers_keep_their_state_and_only_plain_ones_change(onednn: None) -> None:
    class Special(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(96, 160), nn.Tanh(), Special(160, 4))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    use_fast_linear(model)
    assert [type(layer) for layer in model] == [FastLinear, nn.Tanh, Special]
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    twin = copy.deepcopy(model)
    rows = torch.randn(2000, 96)
    assert torch.equal(twin(rows), model(rows))


@needs_onednn
def test_small_products_other_types_and_autocast_stay_with_torch(onednn: None) -> None:
    def grad_fn(rows: Tensor, dtype: torch.dtype = torch.float32) -> str:
        weight = torch.randn(160, 96, dtype=dtype, requires_grad=True)
        return type(linear(rows.to(dtype), weight).grad_fn).__name__

    assert grad_fn(torch.randn(2000, 96)) == "_LinearBackward"
    assert grad_fn(torch.randn(2, 96)) != "_LinearBackward"
    assert grad_fn(torch.randn(2000, 96), torch.float64) != "_LinearBackward"
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(torch.randn(2000, 96), torch.randn(160, 96)).dtype is torch.bfloat16


@pytest.mark.parametrize(("maker", "pays"), [("AuthenticAMD", True), ("GenuineIntel", False), (None, False)])
def test_the_processors_maker_decides(monkeypatch: pytest.MonkeyPatch, maker: str | None, pays: bool) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(subject, "_cpu_maker", lambda: maker)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert onednn_pays() is pays


def test_it_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "default")
    model = nn.Sequential(nn.Linear(3, 4))
    use_fast_linear(model)
    assert type(model[0]) is nn.Linear


def test_an_unknown_choice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "fast")
    with pytest.raises(ConfigError, match="auto, default or onednn"):
        onednn_pays()
