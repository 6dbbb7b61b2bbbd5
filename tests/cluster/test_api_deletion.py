"""The contract of deletion: finalizers, owners, collections, namespaces; on both servers."""

import pytest

from dpmoe_operator.local.apiserver.patches import MERGE_PATCH


@pytest.fixture
def maps(namespace):
    return f"/api/v1/namespaces/{namespace}/configmaps"


def owned_by(owner, name, **more):
    metadata = owner["metadata"]
    reference = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "name": metadata["name"],
        "uid": metadata["uid"],
        **more,
    }
    return {"metadata": {"name": name, "ownerReferences": [reference]}}


def is_gone(answer):
    return answer.status == 404


def test_deletion_answers_with_the_uid(http, maps):
    created = http.create(maps, {"metadata": {"name": "one"}})
    answer = http("DELETE", f"{maps}/one")
    assert (answer.status, answer.body["status"]) == (200, "Success")
    assert answer.body["details"]["uid"] == created["metadata"]["uid"]
    assert is_gone(http("GET", f"{maps}/one"))
    assert is_gone(http("DELETE", f"{maps}/one"))


def test_finalizers_hold_a_deleted_object(http, maps):
    http.create(maps, {"metadata": {"name": "one", "finalizers": ["test.dev/a", "test.dev/b"]}})
    assert http("DELETE", f"{maps}/one").body["metadata"]["deletionTimestamp"]
    again = http("DELETE", f"{maps}/one")
    assert again.body["metadata"]["finalizers"] == ["test.dev/a", "test.dev/b"]
    http.merge(f"{maps}/one", {"metadata": {"finalizers": ["test.dev/b"]}})
    assert http("GET", f"{maps}/one").status == 200
    http.merge(f"{maps}/one", {"metadata": {"finalizers": None}})
    assert is_gone(http("GET", f"{maps}/one"))


def test_a_deleted_object_takes_no_new_finalizers(http, maps):
    http.create(maps, {"metadata": {"name": "one", "finalizers": ["test.dev/a"]}})
    http("DELETE", f"{maps}/one")
    patch = {"metadata": {"finalizers": ["test.dev/a", "test.dev/b"]}}
    assert http("PATCH", f"{maps}/one", patch, content_type=MERGE_PATCH).status == 422
    http.merge(f"{maps}/one", {"metadata": {"finalizers": None}})


@pytest.mark.parametrize("precondition", [{"uid": "another"}, {"resourceVersion": "1"}])
def test_preconditions_protect_another_object(http, maps, precondition):
    http.create(maps, {"metadata": {"name": "one"}})
    answer = http("DELETE", f"{maps}/one", {"preconditions": precondition})
    assert (answer.status, answer.body["reason"]) == (409, "Conflict")
    assert http("GET", f"{maps}/one").status == 200


def test_a_deletion_can_be_a_dry_run(http, maps):
    http.create(maps, {"metadata": {"name": "one"}})
    assert http("DELETE", f"{maps}/one?dryRun=All").status == 200
    assert http("GET", f"{maps}/one").status == 200


def test_unknown_policies_are_refused(http, maps):
    http.create(maps, {"metadata": {"name": "one"}})
    assert http("DELETE", f"{maps}/one?propagationPolicy=Sometimes").status == 422


def test_a_collection_is_deleted_by_selector(http, maps):
    for name, app in (("a", "x"), ("b", "x"), ("c", "y")):
        http.create(maps, {"metadata": {"name": name, "labels": {"app": app}}})
    answer = http("DELETE", f"{maps}?labelSelector=app%3Dx")
    assert [each["metadata"]["name"] for each in answer.body["items"]] == ["a", "b"]
    left = http.get(f"{maps}?labelSelector=app")["items"]
    assert [each["metadata"]["name"] for each in left] == ["c"]


def test_dependents_follow_their_owner(http, maps):
    owner = http.create(maps, {"metadata": {"name": "owner"}})
    http.create(maps, owned_by(owner, "dependent"))
    http("DELETE", f"{maps}/owner", {"propagationPolicy": "Background"})
    assert is_gone(http("GET", f"{maps}/owner"))
    http.eventually(f"{maps}/dependent", is_gone)


def test_a_dependent_of_nobody_is_collected(http, maps):
    owner = {"metadata": {"name": "ghost", "uid": "00000000-0000-4000-8000-000000000000"}}
    http.create(maps, owned_by(owner, "dependent"))
    http.eventually(f"{maps}/dependent", is_gone)


