"""Distillation: every term against its paper's formula written out by hand, and what happens on networks."""

from __future__ import annotations

import copy
from contextlib import ExitStack, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphprune
from graphprune.errors import InputError
from graphprune.train import Polynomial, Shrink, StochasticDepth, Training, finetune
from graphprune.train.distill import (
    AttentionTransfer,
    Distillation,
    Hint,
    RelationalAngle,
    RelationalDistance,
    SimilarityPreserving,
    SoftTargets,
    Term,
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Block(nn.Module):
    """A residual block whose ReLU writes into its input, as torchvision's do."""

    def __init__(self, channels: int, inner: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, inner, 3, padding=1), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(x + self.bn2(self.conv2(y)))


class Small(nn.Module):
    def __init__(self, channels: int = 8, inner: int = 8, stride: int = 1):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, channels, 3, stride, 1), nn.BatchNorm2d(channels), nn.ReLU())
        self.layer1, self.layer2 = Block(channels, inner), Block(channels, inner)
        self.fc = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(self.stem(x)))
        return self.fc(x.mean((2, 3)))


def network(**sizes: int) -> nn.Module:
    """With statistics that say something."""
    model = Small(**sizes)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model.eval()


def batch(size: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 1, 8, 8), torch.randint(5, (size,))


def pruned(model: nn.Module) -> nn.Module:
    graph = graphprune.trace(model, torch.zeros(2, 1, 8, 8), dynamic_batch=True)
    return graph.apply(graph.plan(ratio=0.5)).module


# ---- the formulas ------------------------------------------------------------------------------------


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("shape", [(4, 7), (3, 5, 7)])
def test_soft_targets_are_the_divergence_times_the_squared_temperature(shape: tuple[int, ...]) -> None:
    teacher, student = torch.randn(shape) * 3, torch.randn(shape) * 3
    p, q = softmax(teacher.double().numpy() / 2.5), softmax(student.double().numpy() / 2.5)
    expected = (p * np.log(p / q)).sum(-1).mean() * 2.5**2
    assert float(SoftTargets(temperature=2.5).value(teacher, student, None)) == pytest.approx(
        expected, rel=1e-5
    )


def test_soft_targets_of_a_map_of_classes_take_the_second_dimension() -> None:
    teacher, student = torch.randn(2, 7, 3, 4), torch.randn(2, 7, 3, 4)
    flat = [each.movedim(1, -1).reshape(-1, 7) for each in (teacher, student)]
    expected = F.kl_div(F.log_softmax(flat[1], 1), F.softmax(flat[0], 1), reduction="batchmean")
    torch.testing.assert_close(SoftTargets(temperature=1).value(teacher, student, None), expected)


def attention(values: Tensor) -> np.ndarray:
    """Normalised maps of [batch, channels, …] by loops."""
    rows = []
    for sample in values.double().numpy():
        q = sum(np.abs(channel) ** 2 for channel in sample).ravel()
        rows.append(q / np.sqrt((q**2).sum()))
    return np.array(rows)


@pytest.mark.parametrize("shape", [(3, 6, 4, 5), (3, 6, 2, 3, 4)])
def test_attention_transfer_is_equation_two(shape: tuple[int, ...]) -> None:
    teacher = torch.randn(shape)
    student = torch.randn(shape[0], 2, *shape[2:])
    distances = np.sqrt(((attention(student) - attention(teacher)) ** 2).sum(1))
    value = AttentionTransfer("x").value(teacher, student, None)
    assert float(value) == pytest.approx(distances.mean() / 2, rel=1e-5)


def test_attention_of_a_sequence_is_over_its_positions() -> None:
    teacher, student = torch.randn(3, 7, 12), torch.randn(3, 7, 4)
    first = [each.transpose(1, 2) for each in (teacher, student)]
    distances = np.sqrt(((attention(first[1]) - attention(first[0])) ** 2).sum(1))
    assert float(AttentionTransfer("x").value(teacher, student, None)) == pytest.approx(
        distances.mean() / 2, 1e-5
    )
    swapped = AttentionTransfer("x", channels=1).value(*first, None)
    torch.testing.assert_close(swapped, AttentionTransfer("x").value(teacher, student, None))


