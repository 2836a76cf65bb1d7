"""What proves stoker, for its own tests and for yours: contract suites, pytest fixtures, a real S3 server, a fault proxy.

Needs the extra ``stoker[testing]``. A new object store is right when a subclass of
:class:`stoker.testing.store.StoreTests` passes, a file system may carry a tier of a cache when one of
:class:`stoker.testing.tiers.TierTests` does; those modules import pytest, so they are not imported here.
"""

from .azure import AzureServer
from .faulty_tier import FaultyTier, TierCrash, TierFault, TierFaultRule
from .proxy import Fault, FaultProxy, FaultRule, ProxiedRequest
from .s3 import S3Server

__all__ = [
    "AzureServer",
    "Fault",
    "FaultProxy",
    "FaultRule",
    "FaultyTier",
    "ProxiedRequest",
    "S3Server",
    "TierCrash",
    "TierFault",
    "TierFaultRule",
]
