"""finetune: against loops written out by hand, resumed runs, two processes, and what it leaves behind."""

from __future__ import annotations

import copy
import io
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import graphprune
from graphprune.errors import GraphpruneError, InputError, MissingExtraError
from graphprune.train import Constant, Shrink, State, Training, finetune, remove
from graphprune.train.state import Home
from tests.train import launched

Batches = list[tuple[Any, Tensor]]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def network(width: int = 16) -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.3), nn.Linear(width, 3)
    )


def batches(count: int = 4, size: int = 8) -> Batches:
    return [(torch.randn(size, 5), torch.randint(3, (size,))) for _ in range(count)]


def loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(5)
    images, labels = torch.randn(30, 5, generator=generator), torch.randint(3, (30,), generator=generator)
    return DataLoader(TensorDataset(images, labels), batch_size=8, shuffle=True)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


# ---- what it computes ----------------------------------------------------------------------------------


def test_it_is_the_loop_that_one_would_write() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    expected, data = copy.deepcopy(model), batches()
    optimizer = torch.optim.AdamW(expected.parameters(), 1e-2)
    losses = []
    for _ in range(3):
        total = 0.0
        for x, y in data:
            loss = F.cross_entropy(expected(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        losses.append(total / len(data))
    training = finetune(model, data, F.cross_entropy, lr=1e-2, epochs=3)
    assert same(model, expected)
    assert training.losses == pytest.approx(losses, rel=1e-5)
    assert (training.steps, training.epochs, training.scores) == (12, 3, ())


def test_clipping_penalties_schedules_and_what_follows_a_step() -> None:
    model = nn.Linear(5, 3)
    expected, data = copy.deepcopy(model), batches()

    class Mask:
        """Reads a gradient and writes a weight, as sparsifiers do."""

        def __init__(self, weight: Tensor):
            self.weight, self.norms = weight, []

        def step(self) -> None:
            self.norms.append(float(self.weight.grad.norm()))
            with torch.no_grad():
                self.weight[:, 0] = 0

    by_hand = Mask(expected.weight)
    optimizer = torch.optim.SGD(expected.parameters(), 0.5, momentum=0.9)
    for number, (x, y) in enumerate(data * 2):
        optimizer.param_groups[0]["lr"] = 0.5 * 0.8**number
        optimizer.zero_grad()
        (F.cross_entropy(expected(x), y) + 0.1 * expected.weight.abs().sum()).backward()
        norm = sum(p.grad.square().sum() for p in expected.parameters()).sqrt()
        for p in expected.parameters():
            p.grad *= min(1.0, 0.3 / (float(norm) + 1e-6))
        optimizer.step()
        by_hand.step()
    mask = Mask(model.weight)
    finetune(
        model, data, F.cross_entropy, epochs=2, clip=0.3, after_step=[mask],
        optimizer=lambda parameters: torch.optim.SGD(parameters, 0.5, momentum=0.9),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8),
        penalties=[lambda: 0.1 * model.weight.abs().sum()],
    )  # fmt: skip
    torch.testing.assert_close(model.state_dict(), expected.state_dict())
    assert mask.norms == pytest.approx(by_hand.norms, rel=1e-5)


@pytest.mark.parametrize(("each", "steps"), [(2, 3), (4, 2), (5, 1), (9, 1)])
def test_gradients_are_accumulated_up_to_the_last_batch(each: int, steps: int) -> None:
    """Five batches: what is left at the end has a step of its own, in every epoch, and nothing is lost."""
    model, data = nn.Linear(5, 3), batches(5)
    expected = copy.deepcopy(model)
    optimizer = torch.optim.SGD(expected.parameters(), 0.5, momentum=0.9)
    for _ in range(2):
        for start in range(0, 5, each):
            optimizer.zero_grad()
            for x, y in data[start : start + each]:
                (F.cross_entropy(expected(x), y) / each).backward()
            optimizer.step()
    training = finetune(
        model, data, F.cross_entropy, epochs=2, accelerator=Accelerator(gradient_accumulation_steps=each),
        optimizer=lambda parameters: torch.optim.SGD(parameters, 0.5, momentum=0.9),
    )  # fmt: skip
    torch.testing.assert_close(model.state_dict(), expected.state_dict())
    assert training.steps == 2 * steps


@pytest.mark.parametrize(
    "inputs", [lambda x: (x, x), lambda x: {"a": x, "b": x}], ids=["positional", "keywords"]
)
def test_inputs_as_a_tuple_or_by_keyword(inputs: Callable[[Tensor], Any]) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(10, 3)

        def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
            return {"logits": self.fc(torch.cat([a, b], 1))}

    training = finetune(
        Two(),
        [(inputs(x), y) for x, y in batches()],
        lambda out, y: F.cross_entropy(out["logits"], y),
        lr=0.1,
        epochs=5,
    )
    assert training.losses[-1] < training.losses[0]


def test_scores_are_taken_in_eval_mode_without_gradients() -> None:
    model = network()

    def evaluate(module: nn.Module) -> float:
        assert module is model
        assert not any(m.training for m in module.modules())
        assert not torch.is_grad_enabled()
        return 0.25

    assert finetune(model, batches(), F.cross_entropy, epochs=2, evaluate=evaluate).scores == (0.25, 0.25)


# ---- random numbers ------------------------------------------------------------------------------------


def test_the_seed_decides_and_the_callers_generators_stay() -> None:
    first, second, third = (copy.deepcopy(m) for m in [network()] * 3)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    finetune(first, loader(), F.cross_entropy, lr=1e-2, epochs=2)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()
    torch.manual_seed(99)
    finetune(second, loader(), F.cross_entropy, lr=1e-2, epochs=2)
    finetune(third, loader(), F.cross_entropy, lr=1e-2, epochs=2, seed=1)
    assert same(first, second)
    assert not same(first, third)


def test_the_datas_order_does_not_depend_on_the_network() -> None:
    """Dropout draws from the same generator as shuffling does; processes would read different batches."""
    orders: list[list[float]] = []
    for model in (nn.Linear(5, 3), nn.Sequential(nn.Dropout(0.5), nn.Linear(5, 3))):
        seen: list[float] = []

        def loss(outputs: Tensor, targets: Tensor, seen: list[float] = seen) -> Tensor:
            seen.append(float(targets.sum()))
            return F.cross_entropy(outputs, targets)

        finetune(model, loader(), loss, epochs=3)
        orders.append(seen)
    assert orders[0] == orders[1]
    assert orders[0][:4] != orders[0][4:8]  # another order in every epoch


# ---- resuming --------------------------------------------------------------------------------------------


class Counting:
    """Follows steps and has a state, as a sparsifier."""

    def __init__(self, weight: Tensor):
        self.weight, self.count = weight, 0

    def step(self) -> None:
        self.count += 1
        with torch.no_grad():
            self.weight[self.count % 3] *= 0.5

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


@pytest.mark.parametrize("each", [1, 3], ids=["", "accumulated"])
@pytest.mark.parametrize("generator", [False, True], ids=["global", "own generator"])
def test_a_resumed_run_ends_bit_identical(generator: bool, each: int) -> None:
    def run(resume: Any = None, until: int | None = None) -> tuple[nn.Module, Training, list[bytes]]:
        torch.manual_seed(3)
        model, data, files = network(), loader(), []
        if generator:
            data = DataLoader(data.dataset, 8, shuffle=True, generator=torch.Generator().manual_seed(8))

        def save(state: State) -> None:
            file = io.BytesIO()
            torch.save(state.state_dict(), file)
            files.append(file.getvalue())
            if state.epoch == until:
                raise KeyboardInterrupt

        def start() -> Training:
            return finetune(
                model, data, F.cross_entropy, lr=1e-2, epochs=5, resume=resume, on_epoch=save,
                scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20),
                after_step=[Counting(model[4].weight)], evaluate=lambda m: float(m(torch.ones(1, 5))[0, 0]),
                accelerator=Accelerator(gradient_accumulation_steps=each),
            )  # fmt: skip

        if until is None:
            return model, start(), files
        with pytest.raises(KeyboardInterrupt):
            start()
        assert not model.training
        return model, Training(), files

    whole, training, _ = run()
    _, _, files = run(until=2)
    torch.rand(7)  # another process's generator stands somewhere else
    state = torch.load(io.BytesIO(files[-1]), weights_only=True)
    resumed, again, _ = run(resume=state)
    assert same(whole, resumed)
    assert again == training
    assert again.epochs == 5
    assert again.steps == {1: 20, 3: 10}[each]


