"""What a run reads from its command line and its environment."""

from pathlib import Path

import pytest

from dpmoe_trainer.environment import Pod, Settings, Worker, read_settings
from dpmoe_trainer.errors import BadPlan


def test_a_pod_reads_its_variables() -> None:
    variables = {
        "DPMOE_PLAN": "/plan/plan.json",
        "DPMOE_TERMINATION_LOG": "/dev/log",
        "DPMOE_PROGRESS_PORT": "8475",
    }
    assert read_settings([], variables) == Settings(
        plan=Path("/plan/plan.json"),
        report=Path("/dev/log"),
        output=None,
        progress_port="8475",
        root=None,
    )


def test_the_root_stands_for_the_pods_own() -> None:
    variables = {"DPMOE_ROOT": "/pods/1", "DPMOE_PLAN": "/plan.json"}
    settings = read_settings([], variables | {"DPMOE_TERMINATION_LOG": "/log"})
    assert (settings.plan, settings.report) == (Path("/pods/1/plan.json"), Path("/pods/1/log"))
    assert settings.resolve("/data/x", "f") == Path("/pods/1/data/x")
    assert settings.resolve("data/x", "f") == Path("data/x")
    with pytest.raises(BadPlan, match=r"blocks: '/data/\.\./x' climbs with '\.\.'"):
        settings.resolve("/data/../x", "blocks")


def test_links_do_not_lead_from_one_volume_to_another(tmp_path: Path) -> None:
    volumes, store = tmp_path / "dpmoe", tmp_path / "store"
    for claim in ("claims/models", "outputs/results/team-b"):
        (volumes / claim).mkdir(parents=True)
    (volumes / "claims/models/stolen").symlink_to(volumes / "outputs/results/team-b")
    (volumes / "claims/models/latest").symlink_to("tiny")
    (volumes / "claims/linked").symlink_to(store)
    (tmp_path / "itself").symlink_to(tmp_path)
    settings = Settings(Path("p"), Path("r"), None, None, root=tmp_path)
    for path in ("/itself/dpmoe/outputs/results/team-b", "/dpmoe/claims/models/stolen"):
        with pytest.raises(BadPlan, match=f"model.path: '{path}' leads by links .*: name the vol"):
            settings.resolve(path, "model.path")
    # A volume may itself be mounted by a link, as local processes have it.
    for path in ("/dpmoe/claims/models/latest", "/dpmoe/claims/linked/x", "/models/tiny"):
        assert settings.resolve(path, "model.path") == tmp_path / path[1:]


def test_a_containers_own_root_is_no_way_round() -> None:
    settings = Settings(Path("p"), Path("r"), None, None, root=None)
    with pytest.raises(BadPlan, match="'/dpmoe/outputs/results/team-b'"):
        settings.resolve("/proc/self/root/dpmoe/outputs/results/team-b", "model.path")


def test_the_command_line_comes_first() -> None:
    variables = {"DPMOE_PLAN": "/plan.json", "DPMOE_TERMINATION_LOG": "/log"}
    settings = read_settings(["--plan", "mine.json", "--output", "out"], variables)
    assert settings == Settings(Path("mine.json"), Path("out/report.json"), Path("out"), None, None)


def test_the_default_termination_log_only_where_kubernetes_made_one(tmp_path: Path) -> None:
    variables = {"DPMOE_ROOT": str(tmp_path), "DPMOE_PLAN": "/plan.json"}
    with pytest.raises(BadPlan, match="pass --output DIR, or set DPMOE_TERMINATION_LOG"):
        read_settings([], variables)
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/termination-log").touch()
    assert read_settings([], variables).report == tmp_path / "dev/termination-log"


def test_a_pod_of_many_reads_its_place() -> None:
    variables = {
        "DPMOE_PLAN": "/plan.json",
        "DPMOE_TERMINATION_LOG": "/log",
        "DPMOE_POD_UID": "uid",
        "DPMOE_FAILURES": "2",
        "PET_NNODES": "3",
        "PET_NPROC_PER_NODE": "4",
        "PET_NODE_RANK": "1",
        "PET_MASTER_ADDR": "job-0.job",
        "PET_MASTER_PORT": "29501",
    }
    settings = read_settings([], variables)
    assert (settings.pod_uid, settings.failures, settings.rank) == ("uid", 2, 0)
    assert settings.pod == Pod(3, 4, 1, "job-0.job", "29501")
    assert settings.worker is None


def test_a_worker_reads_torchruns_variables() -> None:
    variables = {"DPMOE_PLAN": "/plan.json", "DPMOE_TERMINATION_LOG": "/log"}
    ranks = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "DPMOE_HEARTBEAT": "9"}
    settings = read_settings([], variables | ranks)
    assert settings.worker == Worker(rank=5, local_rank=1, world=8)
    assert (settings.rank, settings.heartbeat) == (5, 9)


def test_what_kubernetes_leaves_empty_is_unset_and_no_number_is_named() -> None:
    variables = {"DPMOE_PLAN": "/plan.json", "DPMOE_TERMINATION_LOG": "/log"}
    empty = {"DPMOE_FAILURES": "", "PET_NNODES": "1", "PET_NODE_RANK": ""}
    settings = read_settings([], variables | empty)
    assert settings.failures == 0
    assert settings.pod is not None
    assert settings.pod.node_rank == 0
    with pytest.raises(BadPlan, match=r"DPMOE_FAILURES: '-1' is not a number"):
        read_settings([], variables | {"DPMOE_FAILURES": "-1"})
