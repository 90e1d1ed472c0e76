from orchestrator.engine.api import L4, Helper, Policy, Serves


class Greedy(Helper):
    serves = (Serves(L4.TCP, (5000,)),)
    policies = (Policy("greedy", 1, 30),)
    private_len = 16

    def inspect(self, payload, direction, flow, private):
        raise NotImplementedError