def test_a_larger_attention_map_is_averaged_down() -> None:
    teacher, student = torch.randn(2, 3, 8, 8), torch.randn(2, 5, 4, 4)
    q = teacher.pow(2).sum(1).reshape(2, 4, 2, 4, 2).mean((2, 4)).flatten(1)
    p = student.pow(2).sum(1).flatten(1)
    expected = (p / p.norm(dim=1, keepdim=True) - q / q.norm(dim=1, keepdim=True)).norm(dim=1).mean() / 2
    term = AttentionTransfer("x")
    torch.testing.assert_close(term.value(teacher, student, None), expected)
    torch.testing.assert_close(term.value(student, teacher, None), expected)


def test_a_hint_is_the_regressed_value() -> None:
    teacher, student = torch.randn(2, 6, 4, 4), torch.randn(2, 3, 6, 5)
    adapter = Hint("x").adapter(teacher, student)
    assert isinstance(adapter, nn.Conv2d)
    assert adapter.kernel_size == (3, 2)  # 6 - 4 + 1, 5 - 4 + 1
    expected = ((adapter(student) - teacher) ** 2).mean() / 2
    torch.testing.assert_close(Hint("x").value(teacher, student, adapter), expected)


@pytest.mark.parametrize(
    ("teacher", "student"), [((4, 9), (4, 3)), ((4, 7, 9), (4, 7, 3)), ((4, 6, 8, 8), (4, 3, 4, 4))]
)
def test_hints_of_vectors_sequences_and_smaller_students(
    teacher: tuple[int, ...], student: tuple[int, ...]
) -> None:
    guide, guided = torch.randn(teacher), torch.randn(student)
    adapter = Hint("x").adapter(guide, guided)
    weight, bias = adapter.weight.flatten(1), adapter.bias
    if guide.dim() == 4:
        guide = guide.reshape(4, 6, 4, 2, 4, 2).mean((3, 5))
        made = torch.einsum("bchw,oc->bohw", guided, weight) + bias[:, None, None]
    else:
        made = guided @ weight.T + bias
    torch.testing.assert_close(
        Hint("x").value(torch.as_tensor(guide), guided, adapter), F.mse_loss(made, guide) / 2
    )


def huber(difference: float) -> float:
    return 0.5 * difference**2 if abs(difference) <= 1 else abs(difference) - 0.5


def test_relational_distance_by_loops() -> None:
    teacher, student = torch.randn(5, 4, 2), torch.randn(5, 3) * 4

    def psi(rows: np.ndarray) -> dict[tuple[int, int], float]:
        d = {(i, j): float(np.linalg.norm(rows[i] - rows[j])) for i in range(5) for j in range(5) if i != j}
        return {pair: value / np.mean(list(d.values())) for pair, value in d.items()}

    t, s = psi(teacher.double().numpy().reshape(5, -1)), psi(student.double().numpy())
    expected = np.mean([huber(t[pair] - s[pair]) for pair in t])
    assert float(RelationalDistance("x").value(teacher, student, None)) == pytest.approx(expected, rel=1e-4)


def test_relational_angle_by_loops() -> None:
    teacher, student = torch.randn(5, 4, 2) + 10, torch.randn(5, 3)

    def cosine(rows: np.ndarray, i: int, j: int, k: int) -> float:
        a, b = rows[i] - rows[j], rows[k] - rows[j]
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    t, s = teacher.double().numpy().reshape(5, -1), student.double().numpy()
    triples = [(i, j, k) for i in range(5) for j in range(5) for k in range(5) if len({i, j, k}) == 3]
    expected = np.mean([huber(cosine(t, *each) - cosine(s, *each)) for each in triples])
    assert float(RelationalAngle("x").value(teacher, student, None)) == pytest.approx(expected, rel=1e-4)


