"""The process group as launchers announce it."""

import socket

import pytest

from common.distributed import UserError, process

SLURM = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4"}


@pytest.fixture
def launched(monkeypatch):
    """Set a launcher's variables, and no other's."""

    def set_variables(variables: dict[str, str]) -> None:
        for names in process.LAUNCHERS:
            for name in (*names, "MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID", "SLURM_JOB_NODELIST"):
                monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    set_variables({})
    return set_variables


@pytest.mark.parametrize(
    "variables, expected, waits",
    [
        ({}, (0, 1, 0), False),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, (5, 8, 1), False),
        ({**SLURM, "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}, (3, 4, 1), False),
        (SLURM, (0, 4, 0), True),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}, (0, 1, 0), False),  # a shell with one task of a job of four
        ({**SLURM, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, (0, 1, 0), False),
        ({"RANK": "3", "WORLD_SIZE": "4"}, (3, 4, 0), False),  # set by hand, one process per machine
        ({**SLURM, "SLURM_PROCID": "1", "MASTER_PORT": "", "SLURM_JOB_ID": "123456"}, (1, 4, 0), False),
    ],
)
def test_rendezvous(launched, capsys, variables, expected, waits):
    launched(variables)
    assert process._rendezvous() == expected
    assert ("SLURM_NTASKS=4: waiting for 3 more processes at localhost:29500" in capsys.readouterr().out) == waits


@pytest.mark.parametrize(
    "variables, words",
    [
        ({"RANK": "", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK=: expected a whole number, 0 to 1$"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK=2: expected a whole number, 0 to 1$"),
        ({"RANK": "0", "WORLD_SIZE": "two", "LOCAL_RANK": "0"}, "WORLD_SIZE=two: expected a whole number, 1 to"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK=one: expected a whole number"),
        ({**SLURM, "SLURM_JOB_ID": "12_3"}, "SLURM_JOB_ID=12_3: expected a whole number"),
        ({**SLURM, "MASTER_PORT": "port"}, "MASTER_PORT=port: expected a whole number, 1 to 65535"),
        ({**SLURM, "SLURM_JOB_NODELIST": ""}, "SLURM_JOB_NODELIST=: its first node is not known; set MASTER_ADDR"),
        ({**SLURM, "SLURM_JOB_NODELIST": "node[1-4]"}, r"SLURM_JOB_NODELIST=node\[1-4\]: its first node is not known"),
    ],
)
def test_rendezvous__names_an_odd_variable(launched, variables, words):
    launched(variables)
    with pytest.raises(UserError, match=words):
        process._rendezvous()


def test_init__says_that_the_port_is_taken(launched):
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        launched({**SLURM, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
        with pytest.raises(UserError, match=f"MASTER_PORT={port}: 4 processes did not meet .*address already in use"):
            process.init("cpu")
