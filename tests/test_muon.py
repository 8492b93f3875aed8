"""muon.py: orthogonal steps, and several optimizers that are one."""

import copy
import unittest

import torch
from torch.optim.lr_scheduler import LambdaLR

from mingpt.muon import JoinedOptimizer, Muon, orthogonalize


def with_gradients(*shapes: tuple) -> list[torch.nn.Parameter]:
    """Makes random parameters, with random gradients."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return parameters


def copied(parameters: list) -> list:
    """Copies parameters with their gradients, which deepcopy alone leaves out."""
    copies = copy.deepcopy(parameters)
    for old, new in zip(parameters, copies):
        new.grad = old.grad.clone()
    return copies


class Directions(unittest.TestCase):
    def test_singular_values_follow_the_polynomial(self):
        torch.manual_seed(0)
        for shape in ((5, 5), (3, 9), (9, 3)):
            matrix = torch.randn(shape, dtype=torch.float64)
            u, s, v = torch.linalg.svd(matrix, full_matrices=False)
            s = s / s.norm()
            for _ in range(5):
                s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
            # 1e-7 added to the norm moves the values that little.
            torch.testing.assert_close(
                orthogonalize(matrix), u @ s.diag() @ v, atol=1e-4, rtol=1e-4)

    def test_a_step_is_the_formula_of_muon_and_normuon(self):
        matrix, = with_gradients((6, 8))
        expected = matrix.detach().clone()
        optimizer = Muon([matrix], lr=0.1, weight_decay=0.5, momentum=0.9, beta2=0.8)
        mean = torch.zeros(6, 8)
        rows = torch.zeros(6, 1)
        for _ in range(2):
            optimizer.step()
            mean = 0.9 * mean + 0.1 * matrix.grad
            direction = orthogonalize(0.9 * mean + 0.1 * matrix.grad)
            rows = 0.8 * rows + 0.2 * (direction**2).mean(1, keepdim=True)
            direction = direction / rows.sqrt()
            step = 0.2 * direction / (direction**2).mean().sqrt()
            expected = expected - 0.1 * 0.5 * expected - 0.1 * step
        torch.testing.assert_close(matrix.detach(), expected, atol=1e-5, rtol=1e-5)

    def test_stacked_parts_have_directions_of_their_own(self):
        stacked, = with_gradients((12, 8))
        before = stacked.detach().clone()
        directions = torch.cat([orthogonalize(part) for part in stacked.grad.chunk(3)])
        directions = directions / directions.norm(dim=1, keepdim=True)
        Muon([{"params": [stacked], "parts": 3}], lr=1.0).step()
        moved = before - stacked.detach()
        moved = moved / moved.norm(dim=1, keepdim=True)
        torch.testing.assert_close(moved, directions, atol=1e-5, rtol=1e-4)

    def test_no_gradient_no_step(self):
        parameters = frozen, trained, zero = with_gradients((4, 4), (4, 4), (4, 4))
        frozen.grad = None
        zero.grad.zero_()
        before = copy.deepcopy(parameters)
        Muon(parameters, lr=0.1, weight_decay=0.0).step()
        moved = [not torch.equal(p, old) for p, old in zip(parameters, before)]
        self.assertEqual(moved, [False, True, False])


class Joined(unittest.TestCase):
    def setUp(self):
        self.parameters = with_gradients((3,), (4, 4), (12, 4))
        self.optimizer = self.join(self.parameters)

    def join(self, parameters: list) -> JoinedOptimizer:
        bias, matrix, stacked = parameters
        muon = Muon([{"params": [stacked], "parts": 3}, {"params": [matrix]}], lr=0.1)
        return JoinedOptimizer(torch.optim.AdamW([bias], lr=0.01), muon)

    def check_equal(self, parameters: list) -> None:
        for parameter, other in zip(self.parameters, parameters):
            self.assertTrue(torch.equal(parameter, other))

    def test_it_does_what_its_parts_do(self):
        apart = copied(self.parameters)
        for part in self.join(apart).parts * 3:
            part.step()
        for _ in range(3):
            self.optimizer.step()
        self.check_equal(apart)
        self.assertEqual(set(self.optimizer.state), set(self.parameters))

    def test_schedulers_count(self):
        scheduler = LambdaLR(self.optimizer, lambda step: float(step == 0))
        self.optimizer.step()
        scheduler.step()
        before = copy.deepcopy(self.parameters)
        self.optimizer.step()
        self.check_equal(before)

    def test_a_group_that_no_part_trains_is_refused(self):
        self.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
        with self.assertRaisesRegex(ValueError, "group that none of the joined"):
            self.optimizer.step()

    def test_a_loaded_state_goes_on(self):
        self.optimizer.step()
        parameters = copied(self.parameters)
        loaded = self.join(parameters)
        loaded.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        for optimizer in (self.optimizer, loaded):
            optimizer.param_groups[2]["lr"] = 0.5
            optimizer.step()
        self.check_equal(parameters)
