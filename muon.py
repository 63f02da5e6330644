"""
The optimizer Muon, which --optimizer=muon uses for the matrices inside the blocks.
"""
import math

import torch
import torch.distributed as dist

MOMENTUM_WARMUP = 300  # updates in which the momentum rises from 0.85 to 0.95 (modded-nanogpt)


def orthogonalize(x):
    """Return x (..., rows, cols) with singular values moved close to 1 (0.7 to 1.2, the smallest
    less): five steps of a Newton-Schulz iteration with Keller Jordan's polynomial. It computes in
    bf16 on a GPU, and in fp32 elsewhere, where bf16 is slow."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x.size(-2) > x.size(-1)
    y = x.mT if tall else x  # the product below is the smaller of the two possible ones
    y = y.to(torch.bfloat16 if x.is_cuda else torch.float32)
    y = y / y.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = y @ y.mT
        y = a * y + (b * gram + c * gram @ gram) @ y
    return y.mT if tall else y


class Muon(torch.optim.Optimizer):
    """Muon: the momentum of a matrix is made orthogonal before it is added to the matrix (Keller
    Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    An update has a root mean square of about 0.2, as AdamW's, so that one learning rate serves both
    (Moonlight, arXiv 2502.16982, section 2.2). A group's option `rows` gives the heights of
    matrices that are stored as one, such as queries, keys and values, and leading dimensions count
    matrices, such as experts: each is made orthogonal by itself.

    Processes share the work: the matrices are dealt out in turn, the largest first, and each
    process updates its own and sends them to the others. It holds the momentum of these alone."""

    def __init__(self, groups, lr):
        """groups: dicts with "params", "weight_decay" and, if needed, "rows"."""
        super().__init__(groups, dict(lr=lr, weight_decay=0.0, rows=None))
        self.rank, size = 0, 1
        if dist.is_initialized():
            self.rank, size = dist.get_rank(), dist.get_world_size()
        self.shared = size > 1
        self.updates = 0  # how many were made
        self.params = [p for group in self.param_groups for p in group["params"]]
        by_size = sorted(self.params, key=torch.Tensor.numel, reverse=True)
        self.owners = {p: place % size for place, p in enumerate(by_size)}
        for p in self.params:
            if self.owners[p] == self.rank:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self):
        momentum = 0.85 + 0.1 * min(1, self.updates / MOMENTUM_WARMUP)
        self.updates += 1
        for group in self.param_groups:
            for p in group["params"]:
                if self.owners[p] == self.rank:
                    self.update(p, group, momentum)
        if self.shared:
            sent = [dist.broadcast(p, self.owners[p], async_op=True) for p in self.params]
            for message in sent:
                message.wait()

    def update(self, p, group, momentum):
        lr = group["lr"]
        average = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - momentum)
        direction = p.grad.lerp(average, momentum)  # Nesterov: as if this gradient came once more
        p.mul_(1 - lr * group["weight_decay"])
        rows = group["rows"] or p.size(-2)  # the heights of several matrices, or of the only one
        for matrix, part in zip(p.split(rows, -2), direction.split(rows, -2)):
            scale = 0.2 * math.sqrt(max(part.shape[-2:]))
            matrix.sub_(orthogonalize(part), alpha=lr * scale)

    def state_dict(self):
        """Return the state of all matrices. All processes must call this, as each has a part."""
        state = {}
        for index, p in enumerate(self.params):
            owned = self.owners[p] == self.rank
            momentum = self.state[p]["momentum_buffer"] if owned else torch.empty_like(p)
            if self.shared:
                dist.broadcast(momentum, self.owners[p])
            state[index] = {"momentum_buffer": momentum}
        return {**super().state_dict(), "state": state, "updates": self.updates}

    def load_state_dict(self, state_dict):
        """Take over the state of any number of processes. May raise LookupError or ValueError."""
        self.updates = state_dict["updates"]
        super().load_state_dict(state_dict)
        for p in self.params:
            if self.state[p]["momentum_buffer"].shape != p.shape:  # PyTorch does not compare them
                raise ValueError("a momentum has another shape than its matrix")
            if self.owners[p] != self.rank:
                del self.state[p]


class Optimizers(list):
    """Several optimizers that look like one: Muon for the matrices, AdamW for the rest."""

    @property
    def param_groups(self):
        return [group for optimizer in self for group in optimizer.param_groups]

    @property
    def state(self):
        return {p: state for optimizer in self for p, state in optimizer.state.items()}

    def step(self):
        for optimizer in self:
            optimizer.step()

    def zero_grad(self):
        for optimizer in self:
            optimizer.zero_grad()

    def state_dict(self):
        return [optimizer.state_dict() for optimizer in self]

    def load_state_dict(self, states):
        for optimizer, state in zip(self, states, strict=True):
            optimizer.load_state_dict(state)
