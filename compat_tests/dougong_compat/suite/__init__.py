"""The suite under pytest: ``pytest --pyargs dougong_compat.suite --dougong-backend NAME``, or in a vendor's own tests

from dougong_compat.suite import *
COMPAT_BACKEND = "mydev"
"""

from dougong_compat.suite.test_conformance import pytest_generate_tests, test_case, test_verdict

__all__ = ["pytest_generate_tests", "test_case", "test_verdict"]
