"""One vTPM: what each command on its control channel does."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import MappingProxyType

from vtpmd.core import LinkOperation
from vtpmd.daemon.engine import Engine, EngineDied, Reply
from vtpmd.wire import control, swtpm_format
from vtpmd.wire.control import Command, Result, StateType

log = logging.getLogger(__name__)