def test_similarity_preserving_by_loops() -> None:
    teacher, student = torch.randn(4, 3, 2, 2), torch.randn(4, 6)

    def g(rows: np.ndarray) -> np.ndarray:
        gram = np.array([[a @ b for b in rows] for a in rows])
        return np.array([row / np.sqrt((row**2).sum()) for row in gram])

    t, s = g(teacher.double().numpy().reshape(4, -1)), g(student.double().numpy())
    expected = ((t - s) ** 2).sum() / 4**2
    assert float(SimilarityPreserving("x").value(teacher, student, None)) == pytest.approx(expected, rel=1e-4)


TERMS: list[Term] = [
    SoftTargets(), AttentionTransfer("x"), RelationalDistance("x"), RelationalAngle("x"),
    SimilarityPreserving("x"),
]  # fmt: skip


@pytest.mark.parametrize("term", TERMS, ids=lambda term: term.name)
def test_gradients_are_the_differences(term: Term) -> None:
    teacher, student = torch.randn(4, 3, 5), torch.randn(4, 3, 5, requires_grad=True)
    (gradient,) = torch.autograd.grad(term.value(teacher, student, None), student)
    assert torch.isfinite(gradient).all()
    direction, step = torch.randn(4, 3, 5), 1e-2
    with torch.no_grad():
        ahead, behind = (term.value(teacher, student + sign * step * direction, None) for sign in (1, -1))
    assert float((gradient * direction).sum()) == pytest.approx(float(ahead - behind) / (2 * step), rel=5e-2)


@pytest.mark.parametrize("term", TERMS, ids=lambda term: term.name)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(term: Term) -> None:
    value = torch.randn(4, 3, 5)
    student = value.clone().requires_grad_()
    loss = term.value(value, student, None)
    (gradient,) = torch.autograd.grad(loss, student)
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)
    assert float(gradient.abs().max()) < 1e-4


@pytest.mark.parametrize("term", [RelationalDistance("x"), RelationalAngle("x")], ids=lambda term: term.name)
def test_equal_samples_give_finite_gradients(term: Term) -> None:
    student = torch.randn(3, 4)[[0, 0, 1, 2]].requires_grad_()
    (gradient,) = torch.autograd.grad(term.value(torch.randn(4, 4), student, None), student)
    assert torch.isfinite(gradient).all()


# ---- the loss ------------------------------------------------------------------------------------------


def test_the_sum_is_hintons() -> None:
    teacher, student, (x, y) = network(), network(), batch()
    with Distillation(teacher, student, [SoftTargets(temperature=3)], alpha=0.7) as distillation:
        outputs = student(x)
        task = F.cross_entropy(outputs, y)
        loss = distillation.loss(x, outputs, y, task)
    logits = teacher(x)
    soft = F.kl_div(F.log_softmax(outputs / 3, 1), F.softmax(logits / 3, 1), reduction="batchmean") * 9
    torch.testing.assert_close(loss, 0.3 * task + 0.7 * soft)


def test_layers_are_summed_and_weighted_beside_the_whole_task() -> None:
    teacher, student, (x, y) = network(), network(), batch()
    term = AttentionTransfer(["layer1", ("layer2", "layer1")], weight=6.0)
    with Distillation(teacher, student, [term]) as distillation:
        outputs = student(x)
        loss = distillation.loss(x, outputs, y, F.cross_entropy(outputs, y))
        parts = dict(distillation.parts)
    theirs, mine = values(teacher, x), values(student, x)
    expected = term.value(theirs["layer1"], mine["layer1"], None) + term.value(
        theirs["layer2"], mine["layer1"], None
    )
    torch.testing.assert_close(parts["attention-transfer"], expected)
    torch.testing.assert_close(loss, F.cross_entropy(outputs, y) + 6 * expected)


