"""Training on several processes, by the launcher a user takes: the same losses as on one, and no hangs."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import stablemask.hf  # noqa: F401
from stablemask.cli.main import main
from stablemask.errors import InputError
from stablemask.training.pretrain import pretrain
from stablemask.training.pretrain_options import PretrainOptions
from stablemask.training.run import command_line
from tests import marks
from tests.processes import start

ROOT = Path(__file__).parents[2]
STEPS = 20
BLOCKS = 4  # in a step, over all processes


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def options(prose) -> PretrainOptions:
    return PretrainOptions(
        steps=STEPS, data=str(prose), vocab_size=300, context=32, batch_size=BLOCKS,
        global_batch_size=BLOCKS, dtype="float32", save_every=10, eval_every=10, eval_tokens=320,
        log_every=1, tensorboard=False,
    )  # fmt: skip


def words_of(options: PretrainOptions) -> list[str]:
    return shlex.split(command_line(options))[1:] + ["--resume"] * options.resume


def launch(processes: int, options: PretrainOptions) -> list[Any]:
    """The command on several processes, which a launcher has told of each other."""
    port = str(free_port())
    return [
        start(
            main, words_of(options), output=Path(f"{options.out}-{rank}.txt"), RANK=str(rank),
            LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
        )
        for rank in range(processes)
    ]  # fmt: skip


def launch_node(node: int, port: str, options: PretrainOptions) -> subprocess.Popen:
    """One process of two, each by a torchrun of its own."""
    return subprocess.Popen(
        [
            sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={node}",
            "--master-addr=127.0.0.1", f"--master-port={port}", "--nproc-per-node=1",
            "-m", "stablemask", *words_of(options),
        ],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(processes: int, options: PretrainOptions) -> str:
    """What they say on stdout, all together."""
    outputs = [Path(f"{options.out}-{rank}.txt") for rank in range(processes)]
    started = launch(processes, options)
    try:
        for process, output in zip(started, outputs):
            process.join(600)
            assert process.exitcode == 0, output.with_suffix(".err").read_text()
    finally:
        for process in started:
            process.kill()
    return "".join(output.read_text() for output in outputs)


def losses(folder: str | Path) -> dict[str, torch.Tensor]:
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return {
        name: torch.tensor([row[name] for row in rows if name in row])
        for name in ("loss", "grad_norm", "eval_loss")
    }


@pytest.fixture(scope="module")
def alone(options, tmp_path_factory) -> Path:
    """One process with the whole batch."""
    folder = tmp_path_factory.mktemp("runs") / "alone"
    pretrain(replace(options, out=str(folder)))
    return folder


@pytest.fixture(scope="module")
def tolerance(alone, options, tmp_path_factory) -> dict[str, float]:
    """Ten times what another order of summation does to one process: its batch a block at a time."""
    folder = tmp_path_factory.mktemp("runs") / "in-parts"
    pretrain(replace(options, out=str(folder), batch_size=1))
    ours, theirs = losses(folder), losses(alone)
    return {name: 10 * float((ours[name] - theirs[name]).abs().max()) + 1e-6 for name in ours}


def assert_same_losses(folder, alone, tolerance) -> None:
    ours, theirs = losses(folder), losses(alone)
    for name, bound in tolerance.items():
        assert ours[name].shape == theirs[name].shape
        assert (ours[name] - theirs[name]).abs().max() <= bound, name


def test_devices_that_share_sequences_have_the_losses_of_one(options, alone, tolerance, tmp_path):
    """Two groups of two, each with half of the batch, and the model in four shards."""
    folder = tmp_path / "run"
    changes = {"context_parallel": 2, "fsdp": True, "batch_size": 2}
    stdout = run(4, replace(options, out=str(folder), **changes))
    assert stdout.count("validation perplexity") == 1
    assert_same_losses(folder, alone, tolerance)
    ours, theirs = (load_file(path / "model.safetensors") for path in (folder, alone))
    assert ours.keys() == theirs.keys()
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.stablemask == {"gamma": 1 / 32, "horizon": None, "hold": 31}


@marks.nightly
@pytest.mark.parametrize(
    "changes",
    [
        {"compile": True},
        {"compile": True, "fsdp": True, "gradient_checkpointing": True},
    ],
    ids=["ddp", "fsdp"],
)
def test_compiled_in_bfloat16_it_learns_as_much(changes, options, alone, tmp_path):
    folder = tmp_path / "run"
    changes |= {"dtype": "bfloat16", "batch_size": 1}
    run(2, replace(options, out=str(folder), **changes))
    # bfloat16 keeps 8 bits: of a loss of 5 nats, 0.02.
    assert (losses(folder)["loss"] - losses(alone)["loss"]).abs().max() < 0.04


@pytest.mark.parametrize(
    ("changes", "then"),
    [
        pytest.param({"batch_size": 1}, 1, id="ddp, then one process", marks=marks.nightly),
        pytest.param(
            {"batch_size": 1, "fsdp": True, "gradient_checkpointing": True, "async_save": True},
            4,
            id="fsdp saving in the background, then four",
        ),
    ],
)
def test_a_rank_that_dies_ends_the_job_and_the_run_goes_on_elsewhere(
    changes, then, options, alone, tolerance, tmp_path
):
    folder = tmp_path / "run"
    options = replace(options, out=str(folder), **changes)
    first, second = launch(2, options)
    while not (folder / "checkpoints" / "checkpoint-10").exists():
        assert first.is_alive(), (tmp_path / "run-0.err").read_text()
        time.sleep(0.01)
    second.kill()
    first.join(600)
    assert first.exitcode == 1
    assert not (folder / "model.safetensors").exists()

    # The batch that all share stays; each has another part of it.
    run(then, replace(options, global_batch_size=None, resume=True))
    assert_same_losses(folder, alone, tolerance)


@marks.nightly
def test_two_nodes_on_loopback(options, alone, tolerance, tmp_path):
    """Each node has a launcher of its own, which finds the other at an address."""
    folder = tmp_path / "run"
    options = replace(options, out=str(folder), batch_size=2)
    port = str(free_port())
    nodes = [launch_node(node, port, options) for node in range(2)]
    for node in nodes:
        _, stderr = node.communicate(timeout=120)
        assert node.returncode == 0, stderr
    assert_same_losses(folder, alone, tolerance)


@marks.nightly
def test_a_node_whose_other_node_loses_a_process_ends_too(options, tmp_path):
    folder = tmp_path / "run"
    options = replace(options, out=str(folder), batch_size=2, steps=100_000, save_every=5)
    port = str(free_port())
    nodes = [launch_node(node, port, options) for node in range(2)]
    while not (folder / "checkpoints" / "checkpoint-5").exists():
        assert nodes[1].poll() is None, nodes[1].communicate()[1]
        time.sleep(0.01)
    *_, victim = psutil.Process(nodes[1].pid).children()
    victim.kill()
    _, stderr = nodes[1].communicate(timeout=60)
    assert "SIGKILL" in stderr
    nodes[0].communicate(timeout=60)
    assert nodes[0].returncode != 0


def test_the_slurm_script_stops_in_time_and_goes_on_in_the_next_job(
    options, alone, tolerance, tmp_path, monkeypatch
):
    """With an srun of two processes and an scontrol that notes what it is asked for."""

    def install(name: str, text: str) -> None:
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)

    install(
        "srun",
        """shift
        for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i SLURM_NTASKS=2 "$@" & pids+=($!); done
        for pid in "${pids[@]}"; do wait "$pid" || exit 1; done""",
    )
    install("scontrol", 'if [[ $1 == show ]]; then echo 127.0.0.1; else echo "$@" >> requests; fi')
    monkeypatch.setenv("PATH", f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    for name, value in {"JOB_NODELIST": "node", "JOB_ID": "7", "CPUS_PER_TASK": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    folder, requests = tmp_path / "run", tmp_path / "requests"
    options = replace(options, batch_size=2)
    job = [str(ROOT / "examples" / "slurm.sh"), str(folder), *words_of(options)[1:]]

    first = subprocess.Popen(job, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not (folder / "metrics.jsonl").exists():
        assert first.poll() is None, first.communicate()[1]
        time.sleep(0.01)
    for process in psutil.Process(first.pid).children(recursive=True):
        if "stablemask" in process.cmdline():
            process.send_signal(signal.SIGUSR1)
    _, stderr = first.communicate(timeout=600)
    assert first.returncode == 0, stderr
    assert requests.read_text() == "requeue 7\n"
    assert not (folder / "model.safetensors").exists()

    run(2, replace(options, out=str(folder), resume=True))
    assert_same_losses(folder, alone, tolerance)
    install("srun", 'echo "${@: -1}" > last')
    subprocess.run(job, cwd=tmp_path, check=True)
    assert (tmp_path / "last").read_text() == "--resume\n"
    assert requests.read_text() == "requeue 7\n"


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ACCELERATE_USE_FSDP", "true"),
        ("ACCELERATE_USE_DEEPSPEED", "true"),
        ("ACCELERATE_MIXED_PRECISION", "bf16"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR"),
    ],
)
def test_what_a_launcher_would_change_silently_is_refused(
    variable, value, options, tmp_path, monkeypatch
):
    monkeypatch.setenv(variable, value)
    with pytest.raises(InputError, match=f"{variable}.*--"):
        pretrain(replace(options, out=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()
