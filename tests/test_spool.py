"""Looking at a spool without ever leaving it, and our house in it."""

from __future__ import annotations

import errno
import fcntl
import mmap
import multiprocessing
import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from spoold.errors import BadPath, Changed, SpoolBroken, Vanished
from spoold.layout import Layout
from spoold.model import Identity, Oddity
from spoold.spool import CANARY, Spool, can_be_opened_for_writing_elsewhere as is_open_for_writing, fault_of  # noqa: E501