def values(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Every module's result, by running the small network piece by piece, without hooks."""
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        found["stem"] = model.stem(x)  # type: ignore[operator]
        found["layer1"] = model.layer1(found["stem"])  # type: ignore[operator]
        found["layer2"] = model.layer2(found["layer1"])  # type: ignore[operator]
        block: Block = model.layer1  # type: ignore[assignment]
        found["layer1.conv1"] = block.conv1(found["stem"])
        found["layer1.bn1"] = block.bn1(found["layer1.conv1"])
    return found


# ---- names, on modules and on traced networks ----------------------------------------------------------


PATHS = ["stem", "layer1", "layer2", "layer1.conv1", "layer1.bn1"]


@pytest.mark.parametrize("traced", [False, True], ids=["module", "traced"])
def test_a_path_means_the_same_in_a_module_and_in_its_graph(traced: bool) -> None:
    from graphprune.train.distill.taps import Taps

    model, (x, _) = network(), batch()
    expected = values(model, x)
    runs = graphprune.trace(model, x).module if traced else model
    taps = Taps(runs, PATHS, "teacher")
    taps.attach()
    runs(x)
    found = taps.take()
    taps.detach()
    for path in PATHS:
        torch.testing.assert_close(found[path], expected[path], msg=path)


def test_the_last_call_of_a_module_counts() -> None:
    from graphprune.train.distill.taps import Taps

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.fc(torch.tanh(self.fc(x)))) + 1

    model, x = Twice(), torch.randn(2, 3)
    expected = model.fc(torch.tanh(model.fc(x)))
    for runs in (model, graphprune.trace(model.eval(), x).module):
        taps = Taps(runs, ["fc"], "teacher")
        taps.attach()
        runs(x)
        torch.testing.assert_close(taps.take()["fc"], expected)
        taps.detach()


def test_a_module_with_two_results_asks_for_a_node() -> None:
    from graphprune.train.distill.taps import Taps

    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return torch.relu(x), torch.tanh(x)

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = Pair()

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.pair(x)
            return a - b

    module = graphprune.trace(Sum().eval(), torch.zeros(2, 3)).module
    with pytest.raises(InputError, match=r"several results \(relu, tanh\)"):
        Taps(module, ["pair"], "teacher")
    taps = Taps(module, ["tanh"], "teacher")
    taps.attach()
    module(torch.ones(2, 3))
    torch.testing.assert_close(taps.take()["tanh"], torch.ones(2, 3).tanh())


def test_a_pruned_student_matches_its_original_by_the_same_names() -> None:
    teacher, (x, y) = network(), batch()
    student = pruned(teacher)
    assert sum(p.numel() for p in student.parameters()) < sum(p.numel() for p in teacher.parameters())
    terms = [
        SoftTargets(), AttentionTransfer(["layer1", "layer2"]), Hint("layer1"), RelationalDistance("layer2"),
        RelationalAngle("layer2"), SimilarityPreserving(["layer1.bn1"]),
    ]  # fmt: skip
    with Distillation(teacher, student, terms) as distillation:
        student.train()
        outputs = student(x)
        loss = distillation.loss(x, outputs, y, F.cross_entropy(outputs, y))
        loss.backward()
    student.eval()
    without = {name for name, p in student.named_parameters() if p.grad is None or not p.grad.abs().sum()}
    assert without <= {
        name for name in without if name.endswith("bias") and "bn" not in name
    }  # before a norm
    assert len(distillation.parts) == 7
    assert [tuple(p.shape) for p in distillation.parameters()] == [(8, 4, 1, 1), (8,)]


def test_a_traced_teacher_is_as_good_as_a_module() -> None:
    teacher, student, (x, y) = network(), network(inner=3), batch()
    traced = graphprune.trace(teacher, x).module
    losses = []
    for each in (teacher, traced):
        with Distillation(each, student, [AttentionTransfer("layer1")]) as distillation:
            outputs = student(x)
            losses.append(distillation.loss(x, outputs, y, F.cross_entropy(outputs, y)))
    torch.testing.assert_close(*losses)


def test_by_node_name_between_traced_networks() -> None:
    teacher = network()
    x, y = batch()
    graph = graphprune.trace(teacher, x)
    name = next(node.name for node in graph.nodes if node.meta.get("module") == "layer1.conv1")
    student = graph.apply(graph.plan(ratio=0.5)).module
    with Distillation(graph.module, student, [AttentionTransfer(name)]) as distillation:
        outputs = student(x)
        distillation.loss(x, outputs, y, outputs.mean())
    assert float(distillation.parts["attention-transfer"]) > 0


