"""Routing replay (R3): a policy learns on the experts that its rollout chose, not on those that it would choose itself.

The rollout runs in bfloat16, as in an inference engine, so some tokens fall to other experts there.

python examples/routing_replay.py
"""

import copy

import torch
import torch.nn.functional as F

import swiftmoe_lightning as sml


class Policy(torch.nn.Module):
    """[T, 16] observations -> [T, 4] log-probabilities of actions."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(16, 32)
        self.blocks = torch.nn.ModuleList(sml.MoE(32, 64, num_experts=16, top_k=2) for _ in range(3))
        self.outer = torch.nn.Linear(32, 4)

    def forward(self, x):
        x = self.inner(x)
        for block in self.blocks:
            x = x + block(F.layer_norm(x, x.shape[-1:]))
        return self.outer(x).float().log_softmax(-1)


def roll_out(policy, observations):
    """Actions, their log-probabilities, and the experts as vLLM and SGLang return them: [tokens, layers, top_k]."""
    engine = copy.deepcopy(policy).bfloat16()
    with torch.no_grad(), sml.record_routing(engine) as routing:
        log_probs = engine(observations.bfloat16())
    actions = log_probs.exp().multinomial(1)
    return actions, log_probs.gather(1, actions), sml.routing_to_array(routing)


def main():
    torch.manual_seed(0)
    policy = Policy()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    best_action = torch.nn.Linear(16, 4)

    for step in range(31):
        observations = torch.randn(512, 16)
        actions, old, routed_experts = roll_out(policy, observations)
        reward = (actions == best_action(observations).argmax(-1, keepdim=True)).float()

        with sml.replay_routing(policy, sml.routing_from_array(routed_experts, policy)):
            new = policy(observations).gather(1, actions)
        loss = -((new - old).exp() * (reward - reward.mean())).mean()
        loss.backward()
        if step % 10 == 0:
            with torch.no_grad(), sml.record_routing(policy) as live:
                without = policy(observations).gather(1, actions)
            moved = (sml.routing_to_array(live) != routed_experts).any((1, 2))
            live_change, change = ((log_probs - old).abs()[moved].mean() for log_probs in (without, new))
            print(
                f"step {step}: reward {reward.mean():.2f}. {moved.mean():.1%} of the tokens would choose others; "
                f"their log-probabilities change by {live_change:.3f}, replayed by {change:.3f}"
            )
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    main()