def test_a_state_is_a_copy() -> None:
    states: list[dict[str, Any]] = []
    model = network()
    finetune(
        model, batches(), F.cross_entropy, lr=0.1, epochs=2, on_epoch=lambda s: states.append(s.state_dict())
    )
    assert not torch.equal(states[0]["module"]["0.weight"], states[1]["module"]["0.weight"])
    assert [len(state["losses"]) for state in states] == [1, 2]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"seed": 1}, "seed = 0, and this one with 1"),
        ({"lr": 1e-2}, r"lr = 0\.0001, and this one with 0\.01"),
        (
            {"after_step": [Counting(torch.zeros(3, 1))]},
            r"after_step = \[\], and this one with \['Counting'\]",
        ),
        ({"scheduler": lambda o: torch.optim.lr_scheduler.StepLR(o, 1)}, "scheduler = None, .* 'StepLR'"),
        ({"optimizer": torch.optim.SGD}, "optimizer = 'AdamW', and this one with 'SGD'"),
        (
            {"optimizer": lambda p: torch.optim.AdamW(p[::-1], 1e-4)},
            r"of the optimizer\[0\]\[0\] = '0\.weight', .* '4\.bias'",
        ),
        ({"width": 12}, r"module 0\.weight = \[16, 5\], and this one with \[12, 5\]"),
        ({"resume": "run.pt"}, r"torch\.load\('run\.pt', .*, and got str 'run\.pt'"),
        ({"resume": {"a": 1}}, r"state\.state_dict\(\) gave, .*, and got a mapping with 'a'"),
        ({"resume": network().state_dict()}, r"and got a mapping with '0\.weight'"),
    ],
)
def test_a_state_of_another_run_is_refused_before_it_is_loaded(other: dict[str, Any], message: str) -> None:
    states: list[dict[str, Any]] = []
    finetune(network(), batches(), F.cross_entropy, on_epoch=lambda s: states.append(s.state_dict()))
    model = network(other.pop("width", 16))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=message):
        finetune(model, batches(), F.cross_entropy, **{"resume": states[0], "epochs": 2, **other})
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