def test_a_dependent_lives_while_one_owner_does(http, maps):
    first, second = (http.create(maps, {"metadata": {"name": n}}) for n in ("first", "second"))
    body = owned_by(first, "dependent")
    body["metadata"]["ownerReferences"] += owned_by(second, "x")["metadata"]["ownerReferences"]
    http.create(maps, body)
    http("DELETE", f"{maps}/first")
    answer = http.eventually(
        f"{maps}/dependent", lambda answer: len(answer.body["metadata"]["ownerReferences"]) == 1
    )
    assert answer.body["metadata"]["ownerReferences"][0]["name"] == "second"


def test_orphans_stay(http, maps):
    owner = http.create(maps, {"metadata": {"name": "owner"}})
    http.create(maps, owned_by(owner, "dependent"))
    http("DELETE", f"{maps}/owner?propagationPolicy=Orphan")
    http.eventually(f"{maps}/owner", is_gone)
    assert "ownerReferences" not in http.get(f"{maps}/dependent")["metadata"]


def test_in_the_foreground_the_owner_waits(http, maps):
    owner = http.create(maps, {"metadata": {"name": "owner"}})
    body = owned_by(owner, "dependent", blockOwnerDeletion=True)
    body["metadata"]["finalizers"] = ["test.dev/hold"]
    http.create(maps, body)
    answer = http("DELETE", f"{maps}/owner", {"propagationPolicy": "Foreground"})
    assert answer.body["metadata"]["finalizers"] == ["foregroundDeletion"]
    http.eventually(
        f"{maps}/dependent", lambda answer: "deletionTimestamp" in answer.body["metadata"]
    )
    assert http("GET", f"{maps}/owner").status == 200
    http.merge(f"{maps}/dependent", {"metadata": {"finalizers": None}})
    http.eventually(f"{maps}/owner", is_gone)
    assert is_gone(http("GET", f"{maps}/dependent"))


def test_a_pod_on_a_node_is_deleted_gracefully(http, namespace):
    pods = f"/api/v1/namespaces/{namespace}/pods"
    spec = {"containers": [{"name": "main", "image": "some"}], "nodeName": "node-1"}
    http.create("/api/v1/nodes", {"metadata": {"name": f"node-of-{namespace}"}})
    http.create(
        pods, {"metadata": {"name": "p"}, "spec": spec | {"nodeName": f"node-of-{namespace}"}}
    )
    metadata = http("DELETE", f"{pods}/p").body["metadata"]
    assert metadata["deletionGracePeriodSeconds"] == 30
    assert http("GET", f"{pods}/p").status == 200
    # What a kubelet does when the containers have ended.
    http("DELETE", f"{pods}/p?gracePeriodSeconds=0")
    assert is_gone(http("GET", f"{pods}/p"))
    http("DELETE", f"/api/v1/nodes/node-of-{namespace}")


def test_a_pod_without_a_node_goes_at_once(http, namespace):
    pods = f"/api/v1/namespaces/{namespace}/pods"
    spec = {"containers": [{"name": "main", "image": "some"}]}
    http.create(pods, {"metadata": {"name": "p"}, "spec": spec})
    assert http("DELETE", f"{pods}/p").body["kind"] == "Pod"
    assert is_gone(http("GET", f"{pods}/p"))


def test_a_namespace_goes_with_its_content(http):
    http.create("/api/v1/namespaces", {"metadata": {"name": "doomed"}})
    path = "/api/v1/namespaces/doomed"
    http.create(f"{path}/configmaps", {"metadata": {"name": "held", "finalizers": ["t.dev/x"]}})
    http.create(f"{path}/secrets", {"metadata": {"name": "free"}})
    assert http("DELETE", path).body["status"]["phase"] == "Terminating"
    http.eventually(f"{path}/secrets/free", is_gone)
    refused = http("POST", f"{path}/configmaps", {"metadata": {"name": "late"}})
    assert (refused.status, refused.body["reason"]) == (403, "Forbidden")
    assert http.get(path)["status"]["phase"] == "Terminating"
    http.merge(f"{path}/configmaps/held", {"metadata": {"finalizers": None}})
    http.eventually(path, is_gone, seconds=60)
    assert is_gone(http("GET", f"{path}/configmaps/held"))