def test_nothing_is_left_behind() -> None:
    teacher, x = network(), batch()[0]
    teacher.layer1.eval()
    teacher.fc.train()  # a mode of its own
    student = graphprune.trace(network(), x).module
    code, hooks = student.code, [len(m._forward_hooks) for m in teacher.modules()]
    with Distillation(teacher, student, [Hint("layer1"), SoftTargets()]):
        assert student.code != code
        assert not any(m.training for m in teacher.modules())
    assert student.code == code
    assert [len(m._forward_hooks) for m in teacher.modules()] == hooks
    assert teacher.fc.training
    assert not teacher.layer1.training


def test_the_students_mode_switches_while_it_is_tapped() -> None:
    teacher, (x, y) = network(), batch()
    student = pruned(teacher)
    before = student.state_dict()["layer1.bn1.running_mean"].clone()
    with Distillation(teacher, student, [AttentionTransfer("layer1")]) as distillation:
        for mode in (True, False, True):
            student.train(mode)
            outputs = student(x)
            distillation.loss(x, outputs, y, outputs.mean())
    assert not torch.equal(student.state_dict()["layer1.bn1.running_mean"], before)


def test_values_follow_a_graph_that_was_replaced() -> None:
    teacher, (x, y) = network(), batch()
    student = graphprune.trace(teacher, x).module
    with Distillation(teacher, student, [AttentionTransfer("layer1")]) as distillation:
        student.graph = copy.deepcopy(graphprune.trace(teacher, x).module.graph)
        outputs = student(x)
        with pytest.raises(InputError, match=r"distillation.attach\(\)"):
            distillation.loss(x, outputs, y, outputs.mean())
        distillation.attach()
        outputs = student(x)
        distillation.loss(x, outputs, y, outputs.mean())
    assert "record" not in student.code


# ---- transformers --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, vocab_size=50,
        max_position_embeddings=12, num_labels=3, return_dict=True,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def test_sequences_of_a_pruned_transformer(bert: nn.Module) -> None:
    inputs = {"input_ids": torch.randint(50, (4, 10)), "attention_mask": torch.ones(4, 10, dtype=torch.long)}
    graph = graphprune.trace(bert, inputs)
    student = graph.apply(graph.plan(ratio=0.5)).module
    layers = [f"bert.encoder.layer.{i}" for i in range(2)]
    terms = [
        SoftTargets(temperature=2),
        AttentionTransfer(layers),
        Hint(layers[0]),
        RelationalDistance("bert.pooler"),
    ]
    targets = torch.randint(3, (4,))

    def loss(outputs: object, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.logits, targets)  # type: ignore[attr-defined]

    distillation = Distillation(bert, student, terms)
    training = finetune(student, [(inputs, targets)], loss, lr=1e-2, epochs=12, distillation=distillation)
    assert training.losses[-1] < training.losses[0]
    assert set(distillation.parts) == {"task", *(term.name for term in terms)}
    again = Distillation(bert, graph.module, [SoftTargets(temperature=2)])
    with again:
        outputs = graph.module(**inputs)
        again.loss(inputs, outputs, targets, loss(outputs, targets))
    assert float(again.parts["soft-targets"]) == pytest.approx(0, abs=1e-6)


# ---- with finetune -------------------------------------------------------------------------------------


def test_an_adapters_parameters_are_trained_and_saved() -> None:
    teacher, student, (x, y) = network(), network(channels=4, inner=4), batch()
    distillation = Distillation(teacher, student, [Hint(["layer1", "layer2"])], example=x)
    before = copy.deepcopy(distillation.state_dict())
    saved = []
    finetune(
        student, [(x, y)], F.cross_entropy, lr=1e-2, epochs=2, distillation=distillation,
        on_epoch=lambda state: saved.append(state.state_dict()),
    )  # fmt: skip
    after = distillation.state_dict()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    torch.testing.assert_close(saved[-1]["distillation"], dict(after))


