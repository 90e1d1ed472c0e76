import os

print("{}", flush=True)
os._exit(3)
