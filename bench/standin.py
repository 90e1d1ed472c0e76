"""Holds queues as a native helper process does, on kernels where none can run.

`standin.py QUEUE...`, until a signal ends it. Nothing is ever queued to it.
"""

import signal
import struct
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from orchestrator.engine.netlink import open_control_socket
from orchestrator.engine.nfqueue import encode_config

_MASK_AND_FLAGS = 16
"""Bytes at the end of a configuration, which asks for conntrack attributes that such a kernel does not have."""


def main() -> None:
    with open_control_socket() as channel:
        for queue in sys.argv[1:]:
            message = encode_config(int(queue), is_fail_open=True, max_len=128)[:-_MASK_AND_FLAGS]
            channel.send(struct.pack("=I", len(message)) + message[4:])
        signal.pause()


if __name__ == "__main__":
    main()
