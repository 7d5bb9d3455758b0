"""A package, so that processes that tests start find it before what others install under the name ``tests``."""
