from pathlib import Path

import pytest

INTEGRATION = Path(__file__).parent / "integration"


# First: xdist reads the groups in a hook of the same name.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Integration tests start several processes each: `--dist loadgroup` runs one group on one worker, one by one."""
    for item in items:
        if INTEGRATION in item.path.parents:
            item.add_marker(pytest.mark.xdist_group("integration"))
