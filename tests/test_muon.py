"""What muon.py promises: orthogonal steps, and several optimizers that are one."""

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


class Directions(unittest.TestCase):
    def test_singular_values_by_the_polynomial(self):
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

    def test_a_step_by_its_definition(self):
        """Two steps against the formulas of Muon and NorMuon, written for one matrix."""
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
        thirds = [torch.nn.Parameter(part.clone()) for part in before.chunk(3)]
        for third, gradient in zip(thirds, stacked.grad.chunk(3)):
            third.grad = gradient.clone()
        Muon([{"params": [stacked], "parts": 3}], lr=1.0).step()
        Muon(thirds, lr=1.0).step()
        directions = (stacked.detach() - before).chunk(3)
        for third, old, direction in zip(thirds, before.chunk(3), directions):
            own = torch.nn.functional.normalize(third.detach() - old, dim=(0, 1))
            both = torch.nn.functional.normalize(direction, dim=(0, 1))
            torch.testing.assert_close(both, own, atol=1e-5, rtol=1e-4)

    def test_no_gradient_no_step(self):
        frozen, trained, zero = with_gradients((4, 4), (4, 4), (4, 4))
        frozen.grad = None
        zero.grad.zero_()
        before = copy.deepcopy([frozen, trained, zero])
        optimizer = Muon([frozen, trained, zero], lr=0.1, weight_decay=0.0)
        optimizer.step()
        moved = [not torch.equal(p, old) for p, old in zip([frozen, trained, zero], before)]
        self.assertEqual(moved, [False, True, False])
        self.assertNotIn(frozen, optimizer.state)


class Joined(unittest.TestCase):
    def setUp(self):
        self.parameters = with_gradients((3,), (4, 4), (12, 4))
        self.optimizer = self.join(self.parameters)

    def join(self, parameters) -> JoinedOptimizer:
        bias, matrix, stacked = parameters
        muon = Muon([{"params": [stacked], "parts": 3}, {"params": [matrix]}], lr=0.1)
        return JoinedOptimizer(torch.optim.AdamW([bias], lr=0.01), muon)

    def check_shared(self, optimizer: JoinedOptimizer) -> None:
        groups = [group for part in optimizer.parts for group in part.param_groups]
        self.assertEqual(len(groups), 3)
        for group, own in zip(groups, optimizer.param_groups):
            self.assertIs(group, own)
        for part in optimizer.parts:
            self.assertIs(part.state, optimizer.state)

    def test_it_is_the_parts(self):
        apart = copy.deepcopy(self.parameters)
        for old, new in zip(self.parameters, apart):
            new.grad = old.grad.clone()
        for _ in range(3):
            self.optimizer.step()
        parts = self.join(apart).parts
        for part in parts * 3:
            part.step()
        for joined, alone in zip(self.parameters, apart):
            self.assertTrue(torch.equal(joined, alone))
        self.assertEqual(set(self.optimizer.state), set(self.parameters))
        self.optimizer.zero_grad()
        self.assertEqual([p.grad for p in self.parameters], [None] * 3)

    def test_rates_and_schedulers_count(self):
        scheduler = LambdaLR(self.optimizer, lambda step: float(step == 0))
        self.optimizer.step()
        scheduler.step()
        before = copy.deepcopy(self.parameters)
        self.optimizer.step()
        for parameter, old in zip(self.parameters, before):
            self.assertTrue(torch.equal(parameter, old))

    def test_loaded_state_goes_on_and_is_shared(self):
        self.optimizer.step()
        parameters = copy.deepcopy(self.parameters)
        for old, new in zip(self.parameters, parameters):
            new.grad = old.grad.clone()
        loaded = self.join(parameters)
        loaded.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        self.check_shared(loaded)
        self.check_shared(self.optimizer)
        for optimizer in (self.optimizer, loaded):
            optimizer.param_groups[2]["lr"] = 0.5
            optimizer.step()
        for parameter, other in zip(self.parameters, parameters):
            self.assertTrue(torch.equal(parameter, other))

    def test_a_parameter_belongs_to_one_part(self):
        matrix, = with_gradients((4, 4))
        with self.assertRaisesRegex(ValueError, "more than one parameter group"):
            JoinedOptimizer(Muon([matrix], lr=0.1), torch.optim.AdamW([matrix]))


if __name__ == "__main__":
    unittest.main()
