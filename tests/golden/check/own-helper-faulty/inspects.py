from orchestrator.engine.api import L4, Helper, Policy, Serves


class Lazy(Helper):
    serves = (Serves(L4.TCP, (5000,)),)
    policies = (Policy("lazy", 1, 30),)