def test_a_given_optimizer_gets_the_adapters_parameters_once() -> None:
    teacher, student, (x, y) = network(), network(channels=4, inner=4), batch()
    distillation = Distillation(teacher, student, [Hint("layer1")], example=x)
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    for _ in range(2):
        finetune(student, [(x, y)], F.cross_entropy, optimizer=optimizer, distillation=distillation)
    assert len(optimizer.param_groups) == 2
    assert optimizer.param_groups[1]["params"] == list(distillation.parameters())


def test_a_student_comes_closer_to_its_teacher() -> None:
    teacher, student, (x, y) = network(), network(inner=3), batch(32)
    terms = [
        SoftTargets(),
        AttentionTransfer(["layer1", "layer2"], weight=10),
        SimilarityPreserving("layer2"),
    ]
    distillation = Distillation(teacher, student, terms, alpha=1.0)
    seen: list[dict[str, float]] = []
    finetune(
        student, [(x, y)], F.cross_entropy, lr=5e-3, epochs=25, distillation=distillation,
        on_epoch=lambda state: seen.append({k: float(v) for k, v in distillation.parts.items()}),
    )  # fmt: skip
    for term in terms:
        assert seen[-1][term.name] < 0.7 * seen[0][term.name], term.name


# ---- what is refused -----------------------------------------------------------------------------------


def test_unknown_names_list_the_nearest() -> None:
    model, x = network(), batch()[0]
    student = graphprune.trace(model, x).module
    with pytest.raises(
        InputError, match=r"teacher has no module 'layer3' \(the nearest: 'layer[12]', 'layer[12]'"
    ):
        Distillation(model, student, [AttentionTransfer("layer3")])
    with pytest.raises(
        InputError, match=r"student has neither a module nor a node 'layr1' \(the nearest: 'layer1'"
    ):
        Distillation(model, student, [AttentionTransfer([("layer1", "layr1")])])