# ---- what it leaves behind -------------------------------------------------------------------------------


def test_a_pruned_network_is_the_same_object_afterwards() -> None:
    graph = graphprune.trace(network().eval(), torch.zeros(2, 5), dynamic_batch=True)
    graph = graph.apply(graph.plan(ratio=0.5))
    module = graph.module
    parameters, buffers, kind = dict(module.named_parameters()), dict(module.named_buffers()), type(module)
    attributes = set(vars(module))
    finetune(module, batches(), F.cross_entropy, lr=0.1, epochs=2)
    assert type(module) is kind
    assert set(vars(module)) == attributes
    assert not module.training
    assert all(parameters[name] is p and p.grad is None for name, p in module.named_parameters())
    assert all(buffers[name] is b for name, b in module.named_buffers())
    assert not torch.equal(graph.tensors["1.running_mean"], torch.zeros(4))
    x = torch.randn(4, 5)
    torch.testing.assert_close(graph(x), module(x).detach())  # the graph was trained with it


def test_a_network_that_was_moved_shares_its_tensors_with_its_graph_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stands for a GPU: moving gives a module other buffers than its graph has."""
    graph = graphprune.trace(network().eval(), torch.zeros(2, 5))
    home = Home(graph.module)
    with torch.no_grad():
        graph.module.get_submodule("1")._buffers["running_mean"] = torch.full((16,), 7.0)
    home.restore()
    assert float(graph.tensors["1.running_mean"].max()) < 7  # it did not move
    monkeypatch.setattr(Home, "moved", True)
    home.restore()
    assert all(
        graph.tensors[name] is value for name, value in graph.module.named_buffers() if name in graph.tensors
    )
    assert float(graph.tensors["1.running_mean"].min()) == 7


def test_sparse_gradients() -> None:
    model = nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Flatten(), nn.Linear(12, 3))
    data = [(torch.randint(7, (8, 3)), torch.randint(3, (8,))) for _ in range(4)]
    training = finetune(model, data, F.cross_entropy, optimizer=lambda p: torch.optim.SGD(p, 0.1), epochs=5)
    assert training.losses[-1] < training.losses[0]


def test_the_optimizer_that_is_given_is_used() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    states: list[State] = []
    finetune(model, batches(), F.cross_entropy, optimizer=optimizer, on_epoch=states.append)
    assert states[0].optimizer is optimizer
    assert states[0].module is model
    assert all("momentum_buffer" in optimizer.state[p] for p in model.parameters())


# ---- several processes -----------------------------------------------------------------------------------


def check(found: dict[str, Any], each: int = 1) -> None:
    """What two processes found is what one finds."""
    expected = launched.train(each)
    torch.testing.assert_close(found["parameters"], expected["parameters"], rtol=1e-4, atol=1e-5)
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert (found["scores"], found["steps"]) == (expected["scores"], expected["steps"])


def _process(rank: int, port: int) -> None:
    """Make this the process ``rank`` of two."""
    from accelerate.state import AcceleratorState, PartialState

    torch.set_num_threads(1)  # threads of the parent are not there
    for state in (AcceleratorState, PartialState):
        state._reset_state()
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1",
    )  # fmt: skip


def _forked(rank: int, port: int, file: Path, each: int) -> None:
    from accelerate.state import PartialState

    _process(rank, port)
    found = launched.train(each)
    torch.save({**found, "processes": PartialState().num_processes}, f"{file}.{rank}")
    torch.distributed.destroy_process_group()


def _forked_with_an_ill_batch(rank: int, port: int, file: Path) -> None:
    _process(rank, port)
    torch.manual_seed(0)
    model, data = nn.Linear(5, 3), batches(3)
    data[2][0][-1, 0] = float("nan")  # in the second process's part
    before = copy.deepcopy(model)
    message = "none"
    try:
        finetune(model, data, F.cross_entropy)
    except GraphpruneError as error:
        message = str(error)
    finetune(before, data[:2], F.cross_entropy)
    torch.save({"message": message, "same": same(model, before)}, f"{file}.{rank}")
    torch.distributed.destroy_process_group()


def _port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_what_is_not_finite_in_one_process_stops_all(tmp_path: Path) -> None:
    file = tmp_path / "found"
    torch.multiprocessing.start_processes(_forked_with_an_ill_batch, (_port(), file), 2, start_method="fork")
    found = [torch.load(f"{file}.{rank}", weights_only=True) for rank in range(2)]
    assert all("not finite (epoch 1, batch 3)" in each["message"] and each["same"] for each in found)
    assert "inputs are not finite" in found[1]["message"]


@pytest.mark.parametrize("each", [1, 3], ids=["", "accumulated"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_two_forked_processes_give_what_one_gives(tmp_path: Path, each: int) -> None:
    file = tmp_path / "found"
    torch.multiprocessing.start_processes(_forked, (_port(), file, each), 2, start_method="fork")
    for rank in range(2):
        found = torch.load(f"{file}.{rank}", weights_only=True)
        assert found["processes"] == 2
        check(found, each)


@pytest.mark.slow
def test_accelerate_launch_with_two_processes_gives_what_one_gives(tmp_path: Path) -> None:
    # `--multi_gpu` is what makes the launcher start several processes; the variable says what they run on.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--main_process_port=0"]
    command += ["--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [*command, "-m", "tests.train.launched", str(tmp_path / "found.pt")],
        capture_output=True, text=True, check=False, env=environment, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    assert found["processes"] == 2
    check(found)


# ---- what is refused -------------------------------------------------------------------------------------


def test_a_generator_is_used_up_after_one_epoch() -> None:
    with pytest.raises(InputError, match="no batch in epoch 2; a generator gives its batches once"):
        finetune(network(), (batch for batch in batches()), F.cross_entropy, epochs=2)


def test_batches_are_pairs() -> None:
    with pytest.raises(InputError, match=r"batch 0 of the training data is no .* but Tensor"):
        finetune(network(), [torch.zeros(4, 5)], F.cross_entropy)
    with pytest.raises(InputError, match="no tensor with a batch dimension"):
        finetune(network(), [({"x": 3}, torch.zeros(1))], F.cross_entropy)


@pytest.mark.parametrize("each", [1, 2], ids=["", "accumulated"])
@pytest.mark.parametrize("ill", ["loss", "inputs", "gradient"])
def test_what_is_not_finite_stops_before_it_ruins_the_module(ill: str, each: int) -> None:
    """Three batches are trained on, or two where gradients are accumulated; batch norm saw the fourth."""
    model, data = network(), batches(6)
    fine, seen = copy.deepcopy(model), list[int]()
    if ill == "inputs":
        data[3][0][0, 0] = float("nan")

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.append(1)
        value = F.cross_entropy(outputs, targets)
        if len(seen) == 4:
            return value * float("inf") if ill == "loss" else value + (0 * outputs.sum()).abs().sqrt()
        return value

    what = {"loss": "training loss", "inputs": "training loss", "gradient": "gradient"}[ill]
    why = "inputs are not finite" if ill == "inputs" else "lower lr"
    with pytest.raises(GraphpruneError, match=rf"the {what} is not finite \(epoch 1, batch 4\), .*{why}"):
        finetune(model, data, loss, lr=1e-2, accelerator=Accelerator(gradient_accumulation_steps=each))
    accelerator = Accelerator(gradient_accumulation_steps=each)
    finetune(fine, data[: 3 if each == 1 else 2], F.cross_entropy, lr=1e-2, accelerator=accelerator)
    assert same(model, fine)
    assert not model.training
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda out, y: 1.0, "the loss function gave float; it must be a scalar tensor"),
        (nn.CrossEntropyLoss(reduction="none"), r"gave a tensor of shape \[8\]; .* \(reduction='mean'\)"),
        (lambda out, y: F.cross_entropy(out, y).detach(), "the loss has no gradient: it was detached"),
    ],
)
def test_a_loss_is_a_scalar_with_a_gradient(loss: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        finetune(network(), batches(), loss)


@pytest.mark.parametrize("score", [None, "good", torch.zeros(3)])
def test_a_score_is_a_number(score: Any) -> None:
    given = r"a tensor of shape \[3\]" if isinstance(score, Tensor) else repr(score)
    with pytest.raises(InputError, match=f"evaluate gave {given}, and a score is one number"):
        finetune(network(), batches(), F.cross_entropy, evaluate=lambda m: score)


@pytest.mark.parametrize(
    "wrong", [{"epochs": -1}, {"epochs": 2.5}, {"epochs": True}, {"lr": 0.0}, {"clip": 0.0}]
)
def test_arguments_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="epochs is a whole number from 0, lr and clip above 0"):
        finetune(network(), batches(), F.cross_entropy, **wrong)


def test_a_module_without_parameters_to_train() -> None:
    with pytest.raises(InputError, match="no parameter that can be trained"):
        finetune(network().requires_grad_(False), batches(), F.cross_entropy)


def test_an_optimizer_of_another_network_is_refused() -> None:
    model = network().eval()
    graph = graphprune.trace(model, torch.zeros(2, 5), dynamic_batch=True)
    module = graph.apply(graph.plan(ratio=0.5)).module
    others = torch.optim.SGD(model.parameters(), 0.1)
    for given in (others, lambda parameters: others):
        with pytest.raises(InputError, match=r"SGD given holds none .*'0\.weight'.* module\.parameters\(\)"):
            finetune(module, batches(), F.cross_entropy, optimizer=given)
    with pytest.raises(InputError, match=r"a function that makes it .* gave str"):
        finetune(module, batches(), F.cross_entropy, optimizer="adam")  # type: ignore[arg-type]


def test_an_optimizer_that_wants_a_closure_is_refused() -> None:
    with pytest.raises(InputError, match=r"LBFGS computes the loss anew .* a loop of your own"):
        finetune(network(), batches(), F.cross_entropy, optimizer=torch.optim.LBFGS)


def test_an_optimizer_may_hold_a_part_of_the_network() -> None:
    model = network()
    before = copy.deepcopy(dict(model.named_parameters()))
    optimizer = torch.optim.SGD(model[4].parameters(), 0.1)
    finetune(model, batches(), F.cross_entropy, optimizer=optimizer)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"4.weight", "4.bias"}


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_an_optimizer_that_a_removal_left_behind_is_refused(when: str) -> None:
    module = graphprune.trace(network().eval(), torch.zeros(2, 5), dynamic_batch=True).module
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    shrink = [Shrink(module, Constant(0.5, begin=2), optimizer=None)]
    if when == "before":
        remove(module, module.captured.plan(ratio=0.5))
        shrink = []
    with pytest.raises(InputError, match=r"lacks 5 trainable parameters .* holds others .* give Shrink"):
        finetune(module, batches(), F.cross_entropy, optimizer=optimizer, after_step=shrink)


def test_without_accelerate_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'graphprune\[train\]'"):
        finetune(network(), batches(), F.cross_entropy)
