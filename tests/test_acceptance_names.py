"""Each acceptance case of the reference on orchestration, scheduling, jobs and logs has a test that names it.

Its dispatcher's have a module of their own (test_dispatch_acceptance.py). Not here, because what they test does not
exist yet: VolumeEnforcer (cluster volumes) and PluginConstraint (there are no plug-ins).
"""

from __future__ import annotations

from pathlib import Path

import pytest

CASES = """
    RestartOnAny RestartOnFailure RestartOnNone RestartDelay RestartMaxAttempts RestartWindow
    InitializationRestartHistory ScaleDown Drain Updater UpdaterFailureAction UpdaterOrder UpdaterPlacement
    UpdaterRollback UpdaterTaskTimeout TaskHistory TaskStateRemoveOnScaledown TaskStateRemoveOnServiceRemoval
    ServiceRemoveDeadTasks ServiceRemoveUnassignedTasks ConstraintEnforcer OutdatedTaskPlacementConstraints
    HA Preferences MultiplePreferences MultiplePreferencesScaleUp FaultyNode FaultyNodeSpecVersion
    ResourceConstraint ResourceConstraintHA ResourceConstraintDeadTask HostPort MaxReplicas Platform PreassignedTasks
    UnscheduleableTask GenericResources TreeTaskCountConsistency ReplicatedJob NoFollowDisconnect NoFollowMissingNode
    NoFollowNotYetRunningTask
"""


@pytest.fixture(scope="module")
def named() -> set[str]:
    """Words of the docstrings that speak of the reference."""
    found: set[str] = set()
    for path in Path(__file__).parent.glob("test_*.py"):
        for text in path.read_text().split("The reference's ")[1:]:
            found.update(text.partition('"""')[0].replace(",", " ").replace(".", " ").replace(":", " ").split())
    return found


@pytest.mark.parametrize("case", CASES.split())
def test_a_test_names_it(case: str, named: set[str]) -> None:
    assert case in named
