"""Who started this process, told from the environment."""

import pytest

from megadistill.engines.launch import srun_variables
from megadistill.errors import TopologyError

SRUN = {
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "20017",
    "SLURM_STEP_NODELIST": "n[1-2]",
}


def test_ranks_that_srun_started_know_their_place() -> None:
    found = srun_variables(SRUN, lambda nodes: {"n[1-2]": "n1"}[nodes])
    assert found == {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_PORT": "20017", "MASTER_ADDR": "n1"}
    found = srun_variables(SRUN | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "7"}, lambda _: "never asked")
    assert found == {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "5"},  # a batch script
        SRUN | {"RANK": "0"},  # a launcher that srun started
        SRUN | {"SLURM_STEP_NUM_TASKS": "1"},  # an interactive shell
    ],
)
def test_others_are_left_alone(environment: dict[str, str]) -> None:
    assert srun_variables(environment, lambda _: "n1") == {}


def test_half_a_step_is_refused() -> None:
    with pytest.raises(TopologyError, match="did not set SLURM_LOCALID"):
        srun_variables({key: value for key, value in SRUN.items() if key != "SLURM_LOCALID"}, lambda _: "n1")