@pytest.mark.parametrize(
    ("terms", "alpha", "message"),
    [
        ([], None, "needs terms"),
        ([SoftTargets()], 1.5, "alpha must be from 0 to 1"),
        ([AttentionTransfer()], None, "attention-transfer: no layers"),
        ([Hint("layer1")], None, "pass example="),
    ],
)
def test_what_makes_no_sense(terms: list[Term], alpha: float | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Distillation(network(), network(), terms, alpha=alpha)


def test_values_out_of_range() -> None:
    with pytest.raises(InputError, match="temperature must be above 0"):
        SoftTargets(temperature=0)
    with pytest.raises(InputError, match="weight must be at least 0"):
        Hint("x", weight=-1)


@pytest.mark.parametrize("layers", [4.0, [4.0], [("layer1", 2)], [("layer1", "layer2", "layer3")], None])
def test_layers_are_names(layers: Any) -> None:
    with pytest.raises(InputError, match=r"soft-targets: layers are names.* SoftTargets\(temperature=4\.0\)"):
        SoftTargets(layers)
    with pytest.raises(TypeError, match="positional"):
        SoftTargets("fc", 4.0)  # type: ignore[misc]


def test_terms_are_a_list_of_them() -> None:
    for terms in (SoftTargets(), ["layer1"]):
        with pytest.raises(InputError, match=r"a list of them, as in \[SoftTargets\(\)\]"):
            Distillation(network(), network(), terms)  # type: ignore[arg-type]


def test_teacher_and_student_are_two() -> None:
    model = network()
    with pytest.raises(InputError, match=r"copy\.deepcopy"):
        Distillation(model, model, [SoftTargets()])


def test_a_loss_outside_with_says_what_to_do() -> None:
    teacher, student, (x, y) = network(), network(), batch()
    distillation = Distillation(teacher, student, [AttentionTransfer("layer1")])
    outputs = student(x)
    with pytest.raises(InputError, match="inside `with distillation:`"):
        distillation.loss(x, outputs, y, outputs.mean())


@pytest.mark.parametrize(
    ("term", "teacher", "student", "message"),
    [
        (SoftTargets(), (2, 3), (2, 4), r"different shapes, \[2, 3\] and \[2, 4\]"),
        (AttentionTransfer("x"), (2, 3), (2, 3), "no positions to attend to"),
        (AttentionTransfer("x"), (2, 3, 4, 4), (2, 16, 3), "no positions in common"),
        (RelationalAngle("x"), (2, 3), (2, 3), "needs 3 samples"),
        (AttentionTransfer("x", channels=0), (2, 3, 4, 4), (2, 3, 4, 4), "no dimension of"),
    ],
)
def test_shapes_that_do_not_compare(
    term: Term, teacher: tuple[int, ...], student: tuple[int, ...], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        term.value(torch.randn(teacher), torch.randn(student), None)


def test_a_student_that_shrinks_in_the_loop_goes_on_learning() -> None:
    teacher, (x, y) = network(), batch(8)
    student = graphprune.trace(teacher, x).module
    optimizer = torch.optim.SGD(student.parameters(), 1e-2, momentum=0.9)
    shrink = Shrink(student, Polynomial(final=0.4, end=4, frequency=2, power=1.0), optimizer=optimizer)
    distillation = Distillation(teacher, student, [AttentionTransfer(["layer1", "layer2"]), SoftTargets()])
    before = sum(p.numel() for p in student.parameters())
    training = finetune(
        student, [(x, y)] * 3, F.cross_entropy, optimizer=optimizer, epochs=3, after_step=[shrink],
        distillation=distillation,
    )  # fmt: skip
    assert sum(p.numel() for p in student.parameters()) < before
    assert training.steps == 9
    assert "record" not in student.code


@pytest.mark.parametrize("entered", [False, True], ids=["", "entered"])
@pytest.mark.parametrize(
    "term", [Hint("layer2"), AttentionTransfer(["layer1", "layer2"]), SimilarityPreserving("layer1.conv1")]
)
def test_a_student_that_shrank_before_a_stop_goes_on_learning(term: Term, entered: bool) -> None:
    teacher, (x, y) = network(), batch(8)

    def run(resume: Any = None) -> tuple[dict[str, Tensor], Training, list[Any]]:
        student, saved = graphprune.trace(teacher, x).module, list[Any]()
        optimizer = torch.optim.Adam(student.parameters(), 1e-2)
        schedule = Polynomial(final=0.4, begin=1, end=7, frequency=2, power=1.0)
        shrink = Shrink(student, schedule, optimizer=optimizer, ignored=("layer2.conv2", "layer2.bn2"))
        distillation = Distillation(teacher, student, [term])
        with distillation if entered else nullcontext():
            training = finetune(
                student, [(x, y)] * 3, F.cross_entropy, optimizer=optimizer, epochs=3, after_step=[shrink],
                distillation=distillation, on_epoch=lambda s: saved.append(s.state_dict()), resume=resume,
            )  # fmt: skip
        return {**student.state_dict(), **distillation.state_dict()}, training, saved

    whole, training, saved = run()
    assert saved[0]["after_step"][0]["plans"]
    again, resumed, _ = run(saved[0])
    assert resumed == training
    assert whole.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


def test_a_hint_whose_layer_shrank_says_so() -> None:
    teacher, (x, y) = network(), batch(8)
    student = graphprune.trace(teacher, x).module
    distillation = Distillation(teacher, student, [Hint("layer1.conv1")])
    student.become(student.captured.apply(student.captured.plan(ratio=0.5)))
    with distillation:
        outputs = student(x)
        with pytest.raises(InputError, match="4 channels now, and its adapter was made for 8"):
            distillation.loss(x, outputs, y, outputs.mean())


def test_taps_and_stochastic_depth_leave_each_other_alone() -> None:
    teacher, (x, y) = network(), batch(8)
    student = graphprune.trace(teacher, x).module
    code = student.code
    for outer_first in (True, False):
        depth = StochasticDepth(student, rate=0.5)
        distillation = Distillation(teacher, student, [AttentionTransfer(["layer1", "layer2"])])
        with ExitStack() as stack:
            for each in (depth, distillation) if outer_first else (distillation, depth):
                stack.enter_context(each)
            for _ in range(3):
                outputs = student.train()(x)
                distillation.loss(x, outputs, y, outputs.mean())
        assert student.eval().code == code
