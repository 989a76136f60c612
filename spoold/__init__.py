"""spoold takes the slow part of file uploads away from web apps."""

from importlib.metadata import version

__version__ = version("spoold")
