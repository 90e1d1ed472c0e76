from orchestrator.engine.api import L4, Helper, Policy, Serves


class One(Helper):
    serves = (Serves(L4.UDP, (1,)),)


class Two(One):
    pass
