"""Whether the head of a Ray cluster answers at an address, and takes the token.

Ray's own client would retry for up to a minute, print a line of its log each time, and not say in the end which it was.
"""

from __future__ import annotations

import logging

import grpc
from ray._private.authentication import authentication_token_setup
from ray._private.grpc_utils import init_grpc_channel
from ray.core.generated.gcs_service_pb2 import GetAllNodeInfoRequest
from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

from minitron.errors import MinitronError
from minitron_platform.cluster.tokens import refused_token

HEAD_SECONDS = 30.0  # a busy head may take some
PRIVATE = {"minitron": "private"}  # the label of a private Ray's node


def send_token() -> None:
    """Let Ray's clients in this process send the cluster's token: by itself Ray does that only for a cluster that it starts."""
    logging.getLogger(authentication_token_setup.__name__).setLevel(logging.ERROR)
    authentication_token_setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def check_head(head: str, address: str) -> None:
    """Raise MinitronError unless the head of a Ray cluster answers at `head` (HOST:PORT), where something listens, takes the
    token that is set here, and is not that of a run's private Ray. address: what the user has given for it."""
    send_token()
    try:
        with init_grpc_channel(head, [("grpc.enable_http_proxy", 0)]) as channel:
            request = GetAllNodeInfoRequest(limit=1)
            found = NodeInfoGcsServiceStub(channel).GetAllNodeInfo(request, timeout=HEAD_SECONDS)
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.UNAUTHENTICATED:
            raise refused_token(f"Ray at {address!r}") from error
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            raise MinitronError(
                f"Ray at {address!r} has not answered within {HEAD_SECONDS:g} s, though something listens there",
                "check the port, which is that of `ray start --head --port` (6379), and the head with `ray status` there",
            ) from error
        raise MinitronError(
            f"Ray at {address!r}: what listens there is not the head of a Ray cluster",
            "give the port of `ray start --head --port` (6379), not that of the dashboard or of Ray's client",
        ) from error
    if any(PRIVATE.items() <= dict(node.labels).items() for node in found.node_info_list):
        raise MinitronError(
            f"Ray at {address!r} is the private one of a run on this machine, and ends with it",
            "give the address of a cluster, or none for a private Ray of this run",
        )
